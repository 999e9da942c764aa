"""Plans a run: its memory, a bound on its speed, and the evidence for starting it."""
