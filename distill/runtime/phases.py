"""What a thread does, by the files on its stack. Does not import JAX."""

# Part of a file's path -> what the main thread does in it; the first that is on its stack counts.
PHASES = {
    "distill/training/eval_hook": "evaluating",
    "distill/runtime/checkpoint": "saving a checkpoint",
    "distill/teachers/": "scoring",
    "distill/rollout/": "sampling",
    "distill/rewards/": "grading",
    "distill/training/update": "updating",
    "distill/training/metrics_log": "waiting for the update",
    "distill/data/": "reading data",
    "distill/runtime/run_files": "writing files",
}


def find_phase(files: list[str], default: str = "outside sampling and updating") -> str:
    """Returns what a thread with these files on its stack does."""
    for part, phase in PHASES.items():
        if any(part in file for file in files):
            return phase
    return default
