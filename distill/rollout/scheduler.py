"""Which sequences decode, and in which pages of the cache their tokens lie: plain Python.

The mesh may split the rows that decode together into shards, each with a pool of pages of its own.
A sequence takes pages as it grows and gives them back when it ends. Samples of one prompt share the
pages that the prompt fills; of the last one, which each goes on to write in, they take a copy. When
a pool is full, the youngest sequences of its shard are parked: they go back to the queue, and later
read again what they have.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

from distill.rollout.sequence import Sequence


@dataclasses.dataclass(eq=False)
class Slot:
    """A sequence that decodes."""

    sequence: Sequence
    number: int  # in the order that they were asked for
    shard: int
    row: int  # of its shard
    pages: list[int]  # of its shard's pool, in the order of tokens
    length: int  # tokens that the cache holds of it before the coming segment
    max_length: int  # tokens that it may come to hold
    needs_prefill: bool  # its tokens are to be read first; else they are shared
    page_copy: tuple[int, int] | None = None  # a page, and the page that becomes a copy of it


@dataclasses.dataclass
class _SharedPrefix:
    """The last prompt that was read in a shard, kept while samples of it are waiting."""

    prompt: list[int]
    pages: list[int]


class Scheduler:
    """Seats for at most `rows` sequences in each of `shards`, over `pages` pages of `page` tokens.

    pinned: the page of a sequence, which then has one, is also its row.
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
        self.queue = deque((i, s) for i, s in enumerate(sequences) if not s.finish_reason)
        self.page_size, self.segment, self.pinned = page_size, segment, pinned
        self.slots: list[list[Slot | None]] = [[None] * rows for _ in range(shards)]
        self.free_pages = [list(range(pages))[::-1] for _ in range(shards)]
        self.page_refs = [[0] * pages for _ in range(shards)]
        self._prefix: list[_SharedPrefix | None] = [None] * shards

    def iter_slots(self, shard: int | None = None) -> Iterator[Slot]:
        """The seats of a shard, or of all."""
        for slots in self.slots if shard is None else [self.slots[shard]]:
            yield from (seat for seat in slots if seat)

    def release_slot(self, slot: Slot) -> None:
        """Gives back what a sequence had that has ended, or is parked."""
        self.slots[slot.shard][slot.row] = None
        self._release_pages(slot.shard, slot.pages)
        slot.pages = []

    def grow_slots(self) -> list[Slot]:
        """Pages for all that decode to go on for a segment; returns those parked for it."""
        parked: list[Slot] = []
        for shard, free in enumerate(self.free_pages):
            for slot in sorted(self.iter_slots(shard), key=lambda seat: seat.number):
                while slot not in parked and self._count_missing_pages(slot) > len(free):
                    if self._prefix[shard]:
                        self._drop_prefix(shard)
                        continue
                    youngest = max(self.iter_slots(shard), key=lambda seat: seat.number)
                    parked.append(youngest)
                    self.release_slot(youngest)
                if slot not in parked:
                    slot.pages += [
                        self._take_page(shard) for _ in range(self._count_missing_pages(slot))
                    ]
        if parked:  # others, older or younger, may have been parked before
            back = [(seat.number, seat.sequence) for seat in parked]
            self.queue = deque(sorted([*back, *self.queue], key=lambda waiting: waiting[0]))
        return parked

    def insert_waiting(self) -> list[Slot]:
        """Seats sequences of the queue, in its order, as long as there is room."""
        inserted: list[Slot] = []
        while self.queue:
            number, sequence = self.queue[0]
            if sequence.finish_reason:  # its stop string was found when it was parked already
                self.queue.popleft()
                continue
            slot = self._insert_sequence(number, sequence)
            if slot is None:
                break
            self.queue.popleft()
            inserted.append(slot)
        for shard, prefix in enumerate(self._prefix):
            if prefix and not (self.queue and _shares_prefix(self.queue[0][1], prefix)):
                self._drop_prefix(shard)
        return inserted

    def compact_rows(self, rows: int) -> list[list[int]]:
        """Once the queue is empty, of pinned ones: moves all into the first `rows` rows of each
        shard. Returns which row each of these was, -1: none."""
        assert self.pinned and not self.queue
        moved = []
        for shard in range(len(self.slots)):
            slots = list(self.iter_slots(shard))
            moved.append([seat.row for seat in slots] + [-1] * (rows - len(slots)))
            for row, slot in enumerate(slots):
                slot.row, slot.pages = row, [row]
            self.slots[shard] = [*slots, *[None] * (rows - len(slots))]
            self.free_pages[shard] = list(range(len(slots), rows))[::-1]
            self.page_refs[shard] = [1] * len(slots) + [0] * (rows - len(slots))
        return moved

    def _insert_sequence(self, number: int, sequence: Sequence) -> Slot | None:
        """The next sequence of the queue, in the shard that suits it best; None: no room."""

        def rank(shard: int) -> tuple[bool, int]:
            prefix = self._prefix[shard]
            shared = prefix is not None and _shares_prefix(sequence, prefix)
            return not shared, sum(map(bool, self.slots[shard]))

        for shard in sorted(range(len(self.slots)), key=rank):
            if slot := self._insert_in_shard(shard, number, sequence):
                return slot
        return None

    def _insert_in_shard(self, shard: int, number: int, sequence: Sequence) -> Slot | None:
        slots, prefix = self.slots[shard], self._prefix[shard]
        length, end = len(sequence.all_tokens) - 1, sequence.max_length - 1
        row = next((row for row, seat in enumerate(slots) if seat is None), None)
        if row is None:
            return None
        needed = self._count_pages(min(length + self.segment, end))
        shared, copied = [], None
        if prefix and _shares_prefix(sequence, prefix):
            shared = list(prefix.pages)
            if length % self.page_size and self.page_refs[shard][shared[-1]] > 1:
                copied = shared.pop()
        growing = sum(
            self._count_pages(s.max_length) > len(s.pages) for s in self.iter_slots(shard)
        )
        if needed - len(shared) + growing > len(self.free_pages[shard]):
            if prefix is None or _shares_prefix(sequence, prefix):
                return None
            self._drop_prefix(shard)  # which nothing in the queue shares, or it would be first
            return self._insert_in_shard(shard, number, sequence)
        for page in shared:
            self.page_refs[shard][page] += 1
        pages = shared + [self._take_page(shard) for _ in range(needed - len(shared))]
        needs_prefill = length > 0 and not (prefix and _shares_prefix(sequence, prefix))
        copy = None if copied is None else (copied, pages[len(shared)])
        if self.pinned:
            row = pages[0]
        slot = Slot(sequence, number, shard, row, pages, length, end, needs_prefill, copy)
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


def _shares_prefix(sequence: Sequence, prefix: _SharedPrefix) -> bool:
    """Whether a sequence can begin from a prompt that was read."""
    return not sequence.tokens and sequence.prompt == prefix.prompt


def _has_same_prompt(first: Sequence, second: Sequence) -> bool:
    return not first.tokens and not second.tokens and first.prompt == second.prompt
