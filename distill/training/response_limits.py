"""The most tokens that a sampled response may have, by the step of its stage; checks of options.

With `response_schedule` the first responses of a stage are short. They cost less to sample, to
score and to train, and on-policy distillation, which needs no answer, learns most from prefixes:
"Fast and Effective On-Policy Distillation from Reasoning Prefixes" (arXiv 2602.15260), and, with
lengths that grow in steps as here, arXiv 2605.31490.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from distill import rollout
from distill.objectives.losses import Loss
from models import checks
from models.checks import Range
from models.errors import UserError


def check_schedule(name: str, s: ConfigDict, has_rewards: bool, sampled_rows: int) -> None:
    """Raises UserError for a `response_schedule` of stage `name` that cannot be followed."""
    pairs, limit = s.response_schedule, s.max_response_tokens
    if not pairs:
        return
    key = f"config.{name}.response_schedule"
    whole = Range(whole=True)
    if not all(isinstance(x, tuple | list) and len(x) == 2 for x in pairs) or not all(
        number in whole for pair in pairs for number in pair
    ):
        raise UserError(
            f"{key}={pairs}: must be pairs of a step and of tokens from it on, as "
            f"((0, 64), (200, {limit}))"
        )
    steps, tokens = zip(*pairs, strict=True)
    if not sampled_rows:
        raise UserError(f"{key}: {s.objective} samples nothing; set ()")
    if has_rewards:
        raise UserError(f"{key}: a response that it cuts has no answer to reward; set ()")
    if steps[0] != 0:
        raise UserError(f"{key}={pairs}: must begin with step 0 of the stage")
    if sorted(set(steps)) != list(steps):
        raise UserError(f"{key}={pairs}: steps must ascend")
    if steps[-1] >= s.steps:
        raise UserError(f"{key}={pairs}: step {steps[-1]} is beyond the {s.steps} of the stage")
    if tokens[0] < 1 or sorted(tokens) != list(tokens):
        raise UserError(f"{key}={pairs}: tokens must be at least 1, and never become fewer")
    if tokens[-1] > limit:
        raise UserError(
            f"{key}={pairs}: {tokens[-1]} tokens exceed max_response_tokens={limit}, for which the "
            "cache and the batches are planned; raise it, or end at it"
        )


def get_response_limit(s: ConfigDict, stage_step: int) -> int:
    """Returns the most tokens of the responses that begin in a step, counted in its stage."""
    begun = [tokens for step, tokens in s.response_schedule if step <= stage_step]
    return begun[-1] if begun else s.max_response_tokens


def describe_schedule(s: ConfigDict) -> str:
    """Returns what is said of the schedule before step 0: "" without one."""
    parts = [f"{tokens:,} from step {step:,}" for step, tokens in s.response_schedule]
    return f" ({', '.join(parts)})" if parts else ""


def is_truncated(s: ConfigDict, x: rollout.Sequence) -> bool:
    """Returns True for a response that was cut at max_response_tokens, not by the schedule."""
    return x.finish_reason == "length" and x.limit == s.max_response_tokens


def measure_cuts(
    s: ConfigDict, stage_step: int, sequences: Sequence[rollout.Sequence]
) -> dict[str, float]:
    """Returns what the schedule did in a step: the limit of the responses that began in it, and the
    share of those that ended in it which it cut. Nothing without a schedule."""
    if not s.response_schedule:
        return {}
    cut = sum(x.finish_reason == "length" and not is_truncated(s, x) for x in sequences)
    return {
        "rollout/response_limit": get_response_limit(s, stage_step),
        "rollout/cut_by_schedule": cut / max(1, len(sequences)),
    }


def check_drift(name: str, s: ConfigDict, loss: Loss, sampled_rows: int) -> None:
    """Raises UserError for a `drift` of stage `name` that is out of range, or does not apply."""
    key = f"config.{name}.drift"
    checks.check_fields(s.drift, {"kl": Range(off="no checks")}, f"{key}.")
    if not s.drift.kl:
        return
    checks.check_fields(s.drift, {"every": Range(1, whole=True)}, f"{key}.")
    if s.drift.every >= s.max_response_tokens:
        raise UserError(
            f"{key}.every={s.drift.every}: no response goes on after max_response_tokens="
            f"{s.max_response_tokens}; set fewer"
        )
    for refused, why in (
        (not sampled_rows, f"{s.objective} samples nothing"),
        (not loss.teacher, f"{s.objective} has no teacher to drift from"),
        (loss.reward > 0, "a response that is ended has no answer to reward"),
        (
            loss.teacher_output != "hidden",
            f"needs a teacher's hidden states, not loss.teacher_output={loss.teacher_output}",
        ),
        (s.rollout.asynchronous, "rollout.asynchronous samples while the teachers score a step"),
        (s.rollout.token_budget, "rollout.token_budget keeps responses for which no check is due"),
    ):
        if refused:
            raise UserError(f"{key}.kl={s.drift.kl:g}: {why}; set 0")
