"""Decodes sequences segment by segment: between two segments the host hands out pages, prompts are
read, and tokens go to their sequences. The device programs are in distill/rollout/decode.py.
"""

import dataclasses
from collections import Counter, abc, deque
from typing import Any

import jax
import numpy as np

from distill.rollout import decode, drafts
from distill.rollout.decode_types import (
    DRAFT_COUNTS,
    DRAFT_FIELDS,
    FINISH_REASONS,
    ROW_FIELDS,
    UNFINISHED,
)
from distill.rollout.draft_lengths import make_draft_lengths
from distill.rollout.options import RolloutOptions, get_line_sizes, get_shrunk_rows
from distill.rollout.sampling import Sampling, pack_samplings
from distill.rollout.scheduler import Scheduler, Slot, choose_line_size, count_ending_rows
from distill.rollout.sequence import Sequence
from distill.runtime import mesh as mesh_lib
from models.transformer import Params

SEEN_TOKENS_PER_CALL = 1024  # (row, token) pairs that mark_seen_tokens takes at once

# Experts of a prompt, by pieces as they were read: (experts of the line, shard, start, count).
ExpertPieces = list[tuple[Any, int, int, int]]


class Engine:
    """Decodes sequences: call `advance` until it returns False.

    With `harvested`, sequences may join while it runs (`scheduler.add_sequence`): rows then never
    become fewer, and what only some sequences ask for is computed only while one of them decodes.
    `advance` may be called again after it returned False.

    All methods run within mesh_lib.use_mesh of the mesh that decodes.
    """

    def __init__(
        self,
        decoder: decode.Decoder,
        params: Params,
        sequences: abc.Iterable[Sequence],
        options: RolloutOptions,
        version: int,
        counts: Counter[str],
        ended: abc.Callable[[Sequence], bool] | None,
        harvested: abc.Callable[[list[Sequence]], None] | None = None,
    ) -> None:
        self.decoder, self.params = decoder, params
        # Reading prompts does not depend on how is drawn: one program for all ways to draw.
        self.reader = dataclasses.replace(
            decoder, sampling=Sampling(), stop_ids=(), segment=1, top_logprobs=0, by_row=False
        )
        self.version, self.counts, self.ended = version, counts, ended
        self.harvested = harvested  # called with the sequences whose tokens have come
        self.line_sizes = get_line_sizes(options, decoder.cache)
        self.drafts_on = bool(options.drafts)
        self.draft_lengths = make_draft_lengths(options.draft_lengths, decoder, params)
        self.replicated = mesh_lib.make_replicated_sharding(jax.sharding.get_mesh())
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
        self.new_slots: list[Slot] = []  # inserted, and not decoded yet
        self.slot_pieces: dict[int, ExpertPieces] = {}  # by id of a slot that was just read
        self.prompt_pieces: dict[int, ExpertPieces] = {}  # by shard, of the last prompt it read
        self.pending_experts: list[tuple[Sequence, ExpertPieces]] = []  # of prompts, to harvest
        # A segment to harvest: its output, the slots and their rows, and counts and reasons.
        self.pending_output: (
            tuple[decode.DecodeOutput, list[tuple[Slot, int]], np.ndarray] | None
        ) = None

    def advance(self, token_budget: int | None) -> bool:
        """Inserts sequences, starts a segment, harvests the tokens of the previous one while it
        runs, then waits for it to end. Returns False when nothing is left to do."""
        scheduler, output = self.scheduler, None
        if not scheduler.is_done and (token_budget is None or token_budget > 0):
            self.insert_sequences()
            if slots := list(scheduler.iter_slots()):
                wanted = any(slot.sequence.wants_logprobs for slot in slots)
                length = self.draft_lengths.choose(self.rows, scheduler.count_most_cached())
                decoder = self.list_decoders()[0 if wanted else -1]
                decoder = dataclasses.replace(decoder, draft_tokens=length)
                output = self.start_segment(token_budget, decoder)
        self.harvest_tokens()
        if output is None:
            return False
        # The device idles for this transfer only; that of the tokens runs beside the next segment.
        fetched = jax.device_get((output.count_reason_2B, output.draft_counts_5))
        count, reason = count_reason = np.asarray(fetched[0])
        slots = [(slot, self.get_row_index(slot)) for slot in scheduler.iter_slots()]
        self.pending_output = output, slots, count_reason
        done = Counter(steps=int(count.max()), tokens=int(count.sum()))
        done["row_steps"] = done["tokens"]
        if fetched[1] is not None:
            done = Counter({**done, **dict(zip(DRAFT_COUNTS, fetched[1].tolist(), strict=True))})
            self.draft_lengths.add_counts(done["compared"], done["accepted"])
        done["slot_steps"] = done["steps"] * len(count)
        if scheduler.queue:
            done["queued_tokens"], done["queued_slot_steps"] = done["tokens"], done["slot_steps"]
        self.counts.update(done, segments=1)
        for slot, row in slots:
            slot.length += int(count[row])
            if reason[row] != UNFINISHED:
                scheduler.release_slot(slot)
        return True

    def warm_up(self, check_stop: abc.Callable[[], None]) -> None:
        """Calls every program with nothing to do, so that none is compiled later, and between them
        `check_stop`."""
        counts_before = self.counts.copy()
        self.state = self.pin_seen_tokens(decode.init_state(self.decoder))
        for T in self.line_sizes:
            self.prefill_line([deque() for _ in range(self.shards)], T)
            check_stop()
        if self.tracks_seen:
            self.mark_seen_tokens()
        for decoder in self.list_decoders():
            for with_drafts in self.list_lengths(decoder):
                self.start_segment(None, with_drafts)
                check_stop()
        if few := self.get_shrunk_shard_rows():
            self.state = decode.resize(self.state, self.to_device(np.full((self.shards, few), -1)))
            rows, self.rows = self.rows, few
            for with_drafts in self.list_lengths(self.decoder):
                self.start_segment(None, with_drafts)
                check_stop()
            self.rows = rows
        self.state = None
        self.counts.clear()
        self.counts.update(counts_before)

    @property
    def tracks_seen(self) -> bool:
        """True if the device needs to know which tokens the responses contain."""
        return self.decoder.by_row or bool(self.decoder.sampling.presence_penalty)

    def list_decoders(self) -> list[decode.Decoder]:
        """Returns the decoder and, where sequences join, the one that leaves out the records that
        not all of them want."""
        few = dataclasses.replace(self.decoder, top_logprobs=0)
        return [self.decoder, few] if self.harvested and few != self.decoder else [self.decoder]

    def list_lengths(self, decoder: decode.Decoder) -> list[decode.Decoder]:
        """Returns the decoder with each length of drafts."""
        lengths = self.draft_lengths.lengths or (None,)
        return [dataclasses.replace(decoder, draft_tokens=length) for length in lengths]

    def get_row_index(self, slot: Slot) -> int:
        """Returns the slot's row among those of all shards."""
        return slot.shard * self.rows + slot.row

    def to_device(self, x: Any) -> jax.Array:
        return mesh_lib.to_global_array(np.asarray(x, np.int32), self.replicated)

    def insert_sequences(self) -> None:
        """Hands out pages and rows, and reads the prompts of new slots."""
        if self.state is None:
            self.state = self.pin_seen_tokens(decode.init_state(self.decoder))
        if parked := self.scheduler.grow_slots():
            self.counts["parked"] += len(parked)
            self.harvest_tokens()  # parked sequences need all their tokens to go on
        self.new_slots = self.scheduler.insert_waiting()
        self.prefill_prompts([slot for slot in self.new_slots if slot.needs_prefill])
        if self.decoder.routing:
            for slot in self.new_slots:
                if slot.length:
                    self.pending_experts.append((slot.sequence, self.get_prompt_pieces(slot)))
        if self.tracks_seen and self.new_slots:
            self.mark_seen_tokens()
        self.resize_batch()

    def get_prompt_pieces(self, slot: Slot) -> ExpertPieces:
        if slot.needs_prefill:
            self.prompt_pieces[slot.shard] = self.slot_pieces[id(slot)]
        return self.prompt_pieces[slot.shard]

    def resize_batch(self) -> None:
        """Goes on with fewer rows of slabs, once they hold all that still decode."""
        few = self.get_shrunk_shard_rows()
        # Not beside new slots: these may have a row to copy.
        if not few or self.scheduler.queue or self.new_slots:
            return
        if self.scheduler.count_fullest() > few:
            return
        assert self.state is not None
        rows_XR = self.scheduler.compact_rows(few)
        self.state = decode.resize(self.state, self.to_device(rows_XR))
        self.rows = few
        self.counts["resizes"] += 1

    def get_shrunk_shard_rows(self) -> int:
        """Returns the rows of a shard after `resize_batch`; 0: it cannot shrink any more."""
        if self.harvested:
            return 0
        few = get_shrunk_rows(self.decoder.cache) // self.shards
        return few if few < self.rows else 0

    def start_segment(
        self, token_budget: int | None, decoder: decode.Decoder
    ) -> decode.DecodeOutput:
        """Starts a segment, which ends early when the host has something to do."""
        assert self.state is not None
        slots, size = list(self.scheduler.iter_slots()), self.shards * self.rows
        shrunk, is_waiting = self.shards * self.get_shrunk_shard_rows(), bool(self.scheduler.queue)
        bound = size - len(slots) + count_ending_rows(size, len(slots), shrunk, is_waiting)
        steps = decoder.segment
        if token_budget is not None:
            steps = min(steps, -(-token_budget // len(slots)))
        names = ROW_FIELDS + (DRAFT_FIELDS if self.drafts_on else ())
        row_fields_FB = np.zeros((len(names), size), np.int64)
        table_BN = np.zeros((size, decoder.cache.max_pages_per_row), np.int32)
        samplings = [Sampling()] * size
        copies_2XC = np.full((2, self.shards, self.rows), -1, np.int32)
        num_copies = [0] * self.shards
        new = {id(slot) for slot in self.new_slots}
        for slot in slots:
            sequence, row = slot.sequence, self.get_row_index(slot)
            token = sequence.tokens[-1] if sequence.tokens else sequence.prompt[-1]
            row_fields_FB[:, row] = (
                token if id(slot) in new else -1,
                slot.length,
                slot.length + 1 - len(sequence.prompt),
                sequence.limit,
                *sequence.key,
                1,
                *(drafts.list_fields(sequence) if self.drafts_on else ()),
            )
            table_BN[row, : len(slot.pages)] = slot.pages
            samplings[row] = sequence.sampling or samplings[row]
            if id(slot) in new and slot.page_copy:
                copies_2XC[:, slot.shard, num_copies[slot.shard]] = slot.page_copy
                num_copies[slot.shard] += 1
        self.new_slots = []
        sampling_B5 = None
        if decoder.by_row:
            sampling_B5 = mesh_lib.to_global_array(pack_samplings(samplings), self.replicated)
        state, output = decode.decode(
            decoder,
            self.params,
            self.state,
            self.to_device([steps, min(bound, size)]),
            self.to_device(row_fields_FB.astype(np.uint32).view(np.int32)),
            self.to_device(table_BN),
            self.to_device(copies_2XC),
            sampling_B5,
        )
        self.state = self.pin_seen_tokens(state)
        return output

    def harvest_tokens(self) -> None:
        """Appends the draws of the last segment to their sequences."""
        for sequence, pieces in self.pending_experts:
            experts = np.concatenate(
                [np.asarray(x)[shard, start : start + n] for x, shard, start, n in pieces]
            )
            sequence.experts.append(experts[sum(map(len, sequence.experts)) :])
        self.pending_experts = []
        if self.pending_output is None:
            return
        output, slots, (count, reason) = self.pending_output
        self.pending_output, output = None, jax.device_get(output)
        for slot, row in slots:
            sequence, n = slot.sequence, int(count[row])
            sequence.tokens += output.tokens_WB[:n, row].tolist()
            sequence.logprobs += output.logp_WB[:n, row].tolist()
            sequence.versions += [self.version] * n
            sequence.finish_reason = FINISH_REASONS[int(reason[row])]
            if output.experts_WBLA is not None:
                sequence.experts.append(output.experts_WBLA[:n, row].copy())
            if output.top_ids_WBk is not None and sequence.wants_logprobs:
                ids, logp = output.top_ids_WBk[:n, row], output.top_logp_WBk[:n, row]
                pairs = zip(ids.tolist(), logp.tolist(), strict=True)
                top = [list(zip(*pair, strict=True)) for pair in pairs]
                sequence.top_logprobs = (sequence.top_logprobs or []) + top
                model_logp = output.model_logp_WB[:n, row].tolist()
                sequence.model_logprobs = (sequence.model_logprobs or []) + model_logp
            if not sequence.finish_reason and self.ended and self.ended(sequence):
                sequence.finish_reason = "stop"
                if slot.pages:
                    self.scheduler.release_slot(slot)
        if self.harvested:
            self.harvested([slot.sequence for slot, _ in slots])

    def mark_seen_tokens(self) -> None:
        """Tells the device which tokens the sequences of new slots have already drawn."""
        assert self.state is not None
        fresh_B = np.zeros(self.shards * self.rows, np.int32)
        fresh_B[[self.get_row_index(slot) for slot in self.new_slots]] = 1
        pairs = [
            (self.get_row_index(slot), token)
            for slot in self.new_slots
            for token in {*slot.sequence.tokens}
        ]
        for start in range(0, max(1, len(pairs)), SEEN_TOKENS_PER_CALL):
            chunk = pairs[start : start + SEEN_TOKENS_PER_CALL]
            chunk += [(-1, 0)] * (SEEN_TOKENS_PER_CALL - len(chunk))
            cleared = self.to_device(fresh_B if start == 0 else np.zeros_like(fresh_B))
            pairs_2T = self.to_device(np.array(chunk).T)
            state = decode.mark_seen_tokens(self.state, cleared, pairs_2T)
            self.state = self.pin_seen_tokens(state)

    def pin_seen_tokens(self, state: decode.DecodeState) -> decode.DecodeState:
        """Returns the state with one sharding of `seen_BV`: on a single device XLA gives the same
        one several names, and for each a program would be compiled anew."""
        if state.seen_BV is None:
            return state
        rows = mesh_lib.make_row_sharding(jax.sharding.get_mesh())
        return dataclasses.replace(state, seen_BV=jax.device_put(state.seen_BV, rows))

    def prefill_prompts(self, slots: list[Slot]) -> None:
        """Reads all tokens of the slots but the last into the cache, line by line."""
        self.slot_pieces = {id(slot): [] for slot in slots}
        waiting: list[deque[tuple[Slot, int]]] = [deque() for _ in range(self.shards)]
        for slot in slots:
            waiting[slot.shard].append((slot, 0))
        while any(waiting):
            left = max(sum(slot.length - start for slot, start in shard) for shard in waiting)
            self.prefill_line(waiting, choose_line_size(self.line_sizes, left))

    def prefill_line(self, waiting: list[deque[tuple[Slot, int]]], T: int) -> None:
        """Reads the next T tokens at most of each shard, from (slot, first token to read)."""
        assert self.state is not None
        X, R, N = self.shards, self.rows, self.decoder.cache.max_pages_per_row
        line_3XT = np.zeros((3, X, T), np.int32)
        line_3XT[2] = -1
        table_XRN, length_XR = np.zeros((X, R, N), np.int32), np.zeros((X, R), np.int32)
        starts_XR = np.zeros((X, R + 1), np.int32)
        groups_XR = np.zeros((X, R), np.int64)
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
                groups_XR[shard, prompt] = drafts.hash_prompt(slot.sequence.prompt)
                parts.append((slot, used, end - begin))
                used, prompt = place.stop, prompt + 1
                starts_XR[shard, prompt:] = used
                if end < slot.length:
                    slots.appendleft((slot, end))
        state, experts = decode.prefill(
            self.reader,
            self.params,
            self.state,
            self.to_device(line_3XT),
            self.to_device(table_XRN.reshape(X * R, N)),
            self.to_device(length_XR.reshape(-1)),
            self.to_device(starts_XR),
            self.to_device(groups_XR.reshape(-1)) if self.drafts_on else None,
        )
        self.state = self.pin_seen_tokens(state)
        for slot, start, count in parts:
            self.slot_pieces[id(slot)].append((experts, slot.shard, start, count))
            self.counts["prompt_tokens"] += count
        self.counts["read_tokens"] += X * T
        mesh_lib.wait_on_cpu(self.state)
