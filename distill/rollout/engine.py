"""What runs between two looks of the host: pages are handed out, prompts are read, a segment is
decoded, and its tokens go to their sequences. The programs are those of distill/rollout/decode.py.
"""

from collections import Counter, abc, deque
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill.rollout import decode
from distill.rollout.options import RolloutOptions, get_line_sizes, get_shrunk_rows
from distill.rollout.scheduler import Scheduler, Slot
from distill.rollout.sequence import Sequence
from distill.runtime import mesh as mesh_lib
from models.transformer import Params

REFILL_DIVISOR = (
    16  # part of the rows that must be free before a segment ends for the sequences waiting
)

SEEN_TOKENS_PER_CALL = 1024  # tokens told at once of sequences that go on under a presence penalty

FINISH_REASONS = {
    decode.UNFINISHED: "",
    decode.STOP: "stop",
    decode.LENGTH: "length",
    decode.ERROR: "error",
}

# Experts of a prompt: of each piece that was read, the line's, the shard, and its place in it.
ExpertPieces = list[tuple[Any, int, int, int]]


class Engine:
    """Decodes sequences; `advance` until there is nothing left to do."""

    def __init__(
        self,
        decoder: decode.Decoder,
        params: Params,
        mesh: Mesh,
        sequences: abc.Iterable[Sequence],
        options: RolloutOptions,
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
            page_size=shape.page_size,
            segment=decoder.segment,
            pinned=shape.backend == "slabs",
        )
        self.state: decode.DecodeState | None = None
        self.new_slots: list[Slot] = []  # seated, and not decoded yet
        self.slot_pieces: dict[
            int, ExpertPieces
        ] = {}  # by the id of a seat that has just been read
        self.prompt_pieces: dict[
            int, ExpertPieces
        ] = {}  # by shard, of the prompt that it read last
        self.pending_experts: list[
            tuple[Sequence, ExpertPieces]
        ] = []  # began: prompts' experts are to be filed
        self.pending_output: (
            tuple[decode.DecodeOutput, list[tuple[Slot, int]], np.ndarray] | None
        ) = None

    def advance(self, token_budget: int | None) -> bool:
        """Seats sequences and starts a segment; files what the last one drew, while this one
        runs; then waits to hear which it ended. False when there is nothing left to do."""
        scheduler, output = self.scheduler, None
        if (scheduler.queue or any(scheduler.iter_slots())) and (
            token_budget is None or token_budget > 0
        ):
            self.insert_sequences()
            output = self.start_segment(token_budget) if any(scheduler.iter_slots()) else None
        self.harvest_tokens()
        if output is None:
            return False
        # Of all that is read from the device, only this is waited for before it works again.
        count, reason = count_reason = np.asarray(jax.device_get(output.count_reason_2B))
        slots = list(scheduler.iter_slots())
        self.pending_output = (
            output,
            [(seat, self.get_row_index(seat)) for seat in slots],
            count_reason,
        )
        done = Counter(steps=int(count.max()), tokens=int(count.sum()))
        done["slot_steps"] = done["steps"] * len(count)
        if scheduler.queue:
            done["queued_tokens"], done["queued_slot_steps"] = done["tokens"], done["slot_steps"]
        self.counts.update(done, segments=1)
        for slot in slots:
            at = self.get_row_index(slot)
            slot.length += int(count[at])
            if reason[at] != decode.UNFINISHED:
                scheduler.release_slot(slot)
        return True

    def warm_up(self) -> None:
        """Calls every program with nothing to do, so that none is compiled later."""
        decoder, size, before = self.decoder, self.shards * self.rows, self.counts.copy()
        self.state = decode.init_state(decoder)
        for T in get_line_sizes(self.options, decoder.cache):
            self.prefill_line([deque() for _ in range(self.shards)], T)
        if decoder.sampling.presence_penalty:
            nothing = np.full((SEEN_TOKENS_PER_CALL, 2), (-1, 0)).T
            self.state = decode.mark_seen_tokens(
                self.state, self.to_device(np.zeros(size)), self.to_device(nothing)
            )
        self.start_segment(None)
        if few := self.get_shrunk_shard_rows():
            self.state = decode.resize(self.state, self.to_device(np.full((self.shards, few), -1)))
            rows, self.rows = self.rows, few
            self.start_segment(None)
            self.rows = rows
        self.state = None
        self.counts.clear()
        self.counts.update(before)

    def get_row_index(self, slot: Slot) -> int:
        """The row of the batch that a seat is."""
        return slot.shard * self.rows + slot.row

    def to_device(self, x: Any) -> jax.Array:
        return mesh_lib.to_global_array(
            np.asarray(x, np.int32), mesh_lib.make_replicated_sharding(self.mesh)
        )

    def insert_sequences(self) -> None:
        """Hands out pages and rows, and reads the prompts of those that come."""
        if self.state is None:
            self.state = decode.init_state(self.decoder)
        if parked := self.scheduler.grow_slots():
            self.counts["parked"] += len(parked)
            self.harvest_tokens()  # they go on from all their tokens
        self.new_slots = self.scheduler.insert_waiting()
        self.prefill_prompts([seat for seat in self.new_slots if seat.needs_prefill])
        if self.decoder.routing:
            for slot in self.new_slots:
                if slot.length:
                    self.pending_experts.append((slot.sequence, self.get_prompt_pieces(slot)))
        if self.decoder.sampling.presence_penalty and self.new_slots:
            self.mark_seen_tokens()
        self.resize_batch()

    def get_prompt_pieces(self, slot: Slot) -> ExpertPieces:
        if slot.needs_prefill:
            self.prompt_pieces[slot.shard] = self.slot_pieces[id(slot)]
        return self.prompt_pieces[slot.shard]

    def resize_batch(self) -> None:
        """Of slabs: goes on with fewer rows, once so few are left that these hold them."""
        few = self.get_shrunk_shard_rows()
        most = max(len(list(self.scheduler.iter_slots(shard))) for shard in range(self.shards))
        # Not at once: what has just come may be about to copy another row.
        if not few or self.scheduler.queue or self.new_slots or most > few:
            return
        assert self.state is not None
        rows_XR = self.scheduler.compact_rows(few)
        self.state = decode.resize(self.state, self.to_device(rows_XR))
        self.rows = few
        self.counts["resizes"] += 1

    def get_shrunk_shard_rows(self) -> int:
        """The rows of a shard that the last sequences decode on with; 0: no fewer than now."""
        few = get_shrunk_rows(self.decoder.cache) // self.shards
        return few if few < self.rows else 0

    def start_segment(self, token_budget: int | None) -> decode.DecodeOutput:
        """Starts a segment; it ends early when there is something that the host could do."""
        assert self.state is not None
        slots, size = list(self.scheduler.iter_slots()), self.shards * self.rows
        free, bound = size - len(slots), size
        if self.scheduler.queue:
            bound = free + max(1, size // REFILL_DIVISOR)
        elif few := self.get_shrunk_shard_rows():
            bound = max(size - self.shards * few, free + 1)
        steps = self.decoder.segment
        if token_budget is not None:
            steps = min(steps, -(-token_budget // len(slots)))
        columns = self.decoder.cache.max_pages_per_row
        row_fields_7B = np.zeros((len(decode.ROW_FIELDS), size), np.int64)
        table_BN = np.zeros((size, columns), np.int32)
        copies_2XC = np.full((2, self.shards, self.rows), -1, np.int32)
        copied = [0] * self.shards
        fresh = {id(seat) for seat in self.new_slots}
        for slot in slots:
            row, at = slot.sequence, self.get_row_index(slot)
            token = row.tokens[-1] if row.tokens else row.prompt[-1]
            drawn = slot.length + 1 - len(row.prompt)  # as far as is known here
            row_fields_7B[:, at] = (
                token if id(slot) in fresh else -1,
                slot.length,
                drawn,
                row.limit,
                *row.key,
                1,
            )
            table_BN[at, : len(slot.pages)] = slot.pages
            if id(slot) in fresh and slot.page_copy:
                copies_2XC[:, slot.shard, copied[slot.shard]] = slot.page_copy
                copied[slot.shard] += 1
        self.new_slots = []
        self.state, output = decode.decode(
            self.decoder,
            self.params,
            self.state,
            self.to_device([steps, min(bound, size)]),
            self.to_device(row_fields_7B.astype(np.uint32).view(np.int32)),
            self.to_device(table_BN),
            self.to_device(copies_2XC),
        )
        return output

    def harvest_tokens(self) -> None:
        """Gives the tokens of the last segment to their sequences."""
        for row, pieces in self.pending_experts:
            experts = np.concatenate([np.asarray(x)[s, a : a + n] for x, s, a, n in pieces])
            row.experts.append(experts[sum(map(len, row.experts)) :])
        self.pending_experts = []
        if self.pending_output is None:
            return
        output, slots, (count, reason) = self.pending_output
        self.pending_output, output = None, jax.device_get(output)
        for slot, at in slots:
            row, n = slot.sequence, int(count[at])
            row.tokens += output.tokens_WB[:n, at].tolist()
            row.logprobs += output.logp_WB[:n, at].tolist()
            row.versions += [self.version] * n
            row.finish_reason = FINISH_REASONS[int(reason[at])]
            if output.experts_WBLA is not None:
                row.experts.append(output.experts_WBLA[:n, at].copy())
            if self.decoder.top_logprobs:
                ids, logp = output.top_ids_WBk[:n, at], output.top_logp_WBk[:n, at]
                pairs = zip(ids.tolist(), logp.tolist(), strict=True)
                tops = [list(zip(*pair, strict=True)) for pair in pairs]
                row.top_logprobs = (row.top_logprobs or []) + tops
                own = output.model_logp_WB[:n, at].tolist()
                row.model_logprobs = (row.model_logprobs or []) + own
            if not row.finish_reason and self.ended and self.ended(row):
                row.finish_reason = "stop"
                if slot.pages:
                    self.scheduler.release_slot(slot)

    def mark_seen_tokens(self) -> None:
        """Tells the device which tokens the sequences that come have drawn already."""
        assert self.state is not None
        fresh = np.zeros(self.shards * self.rows, np.int32)
        pairs = [
            (self.get_row_index(seat), token)
            for seat in self.new_slots
            for token in {*seat.sequence.tokens}
        ]
        for slot in self.new_slots:
            fresh[self.get_row_index(slot)] = 1
        for start in range(0, max(1, len(pairs)), SEEN_TOKENS_PER_CALL):
            piece = pairs[start : start + SEEN_TOKENS_PER_CALL]
            piece += [(-1, 0)] * (SEEN_TOKENS_PER_CALL - len(piece))
            cleared = self.to_device(fresh if start == 0 else np.zeros_like(fresh))
            self.state = decode.mark_seen_tokens(
                self.state, cleared, self.to_device(np.array(piece).T)
            )

    def prefill_prompts(self, slots: list[Slot]) -> None:
        """Reads what each has, but for its last token, into the cache: line after line."""
        self.slot_pieces = {id(seat): [] for seat in slots}
        waiting: list[deque[tuple[Slot, int]]] = [deque() for _ in range(self.shards)]
        for slot in slots:
            waiting[slot.shard].append((slot, 0))
        sizes = get_line_sizes(self.options, self.decoder.cache)
        while any(waiting):
            left = max(sum(seat.length - at for seat, at in shard) for shard in waiting)
            self.prefill_line(waiting, next((size for size in sizes if size >= left), sizes[-1]))

    def prefill_line(self, waiting: list[deque[tuple[Slot, int]]], T: int) -> None:
        """Reads what comes next in each shard, T tokens at most."""
        assert self.state is not None
        X, R, N = self.shards, self.rows, self.decoder.cache.max_pages_per_row
        line_3XT = np.zeros((3, X, T), np.int32)
        line_3XT[2] = -1
        table_XRN, length_XR = np.zeros((X, R, N), np.int32), np.zeros((X, R), np.int32)
        starts_XR = np.zeros((X, R + 1), np.int32)
        parts: list[tuple[Slot, int, int]] = []
        for shard, slots in enumerate(waiting):
            used = prompt = 0
            while slots and used < T:
                slot, begin = slots.popleft()
                end = min(slot.length, begin + T - used)
                place = slice(used, used + end - begin)
                line_3XT[0, shard, place] = slot.sequence.all_tokens[begin:end]
                line_3XT[1, shard, place] = np.arange(begin, end)
                line_3XT[2, shard, place] = prompt
                table_XRN[shard, prompt, : len(slot.pages)] = slot.pages
                length_XR[shard, prompt] = end
                parts.append((slot, used, end - begin))
                used, prompt = place.stop, prompt + 1
                starts_XR[shard, prompt:] = used
                if end < slot.length:
                    slots.appendleft((slot, end))
        self.state, experts = decode.prefill(
            self.decoder,
            self.params,
            self.state,
            self.to_device(line_3XT),
            self.to_device(table_XRN.reshape(X * R, N)),
            self.to_device(length_XR.reshape(-1)),
            self.to_device(starts_XR),
        )
        for slot, start, count in parts:
            self.slot_pieces[id(slot)].append((experts, slot.shard, start, count))
            self.counts["prompt_tokens"] += count
        self.counts["read_tokens"] += X * T
        mesh_lib.wait_on_cpu(self.state)
