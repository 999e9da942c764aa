"""Terms of a verifiable reward: each one named function of a response, combined by weights.

    reward = Σ weight · term

A term lies in [0, 1], or in [-1, 0] where it is a penalty. Like the graders, this file does without
jax.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from models.errors import UserError

_RUN = 8  # tokens: shorter runs repeat in honest text too


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


def correct(r: Response) -> float:
    """1 for a right answer; a response that met the length limit has none, whatever it holds."""
    return float(r.finished and r.outcome == "correct")


def well_formed(text: str, thinking: bool) -> bool:
    """One closed think block before anything else, in thinking mode; no think tag in the other.

    The template of some models writes the opening tag, so that the response holds none.
    """
    opened, closed = text.count("<think>"), text.count("</think>")
    if not thinking:
        return not opened and not closed
    return closed == 1 and (not opened or (opened == 1 and text.lstrip().startswith("<think>")))


def format(r: Response) -> float:
    """1 for one closed think block (in thinking mode; none in the other), then an answer."""
    answered = bool(r.text.rpartition("</think>")[2].strip()) and r.outcome != "no_answer"
    return float(r.finished and well_formed(r.text, r.thinking) and answered)


def length(r: Response) -> float:
    """0 up to limit - margin tokens, falling to -1 at the limit; -1 for a response cut there.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), counted in tokens.
    """
    if not r.finished:
        return -1.0
    excess = len(r.tokens) - (r.limit - r.margin)
    return -min(1.0, max(0.0, excess / r.margin)) if r.margin else 0.0


def repetition(r: Response) -> float:
    """Minus the share of the response's runs of 8 tokens that it has held before."""
    return repeated(r.tokens)


def repeated(tokens: Sequence[int]) -> float:
    """`repetition` of bare tokens."""
    runs = [tuple(tokens[i : i + _RUN]) for i in range(len(tokens) - _RUN + 1)]
    return -(1 - len(set(runs)) / len(runs)) if runs else 0.0


TABLE = {"correct": correct, "format": format, "length": length, "repetition": repetition}


def rewards(
    responses: Sequence[Response], weights: Mapping[str, float]
) -> tuple[list[float], dict[str, list[float]]]:
    """The reward of each response, and of each term with a weight its values.

    Raises UserError for a weight of a term that is not there.
    """
    for name in weights:
        if name not in TABLE:
            raise UserError(f"reward: {name!r} is none of {', '.join(TABLE)}")
    values = {
        name: [TABLE[name](r) for r in responses] for name, weight in weights.items() if weight
    }
    totals = [
        sum(weights[name] * column[i] for name, column in values.items())
        for i in range(len(responses))
    ]
    return totals, values
