"""Divergences of next-token distributions from a teacher's, and statistics that warn of collapse.

A [B, C, V] array is a chunk of the streamed head. In this file p is the student's distribution of
the next token, and q the teacher's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

# Most likely tokens of both distributions, [B, C, K]: not statistics that can be summed.
TOP_STATS = ("student_top_ids", "student_top_logp", "teacher_top_ids", "teacher_top_logp")

_TINY = 1e-30  # mass of an empty tail, to keep its logarithm finite
_RESOLUTION = 1e-7  # of float32 near 1: the least 1 - Σ of stored probabilities


@dataclasses.dataclass(frozen=True)
class Divergence:
    """A divergence of p from q at one token. Hashable, so static under jit.

    losses.Loss checks the fields.

    divergence_type: "reverse" KL(p‖q); "forward" KL(q‖p); "jsd" β KL(q‖m) + (1-β) KL(p‖m) with
      m = βq + (1-β)p (arXiv 2306.13649, eq. 1). At β = 0 and 1 the jsd itself is zero everywhere;
      as in TRL, these values stand for the limits of jsd/β and jsd/(1-β), forward and reverse KL.
      So the scale of the gradient jumps at both ends.
    skew: α of DistiLLM (arXiv 2402.03898, section 3.1): forward is KL(q‖αq + (1-α)p), reverse is
      KL(p‖αp + (1-α)q). 0: no skew.
    temperature: τ. Both distributions are softmax(logits / τ), and the value is multiplied by τ²,
      which keeps the size of the gradient about the same (arXiv 1503.02531, section 2).
    k: 0 compares the whole vocabulary. Otherwise the k most likely tokens of `topk_from` (teacher,
      student, or the union of both) are compared one by one, and all others together as one more
      outcome, the tail. This is a divergence of coarser distributions: never negative, never above
      the exact one, and sensitive to mass outside the k tokens.
    """

    divergence_type: str = "reverse"
    beta: float = 0.5
    skew: float = 0.0
    temperature: float = 1.0
    k: int = 0
    topk_from: str = "teacher"


def _compute_mixture_ratios(
    logp: jax.Array, logq: jax.Array, share: float
) -> tuple[jax.Array, jax.Array]:
    """Returns log(m/p) and log(m/q) for m = share·q + (1-share)·p, exactly 0 where p = q."""
    gap = logq - logp
    below = jnp.log1p(share * jnp.expm1(jnp.minimum(gap, 0)))  # log(m/p) where q <= p
    above = jnp.log1p((1 - share) * jnp.expm1(-jnp.maximum(gap, 0)))  # log(m/q) where q > p
    return jnp.where(gap > 0, above + gap, below), jnp.where(gap > 0, above, below - gap)


def _compute_terms(
    logp: jax.Array, logq: jax.Array, d: Divergence
) -> tuple[jax.Array, jax.Array | float, jax.Array]:
    """Returns for each outcome its term f of the divergence, and two factors of p ∂f/∂p.

    The product of the factors omits a multiple of p, whose gradient the softmax cancels: it would
    leave rounding noise, which Adam amplifies if p is close to q. Where p = q, the product and f
    are exactly 0. (Two factors instead of their product save XLA two chunks of logits.)
    """
    p, q = jnp.exp(logp), jnp.exp(logq)
    ends = {0.0: "forward", 1.0: "reverse"} if d.divergence_type == "jsd" else {}
    divergence_type = ends.get(d.beta, d.divergence_type)
    if divergence_type == "jsd":
        to_p, to_q = _compute_mixture_ratios(logp, logq, d.beta)
        slope = (d.beta - 1) * to_p
        return p * slope - d.beta * q * to_q, slope, p
    if divergence_type == "reverse":
        if not d.skew:
            return p * (logp - logq), logp - logq, p
        to_p, _ = _compute_mixture_ratios(logp, logq, 1 - d.skew)
        return -p * to_p, -(to_p + d.skew * jnp.expm1(-to_p)), p
    if not d.skew:
        return q * (logq - logp), 1.0, p - q
    to_p, to_q = _compute_mixture_ratios(logp, logq, d.skew)
    return -q * to_q, (1 - d.skew) ** 2 * jnp.exp(-to_p), p - q


def _ids_to_mask(ids_BCK: jax.Array, logp_BCV: jax.Array) -> jax.Array:
    """Returns bool [B, C, V], True for tokens among the ids."""
    none = jnp.zeros(logp_BCV.shape, bool)
    return jnp.put_along_axis(none, ids_BCK, True, axis=-1, inplace=False)


def _compute_with_factors(
    logp_BCV: jax.Array,
    logq_BCV: jax.Array,
    d: Divergence,
    inside_BCV: jax.Array | None,
    tail_q_BC: jax.Array | None,
) -> tuple[jax.Array, jax.Array | float, jax.Array]:
    """Returns the divergence [B, C] without τ², and the two factors of its derivative by log p."""
    f_BCV, slope_BCV, mass_BCV = _compute_terms(logp_BCV, logq_BCV, d)
    if inside_BCV is None:
        return jnp.sum(f_BCV, axis=-1), slope_BCV, mass_BCV
    p_BCV = jnp.where(inside_BCV, 0, jnp.exp(logp_BCV))
    tail_p_BC = jnp.maximum(jnp.sum(p_BCV, axis=-1), _TINY)
    if tail_q_BC is None:
        tail_q_BC = jnp.sum(jnp.where(inside_BCV, 0, jnp.exp(logq_BCV)), axis=-1)
    tail_q_BC = jnp.maximum(tail_q_BC, _TINY)
    f_BC, slope_BC, mass_BC = _compute_terms(jnp.log(tail_p_BC), jnp.log(tail_q_BC), d)
    value_BC = jnp.sum(jnp.where(inside_BCV, f_BCV, 0), axis=-1) + f_BC
    # Each token of the tail gets a part of its derivative, in proportion to its mass.
    shared_BC1 = (slope_BC * mass_BC / tail_p_BC)[..., None]
    return (
        value_BC,
        jnp.where(inside_BCV, slope_BCV, shared_BC1),
        jnp.where(inside_BCV, mass_BCV, p_BCV),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _compute_divergence(
    logp_BCV: jax.Array,
    logq_BCV: jax.Array,
    d: Divergence,
    inside_BCV: jax.Array | None = None,
    tail_q_BC: jax.Array | None = None,
) -> jax.Array:
    """Computes the divergence [B, C], with a hand-written derivative by log p.

    inside_BCV: True for tokens that are outcomes of their own; the others are the tail. None: all.
    tail_q_BC: q's mass of the tail; None: the sum over logq_BCV.
    """
    value_BC, _, _ = _compute_with_factors(logp_BCV, logq_BCV, d, inside_BCV, tail_q_BC)
    return d.temperature**2 * value_BC


def _compute_divergence_fwd(logp_BCV, logq_BCV, d, inside_BCV, tail_q_BC):
    inputs = logp_BCV, logq_BCV, inside_BCV, tail_q_BC
    value_BC, _, _ = _compute_with_factors(logp_BCV, logq_BCV, d, inside_BCV, tail_q_BC)
    return d.temperature**2 * value_BC, inputs


def _compute_divergence_bwd(d, inputs, grad_value_BC):
    logp_BCV, logq_BCV, inside_BCV, tail_q_BC = inputs
    _, slope_BCV, mass_BCV = _compute_with_factors(logp_BCV, logq_BCV, d, inside_BCV, tail_q_BC)
    grad_value_BC1 = (d.temperature**2 * grad_value_BC)[..., None]
    return grad_value_BC1 * slope_BCV * mass_BCV, None, None, None


_compute_divergence.defvjp(_compute_divergence_fwd, _compute_divergence_bwd)


def compare_distributions(logp_BCV: jax.Array, logq_BCV: jax.Array, d: Divergence) -> jax.Array:
    """Computes the divergence [B, C] of two chunks of distributions, differentiable in log p."""
    if d.temperature != 1:
        logp_BCV = jax.nn.log_softmax(logp_BCV / d.temperature, axis=-1)
        logq_BCV = jax.nn.log_softmax(logq_BCV / d.temperature, axis=-1)
    if not d.k:
        return _compute_divergence(logp_BCV, logq_BCV, d)
    sides = {"teacher": [logq_BCV], "student": [logp_BCV], "union": [logq_BCV, logp_BCV]}
    ids = [jax.lax.top_k(jax.lax.stop_gradient(x), d.k)[1] for x in sides[d.topk_from]]
    inside_BCV = _ids_to_mask(jnp.concatenate(ids, axis=-1), logp_BCV)
    return _compute_divergence(logp_BCV, logq_BCV, d, inside_BCV)


def compare_stored_top(
    logp_BCV: jax.Array, ids_BCK: jax.Array, logq_BCK: jax.Array, d: Divergence
) -> jax.Array:
    """Computes the divergence [B, C] from a teacher whose most likely tokens alone are stored."""
    ids_BCK, logq_BCK = ids_BCK[..., : d.k], logq_BCK[..., : d.k]
    # Tokens that are not stored get the student's probability, so they only add to the tail.
    detached_BCV = jax.lax.stop_gradient(logp_BCV)
    logq_BCV = jnp.put_along_axis(
        detached_BCV, ids_BCK, logq_BCK.astype(logp_BCV.dtype), axis=-1, inplace=False
    )
    if d.k == logp_BCV.shape[-1]:
        return _compute_divergence(logp_BCV, logq_BCV, d)
    rest_BC = 1 - jnp.sum(jnp.exp(logq_BCK.astype(logp_BCV.dtype)), axis=-1)
    rest_BC = jnp.maximum(rest_BC, _RESOLUTION)
    return _compute_divergence(logp_BCV, logq_BCV, d, _ids_to_mask(ids_BCK, logp_BCV), rest_BC)


def compute_overlap_stats(
    logp_BCV: jax.Array, teacher_ids_BCK: jax.Array, teacher_logp_BCK: jax.Array
) -> dict[str, jax.Array]:
    """Computes the overlap of the most likely tokens of student and teacher, and returns these
    tokens with it. Detached."""
    logp_BCV = jax.lax.stop_gradient(logp_BCV)
    logp_BCK, ids_BCK = jax.lax.top_k(logp_BCV, teacher_ids_BCK.shape[-1])
    student_top_BCV = _ids_to_mask(ids_BCK, logp_BCV)
    teacher_top_BCV = _ids_to_mask(teacher_ids_BCK, logp_BCV)
    return {
        "top_overlap": jnp.mean(
            jnp.take_along_axis(student_top_BCV, teacher_ids_BCK, axis=-1),
            axis=-1,
            dtype=logp_BCV.dtype,
        ),
        "outside_top": jnp.sum(jnp.where(teacher_top_BCV, 0, jnp.exp(logp_BCV)), axis=-1),
        "student_top_ids": ids_BCK,
        "student_top_logp": logp_BCK,
        "teacher_top_ids": teacher_ids_BCK,
        "teacher_top_logp": teacher_logp_BCK.astype(logp_BCV.dtype),
    }


def _compute_baseline(logp_BCV: jax.Array, logq_BCV: jax.Array) -> jax.Array:
    """Computes the baseline of log p - log q that minimises the variance of its policy gradient.

    The gradient is taken with respect to the logits. The baseline is the mean over tokens weighted
    by ‖∇ log p‖² (arXiv 1301.2315, the optimal constant baseline, here for one state). The plain
    mean, the KL, may add variance.
    """
    logp_BCV = jax.lax.stop_gradient(logp_BCV)
    p_BCV = jnp.exp(logp_BCV)
    square_BC = jnp.sum(p_BCV**2, axis=-1, keepdims=True)
    # No weight may be negative by rounding, so that the mean stays within the range of its terms.
    weight_BCV = p_BCV * jnp.maximum((1 - p_BCV) ** 2 + square_BC - p_BCV**2, 0)
    total_BC = jnp.maximum(jnp.sum(weight_BCV, axis=-1), _TINY)
    return jnp.sum(weight_BCV * (logp_BCV - logq_BCV), axis=-1) / total_BC


def mix_teachers(logits_BCV: list[jax.Array], weight_BCN: jax.Array | None) -> jax.Array:
    """Computes log q for q = Σ weight·q_n.

    A weight of 0 adds nothing, and a weight of 1 gives q_n bit by bit. Padding, where all weights
    are 0, gets finite but meaningless numbers.
    """
    logq_BCV = [jax.nn.log_softmax(x, axis=-1) for x in logits_BCV]
    if weight_BCN is None:
        assert len(logq_BCV) == 1
        return logq_BCV[0]
    weight_BCN = jnp.where(jnp.any(weight_BCN > 0, axis=-1, keepdims=True), weight_BCN, 1)
    weight_BCN = jnp.log(jax.lax.stop_gradient(weight_BCN)).astype(logq_BCV[0].dtype)
    parts = [x + weight_BCN[..., n, None] for n, x in enumerate(logq_BCV)]
    return functools.reduce(jnp.logaddexp, parts)


def compute_teacher_stats(
    logp_BCV: jax.Array, logq_BCV: jax.Array, targets_BC: jax.Array, overlap_k: int, baseline: bool
) -> dict[str, jax.Array]:
    """Computes the stats of a teacher that fused_head.compute_token_stats lists. Detached."""
    logp_BCV = jax.lax.stop_gradient(logp_BCV)
    stats = {
        "teacher_logp": gather_targets(logq_BCV, targets_BC),
        "teacher_entropy": compute_entropy(logq_BCV),
        "reverse_kl": jnp.sum(_compute_terms(logp_BCV, logq_BCV, Divergence())[0], axis=-1),
    }
    if baseline:
        stats["baseline"] = _compute_baseline(logp_BCV, logq_BCV)
    if overlap_k:
        stats |= compute_overlap_stats(logp_BCV, *reversed(jax.lax.top_k(logq_BCV, overlap_k)))
    return stats


def gather_targets(logp_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logp_BCV, targets_BC[..., None], axis=-1)[..., 0]


def compute_entropy(logp_BCV: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.exp(logp_BCV) * logp_BCV, axis=-1)
