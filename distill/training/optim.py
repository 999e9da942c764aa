"""Makes the optimiser: a learning-rate schedule, gradient clipping, and an optax optimiser."""

import jax
import optax
import optax.contrib
from ml_collections import ConfigDict

from models import checks
from models.checks import Range
from models.errors import UserError


def make_schedule(c: ConfigDict, steps: int) -> optax.Schedule:
    """Returns a function from the update count (from 0) to the learning rate.

    The rate rises linearly over `warmup_steps` as learning_rate · (count + 1) / warmup_steps, so it
    is not 0 at the first update; then it follows `schedule` down to
    learning_rate · `final_fraction` at count `steps`, and stays there.
    """
    peak, warmup = c.learning_rate, c.warmup_steps
    length = max(1, steps - warmup)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, length, alpha=c.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, peak * c.final_fraction, length),
        "constant": lambda: optax.constant_schedule(peak),
    }[c.schedule]()
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(c: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Makes an optimiser that clips by the global norm `clip_norm` (0: never), then runs `name`.

    The raw gradient is clipped, so that a spike cannot enter the moments.
      adamw: `b1 b2 eps weight_decay`; the first moment is kept in `momentum_dtype`.
      muon: orthogonalised momentum `b1` for the matrices of the layers (arXiv 2502.16982: updates
        have the size of AdamW's, root mean square 0.2, so that learning rates transfer);
        Nesterov's AdamW without decay for embeddings, head, norms and routers.
      adafactor: factored second moments (arXiv 1804.04235), no first moment, absolute learning
        rate.
      sgd: momentum `b1`; 0: none.

    Raises:
      UserError: for an unknown name, schedule or dtype, or a number out of bounds.
    """
    checks.check_fields(c, RULES)
    if c.name == "adafactor" and c.momentum_dtype != "float32":
        raise UserError(
            f"momentum_dtype={c.momentum_dtype}: adafactor keeps no first moment; leave float32"
        )
    optimizer = OPTIMIZERS[c.name](c, make_schedule(c, steps))
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
RULES = {
    "name": tuple(OPTIMIZERS),
    "schedule": ("cosine", "linear", "constant"),
    "momentum_dtype": ("float32", "bfloat16"),
    "learning_rate": Range(),
    "warmup_steps": Range(),
    "final_fraction": Range(),
    "b1": Range(high=1, below=True),
    "b2": Range(high=1, below=True),
    "eps": Range(),
    "weight_decay": Range(),
    "clip_norm": Range(off="never"),
}


def _get_leaf_name(path: tuple) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)


def _mask_decayed(params: optax.Params) -> optax.Params:
    """Marks the leaves that decay: all but the norms' scales, found by name, since stacked scales
    have two axes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _get_leaf_name(path) != "scale", params)


def _mark_matrices(params: optax.Params) -> optax.Params:
    """Marks the leaves that Muon treats as matrices [..., in, out]; the others are None."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    others = ("embed", "head", "scale", "router")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: None if _get_leaf_name(path) in others else matrix, params
    )
