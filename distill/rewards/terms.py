"""Terms of a verifiable reward: each one named function of a response, combined by weights.

    reward = Σ weight · term

A term lies in [0, 1], or in [-1, 0] where it is a penalty. Like the graders, this file does without
jax.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from models.errors import UserError

_NGRAM_TOKENS = 8  # tokens: shorter runs repeat in honest text too


@dataclasses.dataclass(frozen=True)
class Response:
    """What a reward can depend on.

    `text` is what the model wrote, without special tokens; `tokens` its ids, stop token included;
    `outcome` the grader's word (distill.rewards.graders.OUTCOMES); `thinking` the mode that was
    asked for; `limit` the most tokens that it could have had and `margin` how many of these are too
    many.
    """

    text: str
    tokens: Sequence[int]
    finished: bool
    outcome: str
    thinking: bool
    limit: int
    margin: int


def accuracy_reward(response: Response) -> float:
    """1 for a right answer; a response that met the length limit has none, whatever it holds."""
    return float(response.finished and response.outcome == "correct")


def is_well_formed(text: str, thinking: bool) -> bool:
    """One closed think block before anything else, in thinking mode; no think tag in the other.

    The template of some models writes the opening tag, so that the response holds none.
    """
    opened, closed = text.count("<think>"), text.count("</think>")
    if not thinking:
        return not opened and not closed
    return closed == 1 and (not opened or (opened == 1 and text.lstrip().startswith("<think>")))


def format_reward(response: Response) -> float:
    """1 for one closed think block (in thinking mode; none in the other), then an answer."""
    answered = (
        bool(response.text.rpartition("</think>")[2].strip()) and response.outcome != "no_answer"
    )
    return float(
        response.finished and is_well_formed(response.text, response.thinking) and answered
    )


def overlong_reward(response: Response) -> float:
    """0 up to limit - margin tokens, falling to -1 at the limit; -1 for a response cut there.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), counted in tokens.
    """
    if not response.finished:
        return -1.0
    excess = len(response.tokens) - (response.limit - response.margin)
    return -min(1.0, max(0.0, excess / response.margin)) if response.margin else 0.0


def repetition_reward(response: Response) -> float:
    """Minus the share of the response's runs of 8 tokens that it has held before."""
    return compute_repetition(response.tokens)


def compute_repetition(tokens: Sequence[int]) -> float:
    """`repetition` of bare tokens."""
    runs = [tuple(tokens[i : i + _NGRAM_TOKENS]) for i in range(len(tokens) - _NGRAM_TOKENS + 1)]
    return -(1 - len(set(runs)) / len(runs)) if runs else 0.0


REWARD_TERMS = {
    "correct": accuracy_reward,
    "format": format_reward,
    "length": overlong_reward,
    "repetition": repetition_reward,
}


def compute_rewards(
    responses: Sequence[Response], weights: Mapping[str, float]
) -> tuple[list[float], dict[str, list[float]]]:
    """The reward of each response, and of each term with a weight its values.

    Raises UserError for a weight of a term that is not there.
    """
    for name in weights:
        if name not in REWARD_TERMS:
            raise UserError(f"reward: {name!r} is none of {', '.join(REWARD_TERMS)}")
    values = {
        name: [REWARD_TERMS[name](r) for r in responses]
        for name, weight in weights.items()
        if weight
    }
    totals = [
        sum(weights[name] * column[i] for name, column in values.items())
        for i in range(len(responses))
    ]
    return totals, values
