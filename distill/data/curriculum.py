"""Which prompts a step reads by their difficulty, and in which mode: functions of (seed, step).

Difficulty is a column of the rows, or what the student was measured at: 1 - its pass rate, from a
file of graded samples. It depends on nothing that a run does, so a resumed run reads the same, and
so do any number of processes.
"""

import functools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from distill.data import sources
from distill.data.examples import Example
from models.errors import UserError

CURRICULA = ("", "ordered", "widening", "weighted")

MODE_BLOCK = 32  # in so many rows that are read the modes have their shares

# (number of the draw, the step whose place in the stage counts, rows) -> numbers of examples
Order = Callable[[int, int, int], list[int]]


def is_thinking(share: float, ordinal: int, seed: int) -> bool:
    """Whether what is read as number `ordinal` is in thinking mode: in every MODE_BLOCK of them as
    many as `share` says, in an order drawn for that block."""
    block, place = divmod(ordinal, MODE_BLOCK)
    due = [math.floor(share * MODE_BLOCK * edge + 1e-6) for edge in (block, block + 1)]
    return bool(_shuffle_block(seed, block)[place] < due[1] - due[0])


@functools.lru_cache(maxsize=16)
def _shuffle_block(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng((seed, block, 1)).permutation(MODE_BLOCK)


def make_stage_order(
    c: ConfigDict, size: int, read_example: Callable[[int], Example], steps: int, seed: int
) -> Order | None:
    """The order that a stage's `data.curriculum` asks for over its `steps`; None: no other.

    Args:
      c: the stage's `data`.
      size: how many examples there are; 0: without end.
      example: an example by its number; all are read.

    Raises:
      UserError: if what is read has no end, no one order, or no use for this one.
    """
    if not c.curriculum:
        return None
    why = {
        "config.data.difficulty says what is easy": not c.difficulty,
        "is of one source, not of a mixture": bool(c.mixture),
        "reads all rows before the first step, so none are streamed": c.streaming,
        "takes a source with an end (config.data.max_rows)": not size,
    }
    for reason, refused in why.items():
        if refused:
            raise UserError(f"config.data.curriculum={c.curriculum}: {reason}")
    difficulty_N = _check_difficulties(c.curriculum, [read_example(index) for index in range(size)])
    return make_order(c.curriculum, difficulty_N, steps, seed)


def mean_difficulty(difficulties: Sequence[float | None]) -> dict[str, float]:
    """The metric of what a step reads, where it is known."""
    known = [x for x in difficulties if x is not None]
    return {"data/difficulty": sum(known) / len(known)} if known else {}


def make_order(curriculum: str, difficulty_N: np.ndarray, steps: int, seed: int) -> Order:
    """The examples of each step of a stage of `steps`, each at most once a step where there are
    enough of them.

    ordered: a window that moves from the easiest to the hardest, evenly over the stage.
    widening: any of the easiest c·N, c = √((step + 1) / steps) (competence: arXiv 1903.09848,
      eq. 7, from nothing).
    weighted: drawn by weights p(1 - p) (arXiv 2603.11178); what is always or never right has none.
    """
    sorted_N = np.argsort(difficulty_N, kind="stable")
    N = len(sorted_N)
    with np.errstate(divide="ignore"):
        logits_N = (
            np.log(difficulty_N * (1 - difficulty_N)) if curriculum == "weighted" else sorted_N
        )

    def draw_examples(number: int, step: int, count: int) -> list[int]:
        rng = np.random.default_rng((seed, number, 2))
        if curriculum == "weighted":
            # Gumbel noise: the largest are a draw without replacement.
            drawn_N = np.argsort(-(logits_N + rng.gumbel(size=N)), kind="stable")
            drawn = drawn_N[: np.count_nonzero(np.isfinite(logits_N))]
        elif curriculum == "ordered":
            begin = round(min(1.0, step / max(1, steps - 1)) * max(0, N - count))
            drawn = rng.permutation(sorted_N[begin : begin + count])
        else:
            width = math.ceil(N * math.sqrt(min(1.0, (step + 1) / steps)))
            drawn = rng.permutation(sorted_N[: max(width, count)])
        return [int(i) for i in np.resize(drawn, count)]

    return draw_examples


def _check_difficulties(curriculum: str, examples: list[Example]) -> np.ndarray:
    """The difficulty of each example; raises UserError naming one that `kind` has no use for."""
    difficulty_N = np.array([example.difficulty for example in examples], float)
    if curriculum == "weighted":
        for example, difficulty in zip(examples, difficulty_N, strict=True):
            if not 0 <= difficulty <= 1:
                raise UserError(
                    f"{example.where}: difficulty {difficulty:g}: config.data.curriculum=weighted "
                    "needs a rate, from 0 to 1"
                )
        if not (difficulty_N * (1 - difficulty_N)).any():
            raise UserError(
                "config.data.curriculum=weighted: every difficulty is 0 or 1, so p(1 - p) is 0"
            )
    return difficulty_N


def make_difficulty_fn(difficulty: str) -> Callable[[dict, Example], float | None]:
    """The function that gives an example its difficulty, as config.data.difficulty says.

    Raises UserError for a file that holds no pass rates; the function does so for a row without.
    """
    if not difficulty:
        return lambda row, example: None
    if not difficulty.endswith(".jsonl"):
        return lambda row, example: _parse_difficulty(row, difficulty, example.where)
    rates = load_pass_rates(difficulty)

    def lookup_difficulty(row: dict, example: Example) -> float:
        tokens = [e.prompt for e in (example, example.non_thinking_example) if e]
        for key in (*_list_prompt_keys(row), *(("prompt_tokens", tuple(ids)) for ids in tokens)):
            if key in rates:
                return 1 - rates[key]
        raise UserError(
            f"{example.where}: no pass rate of this prompt in config.data.difficulty={difficulty}"
        )

    return lookup_difficulty


def _parse_difficulty(row: dict, name: str, where: str) -> float:
    """A number, or a text with one in it: "Level 5"."""
    if name not in row:
        raise UserError(f"{where}: config.data.difficulty={name}: its columns are {sorted(row)}")
    value = row[name]
    if isinstance(value, str):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", value)
        value = float(numbers[0]) if len(numbers) == 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: config.data.difficulty={name}: {row[name]!r} is not a number")
    return float(value)


def _list_prompt_keys(row: dict) -> list[tuple[str, Any]]:
    """By what a row's prompt is known."""
    keys: list[tuple[str, Any]] = []
    if isinstance(row.get("prompt_tokens"), list):
        keys.append(("prompt_tokens", tuple(row["prompt_tokens"])))
    for name in ("messages", "question", "prompt"):
        if name in row:
            keys.append((name, json.dumps(row[name], sort_keys=True)))
    return keys


def load_pass_rates(path: str) -> dict[tuple[str, Any], float]:
    """The share of correct samples of each prompt, by each of its keys: of a file that `verify`
    wrote (a row a prompt) or `evaluate` did (a row a sample).

    Raises:
      UserError: naming a row without grades, or if the failures were left out.
    """
    rows, outcomes = sources.open_rows(path), defaultdict(list)
    for index in range(rows.size):
        row, where = rows.read_row(index), rows.locate_row(index)
        samples = row["samples"] if isinstance(row.get("samples"), list) else [row]
        right = [s.get("correct") if isinstance(s, dict) else None for s in samples]
        if any(not isinstance(x, bool) for x in right):
            raise UserError(f"{where}: samples that were not graded (verify --keep=all grades)")
        for key in _list_prompt_keys(row):
            outcomes[key] += right
    if not outcomes:
        raise UserError(f"{path}: no row has prompt_tokens, messages, question or prompt")
    rates = {key: sum(right) / len(right) for key, right in outcomes.items() if right}
    if all(rate == 1 for rate in rates.values()):
        raise UserError(f"{path}: every sample is correct; verify --keep=all keeps the others too")
    return rates
