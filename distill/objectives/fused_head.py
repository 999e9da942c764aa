"""The streamed output head: the only code that computes logits for losses.

The logits of B·T tokens over a vocabulary of 151,936 do not fit in memory, so only one chunk of
them exists at a time: hidden states pass through both models' heads chunk by chunk, and leave a few
numbers per token (distill.objectives.divergences). If a loss depends on these alone, its gradient
is computed in the same pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.batch import TeacherOutput
from distill.objectives import chunks, divergences

Stats = dict[str, jax.Array]  # name -> [B, T] float32
# (stats of tokens, further data about them) -> "loss" and other stats
LossFn = Callable[[Stats, Stats], Stats]

_DIFFERENTIABLE = ("logp", "entropy", "divergence")


@dataclasses.dataclass(frozen=True)
class HeadInputs:
    """Arrays that `compute_token_stats` reads; all but the first two are detached.

    Without the teacher's hidden states, `teacher_top_BTK` holds int32 ids and log-probabilities of
    its most likely tokens, most likely first. They must be finite, also on padding, and the ids of
    a trained token distinct. They suffice only for a Divergence with 0 < k <= K, topk_from
    "teacher" and temperature 1.
    """

    hidden_BTD: jax.Array  # final hidden states that predict the targets
    head_VD: jax.Array  # output head
    targets_BT: jax.Array  # int32: the token that each position predicts
    mask_BT: jax.Array | None = None  # True at needed tokens; None: all
    teacher: TeacherOutput | None = None
    teacher_top_BTK: tuple[jax.Array, jax.Array] | None = None
    known: Stats | None = None  # further data that a loss reads
    weight_BT: jax.Array | None = None  # float32: weight of each token's loss; 0 outside the mask


@dataclasses.dataclass(frozen=True)
class StatsOptions:
    """Options of `compute_token_stats`: hashable, so static under jit."""

    loss_chunk_mib: float  # MiB of float32 logits of one model in a chunk
    # sets the sharding of a chunk of logits [B, C, V]
    split: Callable[[jax.Array], jax.Array] = lambda logits_BCV: logits_BCV
    divergence: divergences.Divergence | None = None  # from the teacher; None: not computed
    top_k: int = 0  # most likely tokens of the student to return
    overlap_k: int = 0  # most likely tokens to compare (at most K if stored)
    baseline: bool = False  # computes the baseline of a policy gradient with log p - log q
    temperature: float = 1.0  # divides the logits of all models
    shards: tuple[int, int] = (1, 1)  # numbers of parts of rows, and of tokens of a row


@jax.custom_vjp
def _compute_logits(
    hidden_BCD: jax.Array, head_VD: jax.Array, cast_head_VD: jax.Array
) -> jax.Array:
    """Computes the logits of a chunk in float32 (float64 if the model uses it).

    cast_head_VD: the head, cast once for all chunks to the dtype of the hidden states, in which all
    products are computed. head_VD receives the gradient, summed over chunks in its own dtype.
    """
    return jnp.einsum(
        "BCD,VD->BCV",
        hidden_BCD,
        cast_head_VD,
        preferred_element_type=jnp.promote_types(hidden_BCD.dtype, jnp.float32),
    )


def _compute_logits_bwd(residuals, grad_logits_BCV):
    hidden_BCD, head_VD, cast_head_VD = residuals
    # Rounded to the model's dtype, like the factors of the logits. JAX's own rule would cast both
    # factors to float32 instead.
    grad_BCV = grad_logits_BCV.astype(hidden_BCD.dtype)
    grad_hidden_BCD = jnp.einsum("BCV,VD->BCD", grad_BCV, cast_head_VD)
    grad_head_VD = jnp.einsum(
        "BCV,BCD->VD", grad_BCV, hidden_BCD, preferred_element_type=head_VD.dtype
    )
    return grad_hidden_BCD, grad_head_VD, None


_compute_logits.defvjp(lambda *args: (_compute_logits(*args), args), _compute_logits_bwd)


def _scale_logits(options: StatsOptions, logits_BCV: jax.Array) -> jax.Array:
    logits_BCV = options.split(logits_BCV)
    return logits_BCV if options.temperature == 1 else logits_BCV / options.temperature


def _compute_chunk_stats(
    options: StatsOptions, head_VD: jax.Array, cast_heads: Any, x: Any
) -> Stats:
    """Computes the stats of a chunk `x`.

    cast_heads: the heads of the student and the teachers, in the dtype of their products.
    """
    cast_head_VD, teacher_heads = cast_heads
    logits_BCV = _scale_logits(options, _compute_logits(x["hidden"], head_VD, cast_head_VD))
    logp_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
    stats = {
        "logp": divergences.gather_targets(logp_BCV, x["targets"]),
        "entropy": divergences.compute_entropy(logp_BCV),
    }
    if x["teachers"]:
        teacher_logits = [
            _scale_logits(options, _compute_logits(hidden_BCE, head_VE, head_VE))
            for hidden_BCE, head_VE in zip(x["teachers"], teacher_heads, strict=True)
        ]
        logq_BCV = divergences.mix_teachers(teacher_logits, x["mixture"])
        stats |= divergences.compute_teacher_stats(
            logp_BCV, logq_BCV, x["targets"], options.overlap_k, options.baseline
        )
        if options.divergence is not None:
            stats["divergence"] = divergences.compare_distributions(
                logp_BCV, logq_BCV, options.divergence
            )
    elif x["top"] is not None:
        ids_BCK, logq_BCK = x["top"]
        if options.divergence is not None:
            stats["divergence"] = divergences.compare_stored_top(
                logp_BCV, ids_BCK, logq_BCK, options.divergence
            )
        if options.overlap_k:
            stats |= divergences.compute_overlap_stats(
                logp_BCV, *(x[..., : options.overlap_k] for x in (ids_BCK, logq_BCK))
            )
    if options.top_k:
        stats["top_logp"], stats["top_ids"] = jax.lax.top_k(logp_BCV, options.top_k)
    return stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compute_stats(
    options: StatsOptions,
    hidden_ARCD: jax.Array,
    head_VD: jax.Array,
    cast_heads: Any,
    xs: Any,
    runs_A: Any,
) -> Stats:
    """Computes the stats of all chunks. The backward pass recomputes the logits of each chunk."""

    def step(_: None, x: Any) -> tuple[None, Stats]:
        return None, _compute_chunk_stats(options, head_VD, cast_heads, x)

    return chunks.scan_chunks(step, None, {"hidden": hidden_ARCD, **xs}, runs_A)[1]


def _compute_stats_bwd(options, residuals, cotangents):
    hidden_ARCD, head_VD, cast_heads, xs, runs_A = residuals
    cotangents = {name: cotangents[name] for name in _DIFFERENTIABLE if name in cotangents}

    def step(grad_head_VD: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
        def compute_differentiable(hidden_RCD: jax.Array, head_VD: jax.Array) -> Stats:
            stats = _compute_chunk_stats(options, head_VD, cast_heads, {**x, "hidden": hidden_RCD})
            return {name: stats[name] for name in cotangents}

        _, transpose = jax.vjp(compute_differentiable, x["hidden"], head_VD)
        grad_hidden_RCD, grad_chunk_VD = transpose(x["cotangents"])
        return grad_head_VD + grad_chunk_VD, grad_hidden_RCD

    xs = {"hidden": hidden_ARCD, "cotangents": cotangents, **xs}
    grad_head_VD, grad_hidden_ARCD = chunks.scan_chunks(step, jnp.zeros_like(head_VD), xs, runs_A)
    return grad_hidden_ARCD, grad_head_VD, None, None, None


_compute_stats.defvjp(
    lambda options, *args: (_compute_stats(options, *args), args), _compute_stats_bwd
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_loss(
    options: StatsOptions,
    loss: LossFn,
    hidden_ARCD: jax.Array,
    head_VD: jax.Array,
    cast_heads: Any,
    xs: Any,
    runs_A: Any,
) -> tuple[jax.Array, Stats]:
    """Returns Σ weight·loss, differentiable in hidden states and head, and the stats."""

    def step(_: None, x: Any) -> tuple[None, Stats]:
        stats = _compute_chunk_stats(options, head_VD, cast_heads, x)
        return None, {**stats, **loss(stats, x["known"])}

    _, stats = chunks.scan_chunks(step, None, {"hidden": hidden_ARCD, **xs}, runs_A)
    return jnp.sum(stats["loss"] * xs["weight"]), stats


def _sum_loss_fwd(options, loss, hidden_ARCD, head_VD, cast_heads, xs, runs_A):
    def step(grad_head_VD: jax.Array, x: Any) -> tuple[jax.Array, Any]:
        def compute_losses(hidden_RCD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, Stats]:
            stats = _compute_chunk_stats(options, head_VD, cast_heads, {**x, "hidden": hidden_RCD})
            stats |= loss(stats, x["known"])
            return stats["loss"], stats

        loss_RC, transpose, stats = jax.vjp(compute_losses, x["hidden"], head_VD, has_aux=True)
        grad_hidden_RCD, grad_chunk_VD = transpose(x["weight"].astype(loss_RC.dtype))
        return grad_head_VD + grad_chunk_VD, (stats, grad_hidden_RCD)

    zeros_VD = jnp.zeros_like(head_VD)
    scanned: Any = chunks.scan_chunks(step, zeros_VD, {"hidden": hidden_ARCD, **xs}, runs_A)
    grad_head_VD, (stats, grad_hidden_ARCD) = scanned
    return (jnp.sum(stats["loss"] * xs["weight"]), stats), (grad_hidden_ARCD, grad_head_VD)


def _sum_loss_bwd(options, loss, residuals, cotangents):
    # Only the total is differentiable.
    return *(cotangents[0].astype(x.dtype) * x for x in residuals), None, None, None


_sum_loss.defvjp(_sum_loss_fwd, _sum_loss_bwd)


def compute_token_stats(
    inputs: HeadInputs, options: StatsOptions, loss: LossFn | None = None
) -> Stats:
    """Computes per-token statistics of the distributions that predict the targets.

    Chunks without a token in the mask skip the heads.

    Args:
      loss: a loss to sum, weighted by `inputs.weight_BT`. loss(stats, known) returns "loss" and any
        other stats of the tokens of a chunk; each token's loss may depend on that token only. The
        gradient is computed while the logits of a chunk exist (as in arXiv 2410.10989, section
        3.2). Without a loss, the backward pass recomputes the logits.

    Returns:
      Float32 [B, T] arrays, 0 outside the mask.
      Differentiable (once) in the student's hidden states and head:
        "logp": log p(target).
        "entropy": of p, in nats.
        "divergence": options.divergence from the teacher.
      Detached, with a teacher (a stored top gives no "teacher_logp", "teacher_entropy" and
      "reverse_kl"):
        "teacher_logp": log q(target).
        "teacher_entropy": of q, in nats.
        "reverse_kl": KL(p‖q) = Σ_v p(v) (log p(v) - log q(v)) over the whole vocabulary, in nats.
        "baseline": see divergences.compute_teacher_stats.
        "top_overlap": share of the teacher's top tokens among the student's, with overlap_k.
        "outside_top": the student's mass outside the teacher's top tokens, with overlap_k.
        "student_top_ids", "student_top_logp", "teacher_top_ids", "teacher_top_logp" [B, T, K]: the
        overlap_k most likely tokens of each, most likely first.
      With top_k, "top_logp" and int32 "top_ids" [B, T, K], most likely first.
      With a loss, its stats, and "total", the scalar sum, then the only differentiable one (once).

      Where teacher and student are equal, divergence and gradient are exactly 0 (with a stored top,
      up to the rounding of the tail's mass, about 1e-7).
    """
    sg = jax.lax.stop_gradient
    hidden_BTD, head_VD, teacher = inputs.hidden_BTD, inputs.head_VD, inputs.teacher
    teachers = [] if teacher is None else [sg(x) for x in teacher.hidden_BTE]
    heads = [] if teacher is None else [sg(x) for x in teacher.heads_VE]
    heads = [head.astype(hidden.dtype) for hidden, head in zip(teachers, heads, strict=True)]
    cast_heads = sg(head_VD).astype(hidden_BTD.dtype), heads
    xs = {"hidden": hidden_BTD, "targets": inputs.targets_BT, "teachers": teachers}
    xs |= {"top": sg(inputs.teacher_top_BTK), "mixture": teacher and teacher.weight_BTN}
    if loss is not None:
        xs |= {"known": inputs.known, "weight": inputs.weight_BT}
    max_tokens = int(options.loss_chunk_mib * 2**20 / (4 * head_VD.shape[0]))
    chunked, runs_A, join = chunks.split_into_chunks(xs, max_tokens, inputs.mask_BT, options.shards)
    operands = chunked.pop("hidden"), head_VD, cast_heads, chunked, runs_A
    if loss is None:
        return join(_compute_stats(options, *operands))
    result: Any = _sum_loss(options, loss, *operands)
    total, stats = result
    return {**join(stats), "total": total}
