"""A model on a mesh."""
