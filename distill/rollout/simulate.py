"""Computes what sampling sequences of known lengths takes: the scheduler alone, without a device.

Does in numbers what `Engine` does between device calls, so that the calls of each program, the rows
in use and the bytes that attention reads are known before a run.
"""

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np

from distill.rollout.decode import CacheShape
from distill.rollout.options import get_shrunk_rows
from distill.rollout.scheduler import Scheduler, Slot, choose_line_size, count_ending_rows
from distill.rollout.sequence import Sequence as Row


@dataclasses.dataclass
class Simulation:
    """Sums over all decoding steps; bytes and tokens are those of the shard with most to read."""

    steps: int = 0  # with all rows
    shrunk_steps: int = 0  # with fewer rows (slabs)
    live_row_steps: int = 0  # rows that decoded, over all steps
    bytes_read: int = 0  # of the cache
    cached_tokens: int = 0  # of rows that decode
    segments: int = 0
    num_parked: int = 0  # sequences parked to make room
    line_counts: Counter[int] = dataclasses.field(default_factory=Counter)  # by tokens of a line


def draw_lengths(
    count: int, mean: float, most: int, sigma: float = 1.0, seed: int = 0
) -> list[int]:
    """Draws response lengths as models write them: log-normal around a mean, cut at `most`."""
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
    """Samples sequences, of which the i-th ends after response_lengths[i] tokens.

    Args:
      response_lengths: at most the sequences' limits.
      line_sizes: token counts that a line of prompts may have, ascending.
      count_read_bytes: bytes that a decoding step reads of the cache, for rows of a shard that have
        so many tokens each; 0: a row that ended within the segment.
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
    remaining = {id(row): n for row, n in zip(sequences, response_lengths, strict=True)}
    while not scheduler.is_done:
        totals.num_parked += len(scheduler.grow_slots())
        new_slots = scheduler.insert_waiting()
        totals.line_counts += _count_lines(
            [slot for slot in new_slots if slot.needs_prefill], shape.shards, line_sizes
        )
        if shrunk and not scheduler.queue and not new_slots and scheduler.count_fullest() <= shrunk:
            scheduler.compact_rows(shrunk)
            rows, shrunk = shrunk, 0
        slots, is_waiting = list(scheduler.iter_slots()), bool(scheduler.queue)
        ending = count_ending_rows(
            rows * shape.shards, len(slots), shrunk * shape.shards, is_waiting
        )
        lengths = sorted(remaining[id(slot.sequence)] for slot in slots)
        steps = min(segment, lengths[min(ending, len(slots)) - 1])
        if rows < shape.rows // shape.shards:
            totals.shrunk_steps += steps
        else:
            totals.steps += steps
        _count_segment(scheduler, remaining, steps, count_read_bytes, totals)
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
    count_read_bytes: Callable[[list[int]], int],
    totals: Simulation,
) -> None:
    """Adds a segment of so many steps, as if each read what the middle one reads."""
    totals.segments += 1
    of_shards = []
    for shard in range(len(scheduler.slots)):
        slots = [(slot, remaining[id(slot.sequence)]) for slot in scheduler.iter_slots(shard)]
        lengths = [slot.length + (steps + 1) // 2 if n > steps // 2 else 0 for slot, n in slots]
        of_shards.append((count_read_bytes(lengths) * steps, sum(lengths) * steps))
        totals.live_row_steps += sum(min(steps, n) for _, n in slots)
    bytes_read, cached_tokens = max(of_shards)
    totals.bytes_read += bytes_read
    totals.cached_tokens += cached_tokens


def _count_lines(slots: list[Slot], shards: int, line_sizes: Sequence[int]) -> Counter[int]:
    """Counts the lines in which `Engine.prefill_prompts` reads these slots, by their size."""
    line_counts = Counter()
    waiting: list[deque[int]] = [deque() for _ in range(shards)]
    for slot in slots:
        waiting[slot.shard].append(slot.length)
    while any(waiting):
        T = choose_line_size(line_sizes, max(map(sum, waiting)))
        line_counts[T] += 1
        for shard in waiting:
            capacity = T
            while shard and capacity:
                taken = min(capacity, shard[0])
                capacity -= taken
                shard[0] -= taken
                if not shard[0]:
                    shard.popleft()
    return line_counts
