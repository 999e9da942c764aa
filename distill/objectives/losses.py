"""The options of a loss, and functions that compute per-token losses and weights from arrays.

An objective is a set of values of the options of `Loss`. OBJECTIVES names the usual ones, and
config.STAGE.loss changes any of their options.

The logits at position t predict token t + 1. `shift` aligns data about tokens with the hidden
states that predict them.

Letters: p is the student's probability of a token, q the teacher's, μ the sampler's; sg detaches.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill.objectives import advantages
from distill.objectives.divergences import Divergence
from distill.objectives.fused_head import Stats
from models import checks
from models.checks import Range
from models.errors import UserError


def shift(x_BT: jax.Array) -> jax.Array:
    """Shifts columns left: column t describes token t + 1, and the last is zero (no target)."""
    return jnp.concatenate([x_BT[:, 1:], jnp.zeros_like(x_BT[:, :1])], axis=1)


def unshift(x_BT: jax.Array) -> jax.Array:
    """Undoes `shift`: column t describes token t again, and column 0 is zero."""
    return jnp.concatenate([jnp.zeros_like(x_BT[:, :1]), x_BT[:, :-1]], axis=1)


RULES: dict[str, checks.Rule] = {
    **dict.fromkeys(("sft", "teacher", "reward", "reference"), Range(off="no such term")),
    "divergence": ("reverse", "forward", "jsd"),
    "beta": Range(high=1),
    "skew": Range(high=1, below=True, off="off"),
    "temperature": Range(above=True),
    "estimator": ("exact", "topk", "sampled", "k2", "k3"),
    "k": Range(),
    "topk_from": ("teacher", "student", "union"),
    "teacher_output": ("hidden", "top", "token"),
    "teacher_topk": Range(),
    "k1_from": ("student", "sampler"),
    "discount": Range(high=1, off="off"),
    "advantage_norm": advantages.ADVANTAGE_NORMS,
    "ratio": ("token", "sequence", "none"),
    "clip": ("none", "ppo", "cispo"),
    "clip_low": Range(high=1),
    "tis_clip": Range(off="off"),
    "aggregation": ("token", "sequence", "constant"),
}
_SAMPLED_ESTIMATORS = ("sampled", "k2", "k3")  # read only the drawn token


@dataclasses.dataclass(frozen=True)
class Loss:
    """The options of a loss, a weighted sum of up to four terms. Hashable, so static under jit.
    Raises UserError for an option out of its bounds, and for a meaningless combination.

    Weights of the terms; 0 omits a term:
      sft: -log p(token), maximum likelihood.
      teacher: the divergence from the teacher.
      reward: the policy gradient of the given advantages.
      reference: the reverse KL from a reference, estimated by (p/μ)·k3 and differentiated
        through p/μ as well, which is unbiased in value and gradient (arXiv 2512.02556, sec. 3.1).

    The divergence from the teacher (formulas and sources: divergences.Divergence):
      divergence: "reverse" KL(p‖q), "forward" KL(q‖p), or "jsd", a mixture of both.
      beta: of jsd, from 0 (forward) to 1 (reverse).
      skew: mixes this share of the other distribution into the second one of the KL.
      temperature: divides the logits of both models.
      estimator: estimates the divergence at a token. Its expected gradient is that of
        "exact": the divergence, over the whole vocabulary.
        "topk": the coarser divergence of `k` tokens and a tail of all others.
        "sampled": the reverse KL. A policy gradient with advantage -k1 = -(log p - log q),
          detached. (k1 itself, differentiated, has expected gradient 0.)
        "k2": the reverse KL. The loss is sg(p/μ)·(log p - log q)²/2.
        "k3": the *forward* KL, though its value, sg(p/μ)·(q/p - 1 - log(q/p)), estimates the
          reverse KL; so it needs divergence="forward".
        This holds for tokens drawn from μ at states that μ visits, ratio="token" and no clip;
        tests/objectives/test_estimators.py proves it by enumeration.
      k: number of tokens of estimator="topk".
      topk_from: the model whose most likely tokens these are: "teacher", "student" or "union".
      teacher_output: what the teacher returns: "hidden" states, its "top" tokens with
        log-probabilities, or only the log-probability of the drawn "token".
      teacher_topk: number of tokens of teacher_output="top".
      k1_from: source of the log p in k1: the "student", also correct for stale samples, or the
        "sampler", as usual: the same on fresh samples, but outdated on stale ones.
      baseline: subtracts from k1 its mean, weighted by the size of the gradient. This reduces the
        variance and keeps the expectation. (The plain mean, the KL, often raises the variance.)
      discount: γ. Adds the later divergences to a token's advantage, Σ_{i>0} γ^i, detached. 0, the
        usual choice, ignores that a token changes later states; 1 is the gradient of the divergence
        of whole sequences, for fresh samples (for stale ones, at the states of μ).

    The policy gradient, of the sum of all advantages A:
      advantage_norm: "std", "mean" or "leave_one_out": see advantages.compute_group_advantages.
      ratio: p/μ of the "token"; its geometric mean over the "sequence" (GSPO, arXiv 2507.18071, in
        the token form of section 4.3); or "none", as if p = μ.
      clip: "none": -ratio·A. "ppo": -min(ratio·A, clip(ratio)·A). "cispo":
        -sg(clip(ratio))·A·log p (arXiv 2506.13585, section 3.1).
      clip_low, clip_high: bound clip(ratio) to [1 - clip_low, 1 + clip_high].
      tis_clip: C > 0 weights each token by min(p_old/p_sampler, C), detached, where p_old is
        the trainer's own probability before the update, which is then the μ of the ratio. Corrects
        differences between sampler and trainer.

    The sum over tokens:
      aggregation: weight of a token's loss. "token": 1, divided by the number of trained tokens;
        "sequence": 1/length, divided by the number of sequences; "constant": 1/(most tokens of a
        response), divided by the number of sequences (Dr. GRPO, arXiv 2503.20783). Sequences
        without a trained token do not count.
    """

    sft: float = 0.0
    teacher: float = 0.0
    reward: float = 0.0
    reference: float = 0.0
    divergence: str = "reverse"
    beta: float = 0.5
    skew: float = 0.0
    temperature: float = 1.0
    estimator: str = "exact"
    k: int = 0
    topk_from: str = "teacher"
    teacher_output: str = "hidden"
    teacher_topk: int = 0
    k1_from: str = "student"
    baseline: bool = False
    discount: float = 0.0
    advantage_norm: str = "std"
    ratio: str = "token"
    clip: str = "none"
    clip_low: float = 0.2
    clip_high: float = 0.2
    tis_clip: float = 0.0
    aggregation: str = "token"

    def __post_init__(self) -> None:
        checks.check_fields(self, RULES)
        for refused, why in _list_combinations(self):
            if refused:
                raise UserError(why)

    @property
    def teacher_divergence(self) -> Divergence | None:
        """The divergence that the head computes; None if the loss does not read one."""
        if not self.teacher or self.estimator in _SAMPLED_ESTIMATORS:
            return None
        return Divergence(
            self.divergence, self.beta, self.skew, self.temperature, self.k, self.topk_from
        )

    @property
    def has_policy_gradient(self) -> bool:
        """True if tokens have advantages."""
        credited = self.estimator == "sampled" or self.discount
        return bool(self.reward or (self.teacher and credited))

    @property
    def is_per_token(self) -> bool:
        """True if a token's loss follows from that token alone."""
        return not (self.discount or (self.has_policy_gradient and self.ratio == "sequence"))

    @property
    def is_on_policy(self) -> bool:
        """True if the loss needs tokens that the student drew, with the sampler's log-probs."""
        drawn = self.teacher and self.estimator in _SAMPLED_ESTIMATORS
        return bool(self.has_policy_gradient or self.reference or drawn)


def _list_combinations(loss: Loss) -> list[tuple[bool, str]]:
    """Returns (refused, reason) for each meaningless combination of options."""
    estimator = f"estimator={loss.estimator}"
    drawn, top = loss.estimator in _SAMPLED_ESTIMATORS, loss.teacher_output == "top"
    no_advantage = loss.estimator in ("k2", "k3")
    kl = "forward" if loss.estimator == "k3" else "reverse"
    return [
        (
            not any((loss.sft, loss.teacher, loss.reward, loss.reference)),
            "sft, teacher, reward and reference are all 0: nothing is learned",
        ),
        (loss.beta != Loss.beta and loss.divergence != "jsd", "beta: read by divergence=jsd only"),
        (loss.skew > 0 and loss.divergence == "jsd", "skew: jsd mixes by beta, and has no skew"),
        (loss.k == 0 and loss.estimator == "topk", "k=0 with estimator=topk: set k to at least 1"),
        (loss.k > 0 and loss.estimator != "topk", f"k={loss.k}: read by estimator=topk only"),
        (loss.teacher_topk > 0 and not top, "teacher_topk: read by teacher_output=top only"),
        (
            drawn and (loss.divergence != kl or loss.skew > 0 or loss.temperature != 1),
            f"{estimator}: has the gradient of the plain {kl} KL at temperature 1; set "
            f"divergence={kl}, skew=0, temperature=1",
        ),
        (top and loss.estimator != "topk", f"{estimator}: teacher_output=top needs topk"),
        (top and loss.k > loss.teacher_topk, f"k={loss.k}: above teacher_topk={loss.teacher_topk}"),
        (top and loss.topk_from != "teacher", "topk_from: teacher_output=top needs teacher"),
        (top and loss.temperature != 1, "temperature: teacher_output=top needs 1"),
        (
            loss.teacher_output == "token" and not drawn,
            f"{estimator}: teacher_output=token is one number a token; use sampled, k2 or k3",
        ),
        (loss.baseline and loss.estimator != "sampled", "baseline: read by estimator=sampled only"),
        (
            loss.baseline and (loss.teacher_output != "hidden" or not loss.teacher),
            "baseline: is a mean over the whole vocabulary, which needs a teacher's hidden states",
        ),
        (loss.discount > 0 and not loss.teacher, "discount: credits later KL, but teacher=0"),
        (
            loss.discount > 0 and no_advantage,
            f"discount: {estimator} has no advantage to add to; use sampled",
        ),
        (not loss.clip_high >= 0, f"clip_high={loss.clip_high}: must be at least 0"),
        (loss.ratio == "none" and loss.clip != "none", f"clip={loss.clip}: ratio=none is always 1"),
        (
            loss.clip == "ppo" and no_advantage and loss.teacher > 0,
            f"clip=ppo: {estimator} has no advantage to clip; use sampled, or clip=cispo",
        ),
        (loss.tis_clip > 0 and not loss.has_policy_gradient, "tis_clip: needs a policy gradient"),
    ]


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
) -> Stats:
    """Computes each token's loss, and stats that warn of collapse. Arrays are [B, T], shifted.

    Args:
      stats: from fused_head.compute_token_stats with divergence=loss.teacher_divergence and
        baseline=loss.baseline. With teacher_output="token", the caller adds "teacher_logp".
      mask_BT: True at trained tokens.
      segments_BT: int32, 0 on padding, else the number of the sequence within its row.
      sampler_logp_BT: log μ as the sampler recorded it. None: the sample is fresh, μ = p.
      old_logp_BT: the trainer's own log-probabilities at the time of sampling, which then are μ.
      reference_logp_BT: read if loss.reference is not 0; detached. Likewise advantages_BT, for
        loss.reward.

    Returns:
      [B, T] arrays, 0 at untrained tokens: "loss", differentiable; and, detached and if the loss
      has them, "advantage"; "ratio" p/μ; "clipped", 1 where the clip limits the gradient;
      "sampler_ratio" p_old/p_sampler; "reference_kl", an unbiased estimate of the KL.
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


def compute_token_weights(
    loss: Loss, mask_BT: jax.Array, segments_BT: jax.Array, limit: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the weight of each token's loss [B, T], and the count (scalar) that divides the sum.

    The loss of a batch is Σ weight·loss / Σ count over all micro-batches and devices, for every
    aggregation. `limit`: the maximum number of tokens of a response.
    """
    mask_BT = (mask_BT > 0).astype(jnp.float32)
    if loss.aggregation == "token":
        return mask_BT, jnp.sum(mask_BT)
    count = advantages.count_sequences(mask_BT, segments_BT)
    if loss.aggregation == "constant":
        return mask_BT / limit, count
    return mask_BT / jnp.maximum(advantages.sum_over_sequence(mask_BT, segments_BT), 1), count


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
