"""Packs several examples into the rows of a batch, first-fit decreasing.

Examples come in the order of `dataset.get_example` and are packed a window at a time: as many as
fill the rows of some steps (WINDOW_ROWS), each into the first row with room, the longest first.
Those that find no room come first in the next window. So rows are full, each example still comes
once an epoch, and a window follows from the lengths of the examples before its end alone. To begin
in the middle, a checkpoint carries the state of its window: a number and the few examples left
over. Without one, all windows from the first are packed, with the same result.
"""

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.data import dataset
from distill.data.examples import Example

WINDOW_ROWS = 256  # about: a window holds whole steps, at least one


def pack_first_fit(
    lengths: Mapping[int, int | tuple[int, ...]],
    order: Sequence[int],
    bins: int,
    capacity: int | tuple[int, ...],
) -> list[list[int]]:
    """Returns the items in each of `bins` bins. Takes items in the given order; each goes into the
    first bin with room for it, or into none. An item with several lengths must fit each of as many
    capacities. Costs O(items x bins) in numpy."""
    free = np.tile(np.atleast_1d(capacity), (bins, 1))
    packed: list[list[int]] = [[] for _ in range(bins)]
    for item in order:
        fits = np.all(free >= lengths[item], axis=1)
        chosen = int(np.argmax(fits))
        if fits[chosen]:
            free[chosen] -= lengths[item]
            packed[chosen].append(item)
    return packed


def pack_first_fit_decreasing(
    lengths: Mapping[int, tuple[int, ...]], capacity: tuple[int, ...]
) -> list[list[int]]:
    """Packs all items, the longest first, into as many bins as they need; none may exceed a bin.
    A function of lengths and numbers alone, so every process gets the same result."""

    def compute_fill(item: int) -> float:
        return max(n / most for n, most in zip(lengths[item], capacity, strict=True))

    order = sorted(lengths, key=lambda item: (-compute_fill(item), item))
    packed = pack_first_fit(lengths, order, len(order), capacity)
    assert sum(map(len, packed)) == len(order), "longer than a row"
    return [bin for bin in packed if bin]


class Packer:
    """The packed rows of each step of a stage. Holds the examples of one window.

    A step has `rows` rows of `row_tokens` tokens; responses are cut at max_response, and no example
    may then be longer than a row.
    """

    def __init__(
        self, source: dataset.Source, seed: int, rows: int, row_tokens: int, max_response: int
    ) -> None:
        self._source, self._seed, self._rows, self._row_tokens = source, seed, rows, row_tokens
        self._max_response = max_response
        self._window_steps = max(1, WINDOW_ROWS // rows)
        self._window, self._packed = -1, [[]]
        # (window, its first new example, examples left over from the window before)
        self._next: tuple[int, int, list[int]] = (0, 0, [])
        self._states: dict[int, tuple[int, int, list[int]]] = {0: self._next}
        self._lock = threading.Lock()  # a thread packs the next step while this one is used

    def get_step_rows(self, step: int) -> list[list[Example]]:
        """Returns the examples in each row of a step, counted from the stage's first."""
        window, place = divmod(step, self._window_steps)
        with self._lock:
            if window != self._window:
                if window < self._next[0]:
                    self._next = max(s for s in self._states.values() if s[0] <= window)
                while self._window != window:
                    self._pack_window()
            return self._packed[place * self._rows : (place + 1) * self._rows]

    def get_state(self, step: int) -> dict[str, Any]:
        """Returns what `restore` needs in order to begin at `step`, as JSON, for a checkpoint."""
        window, first, left = max(
            state for w, state in self._states.items() if w <= step // self._window_steps
        )
        return {"window": window, "first": first, "left": left}

    def restore(self, state: dict[str, Any]) -> None:
        """Begins at the state's window; the rows of every step stay the same."""
        with self._lock:
            self._next = (state["window"], state["first"], list(state["left"]))
            self._states = {**self._states, state["window"]: self._next}

    def _pack_window(self) -> None:
        window, first, left = self._next
        bins = self._window_steps * self._rows
        examples: dict[int, Example] = {}
        lengths: dict[int, int] = {}
        free_tokens, ordinal = bins * self._row_tokens, first
        for ordinal in itertools.chain(left, itertools.count(first)):
            if free_tokens <= 0 and ordinal >= first:
                break
            example = dataset.get_example(self._source, ordinal, self._seed)
            length = len(example.prompt) + min(len(example.response), self._max_response)
            assert length <= self._row_tokens, example.where  # it would never be packed
            examples[ordinal], lengths[ordinal] = example, length
            free_tokens -= length
        leftover = set(left)
        order = sorted(examples, key=lambda i: (i not in leftover, -lengths[i], i))
        packed = pack_first_fit(lengths, order, bins, self._row_tokens)
        taken = {ordinal for row in packed for ordinal in row}
        # First-fit puts the longest into the first rows; shuffle, or some steps have only those.
        shuffled = np.random.default_rng((self._seed, window)).permutation(bins)
        self._packed = [[examples[i] for i in packed[row]] for row in shuffled]
        self._window = window
        self._next = (window + 1, ordinal, [i for i in order if i not in taken])
        kept = {w: s for w, s in self._states.items() if w in (0, window - 1, window)}
        self._states = {**kept, window + 1: self._next}
