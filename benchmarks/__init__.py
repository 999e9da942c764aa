"""Measurements of speed, each a script; their results, with the machine named, in results/."""
