"""What models are made of and no family owns: layers, attention, caches, LoRA, 8-bit kernels."""
