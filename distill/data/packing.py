"""Several examples in a row of a batch: which ones.

The longest go first, each into the first row with room for it (first-fit decreasing).

Examples that are read come in the order of `dataset.one`, and are packed a window at a time: as
many as fill the rows of `span` steps. What found no room goes first into the next window. So rows
are full, each example still comes once an epoch, and what a window holds follows from the lengths
alone: of the examples before it, that is. To begin in the middle, therefore, a checkpoint carries
the `position` of its window, a number and the few examples left over; without one it is worked out
from the first window on, with the same result.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.data import dataset
from distill.data.examples import Example

WINDOW_ROWS = 256  # about: a window is of whole steps, and of one at least


def pack_first_fit(
    lengths: Mapping[int, int | tuple[int, ...]],
    order: Sequence[int],
    bins: int,
    capacity: int | tuple[int, ...],
) -> list[list[int]]:
    """Which items go into each of `bins` bins, items taken in the given order; an item goes into
    the first bin that has room for it, or into none. With several lengths of an item it must fit
    by each, of as many capacities. Costs O(items x bins) in numpy."""
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
    """All items in as many bins as that takes, the longest first; none may exceed a bin. A function
    of lengths and numbers alone: every process finds the same."""

    def compute_fill(item: int) -> float:
        return max(n / most for n, most in zip(lengths[item], capacity, strict=True))

    order = sorted(lengths, key=lambda item: (-compute_fill(item), item))
    packed = pack_first_fit(lengths, order, len(order), capacity)
    assert sum(map(len, packed)) == len(order), "longer than a row"
    return [bin for bin in packed if bin]


class Packer:
    """The packed rows of each step of a stage. Holds the examples of one window.

    `rows` rows of `tokens` tokens a step; responses are cut at max_response, and no example may
    then be longer than a row.
    """

    def __init__(
        self, source: dataset.Source, seed: int, rows: int, tokens: int, max_response: int
    ) -> None:
        self._source, self._seed, self._rows, self._tokens = source, seed, rows, tokens
        self._max_response = max_response
        self._span = max(1, WINDOW_ROWS // rows)  # steps of a window
        self._window, self._packed = -1, [[]]
        # (window, number of the first example that none before it took, those left over)
        self._next: tuple[int, int, list[int]] = (0, 0, [])
        self._positions: dict[int, tuple[int, int, list[int]]] = {0: self._next}
        self._lock = threading.Lock()  # the next step's rows are made while this one's are used

    def get_step_rows(self, step: int) -> list[list[Example]]:
        """The examples in each row of a step of the stage, steps counted from its first."""
        window, place = divmod(step, self._span)
        with self._lock:
            if window != self._window:
                if window < self._next[0]:
                    self._next = max(p for p in self._positions.values() if p[0] <= window)
                while self._window != window:
                    self._pack_window()
            return self._packed[place * self._rows : (place + 1) * self._rows]

    def get_state(self, step: int) -> dict[str, Any]:
        """What `resume` needs to know in order to begin at `step`, for a checkpoint: JSON."""
        known = [p for w, p in self._positions.items() if w <= step // self._span]
        window, first, left = max(known)
        return {"window": window, "first": first, "left": left}

    def restore(self, state: dict[str, Any]) -> None:
        """Begins where `position` was; another step is then still what it was."""
        with self._lock:
            self._next = (state["window"], state["first"], list(state["left"]))
            self._positions = {**self._positions, state["window"]: self._next}

    def _pack_window(self) -> None:
        """Packs the next window."""
        window, first, left = self._next
        bins = self._span * self._rows
        examples: dict[int, Example] = {}
        lengths: dict[int, int] = {}
        free_tokens, number = bins * self._tokens, first

        def add_example(ordinal: int) -> None:
            nonlocal free_tokens
            example = dataset.get_example(self._source, ordinal, self._seed)
            examples[ordinal] = example
            lengths[ordinal] = len(example.prompt) + min(len(example.response), self._max_response)
            assert lengths[ordinal] <= self._tokens, example.where  # it would wait for ever
            free_tokens -= lengths[ordinal]

        for ordinal in left:
            add_example(ordinal)
        while free_tokens > 0:
            add_example(number)
            number += 1
        old = set(left)
        order = sorted(examples, key=lambda i: (i not in old, -lengths[i], i))
        packed = pack_first_fit(lengths, order, bins, self._tokens)
        taken = {ordinal for row in packed for ordinal in row}
        # First-fit leaves the long ones in the first rows: no step should be of these alone.
        shuffled = np.random.default_rng((self._seed, window)).permutation(bins)
        self._packed = [[examples[i] for i in packed[row]] for row in shuffled]
        self._window = window
        self._next = (window + 1, number, [i for i in order if i not in taken])
        kept = {w: p for w, p in self._positions.items() if w in (0, window - 1, window)}
        self._positions = {**kept, window + 1: self._next}
