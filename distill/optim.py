"""The optimiser: a schedule, a clip, AdamW."""

import jax
import optax
from ml_collections import ConfigDict

from models.errors import UserError


def schedule(c: ConfigDict, steps: int) -> optax.Schedule:
    """Update count (from 0) → learning rate, by `c`'s fields.

    Linear warm-up over `warmup_steps`, in which the first update already moves (the rate is
    learning_rate · (count + 1) / warmup_steps), then `schedule` (cosine | linear | constant) down
    to learning_rate · `final_fraction` at count `steps`, and level from there on.
    Raises UserError for an unknown schedule.
    """
    peak, warmup = c.learning_rate, c.warmup_steps
    length = max(1, steps - warmup)
    if c.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, length, alpha=c.final_fraction)
    elif c.schedule == "linear":
        after = optax.linear_schedule(peak, peak * c.final_fraction, length)
    elif c.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise UserError(f"schedule={c.schedule!r}: known are cosine, linear and constant")
    if warmup == 0:
        return after
    before = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([before, after], [warmup])


def make(c: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clip by the global norm `clip_norm` (0: never), then AdamW (`b1 b2 eps weight_decay`).

    The clip sees the raw gradient, so a spike cannot enter the moments. Raises as `schedule` does.
    """
    adamw = optax.adamw(
        schedule(c, steps), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=_decayed
    )
    return optax.chain(optax.clip_by_global_norm(c.clip_norm), adamw) if c.clip_norm else adamw


def _decayed(params: optax.Params) -> optax.Params:
    """Which leaves decay: all but the norms' scales, by name: stacked, they have two axes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) != "scale", params
    )
