"""The metrics of an update: sums over subsets of its tokens, and means over several updates."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from distill.batch import Batch
from distill.objectives import advantages, losses
from distill.runtime import run_files

KL_OFFSETS = (0, 16, 64, 256, 1024, 4096, 16384)  # response positions that bound KL intervals
PARTIAL_METRICS = ("/", "_from_", "stop_")  # in names of metrics that may lack tokens in an update


def sum_subsets(
    stats: losses.Stats,
    mask_BT: jax.Array,
    segments_BT: jax.Array,
    batch: Batch,
    max_response_tokens: int,
) -> run_files.MetricSums:
    """Returns (sum, count) pairs over subsets of the trained tokens: by offset in the response, by
    thinking mode, and of stop tokens. All arrays but the batch are shifted."""
    sums: run_files.MetricSums = {}
    if "reverse_kl" in stats:
        offsets = tuple(x for x in KL_OFFSETS if x < max_response_tokens)
        kl_by_offset = advantages.sum_by_position(
            stats["reverse_kl"], mask_BT, segments_BT, offsets
        )
        sums |= {f"reverse_kl_from_{offset}": x for offset, x in kl_by_offset.items()}
    if batch.thinking_BT is not None:
        thinking_BT = losses.shift(batch.thinking_BT)
        modes = {"think": mask_BT * thinking_BT, "no_think": mask_BT * ~thinking_BT}
        sums |= {
            f"{name}/{mode}": (jnp.sum(stats[name] * mode_mask_BT), jnp.sum(mode_mask_BT))
            for name in ("reverse_kl", "sampled_reverse_kl", "entropy", "logp")
            if name in stats
            for mode, mode_mask_BT in modes.items()
        }
    if batch.finished_BT is not None:
        sums |= sum_stop_logps(stats, mask_BT, losses.shift(batch.finished_BT))
    return sums


def sum_stop_logps(
    stats: losses.Stats, mask_BT: jax.Array, finished_BT: jax.Array
) -> run_files.MetricSums:
    """Returns (sum, count) of the log-probabilities of stop tokens, under student and teacher.

    If the teacher would continue at these tokens, responses are about to grow. Arrays are shifted.
    """
    last_BT = mask_BT * (1 - losses.shift(mask_BT)) * finished_BT
    names = {"logp": "stop_logp", "teacher_logp": "teacher_stop_logp"}
    return {
        metric: (jnp.sum(stats[name] * last_BT), jnp.sum(last_BT))
        for name, metric in names.items()
        if name in stats
    }


@jax.jit
def average_metrics(update_metrics: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Averages the metrics of several updates. Updates without tokens for a metric do not count;
    neither do those that were skipped, unless all were. `skipped_updates` is summed."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *update_metrics)
    has_tokens = stacked["trained_tokens"] > 0
    has_tokens |= ~jnp.any(has_tokens)
    averages = {
        name: jnp.nanmean(x)
        if any(part in name for part in PARTIAL_METRICS)
        else jnp.mean(x, where=has_tokens)
        for name, x in stacked.items()
    }
    return averages | {"skipped_updates": jnp.sum(stacked["skipped_updates"])}
