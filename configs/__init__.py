"""Recipes as ml_collections files: base.py holds every setting, the others say what differs."""
