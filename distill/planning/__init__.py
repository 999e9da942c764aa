"""Will it fit, how fast can it be, and is it worth running."""
