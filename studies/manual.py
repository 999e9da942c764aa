"""Generates price lists, and questions that only a reader of the list can answer.

A cap costs 4. A pen costs 7. A map costs 2. ...          (the manual)
What do a pen and a cap cost?

<think>
pen 7, cap 4: 7+4=11;
</think>

11

A teacher is trained on a manual of its own in each row, in the system's turn, so it learns to read
one and no prices. A student then learns a single, fixed manual without reading it. A row is a pure
function of (seed, index, split, manual).
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.errors import UserError

SPLITS = ("train", "valid", "test")
THINGS = ("bag", "bed", "box", "cap", "cup", "fan", "hat", "key", "map", "pen")
MAX_THINGS = 3  # in a question
PRICES = (1, 10)  # a range


def make_manual(seed: int) -> dict[str, int]:
    """Returns the price of each thing in a fixed manual.

    Raises:
      UserError: if the seed is negative.
    """
    if seed < 0:
        raise UserError(f"seed: {seed} must not be negative")
    return _draw_manual(np.random.default_rng((seed, 0, len(SPLITS))))  # no row's generator


def write_manual(manual: Mapping[str, int]) -> str:
    """Returns the manual as the text that its reader finds in the system's turn."""
    return " ".join(f"A {thing} costs {price}." for thing, price in manual.items())


def make_row(
    seed: int, index: int, split: str, manual: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Makes question number `index` of a split: answer, response, level (the number of things).

    manual: the fixed manual, which the row's `question` does not show; None: the row has
      `messages` with a manual of its own in the system's turn.

    Of the sets of several things two in ten are test questions' and one in ten is a validation
    question's, whatever the seed. Single things are in training only.

    Raises:
      UserError: for an unknown split, a negative seed or index, or a manual of other things.
    """
    if split not in SPLITS:
        raise UserError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise UserError(f"seed: seed {seed} and index {index} must not be negative")
    if manual is not None and set(manual) != set(THINGS):
        raise UserError(f"manual: its things are not {', '.join(THINGS)}")
    rng = np.random.default_rng((seed, index, SPLITS.index(split)))
    prices = _draw_manual(rng) if manual is None else manual
    count = int(rng.integers(1 if split == "train" else 2, MAX_THINGS + 1))
    things = _draw_things(rng, count)
    while assign_split(things) != split:
        things = _draw_things(rng, count)
    question = _ask(things)
    total, sums = prices[things[0]], []
    for thing in things[1:]:
        sums.append(f"{total}+{prices[thing]}={total + prices[thing]};")
        total += prices[thing]
    read = ", ".join(f"{thing} {prices[thing]}" for thing in things)
    thoughts = f"{read}: {' '.join(sums)}" if sums else f"{read};"
    row = {
        "id": f"manual-{split}-{seed}-{index}",
        "question": question,
        "answer": str(total),
        "response": f"<think>\n{thoughts}\n</think>\n\n{total}",
        "level": count,
    }
    return show(row, prices) if manual is None else row


def show(row: Mapping[str, Any], manual: Mapping[str, int]) -> dict[str, Any]:
    """Returns a row of a `question` with `messages` instead, the manual in the system's turn."""
    turns = (("system", write_manual(manual)), ("user", row["question"]))
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"id": row["id"], "messages": messages} | {
        key: value for key, value in row.items() if key != "question"
    }


def assign_split(things: list[str]) -> str:
    """Returns the split of the things that a question is about, in whatever order."""
    if len(things) == 1:
        return "train"
    text = " ".join(sorted(things))
    return {0: "test", 1: "test", 2: "valid"}.get(zlib.crc32(text.encode()) % 10, "train")


def _draw_manual(rng: np.random.Generator) -> dict[str, int]:
    return {THINGS[i]: int(rng.integers(*PRICES)) for i in rng.permutation(len(THINGS))}


def _draw_things(rng: np.random.Generator, count: int) -> list[str]:
    return [THINGS[i] for i in rng.integers(len(THINGS), size=count)]


def _ask(things: list[str]) -> str:
    named = [f"a {thing}" for thing in things]
    if len(named) == 1:
        return f"What does {named[0]} cost?"
    return f"What do {', '.join(named[:-1])} and {named[-1]} cost?"
