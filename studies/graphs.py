"""Generates reasoning problems over a dependency graph of quantities, told as text.

Boxes: red 4, blue 7, green 2.      <think>                  Three boxes change their contents one
green gains 3, red times blue,      472                      statement at a time; counts are last
blue loses green.                   red times blue:4*7=8,872     digits of results. A solution works
How many in blue?                   green gains 3:2+3=5,875      out the statements one by one, and
                                    blue loses green:7-5=2,825   writes the contents of all boxes
                                    </think>                 after each.

                                    2

Each statement makes a new quantity from two earlier ones or a number. Those that do not depend on
one another may be worked out in any order, so there are many right solutions, and a model of them
is uncertain about what comes next. What follows a slip depends on the slip: it leads to contents
that no right solution has. The design is iGSM's (arXiv 2407.20311), with few words. A problem is a
pure function of (seed, index, split, operations).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SPLITS = ("train", "valid", "test")
BOXES = ("red", "blue", "green")
OPERATORS = {"gains": "+", "loses": "-", "times": "*"}
MODULUS = 10
IN_ORDER = 0.7  # share of a solution's lines that follow the order of the statements
MAX_OPERATIONS = 12


@dataclass(frozen=True)
class Statement:
    """A change of box `target` by the contents of box `source`, or, if that is -1, by `number`."""

    target: int
    operator: str  # a key of OPERATORS
    source: int
    number: int

    def tell(self) -> str:
        operand = BOXES[self.source] if self.source >= 0 else str(self.number)
        return f"{BOXES[self.target]} {self.operator} {operand}"

    def needs_order(self, other: "Statement") -> bool:
        """Returns True if this and the other statement cannot change places."""
        return self.target in (other.target, other.source) or other.target == self.source


def make_row(seed: int, index: int, split: str, operations: tuple[int, int]) -> dict[str, Any]:
    """Makes problem number `index` of a split as a training row: question, answer, response,
    level, and the contents of all boxes in the end.

    The number of statements, the level, is uniform in the inclusive range `operations`. The
    expression of the answer decides the split, whatever the seed: one in ten is a test problem's
    and one in ten a validation problem's, so splits share no problem, not even in another order.

    Raises:
      ValueError: for an unknown split, or a range that is not 1 <= low <= high <= MAX_OPERATIONS.
    """
    low, high = operations
    if split not in SPLITS or not 1 <= low <= high <= MAX_OPERATIONS:
        raise ValueError(f"no split {split!r} of {SPLITS}, or no range of operations {operations}")
    rng = np.random.default_rng((seed, index, SPLITS.index(split)))
    count = int(rng.integers(low, high + 1))
    contents, statements = draw_problem(rng, count)
    while assign_split(write_expression(contents, statements)) != split:
        contents, statements = draw_problem(rng, count)
    asked, told = statements[-1].target, ", ".join(x.tell() for x in statements)
    given = ", ".join(f"{box} {count}" for box, count in zip(BOXES, contents, strict=True))
    lines = solve(contents, [statements[i] for i in draw_order(rng, statements)])
    answer = lines[-1][asked - len(BOXES)]
    return {
        "id": f"graphs-{split}-{seed}-{index}",
        "question": f"Boxes: {given}. {told}. How many in {BOXES[asked]}?",
        "answer": answer,
        "response": "\n".join(["<think>", *lines, "</think>", "", answer]),
        "level": count,
        "contents": lines[-1][-len(BOXES) :],
    }


def draw_problem(rng: np.random.Generator, count: int) -> tuple[list[int], list[Statement]]:
    """Draws the boxes' contents and `count` statements."""
    contents = [int(x) for x in rng.integers(MODULUS, size=len(BOXES))]
    statements = []
    for _ in range(count):
        target, offset = int(rng.integers(len(BOXES))), int(rng.integers(len(BOXES)))
        source = (target + offset) % len(BOXES) if offset else -1
        operator = tuple(OPERATORS)[int(rng.integers(len(OPERATORS)))]
        statements.append(Statement(target, operator, source, int(rng.integers(2, MODULUS))))
    return contents, statements


def draw_order(rng: np.random.Generator, statements: Sequence[Statement]) -> list[int]:
    """Draws an order in which statements that depend on one another keep their places: mostly the
    first that may come next, else any that may."""
    order, waiting = [], list(range(len(statements)))
    while waiting:
        ready = [
            i
            for i in waiting
            if not any(statements[j].needs_order(statements[i]) for j in waiting if j < i)
        ]
        is_first = rng.random() < IN_ORDER
        chosen = ready[0] if is_first else ready[int(rng.integers(len(ready)))]
        waiting.remove(chosen)
        order.append(chosen)
    return order


def solve(contents: Sequence[int], statements: Sequence[Statement]) -> list[str]:
    """Returns the lines of a solution: the contents, then each statement with what it makes."""
    contents = list(contents)
    lines = ["".join(map(str, contents))]
    for x in statements:
        left, right = contents[x.target], contents[x.source] if x.source >= 0 else x.number
        contents[x.target] = compute(x.operator, left, right)
        after = "".join(map(str, contents))
        result = contents[x.target]
        lines.append(f"{x.tell()}:{left}{OPERATORS[x.operator]}{right}={result},{after}")
    return lines


def compute(operator: str, left: int, right: int) -> int:
    """Returns the last digit of the result; of a negative one that of its residue, 3-5=8."""
    return {"gains": left + right, "loses": left - right, "times": left * right}[operator] % MODULUS


def write_expression(contents: Sequence[int], statements: Sequence[Statement]) -> str:
    """Returns what the last statement makes as an expression of the given numbers."""
    expressions = [str(x) for x in contents]
    for x in statements:
        operand = expressions[x.source] if x.source >= 0 else str(x.number)
        expressions[x.target] = f"({expressions[x.target]}{OPERATORS[x.operator]}{operand})"
    return expressions[statements[-1].target]


def assign_split(expression: str) -> str:
    """Returns the split of an expression."""
    return {0: "test", 1: "valid"}.get(zlib.crc32(expression.encode()) % 10, "train")
