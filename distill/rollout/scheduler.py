"""Decides which sequences decode, and in which pages of the cache their tokens lie: plain Python.

The mesh may split the rows that decode together into shards, each with its own pool of pages. A
sequence takes pages as it grows and frees them when it ends. Samples of one prompt share the pages
that the prompt fills, and each takes a copy of the last one, which it goes on to write in. When a
pool is full, the youngest sequences of its shard are parked: they return to the queue, and their
tokens are read again later.
"""

import dataclasses
import itertools
from collections import abc, deque
from collections.abc import Iterable, Iterator

from distill.rollout.sequence import Sequence


@dataclasses.dataclass(eq=False)
class Slot:
    """A row that decodes a sequence."""

    sequence: Sequence
    number: int  # of the sequence, in the order of the request
    shard: int
    row: int  # in its shard
    pages: list[int]  # of its shard's pool, in the order of tokens
    length: int  # tokens in the cache before the coming segment
    max_length: int  # tokens that the cache may come to hold
    needs_prefill: bool  # its tokens must be read first; else they are shared
    page_copy: tuple[int, int] | None = None  # (page, the page that becomes a copy of it)


@dataclasses.dataclass
class _SharedPrefix:
    """The last prompt read in a shard, kept while samples of it are waiting."""

    prompt: list[int]
    pages: list[int]

    def matches(self, sequence: Sequence) -> bool:
        return not sequence.tokens and sequence.prompt == self.prompt


# While sequences wait, a segment ends once this part of the rows is free.
REFILL_DIVISOR = 16


class Scheduler:
    """Assigns sequences to at most `rows` slots in each of `shards`, over `pages` pages of
    `page_size` tokens each.

    pinned: each sequence has one page, whose number is also its row (slabs).
    No sequence may need more than `pages` pages.
    """

    def __init__(
        self,
        sequences: Iterable[Sequence],
        *,
        shards: int,
        rows: int,
        pages: int,
        page_size: int,
        segment: int,
        pinned: bool = False,
    ) -> None:
        self.queue: deque[tuple[int, Sequence]] = deque()
        self._numbers = itertools.count()
        for sequence in sequences:
            self.add_sequence(sequence)
        self.page_size, self.segment, self.pinned = page_size, segment, pinned
        self.slots: list[list[Slot | None]] = [[None] * rows for _ in range(shards)]
        self.free_pages = [list(range(pages))[::-1] for _ in range(shards)]
        self.page_refs = [[0] * pages for _ in range(shards)]
        self._prefix: list[_SharedPrefix | None] = [None] * shards

    def add_sequence(self, sequence: Sequence) -> None:
        """Puts a sequence at the end of the queue, unless it has ended."""
        number = next(self._numbers)
        if not sequence.finish_reason:
            self.queue.append((number, sequence))

    @property
    def is_done(self) -> bool:
        return not self.queue and not any(self.iter_slots())

    def iter_slots(self, shard: int | None = None) -> Iterator[Slot]:
        """Yields the slots in use, of one shard or of all."""
        for slots in self.slots if shard is None else [self.slots[shard]]:
            yield from (slot for slot in slots if slot)

    def count_fullest(self) -> int:
        """Returns the slots in use in the fullest shard."""
        return max(sum(map(bool, slots)) for slots in self.slots)

    def count_most_cached(self) -> int:
        """Returns the tokens in the cache of the shard that has most."""
        return max(sum(s.length for s in self.iter_slots(x)) for x in range(len(self.slots)))

    def release_slot(self, slot: Slot) -> None:
        """Frees the row and the pages of a sequence that has ended or is parked."""
        self.slots[slot.shard][slot.row] = None
        self._release_pages(slot.shard, slot.pages)
        slot.pages = []

    def grow_slots(self) -> list[Slot]:
        """Takes pages for a further segment of all slots; returns those parked to make room."""
        parked: list[Slot] = []
        for shard, free in enumerate(self.free_pages):
            for slot in sorted(self.iter_slots(shard), key=lambda slot: slot.number):
                while slot not in parked and self._count_missing_pages(slot) > len(free):
                    if self._prefix[shard]:
                        self._drop_prefix(shard)
                        continue
                    youngest = max(self.iter_slots(shard), key=lambda slot: slot.number)
                    parked.append(youngest)
                    self.release_slot(youngest)
                if slot not in parked:
                    missing = self._count_missing_pages(slot)
                    slot.pages += [self._take_page(shard) for _ in range(missing)]
        if parked:  # the queue may hold older and younger ones, parked before
            returned = [(slot.number, slot.sequence) for slot in parked]
            self.queue = deque(sorted([*returned, *self.queue], key=lambda entry: entry[0]))
        return parked

    def insert_waiting(self) -> list[Slot]:
        """Gives slots to sequences of the queue, in its order, as long as there is room."""
        inserted: list[Slot] = []
        while self.queue:
            number, sequence = self.queue[0]
            if sequence.finish_reason:  # a stop string was found after it was parked
                self.queue.popleft()
                continue
            slot = self._insert_sequence(number, sequence)
            if slot is None:
                break
            self.queue.popleft()
            inserted.append(slot)
        for shard, prefix in enumerate(self._prefix):
            if prefix and not (self.queue and prefix.matches(self.queue[0][1])):
                self._drop_prefix(shard)
        return inserted

    def compact_rows(self, rows: int) -> list[list[int]]:
        """Moves all pinned slots into the first `rows` rows of their shards, once the queue is
        empty. Returns, for each shard, the old row of each new one; -1: none."""
        assert self.pinned and not self.queue
        moved = []
        for shard in range(len(self.slots)):
            slots = list(self.iter_slots(shard))
            empty = rows - len(slots)
            moved.append([slot.row for slot in slots] + [-1] * empty)
            for row, slot in enumerate(slots):
                slot.row, slot.pages = row, [row]
            self.slots[shard] = [*slots, *[None] * empty]
            self.free_pages[shard] = list(range(len(slots), rows))[::-1]
            self.page_refs[shard] = [1] * len(slots) + [0] * empty
        return moved

    def _insert_sequence(self, number: int, sequence: Sequence) -> Slot | None:
        """Inserts where the prompt was read, else in the emptiest shard; None: no room."""

        def rank(shard: int) -> tuple[bool, int]:
            prefix = self._prefix[shard]
            shared = prefix is not None and prefix.matches(sequence)
            return not shared, sum(map(bool, self.slots[shard]))

        for shard in sorted(range(len(self.slots)), key=rank):
            if slot := self._insert_in_shard(shard, number, sequence):
                return slot
        return None

    def _insert_in_shard(self, shard: int, number: int, sequence: Sequence) -> Slot | None:
        slots, prefix = self.slots[shard], self._prefix[shard]
        length, end = len(sequence.all_tokens) - 1, sequence.max_length - 1
        row = next((row for row, slot in enumerate(slots) if slot is None), None)
        if row is None:
            return None
        matches = prefix is not None and prefix.matches(sequence)
        needed = self._count_pages(min(length + self.segment, end))
        shared, copied = [], None
        if prefix and matches:
            shared = list(prefix.pages)
            if length % self.page_size and self.page_refs[shard][shared[-1]] > 1:
                copied = shared.pop()
        growing = sum(
            self._count_pages(slot.max_length) > len(slot.pages) for slot in self.iter_slots(shard)
        )
        if needed - len(shared) + growing > len(self.free_pages[shard]):
            if prefix is None or matches:
                return None
            self._drop_prefix(shard)  # nothing in the queue shares it, or it would be first
            return self._insert_in_shard(shard, number, sequence)
        for page in shared:
            self.page_refs[shard][page] += 1
        pages = shared + [self._take_page(shard) for _ in range(needed - len(shared))]
        needs_prefill = length > 0 and not matches
        page_copy = None if copied is None else (copied, pages[len(shared)])
        if self.pinned:
            row = pages[0]
        slot = Slot(sequence, number, shard, row, pages, length, end, needs_prefill, page_copy)
        slots[row] = slot
        if needs_prefill and len(self.queue) > 1 and _has_same_prompt(sequence, self.queue[1][1]):
            self._drop_prefix(shard)
            prompt_pages = pages[: self._count_pages(length)]
            for page in prompt_pages:
                self.page_refs[shard][page] += 1
            self._prefix[shard] = _SharedPrefix(sequence.prompt, prompt_pages)
        return slot

    def _count_pages(self, tokens: int) -> int:
        return max(1, -(-tokens // self.page_size))

    def _count_missing_pages(self, slot: Slot) -> int:
        return self._count_pages(min(slot.length + self.segment, slot.max_length)) - len(slot.pages)

    def _take_page(self, shard: int) -> int:
        page = self.free_pages[shard].pop()
        self.page_refs[shard][page] = 1
        return page

    def _release_pages(self, shard: int, pages: list[int]) -> None:
        for page in pages:
            self.page_refs[shard][page] -= 1
            if not self.page_refs[shard][page]:
                self.free_pages[shard].append(page)

    def _drop_prefix(self, shard: int) -> None:
        prefix, self._prefix[shard] = self._prefix[shard], None
        if prefix:
            self._release_pages(shard, prefix.pages)


def _has_same_prompt(first: Sequence, second: Sequence) -> bool:
    return not first.tokens and not second.tokens and first.prompt == second.prompt


def choose_line_size(sizes: abc.Sequence[int], tokens: int) -> int:
    """Returns the smallest size that takes so many tokens, else the largest."""
    return next((size for size in sizes if size >= tokens), sizes[-1])


def count_ending_rows(size: int, active: int, shrunk: int, is_waiting: bool) -> int:
    """Returns how many of the `active` rows, of `size`, must end before the segment does: part of
    the rows while sequences wait, else so many that `shrunk` rows (0: off) hold the others."""
    if is_waiting:
        return max(1, size // REFILL_DIVISOR)
    return max(1, active - shrunk) if shrunk else active
