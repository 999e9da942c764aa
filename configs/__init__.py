"""Recipes as ml_collections files; base.py holds every knob, the others say what differs."""
