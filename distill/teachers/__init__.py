"""Frozen models that score responses."""
