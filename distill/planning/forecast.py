"""How often a step calls its programs, and how long that takes, where responses have lengths that
occur and not all the longest.

Lengths are drawn (rollout.lengths), the rows are scheduled and packed by the code that a run does
it with, and each call counts with its roofline: decoding by the pages that it then reads, attention
by the sequences that are in a row, the heads by the tokens that are trained.
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import rollout
from distill.data.collate import Form, Written
from distill.planning import aot, roofline
from distill.planning.roofline import GIB, Row
from distill.policy import policy
from distill.training import calls, memory, microbatches, sampling_programs, stages
from distill.training.calls import Models
from models.errors import UserError
from models.qwen3 import attention
from models.qwen3.config import Config

PROMPT = 300  # tokens of a prompt, if the stage allows so many


@dataclasses.dataclass(frozen=True)
class Packing:
    """rows: of a micro-batch. count: of micro-batches a step. tokens: of a row. real: tokens of all
    sequences, and `trained` of them. attention: the share that attention computes of what it would
    of rows of one sequence. computed: operations of the student's layers for the step over those
    that the sequences alone would take."""

    rows: int
    count: int
    tokens: int
    real: int
    trained: int
    attention: float
    computed: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A stage's step, at responses of a mean length."""

    mean: float  # of what was drawn, which limits cut
    decoding: rollout.Simulated | None
    rows: int  # that decode together
    decode_reads: float  # bytes that a decoding step reads, cache and weights
    needed: float  # bytes of weights and of filled tokens, a decoding step
    packing: Packing
    seconds: dict[str, float]  # a step, of each program

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def of_stage(
    c: ConfigDict,
    s: ConfigDict,
    sampled: int,
    models: Models,
    mesh: Mesh,
    chip: aot.Chip,
    found: list[Row],
    mean: int,
) -> Forecast:
    """The forecast of a stage whose programs are compiled, on the student's `mesh`.

    Raises:
      UserError: if no response may be as long as the mean.
    """
    limit = s.max_response_tokens
    if not 0 < mean <= limit:
        raise UserError(f"--mean_response_tokens={mean}: from 1 to max_response_tokens={limit}")
    readers = [*models.teachers.values(), *([models.reference] if models.reference else [])]
    rows = stages.microbatch_rows(s, sampled, mesh, *map(policy.mesh_of, readers))
    drawn = rollout.lengths(s.batch_size, mean, limit)
    kind = mesh.devices.flat[0].device_kind
    packing = packed(s, sampled, rows, drawn, models.student.config, kind)
    turns: dict[str, float] = {}
    decoding, size, reads, needed = None, 0, 0.0, 0.0
    if sampled:
        room = memory.cache_room(c, s, sampled, models, rows, chip.hbm_gib * GIB)
        sampler = sampling_programs.of_stage(c, s, sampled, models, room)
        decoding, size = simulated(s, sampler, drawn[:sampled]), sampler.decoder.cache.rows
        steps = decoding.steps + decoding.fewer_steps
        few, *many = rollout.line_sizes(sampler.options, sampler.decoder.cache)
        turns = {
            "prompts": decoding.lines[many[0] if many else few],
            "few prompts": decoding.lines[few] if many else 0,
            "decode": decoding.steps,
            "decode fewer": decoding.fewer_steps,
        }
        reads = decoding.read / steps
        needed = sampler.copy + decoding.filled * sampler.token / steps
    seconds, decode_reads = {}, 0.0
    for row in found:
        count, traffic = turns.get(row.kind, row.calls), row.traffic
        flops = max(row.compiled or 0.0, row.useful)
        if row.kind == "decode" and traffic is not None:
            traffic = decode_reads = traffic - row.reads + reads
        if row.kind in ("read", "train"):
            count = row.calls / (s.minibatches * -(-s.batch_size // (s.minibatches * rows)))
            count *= packing.count
            places = packing.count * packing.rows * packing.tokens
            flops -= (row.attention or 0.0) * (1 - packing.attention)
            flops -= row.head * (1 - packing.trained / places)
        times = roofline.limits(chip, flops, traffic, row.collectives)
        seconds[row.name] = count * max(times.values())
    mean_drawn = sum(drawn) / len(drawn)
    return Forecast(mean_drawn, decoding, size, decode_reads, needed, packing, seconds)


def simulated(
    s: ConfigDict, sampler: sampling_programs.Sampler, drawn: list[int]
) -> rollout.Simulated:
    """What sampling responses of these lengths takes."""
    P = min(PROMPT, s.max_prompt_tokens)
    groups = [[number // s.samples] * P for number in range(len(drawn))]
    rows = [rollout.Sequence(p, (0, i), s.max_response_tokens) for i, p in enumerate(groups)]
    shape = sampler.decoder.cache
    sizes = rollout.line_sizes(sampler.options, shape)
    return rollout.simulate(rows, drawn, shape, sampler.decoder.segment, sizes, sampler.reads)


def packed(
    s: ConfigDict, sampled: int, rows: int, drawn: list[int], config: Config, kind: str
) -> Packing:
    """How responses of these lengths are packed, behind prompts as they are assumed."""
    T, P = stages.row_tokens(s), min(PROMPT, s.max_prompt_tokens)
    if sampled:
        examples = [Written([0] * P, [0] * n, "", "") for n in drawn]
        parts = microbatches.pack(examples, rows, s.minibatches, Form(T, s.max_response_tokens))
    else:  # rows of one, or of as many as `pack_tokens` hold, about
        each = [n for n in drawn for _ in range(T // (P + n) if s.pack_tokens else 1)]
        of = [T // (P + n) if s.pack_tokens else 1 for n in drawn]
        ends = [sum(of[: i + 1]) for i in range(len(of))]
        listed = [tuple(range(end - n, end)) for end, n in zip(ends, of, strict=True)]
        parts = [[tuple(listed[at : at + rows]) for at in range(0, len(listed), rows)]]
        drawn = each
    laid = [row for part in parts for micro in part for row in micro]
    count, lengths = sum(map(len, parts)), [P + n for n in drawn]
    block = attention.block_tokens(-(-T // 128) * 128, kind)
    whole = _blocks([T], T, block) * len(laid)
    blocks = sum(_blocks([lengths[i] for i in row], T, block) for row in laid)
    context = blocks * block**2 / (len(laid) * T)
    needed = sum(calls.operations(config, n, (n + 1) / 2, head=False) for n in lengths)
    computed = calls.operations(config, len(laid) * T, context, head=False)
    return Packing(rows, count, T, sum(lengths), sum(drawn), blocks / whole, computed / needed)


def _blocks(lengths: list[int], T: int, block: int) -> int:
    """Blocks that attention computes in a row of these sequences: of queries each with those of
    keys from where the first of its sequences begins on."""
    begins, at = [], 0
    for n in lengths:
        begins += [at // block] * n
        at += n
    begins += [at // block] * (T - at)  # padding, which sees itself
    return sum(i // block + 1 - begins[i] for i in range(0, T, block))


def add(stage: dict[str, Any], of: Forecast) -> None:
    """Adds it to what `roofline.summary` tells of a stage."""
    for program in stage["programs"]:
        program["seconds_at_mean"] = of.seconds[program["name"]]
    stage["seconds_per_step_at_mean"] = of.total
    stage["at_mean"] = {
        "mean_response_tokens": of.mean,
        "micro_batches": of.packing.count,
        "computed_over_real": of.packing.computed,
    }
    if of.decoding:
        stage["at_mean"] |= {
            "rows": of.rows,
            "live_rows": of.decoding.live / (of.decoding.steps + of.decoding.fewer_steps),
            "decoding_steps": of.decoding.steps + of.decoding.fewer_steps,
            "parked": of.decoding.parked,
            "read_over_needed": of.decode_reads / of.needed,
        }


def show(name: str, of: Forecast) -> str:
    """The table of it."""
    told: dict[str, Any] = {"programs": [{"name": program} for program in of.seconds]}
    add(told, of)
    at = told["at_mean"]
    out = [f"stage {name}, responses of {of.mean:.0f} tokens in the mean"]
    out += [f"{program:<16}{s:>9.3g} s a step" for program, s in of.seconds.items() if s]
    if of.decoding:
        out.append(
            f"  {at['rows']} rows decode together, {at['live_rows']:.0f} of them in the mean, for "
            f"{at['decoding_steps']} steps; {at['parked']} parked; a step reads "
            f"{at['read_over_needed']:.2f} times weights and filled tokens"
        )
    out.append(
        f"  {at['micro_batches']} micro-batches, {at['computed_over_real']:.2f} times the "
        f"operations of their tokens; {of.total:.3g} s a step"
    )
    return "\n".join(out)
