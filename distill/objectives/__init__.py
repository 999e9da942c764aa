"""Losses and their parts, as functions of arrays."""
