"""From the files of runs and evaluations to one page: nothing here imports jax."""
