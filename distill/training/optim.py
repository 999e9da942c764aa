"""The optimiser: a schedule, a clip, and one of optax's."""

import math

import jax
import optax
import optax.contrib
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


# Fields that are 0 or more, and what each stays below.
UPPER_BOUNDS = {"b1": 1, "b2": 1} | dict.fromkeys(
    ("learning_rate", "warmup_steps", "final_fraction", "eps", "weight_decay", "clip_norm"),
    math.inf,
)


def make_optimizer(c: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Clip by the global norm `clip_norm` (0: never), then the optimiser `name`.

    The clip sees the raw gradient, so a spike cannot enter the moments.
      adamw: `b1 b2 eps weight_decay`; the first moment is kept in `momentum_dtype`.
      muon: orthogonalised momentum `b1` for the matrices of the layers (arXiv 2502.16982: updates
        have the size of AdamW's, root mean square 0.2, so that learning rates carry over); for
        embeddings, head, norms and routers Nesterov's AdamW, without decay.
      adafactor: second moments as rows and columns (arXiv 1804.04235), no first moment, the
        learning rate absolute.
      sgd: momentum `b1`, which 0 leaves out.

    Raises:
      UserError: for an unknown name, schedule or dtype, or a number out of its bounds.
    """
    for field, below in UPPER_BOUNDS.items():
        if not 0 <= c[field] < below:
            raise UserError(f"{field}={c[field]}: must be at least 0 and below {below}")
    if c.momentum_dtype not in ("float32", "bfloat16"):
        raise UserError(f"momentum_dtype={c.momentum_dtype!r}: known are float32 and bfloat16")
    if c.name == "adafactor" and c.momentum_dtype != "float32":
        raise UserError(f"momentum_dtype={c.momentum_dtype}: adafactor keeps no first moment")
    if c.name not in OPTIMIZERS:
        raise UserError(f"name={c.name!r}: known are {', '.join(OPTIMIZERS)}")
    optimizer = OPTIMIZERS[c.name](c, schedule(c, steps))
    return (
        optax.chain(optax.clip_by_global_norm(c.clip_norm), optimizer) if c.clip_norm else optimizer
    )


def _make_adamw(c: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate,
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        mu_dtype=c.momentum_dtype,
        weight_decay=c.weight_decay,
        mask=_mask_decayed,
    )


def _make_muon(c: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.contrib.muon(
        learning_rate,
        beta=c.b1,
        weight_decay=c.weight_decay,
        mu_dtype=c.momentum_dtype,
        adam_b1=c.b1,
        adam_b2=c.b2,
        muon_weight_dimension_numbers=_mark_matrices,
        consistent_rms=0.2,
    )


def _make_adafactor(c: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adafactor(
        learning_rate,
        multiply_by_parameter_scale=False,
        weight_decay_rate=c.weight_decay or None,
        weight_decay_mask=_mask_decayed,
    )


def _make_sgd(c: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(c.weight_decay, _mask_decayed)
    return optax.chain(
        decay, optax.sgd(learning_rate, momentum=c.b1 or None, accumulator_dtype=c.momentum_dtype)
    )


OPTIMIZERS = {
    "adamw": _make_adamw,
    "muon": _make_muon,
    "adafactor": _make_adafactor,
    "sgd": _make_sgd,
}


def _get_leaf_name(path: tuple) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)


def _mask_decayed(params: optax.Params) -> optax.Params:
    """Which leaves decay: all but the norms' scales, by name: stacked, they have two axes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _get_leaf_name(path) != "scale", params)


def _mark_matrices(params: optax.Params) -> optax.Params:
    """Which leaves are matrices to Muon, [..., in, out]; None of the others."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    others = ("embed", "head", "scale", "router")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: None if _get_leaf_name(path) in others else matrix, params
    )
