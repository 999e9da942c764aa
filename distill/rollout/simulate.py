"""What sampling sequences of known lengths takes: the scheduler at work, without a device.

What `Engine` does between two calls of programs is done here with numbers alone, so that how often
each is called, how full the rows are and what attention reads of the cache is known beforehand.
"""

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np

from distill.rollout.decode import CacheShape
from distill.rollout.engine import REFILL
from distill.rollout.options import fewer_rows
from distill.rollout.scheduler import Scheduler, Seat
from distill.rollout.sequence import Sequence as Row


@dataclasses.dataclass
class Simulated:
    """Sums over all decoding steps, of one device: of the shard that has most to read.

    steps: of decoding, with all rows. fewer_steps: with fewer, of slabs. live: rows that decoded in
    them. read: bytes of the cache. filled: tokens in the cache of rows that decode. lines: of
    prompts, by their tokens. parked: sequences that had to make room.
    """

    steps: int = 0
    fewer_steps: int = 0
    live: int = 0
    read: int = 0
    filled: int = 0
    segments: int = 0
    parked: int = 0
    lines: Counter[int] = dataclasses.field(default_factory=Counter)


def lengths(count: int, mean: float, most: int, sigma: float = 1.0, seed: int = 0) -> list[int]:
    """Lengths of responses as models write them: log-normal around a mean, cut at `most`."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn, min(16, most), most).astype(int).tolist()


def simulate(
    sequences: Sequence[Row],
    ends: Sequence[int],
    shape: CacheShape,
    segment: int,
    sizes: Sequence[int],
    reads: Callable[[list[int]], int],
) -> Simulated:
    """Samples sequences of which the i-th ends after ends[i] tokens, at its limit at the latest.

    sizes: tokens that lines of prompts may have. reads: bytes that a decoding step reads of the
    cache, for rows of a shard that have so many tokens (0: of one that ended in the segment).
    """
    rows, found = shape.rows // shape.shards, Simulated()
    few = fewer_rows(shape) // shape.shards
    scheduler = Scheduler(
        sequences,
        shards=shape.shards,
        rows=rows,
        pages=shape.pages,
        page=shape.page,
        segment=segment,
        pinned=shape.kind == "slabs",
    )
    left = {id(row): end for row, end in zip(sequences, ends, strict=True)}
    while scheduler.queue or any(scheduler.live()):
        found.parked += len(scheduler.grow())
        fresh = scheduler.admit()
        _read([seat for seat in fresh if seat.reads], shape, sizes, found.lines)
        most = max(len(list(scheduler.live(shard))) for shard in range(shape.shards))
        if few and few < rows and not scheduler.queue and not fresh and most <= few:
            scheduler.shrink(few)
            rows = few
        seats = list(scheduler.live())
        size = rows * shape.shards
        ending = 1  # rows that end the segment
        if scheduler.queue:
            ending = max(1, size // REFILL)
        elif few and few < rows:
            ending = max(1, len(seats) - shape.shards * few)
        after = sorted(left[id(seat.sequence)] for seat in seats)
        if not scheduler.queue and not (few and few < rows):
            ending = len(seats)
        steps = min(segment, after[min(ending, len(seats)) - 1])
        _count(scheduler, left, steps, rows < shape.rows // shape.shards, reads, found)
        for seat in seats:
            drawn = min(steps, left[id(seat.sequence)])
            seat.length += drawn
            seat.sequence.tokens += [0] * drawn
            left[id(seat.sequence)] -= drawn
            if not left[id(seat.sequence)]:
                scheduler.release(seat)
    return found


def _count(
    scheduler: Scheduler,
    left: dict[int, int],
    steps: int,
    fewer: bool,
    reads: Callable[[list[int]], int],
    found: Simulated,
) -> None:
    """Adds a segment, of which the step in its middle stands for all."""
    found.segments += 1
    if fewer:
        found.fewer_steps += steps
    else:
        found.steps += steps
    of_shards = []
    for shard in range(len(scheduler.seats)):
        lengths = [
            seat.length + (steps + 1) // 2 if left[id(seat.sequence)] > steps // 2 else 0
            for seat in scheduler.live(shard)
        ]
        read = reads(lengths)
        of_shards.append((read * steps, sum(lengths) * steps))
        found.live += sum(min(steps, left[id(seat.sequence)]) for seat in scheduler.live(shard))
    read, filled = max(of_shards)
    found.read += read
    found.filled += filled


def _read(seats: list[Seat], shape: CacheShape, sizes: Sequence[int], lines: Counter[int]) -> None:
    """Counts the lines in which these are read, as `Engine.read` cuts them."""
    waiting: list[deque[int]] = [deque() for _ in range(shape.shards)]
    for seat in seats:
        waiting[seat.shard].append(seat.length)
    while any(waiting):
        left = max(map(sum, waiting))
        T = next((size for size in sizes if size >= left), sizes[-1])
        lines[T] += 1
        for shard in waiting:
            room = T
            while shard and room:
                taken = min(room, shard[0])
                room -= taken
                shard[0] -= taken
                if not shard[0]:
                    shard.popleft()
