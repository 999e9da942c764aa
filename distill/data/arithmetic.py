"""Generates word problems that keep one running integer between 1 and 99.

Ann has 67 coins, loses 3, keeps one of 4 equal piles, gets 5 times as many. How many coins?

<think>          The answer follows the working. A problem is a pure function of
67-3=64          (seed, index, split), so a resumed run reads the same problems,
64/4=16          and none need to be stored.
16*5=80
</think>

80
"""

import operator
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.errors import UserError

Skeleton = tuple[int, tuple[tuple[str, int], ...]]

SPLITS = ("train", "test")
NAMES = ("Ann", "Ben", "Eva", "Ida", "Leo", "Max", "Tom", "Zoe")
OBJECTS = ("coins", "books", "cards", "pens", "eggs", "nuts")
# Short phrases: a prompt's length is the rollout's cost.
PHRASES = {
    "+": ("finds {} more", "buys {}"),
    "-": ("loses {}", "gives away {}"),
    "*": ("gets {} times as many", "multiplies them by {}"),
    "/": ("keeps one of {} equal piles", "divides them by {}"),
}
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


@dataclass(frozen=True)
class Problem:
    """A problem; `skeleton` is its arithmetic alone, without names, objects and wording."""

    question: str
    solution: str
    answer: str
    operations: int
    skeleton: Skeleton


def make_problem(seed: int, index: int, split: str, operations: tuple[int, int]) -> Problem:
    """Makes problem number `index` of a split; the same arguments always give the same problem.

    The number of operations is uniform in the inclusive range `operations`. Raises UserError for
    a split other than "train" or "test", a range that is not 1 <= low <= high, or a negative seed.
    """
    if split not in SPLITS:
        raise UserError(f"split: {split!r} is neither {' nor '.join(SPLITS)}")
    if len(operations) != 2 or not all(isinstance(count, int) for count in operations):
        raise UserError(f"operations: {operations} is not two whole numbers, the fewest and most")
    low, high = operations
    if not 1 <= low <= high:
        raise UserError(f"operations: ({low}, {high}) is not a range 1 <= low <= high")
    if seed < 0 or index < 0:
        raise UserError(f"seed: seed {seed} and index {index} must not be negative")
    rng = np.random.default_rng((seed, index, SPLITS.index(split)))
    count = int(rng.integers(low, high + 1))
    skeleton = _draw_skeleton(rng, count)
    while assign_split(skeleton) != split:
        skeleton = _draw_skeleton(rng, count)

    value, steps = skeleton
    name, things = _draw_choice(rng, NAMES), _draw_choice(rng, OBJECTS)
    clauses, lines = [f"{name} has {value} {things}"], []
    for symbol, operand in steps:
        clauses.append(_draw_choice(rng, PHRASES[symbol]).format(operand))
        result = OPERATORS[symbol](value, operand)
        lines.append(f"{value}{symbol}{operand}={result}")
        value = result
    question = f"{', '.join(clauses)}. How many {things}?"
    return Problem(question, "\n".join(lines), str(value), count, skeleton)


def assign_split(skeleton: Skeleton) -> str:
    """Returns the split of a skeleton, whatever the seed: one in ten is "test"."""
    start, steps = skeleton
    text = " ".join([str(start), *(f"{symbol}{operand}" for symbol, operand in steps)])
    return "test" if zlib.crc32(text.encode()) % 10 == 0 else "train"


def to_messages(problem: Problem) -> list[dict[str, str]]:
    """Returns the conversation that poses the problem: one user turn."""
    return [{"role": "user", "content": problem.question}]


def to_response(problem: Problem) -> str:
    """Returns the assistant's reference turn: the working in a think block, then the answer."""
    return f"<think>\n{problem.solution}\n</think>\n\n{problem.answer}"


def _draw_skeleton(rng: np.random.Generator, count: int) -> Skeleton:
    """Draws a start in 2..99 and `count` operations: first each one's kind, then its operand."""
    start = value = int(rng.integers(2, 100))
    steps = []
    for _ in range(count):
        operands = _find_valid_operands(value)
        symbol = _draw_choice(rng, tuple(operands))
        operand = operands[symbol][int(rng.integers(len(operands[symbol])))]
        steps.append((symbol, operand))
        value = OPERATORS[symbol](value, operand)
    return start, tuple(steps)


def _find_valid_operands(value: int) -> dict[str, list[int]]:
    """Returns, for each operator that can keep the value in 1..99, the operands that do."""
    operands = {
        "+": list(range(2, min(20, 99 - value) + 1)),
        "-": list(range(2, min(20, value - 1) + 1)),
        "*": list(range(2, min(9, 99 // value) + 1)),
        "/": [k for k in range(2, 10) if value % k == 0 and value // k >= 2],
    }
    return {symbol: valid for symbol, valid in operands.items() if valid}


def _draw_choice(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]
