"""Losses over arrays: one frozen choice, and the per-token loss and weights that follow from it.

A loss is a weighted sum of up to four terms: maximum likelihood, a divergence from the teacher, a
policy gradient of rewards, and a divergence from a reference. Every field of `Loss` can be a flag,
so an objective is a set of values; TABLE names the usual ones.

The logits at position t predict token t + 1. `shift` aligns targets, mask and whatever else is
known of tokens with the hidden states that predict them, once, for every loss.

Letters: p is the student's probability of a token, q the teacher's, μ that of the distribution the
token was drawn from; sg detaches. Each estimator below names its expected gradient, over tokens
drawn from μ at states that μ visits; tests/objectives/test_estimators.py proves it by enumeration.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from distill.objectives import advantages
from distill.objectives.divergences import Divergence
from distill.objectives.fused_head import Stats
from models.errors import UserError


def shift(x_BT: jax.Array) -> jax.Array:
    """Row t of the result is about token t + 1; the last column is zero (nothing is predicted)."""
    return jnp.concatenate([x_BT[:, 1:], jnp.zeros_like(x_BT[:, :1])], axis=1)


def unshift(x_BT: jax.Array) -> jax.Array:
    """Undoes `shift`: column t is about token t again, column 0 is zero."""
    return jnp.concatenate([jnp.zeros_like(x_BT[:, :1]), x_BT[:, :-1]], axis=1)


CHOICES = {
    "divergence": ("reverse", "forward", "jsd"),
    "estimator": ("exact", "topk", "sampled", "k2", "k3"),
    "topk_from": ("teacher", "student", "union"),
    "teacher_output": ("hidden", "top", "token"),
    "k1_from": ("student", "sampler"),
    "advantage_norm": advantages.ADVANTAGE_NORMS,
    "ratio": ("token", "sequence", "none"),
    "clip": ("none", "ppo", "cispo"),
    "aggregation": ("token", "sequence", "constant"),
}
_SAMPLED_ESTIMATORS = ("sampled", "k2", "k3")  # read only the token that was drawn


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is minimised. Hashable, so static under jit; a combination without a meaning raises
    UserError.

    Weights of the terms, 0 leaves one out: `sft` of -log p(token); `teacher` of the divergence
    from the teacher; `reward` of the policy gradient of given advantages; `reference` of the
    reverse KL from a reference, estimated by (p/μ)·k3 with the gradient through p/μ as well, which
    is unbiased in value and gradient (arXiv 2512.02556, section 3.1).

    Divergence from the teacher: `divergence`, `beta`, `skew`, `temperature`, `k`, `topk_from` as in
    divergences.Divergence. With sg(p/μ) as ratio, and `estimator`:
      exact: over the whole vocabulary. Gradient: that of the divergence, at every token.
      topk: k tokens and the tail. Gradient: that of the coarser divergence.
      sampled: a policy gradient with advantage -k1 = -(log p - log q), detached. Gradient: that
        of the reverse KL. (k1 itself, differentiated, has expected gradient 0.)
      k2: sg(p/μ)·(log p - log q)²/2. Gradient: that of the reverse KL.
      k3: sg(p/μ)·(q/p - 1 - log(q/p)). Its value estimates the reverse KL, its gradient is that
        of the *forward* KL, so it goes by that name.
    `teacher_output` says what the teacher hands over: hidden states, its `teacher_topk` likeliest
    tokens with log-probabilities, or only the log-probability of the drawn token.
    `k1_from`: whose log p stands in k1. The student's is right for stale samples too. The sampler's
    is the usual recipe, and the same on fresh samples; on stale ones it lags behind.
    `baseline` subtracts from k1 its expectation weighed by the size of the gradient: the expected
    gradient stays, its variance falls. (The plain expectation, the KL, often makes it rise.)
    `discount` γ credits a token with what follows: Σ_{i>0} γ^i of the later divergences, detached,
    joins its advantage. 0, the usual choice, leaves out that a token changes the states after it;
    1 is the gradient of the divergence of whole sequences, on fresh samples. (Stale ones would
    need the ratio of whole prefixes, too noisy to be of use: the states are then still μ's.)

    Policy gradient, of the sum of all advantages: `ratio` p/μ of the token, its geometric mean over
    the sequence (GSPO, arXiv 2507.18071, in the token form of section 4.3), or none (as if p = μ).
    `clip`: none is -ratio·A; ppo is -min(ratio·A, clip(ratio)·A); cispo is -sg(clip(ratio))·A·log p
    (arXiv 2506.13585, section 3.1), with clip(ratio) within [1 - clip_low, 1 + clip_high].
    `tis_clip` C > 0: where the trainer's own log-probabilities of before the update are given
    (they are μ in the ratio, then), min(p_old/p_sampler, C), detached, weighs each token: it mends
    what sampler and trainer compute differently. `advantage_norm`: see advantages.group_advantages.

    `aggregation`: what one token weighs. token: 1, divided by the number of trained tokens;
    sequence: 1/length, divided by the number of sequences; constant: 1/limit, divided by the number
    of sequences (Dr. GRPO, arXiv 2503.20783). Sequences without a trained token do not count.
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
        for field, choices in CHOICES.items():
            if vars(self)[field] not in choices:
                raise UserError(f"{field}={vars(self)[field]!r}: must be one of {choices}")
        for refused, why in _list_invalid_settings(self):
            if refused:
                raise UserError(why)

    @property
    def teacher_divergence(self) -> Divergence | None:
        """What the head is to compare with the teacher; None where no loss reads it."""
        if not self.teacher or self.estimator in _SAMPLED_ESTIMATORS:
            return None
        return Divergence(
            self.divergence, self.beta, self.skew, self.temperature, self.k, self.topk_from
        )

    @property
    def has_policy_gradient(self) -> bool:
        """Whether tokens have advantages."""
        return bool(
            self.reward or (self.teacher and (self.estimator == "sampled" or self.discount))
        )

    @property
    def is_per_token(self) -> bool:
        """Whether a token's loss follows from that token alone."""
        return not (self.discount or (self.has_policy_gradient and self.ratio == "sequence"))

    @property
    def is_on_policy(self) -> bool:
        """Whether only tokens that the student drew make sense, with the sampler's log-probs."""
        drawn = self.teacher and self.estimator in _SAMPLED_ESTIMATORS
        return bool(self.has_policy_gradient or self.reference or drawn)


def _list_invalid_settings(loss: Loss) -> list[tuple[bool, str]]:
    """(whether, why) of each combination that cannot mean anything."""
    weights = (loss.sft, loss.teacher, loss.reward, loss.reference)
    drawn = loss.estimator in _SAMPLED_ESTIMATORS
    gradient = "forward" if loss.estimator == "k3" else "reverse"
    return [
        (
            not all(0 <= w < math.inf for w in weights),
            f"weights (sft, teacher, reward, reference)={weights}: must be finite, 0 or more",
        ),
        (not any(weights), "sft, teacher, reward and reference are all 0: nothing is learned"),
        (not 0 <= loss.beta <= 1, f"beta={loss.beta}: must be from 0 (forward) to 1 (reverse)"),
        (not 0 <= loss.skew < 1, f"skew={loss.skew}: must be at least 0 (off) and below 1"),
        (loss.beta != Loss.beta and loss.divergence != "jsd", "beta: read by divergence=jsd only"),
        (loss.skew > 0 and loss.divergence == "jsd", "skew: jsd mixes by beta, and has no skew"),
        (not 0 < loss.temperature < math.inf, f"temperature={loss.temperature}: must be above 0"),
        (
            loss.k < 0 or loss.teacher_topk < 0,
            f"k={loss.k}, teacher_topk={loss.teacher_topk}: must be 0 or more",
        ),
        (
            loss.estimator == "topk" and loss.k == 0,
            "estimator=topk: k says how many tokens, at least 1",
        ),
        (loss.estimator != "topk" and loss.k > 0, f"k={loss.k}: read by estimator=topk only"),
        (
            loss.teacher_topk > 0 and loss.teacher_output != "top",
            f"teacher_topk={loss.teacher_topk}: read by teacher_output=top only",
        ),
        (
            drawn and (loss.divergence != gradient or loss.skew > 0 or loss.temperature != 1),
            f"estimator={loss.estimator}: has the gradient of the plain {gradient} KL at "
            "temperature "
            f"1; set divergence={gradient}, skew=0, temperature=1",
        ),
        (
            loss.teacher_output == "top" and loss.estimator != "topk",
            f"estimator={loss.estimator} with teacher_output=top: the teacher gives its "
            "likeliest tokens "
            "only, neither the whole distribution nor that of any drawn token; use topk",
        ),
        (
            loss.teacher_output == "top" and loss.k > loss.teacher_topk,
            f"k={loss.k}: more than the {loss.teacher_topk} tokens that the teacher serves",
        ),
        (
            loss.teacher_output == "top" and loss.topk_from != "teacher",
            f"topk_from={loss.topk_from} with teacher_output=top: of other tokens than the "
            "teacher's own likeliest, its "
            "probability is not known",
        ),
        (
            loss.teacher_output == "top" and loss.temperature != 1,
            f"temperature={loss.temperature} with teacher_output=top: needs the whole distribution",
        ),
        (
            loss.teacher_output == "token" and not drawn,
            f"estimator={loss.estimator} with teacher_output=token: the teacher gives one "
            "number a token; use "
            "sampled, k2 or k3",
        ),
        (loss.baseline and loss.estimator != "sampled", "baseline: read by estimator=sampled only"),
        (
            loss.baseline and (loss.teacher_output != "hidden" or not loss.teacher),
            "baseline: is a mean over the whole vocabulary, which needs a teacher's hidden states",
        ),
        (not 0 <= loss.discount <= 1, f"discount={loss.discount}: must be from 0 to 1"),
        (loss.discount > 0 and not loss.teacher, "discount: credits later KL, but teacher=0"),
        (
            loss.discount > 0 and loss.estimator in ("k2", "k3"),
            f"discount with estimator={loss.estimator}: it has no advantage; use sampled",
        ),
        (
            not (0 <= loss.clip_low <= 1 and loss.clip_high >= 0),
            f"clip_low={loss.clip_low}, clip_high={loss.clip_high}: the ratio is kept within "
            "[1 - clip_low, 1 + clip_high], so 0 <= clip_low <= 1 and 0 <= clip_high",
        ),
        (
            loss.ratio == "none" and loss.clip != "none",
            f"clip={loss.clip} with ratio=none: it is always 1",
        ),
        (
            loss.clip == "ppo" and loss.estimator in ("k2", "k3") and loss.teacher > 0,
            f"clip=ppo with estimator={loss.estimator}: it has no advantage; use sampled, or cispo",
        ),
        (not 0 <= loss.tis_clip < math.inf, f"tis_clip={loss.tis_clip}: must be 0 (off) or more"),
        (
            loss.tis_clip > 0 and not loss.has_policy_gradient,
            "tis_clip: no policy gradient to weigh",
        ),
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
    """The loss of each token, to be weighed by `weights`, and figures that foresee collapse.

    Args:
      stats: of fused_head.token_stats with divergence=loss.compared, baseline=loss.baseline. If the
        teacher serves only log-probabilities of drawn tokens, they stand in it as "teacher_logp".
      mask_BT: where a token is trained. Everything here is aligned by `shift`.
      segments_BT: int32, 0 on padding, else the number of the sequence within its row.
      sampler_logp_BT: log μ as the sampler recorded it. None: the sample is fresh, μ = p.
      old_logp_BT: the trainer's own log-probabilities at the time of sampling; then these are μ.
      reference_logp_BT, advantages_BT: needed for a reference, for a reward; detached.

    Returns:
      [B, T] arrays, 0 where not trained: "loss", differentiable; detached, where they exist:
      "advantage"; "ratio" p/μ and "clipped", whether its bound holds the gradient back;
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
        own_BT, credit_BT = _compute_teacher_loss(
            loss, stats, mask_untrained, log_ratio_BT, segments_BT, sampler_logp_BT
        )
        total_BT += loss.teacher * own_BT
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
            metrics["sampler_ratio"] = mask_untrained(
                jnp.exp(sg(mask_untrained(old_logp_BT - sampler_logp_BT)))
            )
            gradient_BT *= jnp.minimum(metrics["sampler_ratio"], loss.tis_clip)
        total_BT += gradient_BT
    if loss.reference:
        assert reference_logp_BT is not None
        kl_BT = jnp.exp(log_ratio_BT) * _compute_k3(mask_untrained(sg(reference_logp_BT)) - logp_BT)
        total_BT += loss.reference * kl_BT
        metrics["reference_kl"] = sg(kl_BT)
    if before_BT is not None and loss.is_on_policy:
        metrics["ratio"] = jnp.exp(sg(logp_BT - mask_untrained(before_BT)))
    return {
        "loss": mask_untrained(total_BT),
        **{name: mask_untrained(x) for name, x in metrics.items()},
    }


def _compute_k3(gap_BT: jax.Array) -> jax.Array:
    """q/p - 1 - log(q/p), of log(q/p): never negative."""
    return jnp.expm1(gap_BT) - gap_BT


def _compute_teacher_loss(
    loss: Loss,
    stats: Stats,
    mask_untrained: Callable[[jax.Array], jax.Array],
    log_ratio_BT: jax.Array,
    segments_BT: jax.Array,
    sampler_logp_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Per-token loss and advantage of the divergence from the teacher."""
    sg = jax.lax.stop_gradient
    nothing_BT = jnp.zeros_like(log_ratio_BT)
    if loss.estimator in ("exact", "topk"):
        own_BT = mask_untrained(stats["divergence"])
        if not loss.discount:
            return own_BT, nothing_BT
        return own_BT, -advantages.sum_discounted_future(sg(own_BT), segments_BT, loss.discount)
    logp_BT, logq_BT = mask_untrained(stats["logp"]), mask_untrained(sg(stats["teacher_logp"]))
    if loss.estimator != "sampled":
        weight_BT = sg(jnp.exp(log_ratio_BT))
        if loss.clip == "cispo":
            weight_BT = jnp.clip(weight_BT, 1 - loss.clip_low, 1 + loss.clip_high)
        gap_BT = logq_BT - logp_BT
        return weight_BT * (
            gap_BT**2 / 2 if loss.estimator == "k2" else _compute_k3(gap_BT)
        ), nothing_BT
    if loss.k1_from == "sampler":
        assert sampler_logp_BT is not None
        logp_BT = mask_untrained(sampler_logp_BT)
    k1_BT = later_BT = sg(logp_BT) - logq_BT
    if loss.baseline:
        # Of later tokens the expectation itself is credited: that is their k1 without its noise.
        later_BT = mask_untrained(sg(stats["reverse_kl"]))
        k1_BT = k1_BT - mask_untrained(sg(stats["baseline"]))
    if loss.discount:
        k1_BT = k1_BT + advantages.sum_discounted_future(later_BT, segments_BT, loss.discount)
    return nothing_BT, -k1_BT


def _compute_policy_gradient(
    loss: Loss,
    logp_BT: jax.Array,
    log_ratio_BT: jax.Array,
    advantage_BT: jax.Array,
    trained_BT: jax.Array,
    segments_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Per-token loss of an advantage, and whether the clip took its gradient away or cut it."""
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
    # This is the minimum of the docstring, without its ties.
    bounded_BT = jnp.where(outside_BT, sg(clipped_BT), ratio_BT)
    return -bounded_BT * advantage_BT, outside_BT.astype(ratio_BT.dtype)


def compute_token_weights(
    loss: Loss, mask_BT: jax.Array, segments_BT: jax.Array, limit: int
) -> tuple[jax.Array, jax.Array]:
    """What each token's loss weighs [B, T], and the count (scalar) that the sum is divided by.

    Both add up: the loss of a batch is Σ weight·loss over all micro-batches and devices, divided
    once by Σ count, whatever the aggregation. `limit` is the most tokens of a response.
    """
    mask_BT = (mask_BT > 0).astype(jnp.float32)
    if loss.aggregation == "token":
        return mask_BT, jnp.sum(mask_BT)
    count = advantages.count_sequences(mask_BT, segments_BT)
    if loss.aggregation == "constant":
        return mask_BT / limit, count
    return mask_BT / jnp.maximum(advantages.sum_over_sequence(mask_BT, segments_BT), 1), count


_GRPO = Loss(reward=1.0, clip="ppo", aggregation="sequence")

# objective -> what it minimises; a flag changes any field of it
OBJECTIVES: dict[str, Loss] = {
    "sft": Loss(sft=1.0),
    # off-policy: the teacher's distribution at every token of written responses
    "distill": Loss(teacher=1.0, divergence="forward"),
    "gkd": Loss(teacher=1.0, divergence="jsd"),
    # on-policy: the student writes
    "opd": Loss(teacher=1.0),
    "opd_sampled": Loss(teacher=1.0, estimator="sampled"),
    "grpo": _GRPO,
    "dr_grpo": dataclasses.replace(_GRPO, advantage_norm="mean", aggregation="constant"),
    "dapo": dataclasses.replace(_GRPO, clip_high=0.28, aggregation="token"),
    "gspo": dataclasses.replace(_GRPO, ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    "cispo": Loss(reward=1.0, clip="cispo", clip_low=1.0, clip_high=4.0),
    "rloo": Loss(reward=1.0, advantage_norm="leave_one_out", aggregation="constant"),
    "hybrid": Loss(reward=1.0, teacher=1.0, clip="ppo"),  # verified, and the whole distribution
}
