"""The streamed head: the only place that ever sees logits.

The logits of B·T tokens over a vocabulary of 151,936 do not fit in memory, so nothing here ever
holds more than one chunk of them: hidden states go through both heads chunk by chunk. What comes
out is a few numbers a token (distill.objectives.divergences); and a loss that depends on nothing
else has its gradient taken on the way.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill.objectives import chunks, divergences

Stats = dict[str, jax.Array]  # name -> [B, T] float32
LossFn = Callable[
    [Stats, Stats], Stats
]  # (figures of tokens, what is known of them) -> "loss", ...
TeacherArrays = jax.Array | tuple[jax.Array, ...] | None

_DIFFERENTIABLE = ("logp", "entropy", "divergence")


@jax.custom_vjp
def _compute_logits(hidden_BCD: jax.Array, head_VD: jax.Array, read_VD: jax.Array) -> jax.Array:
    """Logits of a chunk, summed and kept in float32 (or float64, if that is the model's).

    read_VD: the head in the dtype of the hidden states, in which all products are taken, cast once
    for all chunks; head_VD stands for the gradient, which is summed over them in its own dtype.
    """
    return jnp.einsum(
        "BCD,VD->BCV",
        hidden_BCD,
        read_VD,
        preferred_element_type=jnp.promote_types(hidden_BCD.dtype, jnp.float32),
    )


def _compute_logits_bwd(residuals, grad_logits_BCV):
    hidden_BCD, head_VD, read_VD = residuals
    # Rounded as the logits' factors are: two products of the model's dtype, where the transposed
    # rule would take float32 times what is cast up for it.
    grad_BCV = grad_logits_BCV.astype(hidden_BCD.dtype)
    grad_hidden_BCD = jnp.einsum("BCV,VD->BCD", grad_BCV, read_VD)
    grad_head_VD = jnp.einsum(
        "BCV,BCD->VD", grad_BCV, hidden_BCD, preferred_element_type=head_VD.dtype
    )
    return grad_hidden_BCD, grad_head_VD, None


_compute_logits.defvjp(lambda *given: (_compute_logits(*given), given), _compute_logits_bwd)


@dataclasses.dataclass(frozen=True)
class _StatsSpec:
    """What is to be found of each token, as in token_stats."""

    split: Callable[[jax.Array], jax.Array]
    top_k: int
    divergence: divergences.Divergence | None
    exact: bool
    overlap: int
    baseline: bool
    temperature: float

    def scale_logits(self, logits_BCV: jax.Array) -> jax.Array:
        logits_BCV = self.split(logits_BCV)
        return logits_BCV if self.temperature == 1 else logits_BCV / self.temperature

    def compute_chunk_stats(self, head_VD: jax.Array, cast_heads: Any, x: Any) -> Stats:
        """The stats of a chunk. fixed: both sides' heads in the dtype of their products."""
        read_VD, heads = cast_heads
        logits_BCV = self.scale_logits(_compute_logits(x["hidden"], head_VD, read_VD))
        logp_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
        stats = {
            "logp": divergences.gather_targets(logp_BCV, x["targets"]),
            "entropy": divergences.compute_entropy(logp_BCV),
        }
        if x["teachers"]:
            pairs = zip(x["teachers"], heads, strict=True)
            teacher_logits = [
                self.scale_logits(_compute_logits(hidden_BCE, y, y)) for hidden_BCE, y in pairs
            ]
            logq_BCV = divergences.mix_teachers(teacher_logits, x["share"])
            stats |= divergences.compute_teacher_stats(
                logp_BCV, logq_BCV, x["targets"], self.overlap, self.baseline
            )
            if self.divergence is not None:
                stats |= divergences.compare_distributions(
                    logp_BCV, logq_BCV, self.divergence, self.exact
                )
        elif x["top"] is not None:
            ids_BCK, logq_BCK = x["top"]
            if self.divergence is not None:
                stats["divergence"] = divergences.compare_stored_top(
                    logp_BCV, ids_BCK, logq_BCK, self.divergence
                )
            if self.overlap:
                stats |= divergences.compute_overlap_stats(logp_BCV, ids_BCK[..., : self.overlap])
        if self.top_k:
            stats["top_logp"], stats["top_ids"] = jax.lax.top_k(logp_BCV, self.top_k)
        return stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _compute_stats(
    spec: _StatsSpec,
    hidden_ARCD: jax.Array,
    head_VD: jax.Array,
    cast_heads: Any,
    xs: Any,
    runs_A: Any,
) -> Stats:
    """The stats of chunks. Logits of a chunk are computed again on the way back."""

    def step(_: None, x: Any) -> tuple[None, Stats]:
        return None, spec.compute_chunk_stats(head_VD, cast_heads, x)

    return chunks.scan_chunks(step, None, {"hidden": hidden_ARCD, **xs}, runs_A)[1]


def _compute_stats_bwd(spec, residuals, cotangents):
    hidden_ARCD, head_VD, cast_heads, xs, runs_A = residuals
    cotangents = {name: cotangents[name] for name in _DIFFERENTIABLE if name in cotangents}

    def step(grad_head_VD: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
        def compute_differentiable(hidden_RCD: jax.Array, head_VD: jax.Array) -> Stats:
            stats = spec.compute_chunk_stats(head_VD, cast_heads, {**x, "hidden": hidden_RCD})
            return {name: stats[name] for name in cotangents}

        _, transpose = jax.vjp(compute_differentiable, x["hidden"], head_VD)
        grad_hidden_RCD, grad_chunk_VD = transpose(x["by"])
        return grad_head_VD + grad_chunk_VD, grad_hidden_RCD

    xs = {"hidden": hidden_ARCD, "by": cotangents, **xs}
    grad_head_VD, grad_hidden_ARCD = chunks.scan_chunks(step, jnp.zeros_like(head_VD), xs, runs_A)
    return grad_hidden_ARCD, grad_head_VD, None, None, None


_compute_stats.defvjp(
    lambda asked, *given: (_compute_stats(asked, *given), given), _compute_stats_bwd
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_loss(
    spec: _StatsSpec,
    loss: LossFn,
    hidden_ARCD: jax.Array,
    head_VD: jax.Array,
    cast_heads: Any,
    xs: Any,
    runs_A: Any,
) -> tuple[jax.Array, Stats]:
    """Σ weight·loss, differentiable in hidden states and head, and the stats of chunks."""

    def step(_: None, x: Any) -> tuple[None, Stats]:
        stats = spec.compute_chunk_stats(head_VD, cast_heads, x)
        return None, {**stats, **loss(stats, x["known"])}

    _, stats = chunks.scan_chunks(step, None, {"hidden": hidden_ARCD, **xs}, runs_A)
    return jnp.sum(stats["loss"] * xs["weight"]), stats


def _sum_loss_fwd(spec, loss, hidden_ARCD, head_VD, cast_heads, xs, runs_A):
    def step(grad_head_VD: jax.Array, x: Any) -> tuple[jax.Array, Any]:
        def compute_losses(hidden_RCD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, Stats]:
            stats = spec.compute_chunk_stats(head_VD, cast_heads, {**x, "hidden": hidden_RCD})
            stats |= loss(stats, x["known"])
            return stats["loss"], stats

        loss_RC, transpose, stats = jax.vjp(compute_losses, x["hidden"], head_VD, has_aux=True)
        grad_hidden_RCD, grad_chunk_VD = transpose(x["weight"].astype(loss_RC.dtype))
        return grad_head_VD + grad_chunk_VD, (stats, grad_hidden_RCD)

    zeros_VD = jnp.zeros_like(head_VD)
    scanned: Any = chunks.scan_chunks(step, zeros_VD, {"hidden": hidden_ARCD, **xs}, runs_A)
    grad_head_VD, (stats, grad_hidden_ARCD) = scanned
    return (jnp.sum(stats["loss"] * xs["weight"]), stats), (grad_hidden_ARCD, grad_head_VD)


def _sum_loss_bwd(spec, loss, residuals, cotangents):
    # All but the total is detached.
    return *(cotangents[0].astype(x.dtype) * x for x in residuals), None, None, None


_sum_loss.defvjp(_sum_loss_fwd, _sum_loss_bwd)


def compute_token_stats(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    teacher_hidden_BTE: TeacherArrays = None,
    teacher_head_VE: TeacherArrays = None,
    *,
    loss_chunk_mib: float,
    split: Callable[[jax.Array], jax.Array] = lambda logits_BCV: logits_BCV,
    top_k: int = 0,
    divergence: divergences.Divergence | None = None,
    teacher_top_BTK: tuple[jax.Array, jax.Array] | None = None,
    teacher_weight_BTN: jax.Array | None = None,
    exact: bool = False,
    overlap: int = 0,
    baseline: bool = False,
    temperature: float = 1.0,
    loss: LossFn | None = None,
    known: Stats | None = None,
    weight_BT: jax.Array | None = None,
    mask_BT: jax.Array | None = None,
    shards: tuple[int, int] = (1, 1),
) -> Stats:
    """Per-token figures of the distributions that predict `targets_BT`, vocabulary streamed.

    Args:
      hidden_BTD: final hidden states that predict the targets.
      head_VD: output head; gradients flow into it and into hidden_BTD.
      targets_BT: int32, the token that each position predicts.
      teacher_hidden_BTE, teacher_head_VE: the same of the teacher, whose width may differ; never
        differentiated. Or tuples with those of N teachers.
      teacher_weight_BTN: of N teachers, how much of a token's teacher each one is: their
        distributions are mixed by it, q = Σ share·q_n. A token's shares add up to 1; one of 1 is
        that teacher.
      loss_chunk_mib: how many MiB one chunk of float32 logits of one model may take.
      split: puts a sharding on a chunk's logits [B, C, V].
      top_k: also find this many of the student's most likely tokens.
      divergence: also compare with the teacher in this form.
      teacher_top_BTK: int32 ids and log-probabilities of the teacher's most likely tokens, the
        most likely first, where its hidden states are not at hand. Finite on padding too, and
        ids of one trained token distinct. For a Divergence of 0 < k <= K, topk_from "teacher" and
        temperature 1: no other is known.
      exact: beside the divergence also its value over the whole vocabulary.
      overlap: compare this many of the most likely tokens (of stored ones, at most K).
      baseline: also find the baseline of a policy gradient with log p - log q of a drawn token.
      temperature: logits of all models are divided by it.
      loss: also add up a loss, each token's times weight_BT: loss(stats, known) gives "loss" and
        what else it finds, of tokens of a chunk, from their stats and what is `known` of them, and
        may not look from one token to another. The gradient is then taken while a chunk's logits
        are there (as arXiv 2410.10989, section 3.2), else they are computed again on the way back.
      mask_BT: which tokens are needed; None: all. Few others go through the heads; weight_BT must
        be 0 at these.
      shards: into how many parts rows, and the tokens of a row, are split over devices.

    Returns:
      Float32 [B, T] arrays, 0 where not needed. Differentiable (once) in the student: "logp"
      log p(target), "entropy" of p in nats, and "divergence". Detached: with a teacher
      "teacher_logp" log q(target), "teacher_entropy", and "reverse_kl", the exact KL(p‖q) =
      Σ_v p(v) (log p(v) - log q(v)) over the whole vocabulary (stored tops give none of the three);
      "exact_divergence"; "baseline"; with overlap "top_overlap", the share of the teacher's top
      that is in the student's, and "outside_top", the student's mass outside it. With top_k also
      "top_logp" and int32 "top_ids", [B, T, K], the most likely first. With a loss also what it
      finds, and "total", its scalar sum, which then alone is differentiable (once).

      Where teacher and student are equal, divergence and gradient are exactly 0 (of stored tops up
      to the rounding of the tail's mass, about 1e-7).
    """
    sg = jax.lax.stop_gradient
    teachers, heads = (jax.tree.leaves(sg(x)) for x in (teacher_hidden_BTE, teacher_head_VE))
    heads = [y.astype(x.dtype) for x, y in zip(teachers, heads, strict=bool(teachers))]
    cast_heads = sg(head_VD).astype(hidden_BTD.dtype), heads
    xs = {"hidden": hidden_BTD, "targets": targets_BT, "teachers": teachers}
    xs |= {"top": sg(teacher_top_BTK), "share": teacher_weight_BTN}
    xs |= {} if loss is None else {"known": known, "weight": weight_BT}
    size = int(loss_chunk_mib * 2**20 / (4 * head_VD.shape[0]))
    chunked, runs_A, join = chunks.split_into_chunks(xs, size, mask_BT, shards)
    operands = chunked.pop("hidden"), head_VD, cast_heads, chunked, runs_A
    spec = _StatsSpec(split, top_k, divergence, exact, overlap, baseline, temperature)
    result: Any = (
        _compute_stats(spec, *operands) if loss is None else _sum_loss(spec, loss, *operands)
    )
    return join(result) if loss is None else {**join(result[1]), "total": result[0]}
