"""Qwen3 in Flax: config (architecture), model (computation), family (spec and weight names)."""
