"""From rows to token arrays."""
