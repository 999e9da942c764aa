"""Metrics of the responses that a step sampled."""

from collections.abc import Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from distill import rollout
from distill.data import curriculum
from distill.rewards import terms
from distill.training import response_limits
from distill.training.grading import THINKING_MODES, Metrics


def measure_rollout(
    s: ConfigDict,
    stage_step: int,
    sequences: Sequence[rollout.Sequence],
    counts: Mapping[str, int],
    seconds: float,
    has_drafts: bool,
) -> Metrics:
    """Measures the sequences that ended in a step, counted in its stage.

    Args:
      counts: what the sampler counted, of these sequences and of those that go on.
      seconds: that it took.
    """
    num_truncated = sum(response_limits.is_truncated(s, x) for x in sequences)
    repetition = [terms.compute_repetition(x.tokens) for x in sequences]
    metrics = {
        "rollout/tokens_per_second": counts["tokens"] / seconds,
        "rollout/mean_length": sum(len(x.tokens) for x in sequences) / max(1, len(sequences)),
        "rollout/truncated": num_truncated / max(1, len(sequences)),
        "rollout/failed": sum(x.finish_reason == "error" for x in sequences),
        "rollout/repetition": -float(np.mean(repetition or [0])),
        "rollout/utilisation": counts["row_steps"] / max(1, counts["slot_steps"]),
        "time/rollout": seconds,
        **curriculum.mean_difficulty([x.difficulty for x in sequences]),
        **measure_by_mode(s, sequences),
        **response_limits.measure_cuts(s, stage_step, sequences),
    }
    if has_drafts:
        metrics["rollout/tokens_per_step"] = counts["tokens"] / max(1, counts["row_steps"])
        metrics["rollout/drafts_accepted"] = counts["accepted"] / max(1, counts["drafted"])
    return metrics


def measure_by_mode(s: ConfigDict, sequences: Sequence[rollout.Sequence]) -> Metrics:
    """Measures lengths and truncation in each thinking mode that occurs."""
    metrics: Metrics = {}
    for mode, thinking in THINKING_MODES.items():
        part = [x for x in sequences if x.thinking == thinking]
        if part:
            num_truncated = sum(response_limits.is_truncated(s, x) for x in part)
            metrics[f"rollout/rows/{mode}"] = len(part)
            metrics[f"rollout/mean_length/{mode}"] = sum(len(x.tokens) for x in part) / len(part)
            metrics[f"rollout/truncated/{mode}"] = num_truncated / len(part)
    return metrics
