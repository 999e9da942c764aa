"""Frozen models that score what was written."""
