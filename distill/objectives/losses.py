"""Per-token losses and weights from arrays, and the table of objectives.

The logits at position t predict token t + 1. `shift` aligns data about tokens with the hidden
states that predict them.

Letters: p is the student's probability of a token, q the teacher's, μ the sampler's; sg detaches.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill.objectives import advantages, token_weights
from distill.objectives.fused_head import Stats
from distill.objectives.loss import Loss


def shift(x_BT: jax.Array) -> jax.Array:
    """Shifts columns left: column t describes token t + 1, and the last is zero (no target)."""
    return jnp.concatenate([x_BT[:, 1:], jnp.zeros_like(x_BT[:, :1])], axis=1)


def unshift(x_BT: jax.Array) -> jax.Array:
    """Undoes `shift`: column t describes token t again, and column 0 is zero."""
    return jnp.concatenate([jnp.zeros_like(x_BT[:, :1]), x_BT[:, :-1]], axis=1)


def compute_token_losses(
    loss: Loss,
    stats: Stats,
    mask_BT: jax.Array,
    segments_BT: jax.Array,
    *,
    sampler_logp_BT: jax.Array | None = None,
    old_logp_BT: jax.Array | None = None,
    reference_logp_BT: jax.Array | None = None,
    advantages_BT: jax.Array | None = None,
    teacher_logp_BT: jax.Array | None = None,
) -> Stats:
    """Computes each token's loss, and stats that warn of collapse. Arrays are [B, T], shifted.

    Args:
      stats: from fused_head.compute_token_stats with divergence=loss.teacher_divergence and
        baseline=loss.baseline.
      mask_BT: True at trained tokens.
      segments_BT: int32, 0 on padding, else the number of the sequence within its row.
      sampler_logp_BT: log μ as the sampler recorded it. None: the sample is fresh, μ = p.
      old_logp_BT: the trainer's own log-probabilities at the time of sampling, which then are μ.
      reference_logp_BT: read if loss.reference is not 0; detached. Likewise advantages_BT, for
        loss.reward.
      teacher_logp_BT: the teacher's log-probabilities, for teacher_output="token".

    Returns:
      [B, T] arrays, 0 at untrained tokens: "loss", differentiable; and, detached and if the loss
      has them, "advantage"; "ratio" p/μ; "clipped", 1 where the clip limits the gradient;
      "sampler_ratio" p_old/p_sampler; "reference_kl", an unbiased estimate of the KL; with
      teacher_logp_BT, "teacher_logp", and "sampled_reverse_kl", log p - log q, whose mean over
      fresh samples is the reverse KL; and by entropy a "token_weight", a factor of "loss".
    """
    sg = jax.lax.stop_gradient
    trained_BT = mask_BT > 0

    def mask_untrained(x_BT: jax.Array) -> jax.Array:
        return jnp.where(trained_BT, x_BT, 0)

    logp_BT = mask_untrained(stats["logp"])
    before_BT = old_logp_BT if old_logp_BT is not None else sampler_logp_BT
    drawn_BT = None if loss.ratio == "none" else before_BT
    log_ratio_BT = logp_BT - sg(logp_BT if drawn_BT is None else mask_untrained(drawn_BT))
    total_BT = -loss.sft * logp_BT
    advantage_BT = jnp.zeros_like(logp_BT)
    metrics: Stats = {}
    if teacher_logp_BT is not None:
        stats = {**stats, "teacher_logp": teacher_logp_BT}
        metrics["teacher_logp"] = teacher_logp_BT
        metrics["sampled_reverse_kl"] = sg(logp_BT) - teacher_logp_BT
    if loss.teacher:
        divergence_BT, credit_BT = _compute_teacher_loss(
            loss, stats, mask_untrained, log_ratio_BT, segments_BT, sampler_logp_BT
        )
        total_BT += loss.teacher * divergence_BT
        advantage_BT += loss.teacher * credit_BT
    if loss.reward:
        assert advantages_BT is not None
        advantage_BT += loss.reward * mask_untrained(sg(advantages_BT))
    if loss.has_policy_gradient:
        gradient_BT, metrics["clipped"] = _compute_policy_gradient(
            loss, logp_BT, log_ratio_BT, advantage_BT, trained_BT, segments_BT
        )
        metrics["advantage"] = advantage_BT
        if loss.tis_clip:
            assert sampler_logp_BT is not None and old_logp_BT is not None
            gap_BT = sg(mask_untrained(old_logp_BT - sampler_logp_BT))
            metrics["sampler_ratio"] = mask_untrained(jnp.exp(gap_BT))
            gradient_BT *= jnp.minimum(metrics["sampler_ratio"], loss.tis_clip)
        total_BT += gradient_BT
    if loss.reference:
        assert reference_logp_BT is not None
        kl_BT = jnp.exp(log_ratio_BT) * _compute_k3(mask_untrained(sg(reference_logp_BT)) - logp_BT)
        total_BT += loss.reference * kl_BT
        metrics["reference_kl"] = sg(kl_BT)
    if before_BT is not None and loss.is_on_policy:
        metrics["ratio"] = jnp.exp(sg(logp_BT - mask_untrained(before_BT)))
    if loss.entropy_weight:
        metrics["token_weight"] = mask_untrained(token_weights.compute_entropy_weights(loss, stats))
        total_BT = metrics["token_weight"] * total_BT
    return {name: mask_untrained(x) for name, x in {"loss": total_BT, **metrics}.items()}


def _compute_k3(gap_BT: jax.Array) -> jax.Array:
    """Returns q/p - 1 - log(q/p), given log(q/p). Never negative."""
    return jnp.expm1(gap_BT) - gap_BT


def _compute_teacher_loss(
    loss: Loss,
    stats: Stats,
    mask_untrained: Callable[[jax.Array], jax.Array],
    log_ratio_BT: jax.Array,
    segments_BT: jax.Array,
    sampler_logp_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the per-token loss and advantage of the divergence from the teacher."""
    sg = jax.lax.stop_gradient
    zeros_BT = jnp.zeros_like(log_ratio_BT)
    if loss.estimator in ("exact", "topk"):
        divergence_BT = mask_untrained(stats["divergence"])
        if not loss.discount:
            return divergence_BT, zeros_BT
        return divergence_BT, -advantages.sum_discounted_future(
            sg(divergence_BT), segments_BT, loss.discount
        )
    logp_BT, logq_BT = mask_untrained(stats["logp"]), mask_untrained(sg(stats["teacher_logp"]))
    if loss.estimator != "sampled":
        weight_BT = sg(jnp.exp(log_ratio_BT))
        if loss.clip == "cispo":
            weight_BT = jnp.clip(weight_BT, 1 - loss.clip_low, 1 + loss.clip_high)
        gap_BT = logq_BT - logp_BT
        estimate_BT = gap_BT**2 / 2 if loss.estimator == "k2" else _compute_k3(gap_BT)
        return weight_BT * estimate_BT, zeros_BT
    if loss.k1_from == "sampler":
        assert sampler_logp_BT is not None
        logp_BT = mask_untrained(sampler_logp_BT)
    k1_BT = later_BT = sg(logp_BT) - logq_BT
    if loss.baseline:
        # Later tokens count with the expectation of their k1, without its noise.
        later_BT = mask_untrained(sg(stats["reverse_kl"]))
        k1_BT = k1_BT - mask_untrained(sg(stats["baseline"]))
    if loss.discount:
        k1_BT = k1_BT + advantages.sum_discounted_future(later_BT, segments_BT, loss.discount)
    return zeros_BT, -k1_BT


def _compute_policy_gradient(
    loss: Loss,
    logp_BT: jax.Array,
    log_ratio_BT: jax.Array,
    advantage_BT: jax.Array,
    trained_BT: jax.Array,
    segments_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the per-token loss of an advantage, and 1 where the clip changes its gradient."""
    sg = jax.lax.stop_gradient
    if loss.ratio == "sequence":
        mean_BT = advantages.mean_over_sequence(sg(log_ratio_BT), trained_BT, segments_BT)
        log_ratio_BT = mean_BT + logp_BT - sg(logp_BT)
    ratio_BT, low, high = jnp.exp(log_ratio_BT), 1 - loss.clip_low, 1 + loss.clip_high
    clipped_BT = jnp.clip(ratio_BT, low, high)
    if loss.clip == "none":
        return -ratio_BT * advantage_BT, jnp.zeros_like(ratio_BT)
    if loss.clip == "cispo":
        outside_BT = (ratio_BT < low) | (ratio_BT > high)
        return -sg(clipped_BT) * advantage_BT * logp_BT, outside_BT.astype(ratio_BT.dtype)
    outside_BT = ((ratio_BT < low) & (advantage_BT < 0)) | ((ratio_BT > high) & (advantage_BT > 0))
    # The minimum in Loss's docstring, except at ties.
    bounded_BT = jnp.where(outside_BT, sg(clipped_BT), ratio_BT)
    return -bounded_BT * advantage_BT, outside_BT.astype(ratio_BT.dtype)


_GRPO = Loss(reward=1.0, clip="ppo", aggregation="sequence")

# objective -> its loss
OBJECTIVES: dict[str, Loss] = {
    "sft": Loss(sft=1.0),
    # off-policy: the teacher's distribution at every token of given responses
    "distill": Loss(teacher=1.0, divergence="forward"),
    "gkd": Loss(teacher=1.0, divergence="jsd"),
    # on-policy: responses of the student
    "opd": Loss(teacher=1.0),
    "opd_sampled": Loss(teacher=1.0, estimator="sampled"),
    "grpo": _GRPO,
    "dr_grpo": dataclasses.replace(_GRPO, advantage_norm="mean", aggregation="constant"),
    "dapo": dataclasses.replace(_GRPO, clip_high=0.28, aggregation="token"),
    "gspo": dataclasses.replace(_GRPO, ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    "cispo": Loss(reward=1.0, clip="cispo", clip_low=1.0, clip_high=4.0),
    "rloo": Loss(reward=1.0, advantage_norm="leave_one_out", aggregation="constant"),
    # verified rewards, and the teacher's distribution
    "hybrid": Loss(reward=1.0, teacher=1.0, clip="ppo"),
}
