"""Generates a manual's rules, and requests whose responses are to keep them.

No commas. End with done.                                 (the manual)

Name animals. Put 2 words in [ ].

owl [cat] [pig] fox done

The response keeps the rules of both. They are those of studies/instructions.py. In training a
teacher sees a different manual before each request, so it learns to follow whichever it reads. A
student then learns to follow one fixed manual without reading it. A row is a pure function of
(seed, index, split, manual, is_shown).
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.errors import UserError
from studies import instructions

SPLITS = ("train", "valid", "test")
# Constraints that do not depend on a request.
RULES = (
    "punctuation:no_comma",
    "startend:end_checker",
    "startend:quotation",
    "keywords:existence",
    "detectable_format:title",
    "detectable_content:number_placeholders",
    "detectable_format:number_highlighted_sections",
    "detectable_content:postscript",
)
LENGTH = 2  # rules of a manual
MAX_OWN = 2  # constraints of a request beside them

Manual = Mapping[str, dict[str, Any]]  # IFEval's name of a rule: its arguments


def make_manual(seed: int) -> dict[str, dict[str, Any]]:
    """Returns the rules of a fixed manual.

    Raises:
      UserError: if the seed is negative.
    """
    if seed < 0:
        raise UserError(f"seed: {seed} must not be negative")
    return _draw_manual(np.random.default_rng((seed, 0, len(SPLITS))))  # no row's generator


def write_manual(manual: Manual, rng: np.random.Generator | None = None) -> str:
    """Returns the manual as its reader finds it; without `rng` in the words of a fixed one."""
    return " ".join(instructions.write_constraints(rng or np.random.default_rng(0), manual))


def make_row(
    seed: int, index: int, split: str, manual: Manual | None = None, is_shown: bool = False
) -> dict[str, Any]:
    """Makes request number `index` of a split, in IFEval's published form, as
    `instructions.make_row` does. Its constraints are the manual's and those of the request, whose
    number, up to MAX_OWN, is its level.

    manual: the fixed manual; None: the row shows one of its own.
    is_shown: puts the fixed manual, too, before the request.

    One request in five is test, one in ten valid, whatever the seed.

    Raises:
      UserError: for an unknown split, or a negative seed or index.
    """
    if split not in SPLITS:
        raise UserError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise UserError(f"seed: seed {seed} and index {index} must not be negative")
    rng = np.random.default_rng((seed, index, SPLITS.index(split)))
    rules = _draw_manual(rng) if manual is None else manual
    request = _draw_request(rng, rules)
    while assign_split(request.prompt) != split:
        request = _draw_request(rng, rules)
    prompt = request.prompt
    if manual is None:
        prompt = f"{write_manual(rules, rng)}\n\n{prompt}"
    elif is_shown:
        prompt = f"{write_manual(rules)}\n\n{prompt}"
    return {
        "id": f"manual-{split}-{seed}-{index}",
        "prompt": prompt,
        "question": prompt,
        "instruction_id_list": list(request.constraints),
        "kwargs": list(request.constraints.values()),
        "response": instructions.draw_response(rng, request),
        "thinking": False,
        "level": len(request.constraints) - len(rules),
    }


def assign_split(request: str) -> str:
    """Returns the split of a request, whatever the manual."""
    return {0: "test", 1: "test", 2: "valid"}.get(zlib.crc32(request.encode()) % 10, "train")


def _draw_manual(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    names = [RULES[i] for i in rng.permutation(len(RULES))[:LENGTH]]
    return instructions.draw_arguments(rng, next(iter(instructions.TOPICS)), names)[0]


def _draw_request(rng: np.random.Generator, rules: Manual) -> instructions.Request:
    """Draws a request with up to MAX_OWN constraints, none of which is of the rules' kinds."""
    topics, others = [*instructions.TOPICS], [x for x in instructions.CONSTRAINTS if x not in rules]
    topic = topics[rng.integers(len(topics))]
    own = [others[i] for i in rng.permutation(len(others))[: rng.integers(MAX_OWN + 1)]]
    drawn, named = instructions.draw_arguments(rng, topic, [*rules, *own])
    prompt = instructions.write_prompt(rng, topic, {name: drawn[name] for name in own})
    return instructions.Request(topic, {**drawn, **rules}, named, prompt)
