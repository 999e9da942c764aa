"""What sampling sequences of known lengths takes: the scheduler at work, without a device.

What `Engine` does between two calls of programs is done here with numbers alone, so that how often
each is called, how full the rows are and what attention reads of the cache is known beforehand.
"""

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np

from distill.rollout.decode import CacheShape
from distill.rollout.engine import REFILL_DIVISOR
from distill.rollout.options import get_shrunk_rows
from distill.rollout.scheduler import Scheduler, Slot
from distill.rollout.sequence import Sequence as Row


@dataclasses.dataclass
class Simulation:
    """Sums over all decoding steps, of one device: of the shard that has most to read.

    steps: of decoding, with all rows. fewer_steps: with fewer, of slabs. live: rows that decoded in
    them. read: bytes of the cache. filled: tokens in the cache of rows that decode. lines: of
    prompts, by their tokens. parked: sequences that had to make room.
    """

    steps: int = 0
    shrunk_steps: int = 0
    live_row_steps: int = 0
    bytes_read: int = 0
    cached_tokens: int = 0
    segments: int = 0
    num_parked: int = 0
    line_counts: Counter[int] = dataclasses.field(default_factory=Counter)


def draw_lengths(
    count: int, mean: float, most: int, sigma: float = 1.0, seed: int = 0
) -> list[int]:
    """Lengths of responses as models write them: log-normal around a mean, cut at `most`."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(drawn, min(16, most), most).astype(int).tolist()


def simulate(
    sequences: Sequence[Row],
    response_lengths: Sequence[int],
    shape: CacheShape,
    segment: int,
    line_sizes: Sequence[int],
    count_read_bytes: Callable[[list[int]], int],
) -> Simulation:
    """Samples sequences of which the i-th ends after ends[i] tokens, at its limit at the latest.

    sizes: tokens that lines of prompts may have. reads: bytes that a decoding step reads of the
    cache, for rows of a shard that have so many tokens (0: of one that ended in the segment).
    """
    rows, totals = shape.rows // shape.shards, Simulation()
    shrunk = get_shrunk_rows(shape) // shape.shards
    scheduler = Scheduler(
        sequences,
        shards=shape.shards,
        rows=rows,
        pages=shape.pages,
        page_size=shape.page_size,
        segment=segment,
        pinned=shape.backend == "slabs",
    )
    remaining = {id(row): end for row, end in zip(sequences, response_lengths, strict=True)}
    while scheduler.queue or any(scheduler.iter_slots()):
        totals.num_parked += len(scheduler.grow_slots())
        fresh = scheduler.insert_waiting()
        _count_lines(
            [seat for seat in fresh if seat.needs_prefill], shape, line_sizes, totals.line_counts
        )
        most = max(len(list(scheduler.iter_slots(shard))) for shard in range(shape.shards))
        if shrunk and shrunk < rows and not scheduler.queue and not fresh and most <= shrunk:
            scheduler.compact_rows(shrunk)
            rows = shrunk
        slots = list(scheduler.iter_slots())
        size = rows * shape.shards
        ending = 1  # rows that end the segment
        if scheduler.queue:
            ending = max(1, size // REFILL_DIVISOR)
        elif shrunk and shrunk < rows:
            ending = max(1, len(slots) - shape.shards * shrunk)
        after = sorted(remaining[id(seat.sequence)] for seat in slots)
        if not scheduler.queue and not (shrunk and shrunk < rows):
            ending = len(slots)
        steps = min(segment, after[min(ending, len(slots)) - 1])
        _count_segment(
            scheduler, remaining, steps, rows < shape.rows // shape.shards, count_read_bytes, totals
        )
        for slot in slots:
            drawn = min(steps, remaining[id(slot.sequence)])
            slot.length += drawn
            slot.sequence.tokens += [0] * drawn
            remaining[id(slot.sequence)] -= drawn
            if not remaining[id(slot.sequence)]:
                scheduler.release_slot(slot)
    return totals


def _count_segment(
    scheduler: Scheduler,
    remaining: dict[int, int],
    steps: int,
    is_shrunk: bool,
    count_read_bytes: Callable[[list[int]], int],
    totals: Simulation,
) -> None:
    """Adds a segment, of which the step in its middle stands for all."""
    totals.segments += 1
    if is_shrunk:
        totals.shrunk_steps += steps
    else:
        totals.steps += steps
    of_shards = []
    for shard in range(len(scheduler.slots)):
        lengths = [
            seat.length + (steps + 1) // 2 if remaining[id(seat.sequence)] > steps // 2 else 0
            for seat in scheduler.iter_slots(shard)
        ]
        read = count_read_bytes(lengths)
        of_shards.append((read * steps, sum(lengths) * steps))
        totals.live_row_steps += sum(
            min(steps, remaining[id(seat.sequence)]) for seat in scheduler.iter_slots(shard)
        )
    read, filled = max(of_shards)
    totals.bytes_read += read
    totals.cached_tokens += filled


def _count_lines(
    slots: list[Slot], shape: CacheShape, line_sizes: Sequence[int], line_counts: Counter[int]
) -> None:
    """Counts the lines in which these are read, as `Engine.read` cuts them."""
    waiting: list[deque[int]] = [deque() for _ in range(shape.shards)]
    for slot in slots:
        waiting[slot.shard].append(slot.length)
    while any(waiting):
        left = max(map(sum, waiting))
        T = next((size for size in line_sizes if size >= left), line_sizes[-1])
        line_counts[T] += 1
        for shard in waiting:
            capacity = T
            while shard and capacity:
                taken = min(capacity, shard[0])
                capacity -= taken
                shard[0] -= taken
                if not shard[0]:
                    shard.popleft()
