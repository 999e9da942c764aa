"""Strong-to-weak distillation of Qwen3: one noun (Batch), one loop (train), one table of losses."""
