"""Evaluation: benchmarks, graded responses, and statistics of them."""
