"""Building blocks shared by all families: layers, attention, caches, LoRA, 8-bit kernels."""
