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
from distill.data.collate import BatchLayout, SampledExample
from distill.planning import aot, roofline
from distill.planning.roofline import GIB, ProgramCost
from distill.policy import policy
from distill.training import memory, microbatches, sampling_programs, stages
from distill.training.calls import StageModels
from models import families
from models.config import Config
from models.errors import UserError
from models.layers import attention

PROMPT_TOKENS = 300  # tokens of a prompt, if the stage allows so many


@dataclasses.dataclass(frozen=True)
class Packing:
    """rows: of a micro-batch. count: of micro-batches a step. tokens: of a row. real: tokens of all
    sequences, and `trained` of them. attention: the share that attention computes of what it would
    of rows of one sequence. computed: operations of the student's layers for the step over those
    that the sequences alone would take."""

    microbatch_rows: int
    num_microbatches: int
    row_tokens: int
    real_tokens: int
    trained_tokens: int
    attention_share: float
    computed_over_real: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A stage's step, at responses of a mean length."""

    mean_tokens: float  # of what was drawn, which limits cut
    decoding: rollout.Simulation | None
    decode_rows: int  # that decode together
    decode_read_bytes: float  # bytes that a decoding step reads, cache and weights
    decode_needed_bytes: float  # bytes of weights and of filled tokens, a decoding step
    packing: Packing
    program_seconds: dict[str, float]  # a step, of each program

    @property
    def total_seconds(self) -> float:
        return sum(self.program_seconds.values())


def forecast_stage(
    c: ConfigDict,
    s: ConfigDict,
    sampled: int,
    models: StageModels,
    mesh: Mesh,
    chip: aot.Chip,
    costs: list[ProgramCost],
    mean_tokens: int,
) -> Forecast:
    """The forecast of a stage whose programs are compiled, on the student's `mesh`.

    Raises:
      UserError: if no response may be as long as the mean.
    """
    limit = s.max_response_tokens
    if not 0 < mean_tokens <= limit:
        raise UserError(
            f"--mean_response_tokens={mean_tokens}: from 1 to max_response_tokens={limit}"
        )
    readers = [*models.teachers.values(), *([models.reference] if models.reference else [])]
    rows = stages.compute_microbatch_rows(s, sampled, mesh, *map(policy.get_mesh, readers))
    lengths = rollout.draw_lengths(s.batch_size, mean_tokens, limit)
    device_kind = mesh.devices.flat[0].device_kind
    packing = simulate_packing(s, sampled, rows, lengths, models.student.config, device_kind)
    sampler_calls: dict[str, float] = {}
    decoding, size, reads, needed = None, 0, 0.0, 0.0
    if sampled:
        cache_capacity = memory.compute_cache_capacity(
            c, s, sampled, models, rows, chip.hbm_gib * GIB
        )
        sampler = sampling_programs.make_stage_sampler(c, s, sampled, models, cache_capacity)
        decoding, size = (
            simulate_decoding(s, sampler, lengths[:sampled]),
            sampler.decoder.cache.rows,
        )
        steps = decoding.steps + decoding.shrunk_steps
        small_prefill, *large_prefill = rollout.get_line_sizes(
            sampler.options, sampler.decoder.cache
        )
        sampler_calls = {
            "prompts": decoding.line_counts[large_prefill[0] if large_prefill else small_prefill],
            "few prompts": decoding.line_counts[small_prefill] if large_prefill else 0,
            "decode": decoding.steps,
            "decode fewer": decoding.shrunk_steps,
        }
        reads = decoding.bytes_read / steps
        needed = sampler.weight_bytes + decoding.cached_tokens * sampler.token_bytes / steps
    seconds, decode_reads = {}, 0.0
    for row in costs:
        count, traffic = sampler_calls.get(row.kind, row.calls), row.traffic
        flops = max(row.compiled or 0.0, row.useful)
        if row.kind == "decode" and traffic is not None:
            traffic = decode_reads = traffic - row.reads + reads
        if row.kind in ("read", "train"):
            count = row.calls / (s.minibatches * -(-s.batch_size // (s.minibatches * rows)))
            count *= packing.num_microbatches
            places = packing.num_microbatches * packing.microbatch_rows * packing.row_tokens
            flops -= (row.attention or 0.0) * (1 - packing.attention_share)
            flops -= row.head * (1 - packing.trained_tokens / places)
        times = roofline.estimate_seconds(chip, flops, traffic, row.collectives)
        seconds[row.name] = count * max(times.values())
    mean_drawn = sum(lengths) / len(lengths)
    return Forecast(mean_drawn, decoding, size, decode_reads, needed, packing, seconds)


def simulate_decoding(
    s: ConfigDict, sampler: sampling_programs.SamplingSetup, lengths: list[int]
) -> rollout.Simulation:
    """What sampling responses of these lengths takes."""
    P = min(PROMPT_TOKENS, s.max_prompt_tokens)
    groups = [[number // s.samples] * P for number in range(len(lengths))]
    rows = [rollout.Sequence(p, (0, i), s.max_response_tokens) for i, p in enumerate(groups)]
    shape = sampler.decoder.cache
    sizes = rollout.get_line_sizes(sampler.options, shape)
    return rollout.simulate(
        rows, lengths, shape, sampler.decoder.segment, sizes, sampler.count_cache_reads
    )


def simulate_packing(
    s: ConfigDict,
    sampled: int,
    rows: int,
    response_lengths: list[int],
    config: Config,
    device_kind: str,
) -> Packing:
    """How responses of these lengths are packed, behind prompts as they are assumed."""
    T, P = stages.get_row_tokens(s), min(PROMPT_TOKENS, s.max_prompt_tokens)
    if sampled:
        examples = [SampledExample([0] * P, [0] * n, "", "") for n in response_lengths]
        parts = microbatches.pack_examples(
            examples, rows, s.minibatches, BatchLayout(T, s.max_response_tokens)
        )
    else:  # rows of one, or of as many as `pack_tokens` hold, about
        repeated_lengths = [
            n for n in response_lengths for _ in range(T // (P + n) if s.pack_tokens else 1)
        ]
        row_counts = [T // (P + n) if s.pack_tokens else 1 for n in response_lengths]
        ends = [sum(row_counts[: i + 1]) for i in range(len(row_counts))]
        listed = [tuple(range(end - n, end)) for end, n in zip(ends, row_counts, strict=True)]
        parts = [[tuple(listed[at : at + rows]) for at in range(0, len(listed), rows)]]
        response_lengths = repeated_lengths
    packed_rows = [row for part in parts for micro in part for row in micro]
    count, lengths = sum(map(len, parts)), [P + n for n in response_lengths]
    block = attention.choose_block_size(-(-T // 128) * 128, device_kind)
    whole = _count_blocks([T], T, block) * len(packed_rows)
    blocks = sum(_count_blocks([lengths[i] for i in row], T, block) for row in packed_rows)
    context = blocks * block**2 / (len(packed_rows) * T)
    needed = sum(
        families.count_forward_flops(config, n, (n + 1) / 2, with_head=False) for n in lengths
    )
    computed = families.count_forward_flops(config, len(packed_rows) * T, context, with_head=False)
    return Packing(
        rows, count, T, sum(lengths), sum(response_lengths), blocks / whole, computed / needed
    )


def _count_blocks(lengths: list[int], T: int, block: int) -> int:
    """Blocks that attention computes in a row of these sequences: of queries each with those of
    keys from where the first of its sequences begins on."""
    begins, at = [], 0
    for n in lengths:
        begins += [at // block] * n
        at += n
    begins += [at // block] * (T - at)  # padding, which sees itself
    return sum(i // block + 1 - begins[i] for i in range(0, T, block))


def add_to_summary(stage: dict[str, Any], forecast: Forecast) -> None:
    """Adds it to what `roofline.summary` tells of a stage."""
    for program in stage["programs"]:
        program["seconds_at_mean"] = forecast.program_seconds[program["name"]]
    stage["seconds_per_step_at_mean"] = forecast.total_seconds
    stage["at_mean"] = {
        "mean_response_tokens": forecast.mean_tokens,
        "micro_batches": forecast.packing.num_microbatches,
        "computed_over_real": forecast.packing.computed_over_real,
    }
    if forecast.decoding:
        stage["at_mean"] |= {
            "rows": forecast.decode_rows,
            "live_rows": forecast.decoding.live_row_steps
            / (forecast.decoding.steps + forecast.decoding.shrunk_steps),
            "decoding_steps": forecast.decoding.steps + forecast.decoding.shrunk_steps,
            "parked": forecast.decoding.num_parked,
            "read_over_needed": forecast.decode_read_bytes / forecast.decode_needed_bytes,
        }


def render_forecast(name: str, forecast: Forecast) -> str:
    """The table of it."""
    summary: dict[str, Any] = {
        "programs": [{"name": program} for program in forecast.program_seconds]
    }
    add_to_summary(summary, forecast)
    at = summary["at_mean"]
    out = [f"stage {name}, responses of {forecast.mean_tokens:.0f} tokens in the mean"]
    out += [
        f"{program:<16}{s:>9.3g} s a step" for program, s in forecast.program_seconds.items() if s
    ]
    if forecast.decoding:
        out.append(
            f"  {at['rows']} rows decode together, {at['live_rows']:.0f} of them in the mean, for "
            f"{at['decoding_steps']} steps; {at['parked']} parked; a step reads "
            f"{at['read_over_needed']:.2f} times weights and filled tokens"
        )
    out.append(
        f"  {at['micro_batches']} micro-batches, {at['computed_over_real']:.2f} times the "
        f"operations of their tokens; {forecast.total_seconds:.3g} s a step"
    )
    return "\n".join(out)
