"""Orders a stage's prompts by difficulty and draws their modes, as functions of (seed, step).

Difficulty is a column of the rows, or 1 - the student's measured pass rate, from a file of graded
samples. It depends on nothing that a run does, so a resumed run reads the same prompts, and so do
any number of processes.
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

MODE_BLOCK = 32  # in each run of so many examples the modes have their shares

# (number of the draw, step of the stage that sets the difficulty, count) -> indices of examples
Order = Callable[[int, int, int], list[int]]


def is_thinking(share: float, ordinal: int, seed: int) -> bool:
    """Returns True if the example read as number `ordinal` is in thinking mode: of each MODE_BLOCK
    as many as `share` says, in an order drawn for that block."""
    block, place = divmod(ordinal, MODE_BLOCK)
    before, after = (math.floor(share * MODE_BLOCK * b + 1e-6) for b in (block, block + 1))
    return bool(_shuffle_block(seed, block)[place] < after - before)


@functools.lru_cache(maxsize=16)
def _shuffle_block(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng((seed, block, 1)).permutation(MODE_BLOCK)


def make_stage_order(
    c: ConfigDict, size: int, read_example: Callable[[int], Example], steps: int, seed: int
) -> Order | None:
    """Makes the order that a stage's `data.curriculum` asks for over its `steps`; None if it asks
    for none.

    Args:
      c: the stage's `data` config.
      size: number of examples; 0: without end.
      read_example: reads an example by its number; called for all of them.

    Raises:
      UserError: if the source is endless, streamed or a mixture, or its difficulties do not suit.
    """
    if not c.curriculum:
        return None
    refusals = {
        "needs config.data.difficulty, which says what is easy": not c.difficulty,
        "orders one source, not a mixture": bool(c.mixture),
        "reads all rows before the first step, so none are streamed": c.streaming,
        "takes a source with an end (config.data.max_rows)": not size,
    }
    for reason, is_refused in refusals.items():
        if is_refused:
            raise UserError(f"config.data.curriculum={c.curriculum}: {reason}")
    difficulty_N = _check_difficulties(c.curriculum, [read_example(index) for index in range(size)])
    return make_order(c.curriculum, difficulty_N, steps, seed)


def mean_difficulty(difficulties: Sequence[float | None]) -> dict[str, float]:
    """Returns the metric of a step's examples; none if no difficulty is known."""
    known = [x for x in difficulties if x is not None]
    return {"data/difficulty": sum(known) / len(known)} if known else {}


def make_order(curriculum: str, difficulty_N: np.ndarray, steps: int, seed: int) -> Order:
    """Makes the order of a stage of `steps`; no example comes twice in a step if there are enough.

    ordered: a window that moves from the easiest to the hardest, evenly over the stage.
    widening: any of the easiest c·N, c = √((step + 1) / steps) (competence: arXiv 1903.09848,
      eq. 7, starting at 0).
    weighted: drawn with weights p(1 - p) (arXiv 2603.11178), which are 0 for examples that are
      always or never right.
    """
    sorted_N = np.argsort(difficulty_N, kind="stable")
    N = len(sorted_N)

    def draw_examples(number: int, step: int, count: int) -> list[int]:
        rng = np.random.default_rng((seed, number, 2))
        if curriculum == "weighted":
            with np.errstate(divide="ignore"):
                logits_N = np.log(difficulty_N * (1 - difficulty_N))
            # The largest after adding Gumbel noise are a draw without replacement.
            drawn_N = np.argsort(-(logits_N + rng.gumbel(size=N)), kind="stable")
            drawn = drawn_N[: np.count_nonzero(np.isfinite(logits_N))]
        elif curriculum == "ordered":
            start = round(min(1.0, step / max(1, steps - 1)) * max(0, N - count))
            drawn = rng.permutation(sorted_N[start : start + count])
        else:
            width = math.ceil(N * math.sqrt(min(1.0, (step + 1) / steps)))
            drawn = rng.permutation(sorted_N[: max(width, count)])
        return [int(i) for i in np.resize(drawn, count)]

    return draw_examples


def _check_difficulties(curriculum: str, examples: list[Example]) -> np.ndarray:
    """Returns each example's difficulty. Raises UserError naming one that does not suit."""
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
    """Makes the function that gives a row's example its difficulty, as config.data.difficulty says.

    Raises UserError if a file holds no pass rates; the function does if the row has no difficulty.
    """
    if not difficulty:
        return lambda row, example: None
    if not difficulty.endswith(".jsonl"):
        return lambda row, example: _parse_difficulty(row, difficulty, example.where)
    rates = load_pass_rates(difficulty)

    def find_difficulty(row: dict, example: Example) -> float:
        modes = [e for e in (example, example.non_thinking_example) if e]
        for key in (*_list_prompt_keys(row), *(("prompt_tokens", tuple(e.prompt)) for e in modes)):
            if key in rates:
                return 1 - rates[key]
        raise UserError(
            f"{example.where}: no pass rate of this prompt in config.data.difficulty={difficulty}"
        )

    return find_difficulty


def _parse_difficulty(row: dict, name: str, where: str) -> float:
    """Parses a number, or a text with one number in it: "Level 5"."""
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
    """Lists the (column, value) pairs that identify a row's prompt."""
    keys: list[tuple[str, Any]] = []
    if isinstance(row.get("prompt_tokens"), list):
        keys.append(("prompt_tokens", tuple(row["prompt_tokens"])))
    for name in ("messages", "question", "prompt"):
        if name in row:
            keys.append((name, json.dumps(row[name], sort_keys=True, default=repr)))
    return keys


def load_pass_rates(path: str) -> dict[tuple[str, Any], float]:
    """Reads each prompt's share of correct samples, by each of its keys, from a file of `verify`
    (a row a prompt) or `evaluate` (a row a sample).

    Raises:
      UserError: naming a row without grades, or if the file leaves out the failures.
    """
    outcomes = defaultdict(list)
    for where, row in sources.open_rows(path):
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
