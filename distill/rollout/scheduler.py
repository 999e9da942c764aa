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
class Seat:
    """A sequence that decodes."""

    sequence: Sequence
    number: int  # in the order that they were asked for
    shard: int
    row: int  # of its shard
    pages: list[int]  # of its shard's pool, in the order of tokens
    length: int  # tokens that the cache holds of it before the coming segment
    end: int  # tokens that it may come to hold
    reads: bool  # its tokens are to be read first; else they are shared
    copy: tuple[int, int] | None = None  # a page, and the page that becomes a copy of it


@dataclasses.dataclass
class _Prefix:
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
        page: int,
        segment: int,
        pinned: bool = False,
    ) -> None:
        self.queue = deque((i, s) for i, s in enumerate(sequences) if not s.reason)
        self.page, self.segment, self.pinned = page, segment, pinned
        self.seats: list[list[Seat | None]] = [[None] * rows for _ in range(shards)]
        self.free = [list(range(pages))[::-1] for _ in range(shards)]
        self.uses = [[0] * pages for _ in range(shards)]
        self._prefix: list[_Prefix | None] = [None] * shards

    def live(self, shard: int | None = None) -> Iterator[Seat]:
        """The seats of a shard, or of all."""
        for seats in self.seats if shard is None else [self.seats[shard]]:
            yield from (seat for seat in seats if seat)

    def release(self, seat: Seat) -> None:
        """Gives back what a sequence had that has ended, or is parked."""
        self.seats[seat.shard][seat.row] = None
        self._give_back(seat.shard, seat.pages)
        seat.pages = []

    def grow(self) -> list[Seat]:
        """Pages for all that decode to go on for a segment; returns those parked for it."""
        parked: list[Seat] = []
        for shard, free in enumerate(self.free):
            for seat in sorted(self.live(shard), key=lambda seat: seat.number):
                while seat not in parked and self._missing(seat) > len(free):
                    if self._prefix[shard]:
                        self._drop_prefix(shard)
                        continue
                    youngest = max(self.live(shard), key=lambda seat: seat.number)
                    parked.append(youngest)
                    self.release(youngest)
                if seat not in parked:
                    seat.pages += [self._take(shard) for _ in range(self._missing(seat))]
        if parked:  # others, older or younger, may have been parked before
            back = [(seat.number, seat.sequence) for seat in parked]
            self.queue = deque(sorted([*back, *self.queue], key=lambda waiting: waiting[0]))
        return parked

    def admit(self) -> list[Seat]:
        """Seats sequences of the queue, in its order, as long as there is room."""
        found: list[Seat] = []
        while self.queue:
            number, sequence = self.queue[0]
            if sequence.reason:  # its stop string was found when it was parked already
                self.queue.popleft()
                continue
            seat = self._seat(number, sequence)
            if seat is None:
                break
            self.queue.popleft()
            found.append(seat)
        for shard, prefix in enumerate(self._prefix):
            if prefix and not (self.queue and _shares(self.queue[0][1], prefix)):
                self._drop_prefix(shard)
        return found

    def shrink(self, rows: int) -> list[list[int]]:
        """Once the queue is empty, of pinned ones: moves all into the first `rows` rows of each
        shard. Returns which row each of these was, -1: none."""
        assert self.pinned and not self.queue
        moved = []
        for shard in range(len(self.seats)):
            seats = list(self.live(shard))
            moved.append([seat.row for seat in seats] + [-1] * (rows - len(seats)))
            for row, seat in enumerate(seats):
                seat.row, seat.pages = row, [row]
            self.seats[shard] = [*seats, *[None] * (rows - len(seats))]
            self.free[shard] = list(range(len(seats), rows))[::-1]
            self.uses[shard] = [1] * len(seats) + [0] * (rows - len(seats))
        return moved

    def _seat(self, number: int, sequence: Sequence) -> Seat | None:
        """The next sequence of the queue, in the shard that suits it best; None: no room."""

        def rank(shard: int) -> tuple[bool, int]:
            prefix = self._prefix[shard]
            shared = prefix is not None and _shares(sequence, prefix)
            return not shared, sum(map(bool, self.seats[shard]))

        for shard in sorted(range(len(self.seats)), key=rank):
            if seat := self._seat_in(shard, number, sequence):
                return seat
        return None

    def _seat_in(self, shard: int, number: int, sequence: Sequence) -> Seat | None:
        seats, prefix = self.seats[shard], self._prefix[shard]
        length, end = len(sequence.context) - 1, sequence.longest - 1
        row = next((row for row, seat in enumerate(seats) if seat is None), None)
        if row is None:
            return None
        needed = self._pages(min(length + self.segment, end))
        shared, copied = [], None
        if prefix and _shares(sequence, prefix):
            shared = list(prefix.pages)
            if length % self.page and self.uses[shard][shared[-1]] > 1:
                copied = shared.pop()
        growing = sum(self._pages(s.end) > len(s.pages) for s in self.live(shard))
        if needed - len(shared) + growing > len(self.free[shard]):
            if prefix is None or _shares(sequence, prefix):
                return None
            self._drop_prefix(shard)  # which nothing in the queue shares, or it would be first
            return self._seat_in(shard, number, sequence)
        for page in shared:
            self.uses[shard][page] += 1
        pages = shared + [self._take(shard) for _ in range(needed - len(shared))]
        reads = length > 0 and not (prefix and _shares(sequence, prefix))
        copy = None if copied is None else (copied, pages[len(shared)])
        if self.pinned:
            row = pages[0]
        seat = Seat(sequence, number, shard, row, pages, length, end, reads, copy)
        seats[row] = seat
        if reads and len(self.queue) > 1 and _same_prompt(sequence, self.queue[1][1]):
            self._drop_prefix(shard)
            held = pages[: self._pages(length)]
            for page in held:
                self.uses[shard][page] += 1
            self._prefix[shard] = _Prefix(sequence.prompt, held)
        return seat

    def _pages(self, tokens: int) -> int:
        return max(1, -(-tokens // self.page))

    def _missing(self, seat: Seat) -> int:
        return self._pages(min(seat.length + self.segment, seat.end)) - len(seat.pages)

    def _take(self, shard: int) -> int:
        page = self.free[shard].pop()
        self.uses[shard][page] = 1
        return page

    def _give_back(self, shard: int, pages: list[int]) -> None:
        for page in pages:
            self.uses[shard][page] -= 1
            if not self.uses[shard][page]:
                self.free[shard].append(page)

    def _drop_prefix(self, shard: int) -> None:
        prefix, self._prefix[shard] = self._prefix[shard], None
        if prefix:
            self._give_back(shard, prefix.pages)


def _shares(sequence: Sequence, prefix: _Prefix) -> bool:
    """Whether a sequence can begin from a prompt that was read."""
    return not sequence.tokens and sequence.prompt == prefix.prompt


def _same_prompt(one: Sequence, other: Sequence) -> bool:
    return not one.tokens and not other.tokens and one.prompt == other.prompt
