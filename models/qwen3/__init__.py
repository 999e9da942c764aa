"""Qwen3 in Flax: config (what a model is), model (what it computes), weights (how it is stored)."""
