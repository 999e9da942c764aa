"""Losses, over arrays alone."""
