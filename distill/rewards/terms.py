"""Terms of a verifiable reward: named functions of a response, summed with weights.

    reward = Σ weight · term

A term lies in [0, 1], or in [-1, 0] if it is a penalty. Like the graders, this file must not import
jax.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from models.errors import UserError

_NGRAM_TOKENS = 8  # tokens; shorter runs repeat in ordinary text too


@dataclasses.dataclass(frozen=True)
class Response:
    """A response with everything that a reward may depend on.

    `text` is the response without special tokens, and with the think tag that its prompt opened, if
    it did (`chat.decode_response`); `tokens` its ids, including the stop token;
    `outcome` the grader's result (distill.rewards.graders.OUTCOMES), and `score` how much is right,
    from 0 to 1 (`graders.get_score`); `thinking` the requested mode;
    `limit` the maximum number of tokens, the last `margin` of which are penalised for length.
    """

    text: str
    tokens: Sequence[int]
    finished: bool
    outcome: str
    thinking: bool
    limit: int
    margin: int
    score: float = 0.0


def accuracy_reward(response: Response) -> float:
    """Returns 1 for a right answer, else 0. A response that reached the length limit gets 0."""
    return float(response.finished and response.outcome == "correct")


def score_reward(response: Response) -> float:
    """Returns how much of a response is right, from 0 to 1. A response that reached the length
    limit gets 0."""
    return response.score if response.finished else 0.0


def is_well_formed(text: str, thinking: bool) -> bool:
    """Returns True for one closed think block at the start (thinking mode), or for no think tag.

    A block that the prompt opened counts, since its tag is put back (`chat.decode_response`).
    """
    opened, closed = text.count("<think>"), text.count("</think>")
    if not thinking:
        return not opened and not closed
    return opened == closed == 1 and text.lstrip().startswith("<think>")


def format_reward(response: Response) -> float:
    """Returns 1 for a well-formed response with an answer (see `is_well_formed`), else 0."""
    answered = (
        bool(response.text.rpartition("</think>")[2].strip()) and response.outcome != "no_answer"
    )
    return float(
        response.finished and is_well_formed(response.text, response.thinking) and answered
    )


def overlong_reward(response: Response) -> float:
    """Returns 0 up to limit - margin tokens, then falls linearly to -1 at the limit.

    A response cut at the limit gets -1. This is DAPO's soft overlong punishment (arXiv 2503.14476,
    eq. 13), in tokens.
    """
    if not response.finished:
        return -1.0
    excess = len(response.tokens) - (response.limit - response.margin)
    return -min(1.0, max(0.0, excess / response.margin)) if response.margin else 0.0


def repetition_reward(response: Response) -> float:
    """Returns minus the share of the response's runs of 8 tokens that occurred before in it."""
    return compute_repetition(response.tokens)


def compute_repetition(tokens: Sequence[int]) -> float:
    """Computes `repetition_reward` of token ids."""
    runs = [tuple(tokens[i : i + _NGRAM_TOKENS]) for i in range(len(tokens) - _NGRAM_TOKENS + 1)]
    return -(1 - len(set(runs)) / len(runs)) if runs else 0.0


REWARD_TERMS = {
    "correct": accuracy_reward,
    "score": score_reward,
    "format": format_reward,
    "length": overlong_reward,
    "repetition": repetition_reward,
}


def compute_rewards(
    responses: Sequence[Response], weights: Mapping[str, float]
) -> tuple[list[float], dict[str, list[float]]]:
    """Computes the reward of each response, and the values of each term that has a weight.

    Raises UserError for a weight of an unknown term.
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
