"""What runs between two looks of the host: pages are handed out, prompts are read, a segment is
decoded, and its tokens go to their sequences. The programs are those of distill/rollout/decode.py.
"""

from collections import Counter, abc, deque
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill.rollout import decode
from distill.rollout.options import Options, fewer_rows, line_sizes
from distill.rollout.scheduler import Scheduler, Seat
from distill.rollout.sequence import Sequence
from distill.runtime import mesh as mesh_lib
from models.qwen3.model import Params

REFILL = 16  # part of the rows that must be free before a segment ends for the sequences waiting

REMEMBER = 1024  # tokens told at once of sequences that go on under a presence penalty

REASONS = {decode.GOING: "", decode.STOP: "stop", decode.LENGTH: "length", decode.BAD: "error"}

# Experts of a prompt: of each piece that was read, the line's, the shard, and its place in it.
Pieces = list[tuple[Any, int, int, int]]


class Engine:
    """Decodes sequences; `advance` until there is nothing left to do."""

    def __init__(
        self,
        decoder: decode.Decoder,
        params: Params,
        mesh: Mesh,
        sequences: abc.Iterable[Sequence],
        options: Options,
        version: int,
        counts: Counter[str],
        ended: abc.Callable[[Sequence], bool] | None,
    ) -> None:
        self.decoder, self.params, self.mesh, self.options = decoder, params, mesh, options
        self.version, self.counts, self.ended = version, counts, ended
        shape = decoder.cache
        self.shards = shape.shards
        self.rows = shape.rows // shape.shards  # of each shard
        self.scheduler = Scheduler(
            sequences,
            shards=shape.shards,
            rows=self.rows,
            pages=shape.pages,
            page=shape.page,
            segment=decoder.segment,
            pinned=shape.kind == "slabs",
        )
        self.state: decode.State | None = None
        self.fresh: list[Seat] = []  # seated, and not decoded yet
        self.read_pieces: dict[int, Pieces] = {}  # by the id of a seat that has just been read
        self.prompts: dict[int, Pieces] = {}  # by shard, of the prompt that it read last
        self.routed: list[tuple[Sequence, Pieces]] = []  # began: prompts' experts are to be filed
        self.drawn: tuple[decode.DecodeOutput, list[tuple[Seat, int]], np.ndarray] | None = None

    def advance(self, budget: int | None) -> bool:
        """Seats sequences and starts a segment; files what the last one drew, while this one
        runs; then waits to hear which it ended. False when there is nothing left to do."""
        scheduler, drawn = self.scheduler, None
        if (scheduler.queue or any(scheduler.live())) and (budget is None or budget > 0):
            self.seat()
            drawn = self.decode(budget) if any(scheduler.live()) else None
        self.file()
        if drawn is None:
            return False
        # Of all that is read from the device, only this is waited for before it works again.
        count, reason = count_reason = np.asarray(jax.device_get(drawn.count_reason_2B))
        seats = list(scheduler.live())
        self.drawn = (drawn, [(seat, self.at(seat)) for seat in seats], count_reason)
        done = Counter(steps=int(count.max()), tokens=int(count.sum()))
        done["slot_steps"] = done["steps"] * len(count)
        if scheduler.queue:
            done["queued_tokens"], done["queued_slot_steps"] = done["tokens"], done["slot_steps"]
        self.counts.update(done, segments=1)
        for seat in seats:
            at = self.at(seat)
            seat.length += int(count[at])
            if reason[at] != decode.GOING:
                scheduler.release(seat)
        return True

    def warm_up(self) -> None:
        """Calls every program with nothing to do, so that none is compiled later."""
        decoder, size, before = self.decoder, self.shards * self.rows, self.counts.copy()
        self.state = decode.init_state(decoder)
        for T in line_sizes(self.options, decoder.cache):
            self.read_line([deque() for _ in range(self.shards)], T)
        if decoder.sampling.presence_penalty:
            nothing = np.full((REMEMBER, 2), (-1, 0)).T
            self.state = decode.remember(self.state, self.put(np.zeros(size)), self.put(nothing))
        self.decode(None)
        if few := self.fewer():
            self.state = decode.resize(self.state, self.put(np.full((self.shards, few), -1)))
            rows, self.rows = self.rows, few
            self.decode(None)
            self.rows = rows
        self.state = None
        self.counts.clear()
        self.counts.update(before)

    def at(self, seat: Seat) -> int:
        """The row of the batch that a seat is."""
        return seat.shard * self.rows + seat.row

    def put(self, x: Any) -> jax.Array:
        return mesh_lib.put(np.asarray(x, np.int32), mesh_lib.replicated(self.mesh))

    def seat(self) -> None:
        """Hands out pages and rows, and reads the prompts of those that come."""
        if self.state is None:
            self.state = decode.init_state(self.decoder)
        if parked := self.scheduler.grow():
            self.counts["parked"] += len(parked)
            self.file()  # they go on from all their tokens
        self.fresh = self.scheduler.admit()
        self.read([seat for seat in self.fresh if seat.reads])
        if self.decoder.routing:
            for seat in self.fresh:
                if seat.length:
                    self.routed.append((seat.sequence, self.pieces(seat)))
        if self.decoder.sampling.presence_penalty and self.fresh:
            self.remember()
        self.shrink()

    def pieces(self, seat: Seat) -> Pieces:
        if seat.reads:
            self.prompts[seat.shard] = self.read_pieces[id(seat)]
        return self.prompts[seat.shard]

    def shrink(self) -> None:
        """Of slabs: goes on with fewer rows, once so few are left that these hold them."""
        few = self.fewer()
        most = max(len(list(self.scheduler.live(shard))) for shard in range(self.shards))
        # Not at once: what has just come may be about to copy another row.
        if not few or self.scheduler.queue or self.fresh or most > few:
            return
        assert self.state is not None
        rows_XR = self.scheduler.shrink(few)
        self.state = decode.resize(self.state, self.put(rows_XR))
        self.rows = few
        self.counts["resizes"] += 1

    def fewer(self) -> int:
        """The rows of a shard that the last sequences decode on with; 0: no fewer than now."""
        few = fewer_rows(self.decoder.cache) // self.shards
        return few if few < self.rows else 0

    def decode(self, budget: int | None) -> decode.DecodeOutput:
        """Starts a segment; it ends early when there is something that the host could do."""
        assert self.state is not None
        seats, size = list(self.scheduler.live()), self.shards * self.rows
        free, bound = size - len(seats), size
        if self.scheduler.queue:
            bound = free + max(1, size // REFILL)
        elif few := self.fewer():
            bound = max(size - self.shards * few, free + 1)
        steps = self.decoder.segment
        if budget is not None:
            steps = min(steps, -(-budget // len(seats)))
        columns = self.decoder.cache.columns
        about_7B = np.zeros((len(decode.ABOUT), size), np.int64)
        table_BN = np.zeros((size, columns), np.int32)
        copies_2XC = np.full((2, self.shards, self.rows), -1, np.int32)
        copied = [0] * self.shards
        fresh = {id(seat) for seat in self.fresh}
        for seat in seats:
            row, at = seat.sequence, self.at(seat)
            token = row.tokens[-1] if row.tokens else row.prompt[-1]
            drawn = seat.length + 1 - len(row.prompt)  # as far as is known here
            about_7B[:, at] = (
                token if id(seat) in fresh else -1,
                seat.length,
                drawn,
                row.limit,
                *row.key,
                1,
            )
            table_BN[at, : len(seat.pages)] = seat.pages
            if id(seat) in fresh and seat.copy:
                copies_2XC[:, seat.shard, copied[seat.shard]] = seat.copy
                copied[seat.shard] += 1
        self.fresh = []
        self.state, output = decode.decode(
            self.decoder,
            self.params,
            self.state,
            self.put([steps, min(bound, size)]),
            self.put(about_7B.astype(np.uint32).view(np.int32)),
            self.put(table_BN),
            self.put(copies_2XC),
        )
        return output

    def file(self) -> None:
        """Gives the tokens of the last segment to their sequences."""
        for row, pieces in self.routed:
            held = np.concatenate([np.asarray(x)[s, a : a + n] for x, s, a, n in pieces])
            row.experts.append(held[sum(map(len, row.experts)) :])
        self.routed = []
        if self.drawn is None:
            return
        output, seats, (count, reason) = self.drawn
        self.drawn, output = None, jax.device_get(output)
        for seat, at in seats:
            row, n = seat.sequence, int(count[at])
            row.tokens += output.tokens_WB[:n, at].tolist()
            row.logprobs += output.logp_WB[:n, at].tolist()
            row.versions += [self.version] * n
            row.reason = REASONS[int(reason[at])]
            if output.experts_WBLA is not None:
                row.experts.append(output.experts_WBLA[:n, at].copy())
            if self.decoder.top_logprobs:
                ids, logp = output.top_ids_WBk[:n, at], output.top_logp_WBk[:n, at]
                pairs = zip(ids.tolist(), logp.tolist(), strict=True)
                tops = [list(zip(*pair, strict=True)) for pair in pairs]
                row.top_logprobs = (row.top_logprobs or []) + tops
                own = output.model_logp_WB[:n, at].tolist()
                row.model_logprobs = (row.model_logprobs or []) + own
            if not row.reason and self.ended and self.ended(row):
                row.reason = "stop"
                if seat.pages:
                    self.scheduler.release(seat)

    def remember(self) -> None:
        """Tells the device which tokens the sequences that come have drawn already."""
        assert self.state is not None
        fresh = np.zeros(self.shards * self.rows, np.int32)
        pairs = [(self.at(seat), token) for seat in self.fresh for token in {*seat.sequence.tokens}]
        for seat in self.fresh:
            fresh[self.at(seat)] = 1
        for start in range(0, max(1, len(pairs)), REMEMBER):
            piece = pairs[start : start + REMEMBER]
            piece += [(-1, 0)] * (REMEMBER - len(piece))
            forgotten = self.put(fresh if start == 0 else np.zeros_like(fresh))
            self.state = decode.remember(self.state, forgotten, self.put(np.array(piece).T))

    def read(self, seats: list[Seat]) -> None:
        """Reads what each has, but for its last token, into the cache: line after line."""
        self.read_pieces = {id(seat): [] for seat in seats}
        waiting: list[deque[tuple[Seat, int]]] = [deque() for _ in range(self.shards)]
        for seat in seats:
            waiting[seat.shard].append((seat, 0))
        sizes = line_sizes(self.options, self.decoder.cache)
        while any(waiting):
            left = max(sum(seat.length - at for seat, at in shard) for shard in waiting)
            self.read_line(waiting, next((size for size in sizes if size >= left), sizes[-1]))

    def read_line(self, waiting: list[deque[tuple[Seat, int]]], T: int) -> None:
        """Reads what comes next in each shard, T tokens at most."""
        assert self.state is not None
        X, R, N = self.shards, self.rows, self.decoder.cache.columns
        line_3XT = np.zeros((3, X, T), np.int32)
        line_3XT[2] = -1
        table_XRN, length_XR = np.zeros((X, R, N), np.int32), np.zeros((X, R), np.int32)
        starts_XR = np.zeros((X, R + 1), np.int32)
        parts: list[tuple[Seat, int, int]] = []
        for shard, seats in enumerate(waiting):
            used = prompt = 0
            while seats and used < T:
                seat, begin = seats.popleft()
                end = min(seat.length, begin + T - used)
                place = slice(used, used + end - begin)
                line_3XT[0, shard, place] = seat.sequence.context[begin:end]
                line_3XT[1, shard, place] = np.arange(begin, end)
                line_3XT[2, shard, place] = prompt
                table_XRN[shard, prompt, : len(seat.pages)] = seat.pages
                length_XR[shard, prompt] = end
                parts.append((seat, used, end - begin))
                used, prompt = place.stop, prompt + 1
                starts_XR[shard, prompt:] = used
                if end < seat.length:
                    seats.appendleft((seat, end))
        self.state, experts = decode.prefill(
            self.decoder,
            self.params,
            self.state,
            self.put(line_3XT),
            self.put(table_XRN.reshape(X * R, N)),
            self.put(length_XR.reshape(-1)),
            self.put(starts_XR),
        )
        for seat, start, count in parts:
            self.read_pieces[id(seat)].append((experts, seat.shard, start, count))
            self.counts["prompt_tokens"] += count
        self.counts["read_tokens"] += X * T
        mesh_lib.settled(self.state)
