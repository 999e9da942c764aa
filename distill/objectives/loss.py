"""The options of a loss: `Loss`, their bounds, and combinations that make no sense.

An objective is a set of values of these options. `losses.OBJECTIVES` names the usual ones, and
config.STAGE.loss changes any of their options.

Letters: p is the student's probability of a token, q the teacher's, μ the sampler's; sg detaches.
"""

import dataclasses

from distill.objectives import advantages
from distill.objectives.divergences import Divergence
from models import checks
from models.checks import Range
from models.errors import UserError

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
    "position_half_life": Range(off="off"),
    "entropy_weight": Range(-1, 1),
    "entropy_from": ("student", "teacher"),
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

    Weights of tokens, detached, for aggregation="token": the sum of weight·loss is divided by the
    sum of the weights, so their mean is 1, and learning rates keep their meaning.
      position_half_life: h > 0 tokens: 2^(-i/h) for the i-th trained token of a sequence, from 0.
        Teachers are less reliable after a student's long prefix (arXiv 2606.22600, 2605.27028).
      entropy_weight: α: exp(α·H), with H the entropy in nats of the distribution that the token is
        drawn from; so the perplexity to the power of α. 0: off. Above 0, tokens where a response
        may fork count more (arXiv 2506.01939; 2604.14084 keeps the half with the highest H in OPD);
        below 0, tokens that are certain. Both papers take a share of the tokens; a weight needs no
        ranking, so it is the same in any micro-batch.
      entropy_from: the distribution: the "student"'s, or the "teacher"'s, whose entropy makes the
        reverse KL an unstable signal (arXiv 2603.07079).
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
    position_half_life: float = 0.0
    entropy_weight: float = 0.0
    entropy_from: str = "student"

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
    def weighs_tokens(self) -> bool:
        """True if trained tokens have different weights."""
        return bool(self.position_half_life or self.entropy_weight)

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
        (
            loss.weighs_tokens and loss.aggregation != "token",
            f"aggregation={loss.aggregation}: position_half_life and entropy_weight divide by the "
            "weights of all tokens; use token",
        ),
        (
            loss.entropy_from != "student" and not loss.entropy_weight,
            f"entropy_from={loss.entropy_from}: read by entropy_weight only",
        ),
        (
            loss.entropy_from == "teacher"
            and not (loss.teacher and loss.teacher_output == "hidden"),
            "entropy_from=teacher: the entropy is over the whole vocabulary, which needs a "
            "teacher's hidden states",
        ),
    ]
