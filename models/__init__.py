"""Model families; each imports nothing of distill/."""
