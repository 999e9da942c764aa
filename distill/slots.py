"""Who sits where: a queue of rows, and a fixed number of slots that decode together.

A slot whose row has ended takes the next row of the queue, a prompt is read once for all its
samples, and the cache has the shape that its rows need. The programs are those of
distill/engine.py. How many there are is bounded: slots, widths and prompts come in few sizes.
"""

import dataclasses
import itertools
import sys
from collections import Counter, abc, deque
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill import engine
from distill import mesh as mesh_lib
from distill.policy import DTYPES, PARAM_DTYPES
from distill.rollout.sequence import Sequence
from models.errors import UserError
from models.qwen3.cache import Cache
from models.qwen3.model import Params

NARROWEST = 64  # slots of a cache that is not worth making smaller
SHRINK = 4  # once none are waiting: fewer slots decode on when this part of them has rows
REFILL = 16  # part of the slots that must be free before a segment ends for the rows waiting

PADDING = 256  # tokens of padding that cost less than one more call to read prompts
REMEMBER = 1024  # tokens told at once of rows that go on under a presence penalty

REASONS = {engine.GOING: "", engine.STOP: "stop", engine.LENGTH: "length", engine.BAD: "error"}


@dataclasses.dataclass(frozen=True)
class Options:
    """How rows are decoded; nothing here changes what is drawn."""

    slots: int  # rows that decode together, rounded up to what the mesh divides
    longest: int = 0  # tokens of prompt and response that a row may have; 0: as at hand
    segment: int = 64  # steps at most between two looks of the host
    chunk: int = 2048  # tokens of prompts read in one call; a longer prompt takes several
    cache_tokens: int = 0  # slots x width of the cache never exceed it; 0: no limit
    cache_dtype: str = ""  # float32, bfloat16 or int8; "": that of the model
    param_dtype: str = ""  # of the weights, see engine.weights
    gathered: bool = True
    stacked: bool | None = None  # the layout (models.qwen3.cache); None: what the platform prefers
    static: bool = False  # batch after batch at full width: what the rest is measured against

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("segment", 1), ("chunk", 1), ("cache_tokens", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be {least} or more")
        for name, known in (("cache_dtype", (*DTYPES, "int8")), ("param_dtype", PARAM_DTYPES)):
            if (value := getattr(self, name)) not in ("", *known):
                raise UserError(f"{name}={value!r}: must be {', '.join(known)} or empty")

    def room(self, mesh: Mesh) -> int:
        """The tokens that a row may have, if no more rows decode together than must."""
        return self.cache_tokens // engine.least_rows(mesh) if self.cache_tokens else sys.maxsize


# Of a prompt that was read: the cache, the last hidden state and its row in these; where asked for
# the experts [rows, T, L, A] of one piece of the tokens after the other.
Reading = tuple[Cache, jax.Array, int, list[Any]]


class Slots:
    """`at[i]` is the row of slot i, or None; `length[i]` its tokens, as far as the host knows."""

    def __init__(
        self,
        decoder: engine.Decoder,
        params: Params,
        mesh: Mesh,
        rows: abc.Sequence[Sequence],
        options: Options,
        version: int,
        counts: Counter[str],
        ended: abc.Callable[[Sequence], bool] | None,
    ) -> None:
        self.decoder, self.params, self.mesh, self.options = decoder, params, mesh, options
        self.version, self.counts, self.ended = version, counts, ended
        self.queue = deque(row for row in rows if not row.reason)
        self.shards = mesh_lib.row_shards(mesh)
        least = engine.least_rows(mesh)
        self.sizes = sizes(min(options.slots, len(self.queue)), least)
        self.last_sizes = sizes(self.sizes[0], least, SHRINK)
        longest = options.longest or max((row.longest for row in rows), default=1)
        self.widths = sorted({min(width, options.room(mesh)) for width in widths(longest)})
        self.at: list[Sequence | None] = []
        self.length: list[int] = []
        self.width = 0
        self.state: engine.State | None = None
        self.read: dict[tuple[int, ...], Reading] = {}
        self.routed: list[
            tuple[Sequence, Reading]
        ] = []  # began: their prompts' experts are to be filed
        self.drawn: tuple[engine.Drawn, list[Sequence | None], np.ndarray] | None = None

    def advance(self, budget: int | None) -> bool:
        """Fills free slots and starts a segment; files what the last one drew, while this one
        runs; then waits to hear which rows it ended. False when there is nothing left to do."""
        drawn = None
        if (self.queue or self.live()) and (budget is None or budget > 0):
            self.admit(self.make_room())
            drawn = self.decode(budget) if self.live() else None
        self.file()
        if drawn is None:
            return False
        # Of all that is read from the device, only this is waited for before it works again.
        count_reason = np.asarray(jax.device_get(drawn.count_reason_2B))
        self.drawn = (drawn, list(self.at), count_reason)
        count, reason = count_reason
        done = Counter(steps=int(count.max()), tokens=int(count.sum()))
        done["slot_steps"] = done["steps"] * len(self.at)
        if self.queue:
            done["queued_tokens"], done["queued_slot_steps"] = done["tokens"], done["slot_steps"]
        self.counts.update(done, segments=1)
        for slot in self.live():
            self.length[slot] += int(count[slot])
            if reason[slot] != engine.GOING:
                self.at[slot] = None
        return True

    def live(self) -> list[int]:
        return [slot for slot, row in enumerate(self.at) if row]

    def row(self, slot: int) -> Sequence:
        row = self.at[slot]
        assert row is not None
        return row

    def by_shard(self, slots: abc.Iterable[int]) -> list[list[int]]:
        """Slots by the part of the rows that they belong to."""
        part, found = len(self.at) // self.shards, [[] for _ in range(self.shards)]
        for slot in slots:
            found[slot // part].append(slot)
        return found

    def put(self, x: Any) -> jax.Array:
        return mesh_lib.put(np.asarray(x, np.int32), mesh_lib.replicated(self.mesh))

    def decode(self, budget: int | None) -> engine.Drawn:
        """Starts a segment; it ends early when there is something that the host could do."""
        assert self.state is not None
        size, live = len(self.at), len(self.live())
        free, bound = size - live, size
        if self.queue and not self.options.static:
            bound = free + max(1, size // REFILL)
        elif not self.options.static and size > self.sizes[-1]:
            bound = max(size - size // SHRINK, free + 1)
        steps = self.options.segment
        if budget is not None:
            steps = min(steps, -(-budget // live))
        self.state, drawn = engine.decode(
            self.decoder,
            self.params,
            self.state,
            self.put([steps, min(bound, size)]),
            self.put([row is not None for row in self.at]),
        )
        return drawn

    def file(self) -> None:
        """Gives the tokens of the last segment to their rows."""
        for row, (_, _, source, experts) in self.routed:
            known, end = sum(map(len, row.experts)), len(row.context)
            held = np.concatenate([np.asarray(x)[source] for x in experts])
            row.experts.append(held[len(held) - end + known :])
        self.routed = []
        if self.drawn is None:
            return
        drawn, at, (count, reason) = self.drawn
        self.drawn, drawn = None, jax.device_get(drawn)
        for slot, row in enumerate(at):
            if row:
                n = int(count[slot])
                row.tokens += drawn.tokens_WB[:n, slot].tolist()
                row.logprobs += drawn.logp_WB[:n, slot].tolist()
                row.versions += [self.version] * n
                row.reason = REASONS[int(reason[slot])]
                if drawn.experts_WBLA is not None:
                    row.experts.append(drawn.experts_WBLA[:n, slot].copy())
                if self.decoder.top_logprobs:
                    ids, logp = drawn.top_ids_WBk[:n, slot], drawn.top_logp_WBk[:n, slot]
                    pairs = zip(ids.tolist(), logp.tolist(), strict=True)
                    tops = [list(zip(*pair, strict=True)) for pair in pairs]
                    row.top_logprobs = (row.top_logprobs or []) + tops
                    own = drawn.model_logp_WB[:n, slot].tolist()
                    row.model_logprobs = (row.model_logprobs or []) + own
                if not row.reason and self.ended and self.ended(row):
                    row.reason = "stop"
                    self.at = [None if other is row else other for other in self.at]

    def reach(self, row: Sequence, length: int) -> int:
        """The tokens that a row may have at the end of the next segment."""
        return min(length + self.options.segment, row.longest)

    def fit(self, tokens: int) -> tuple[int, int]:
        """The width that a row of so many tokens needs, and the most slots allowed at it."""
        width, room = next(w for w in self.widths if w >= tokens), self.options.cache_tokens
        return width, next(n for n in self.sizes if not room or n * width <= room)

    def make_room(self) -> int:
        """Gives the cache the shape that the coming segment needs, and parks rows if it must.

        Returns how many rows of the queue there is room for.
        """
        if self.options.static:
            if not self.at:
                self.resize(self.sizes[0], self.widths[-1])
            return 0 if self.live() else min(len(self.at), len(self.queue))
        live = self.live()
        reach, coming = [self.reach(self.row(slot), self.length[slot]) for slot in live], 0
        for row in itertools.islice(self.queue, self.sizes[0] - len(live)):
            more = [*reach, self.reach(row, len(row.context))]
            if len(more) > self.fit(max(more))[1]:
                break
            reach, coming = more, coming + 1
        if not reach:
            return 0
        width, most = self.fit(max(reach))
        crowd = max(map(len, self.by_shard(live))) * self.shards  # no row can leave its shard
        if crowd > most:
            self.park(most // self.shards)
            return self.make_room()
        size, needed = len(self.at), max(len(reach), crowd)
        if coming == len(self.queue):  # the last ones: few shapes, for each is compiled
            smallest = min(n for n in self.last_sizes if n >= needed)
            size = smallest if size < needed or smallest <= size // SHRINK else size
        if not needed <= size <= most:
            size = min(n for n in self.sizes if n >= needed)
        if (size, width) != (len(self.at), self.width):
            self.resize(size, width)
        return coming

    def park(self, most: int) -> None:
        """Sends the shortest rows back to the head of the queue: `most` stay in each shard.

        The longest one, for whose sake it is done, is never among them.
        """
        self.file()  # they go on from all their tokens
        parked = []
        for slots in self.by_shard(self.live()):
            parked += sorted(slots, key=lambda slot: self.length[slot])[:-most]
        for slot in parked:
            self.queue.appendleft(self.row(slot))
            self.at[slot] = None
        self.counts["parked"] += len(parked)

    def resize(self, size: int, width: int) -> None:
        """Moves what there is into a cache of another shape."""
        part, slots = size // self.shards, []
        for live in self.by_shard(self.live()):
            slots += [*live, *[-1] * (part - len(live))]
        if self.state is None:
            self.state = engine.empty(self.decoder, size, width)
        else:
            old = len(self.at) // self.shards  # a row's number counts within its part
            rows = [slot % old if slot >= 0 else -1 for slot in slots]
            rows_XB = self.put(np.reshape(rows, (self.shards, part)))
            self.state = engine.refit(self.state, rows_XB, width)
            self.counts["refits"] += 1
        self.at = [self.at[slot] if slot >= 0 else None for slot in slots]
        self.length = [self.length[slot] if slot >= 0 else 0 for slot in slots]
        self.width = width

    def admit(self, coming: int) -> None:
        """Seats the next rows of the queue, in the emptiest shards first."""
        rows = [self.queue.popleft() for _ in range(coming)]
        self.read_prompts({row.context for row in rows} - self.read.keys())
        free = self.by_shard(slot for slot, row in enumerate(self.at) if not row)
        ranked = [(-left, slot) for shard in free for left, slot in enumerate(reversed(shard))]
        columns: dict[int, list[list[int]]] = {}  # by the cache that they come from
        for row, (_, slot) in zip(rows, sorted(ranked), strict=False):
            cache, _, source, _ = reading = self.read[row.context]
            if self.decoder.routing:
                self.routed.append((row, reading))
            length, (a, b) = len(row.context), row.key
            about = [source, slot, length, len(row.tokens), row.limit, a, b]
            columns.setdefault(id(cache), []).append(about)
            self.at[slot], self.length[slot] = row, length
        for cache, hidden, *_ in list(self.read.values()):
            assert self.state is not None
            if about := columns.pop(id(cache), None):
                about += [[0, -1, 0, 0, 0, 0, 0]] * (len(self.at) - len(about))
                about_7B = np.array(about, np.int64).T.astype(np.uint32).view(np.int32)
                self.state = engine.admit(self.state, cache, hidden, self.put(about_7B))
        if self.decoder.sampling.presence_penalty:
            self.remember(rows)
        ahead = {row.context for row in itertools.islice(self.queue, len(self.at))}
        self.read = {context: x for context, x in self.read.items() if context in ahead}

    def remember(self, rows: list[Sequence]) -> None:
        """Tells the device which tokens rows that go on have drawn already."""
        assert self.state is not None
        new = {id(row) for row in rows}
        slots = [slot for slot, row in enumerate(self.at) if id(row) in new]
        pairs = [(slot, token) for slot in slots for token in {*self.row(slot).tokens}]
        for start in range(0, len(pairs), REMEMBER):
            piece = pairs[start : start + REMEMBER]
            piece += [(-1, 0)] * (REMEMBER - len(piece))
            self.state = engine.remember(self.state, self.put(np.array(piece).T))

    def read_prompts(self, contexts: set[tuple[int, ...]]) -> None:
        """Fills self.read with each of these prompts."""
        by_width: dict[int, list[tuple[int, ...]]] = {}
        for context in sorted(contexts, key=len):
            by_width.setdefault(prompt_width(len(context), self.options.chunk), []).append(context)
        for width, group in by_width.items():
            together = max(1, self.options.chunk // width // self.shards) * self.shards
            counts = sizes(min(together, self.sizes[0]), self.shards, SHRINK)
            while group:
                count = next((n for n in counts if n <= len(group)), counts[-1])
                above = min((n for n in counts if n >= len(group)), default=count)
                if (above - len(group)) * width <= PADDING:
                    count = above
                self.read_together(group[:count], count, width)
                group = group[count:]

    def read_together(self, contexts: list[tuple[int, ...]], rows: int, width: int) -> None:
        tokens_positions = np.zeros((2, rows, width), np.int32)
        tokens_positions[1] = -1  # padding, on the left
        for i, context in enumerate(contexts):
            start = width - len(context)
            tokens_positions[0, i, start:] = context
            tokens_positions[1, i, start:] = np.arange(len(context))
        chunk = min(width, self.options.chunk)
        first = (width - max(map(len, contexts))) // chunk * chunk  # before it is only padding
        cache = engine.empty_cache(self.decoder, rows, width, first)
        hidden, experts = None, []
        for start in range(first, width, chunk):
            piece = self.put(tokens_positions[:, :, start : start + chunk])
            cache, hidden, chosen = engine.read(self.decoder, self.params, cache, piece)
            experts.append(chosen)
        assert hidden is not None
        if self.mesh.size > 1 and jax.default_backend() == "cpu":
            # XLA deadlocks on several CPU devices where programs with collectives that do not
            # depend on each other queue up on few cores.
            jax.block_until_ready(hidden)
        for i, context in enumerate(contexts):
            self.read[context] = (cache, hidden, i, experts)
        self.counts["prompt_tokens"] += sum(map(len, contexts))
        self.counts["read_tokens"] += rows * (width - first)


def sizes(most: int, least: int, factor: int = 2) -> list[int]:
    """Numbers of rows, falling by `factor` from `most` to `least`, of which all are multiples."""
    found = {-(-most // least) * least}
    while min(found) > least:
        found.add(-(-(min(found) // factor) // least) * least or least)
    return sorted(found, reverse=True)


def widths(longest: int) -> list[int]:
    """Widths of the cache for rows of at most `longest` tokens: whole, half, quarter, eighth."""
    found = [longest]
    while found[-1] > NARROWEST and len(found) < 4:
        found.append(-(-found[-1] // 2))
    return found[::-1]


def prompt_width(length: int, chunk: int) -> int:
    """The padded length of a prompt: 2ⁿ or 3·2ⁿ tokens; of a long one, 2ⁿ whole chunks."""
    if length > chunk:
        return chunk * 2 ** (-(-length // chunk) - 1).bit_length()
    power = max(16, 2 ** (length - 1).bit_length())
    return min(power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power, chunk)
