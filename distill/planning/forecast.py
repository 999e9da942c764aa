"""Forecasts the time of a step for realistic response lengths, rather than the maximum for all.

Lengths are drawn by rollout.draw_lengths; rows are scheduled and packed by the code that a run
uses. Each call takes its roofline time. Decoding is charged for the pages it reads at these
lengths, attention for the sequences that share a row, and output heads for trained tokens.
"""

import dataclasses
import functools
from typing import Any

from distill import rollout
from distill.data.collate import SampledExample
from distill.planning import aot, roofline
from distill.planning.roofline import GIB, ProgramCost
from distill.training import memory, microbatches, sampling_programs, stages
from distill.training.calls import AbstractStage
from models import families
from models.errors import UserError
from models.layers import attention

PROMPT_TOKENS = 300  # assumed length of each prompt, unless the stage allows less


@dataclasses.dataclass(frozen=True)
class Packing:
    """A step's sequences, packed into micro-batches."""

    microbatch_rows: int
    num_microbatches: int
    row_tokens: int
    real_tokens: int  # of all sequences
    trained_tokens: int
    attention_share: float  # of the blocks that attention computes if each row is one sequence
    computed_over_real: float  # FLOPs of the layers over those of the sequences without padding

    @property
    def num_places(self) -> int:
        """Token positions of all rows, padding included."""
        return self.num_microbatches * self.microbatch_rows * self.row_tokens


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The decoding of a step's sequences."""

    simulation: rollout.Simulation
    rows: int  # decoded together
    cache_read_bytes: float  # per decoding step
    needed_bytes: float  # per decoding step: weights and filled cache tokens
    line_counts: tuple[int, int]  # calls of "few prompts" and "prompts"
    drafts: int = 0  # that each step drafts for a row

    @property
    def steps(self) -> int:
        return self.simulation.steps + self.simulation.shrunk_steps

    @property
    def main_program(self) -> str:
        """The program that decodes all rows."""
        return f"decode {self.drafts} drafts" if self.drafts else "decode"

    @property
    def program_calls(self) -> dict[str, int]:
        """Number of calls of each sampling program whose calls depend on lengths."""
        few, many = self.line_counts
        steps = {"decode": self.simulation.steps, "decode fewer": self.simulation.shrunk_steps}
        if self.drafts:
            steps |= {f"{name} {self.drafts} drafts": n for name, n in steps.items()}
            steps |= {"decode": 0, "decode fewer": 0}
        return {"prompts": many, "few prompts": few, **steps}


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The forecast of one step of a stage at a mean response length."""

    mean_tokens: float  # of the drawn lengths, which are cut at the limit
    decoding: Decoding | None  # None if the stage does not sample
    read_bytes: float  # per decoding step: weights and cache
    packing: Packing
    program_seconds: dict[str, float]  # program -> seconds per step

    @property
    def total_seconds(self) -> float:
        return sum(self.program_seconds.values())


def forecast_stage(
    stage: AbstractStage,
    chip: aot.Chip,
    costs: list[ProgramCost],
    mean_tokens: int,
    tokens_per_step: float = 1.0,
) -> Forecast:
    """Forecasts a step of a stage from the costs of its compiled programs.

    tokens_per_step: that a row draws in a decoding step of the longest drafts.

    Raises:
      UserError: if the mean is not between 1 and the stage's max_response_tokens, or if
        tokens_per_step is more than its drafts can give.
    """
    limit = stage.s.max_response_tokens
    if not 0 < mean_tokens <= limit:
        raise UserError(
            f"--mean_response_tokens={mean_tokens}: from 1 to max_response_tokens={limit}"
        )
    r = stage.s.rollout
    most = 1 + r.draft_tokens if r.drafts and stage.sampled_rows else 1
    if not 1 <= tokens_per_step <= most:
        reason = f"config.{stage.name}.rollout.drafts" if most == 1 else "draft_tokens + 1"
        raise UserError(f"--tokens_per_step={tokens_per_step:g}: from 1 to {most} ({reason})")
    lengths = rollout.draw_lengths(stage.s.batch_size, mean_tokens, limit)
    packing, decoding = simulate_packing(stage, lengths), None
    if stage.sampled_rows:
        cache_capacity = memory.compute_cache_capacity(stage, chip.hbm_gib * GIB)
        sampler = sampling_programs.make_stage_sampler(stage, cache_capacity)
        rows = lengths[: stage.sampled_rows]
        decoding = simulate_decoding(sampler, rows, tokens_per_step)
    program_calls = decoding.program_calls if decoding else {}
    seconds, read_bytes = {}, 0.0
    for cost in costs:
        count, traffic = program_calls.get(cost.kind, cost.calls), cost.traffic
        flops = max(cost.compiled or 0.0, cost.useful)
        if decoding and cost.kind == decoding.main_program and traffic is not None:
            traffic = read_bytes = traffic - cost.reads + decoding.cache_read_bytes
        if cost.kind in ("read", "train"):
            count = cost.calls / stage.max_microbatches * packing.num_microbatches
            flops -= (cost.attention or 0.0) * (1 - packing.attention_share)
            flops -= cost.head * (1 - packing.trained_tokens / packing.num_places)
        times = roofline.estimate_seconds(chip, flops, traffic, cost.collectives)
        seconds[cost.name] = count * max(times.values())
    return Forecast(sum(lengths) / len(lengths), decoding, read_bytes, packing, seconds)


def simulate_decoding(
    sampler: sampling_programs.AbstractSampler, lengths: list[int], tokens_per_step: float = 1.0
) -> Decoding:
    """Simulates the decoding of responses of these lengths with a run's scheduler."""
    s, shape = sampler.stage.s, sampler.decoder.cache
    P = min(PROMPT_TOKENS, s.max_prompt_tokens)
    prompts = [[number // s.samples] * P for number in range(len(lengths))]
    rows = [rollout.Sequence(p, (0, i), s.max_response_tokens) for i, p in enumerate(prompts)]
    sizes = rollout.get_line_sizes(sampler.options, shape)
    drafts = s.rollout.draft_tokens if tokens_per_step > 1 else 0
    count_reads = functools.partial(sampler.count_cache_reads, drafts=drafts)
    segment = sampler.decoder.segment
    simulation = rollout.simulate(
        rows, lengths, shape, segment, sizes, count_reads, tokens_per_step
    )
    steps = simulation.steps + simulation.shrunk_steps
    *few, many = (simulation.line_counts[size] for size in sizes)
    return Decoding(
        simulation,
        shape.rows,
        simulation.bytes_read / steps,
        sampler.weight_bytes + simulation.cached_tokens * sampler.token_bytes / steps,
        (sum(few), many),
        drafts,
    )


def simulate_packing(stage: AbstractStage, response_lengths: list[int]) -> Packing:
    """Packs responses of these lengths, each after a prompt of PROMPT_TOKENS, as a run does."""
    s, rows = stage.s, stage.microbatch_rows
    T, P = stages.get_row_tokens(s), min(PROMPT_TOKENS, s.max_prompt_tokens)
    if stage.sampled_rows:
        examples = [SampledExample([0] * P, [0] * n, "", "") for n in response_lengths]
        layout = dataclasses.replace(stage.layout, context_tokens=0)
        parts = microbatches.pack_examples(examples, rows, s.minibatches, layout)
    else:  # one sequence per row, or about as many as `pack_tokens` holds
        row_counts = [T // (P + n) if s.pack_tokens else 1 for n in response_lengths]
        ends = [sum(row_counts[: i + 1]) for i in range(len(row_counts))]
        packed = [tuple(range(end - n, end)) for end, n in zip(ends, row_counts, strict=True)]
        parts = [[tuple(packed[i : i + rows]) for i in range(0, len(packed), rows)]]
        pairs = zip(response_lengths, row_counts, strict=True)
        response_lengths = [n for n, count in pairs for _ in range(count)]
    packed_rows = [row for part in parts for micro in part for row in micro]
    lengths = [P + n for n in response_lengths]
    device_kind, config = stage.mesh.devices.flat[0].device_kind, stage.student.config
    block = attention.choose_block_size(-(-T // 128) * 128, device_kind)
    whole = _count_blocks([T], T, block) * len(packed_rows)
    blocks = sum(_count_blocks([lengths[i] for i in row], T, block) for row in packed_rows)
    context = blocks * block**2 / (len(packed_rows) * T)
    needed = sum(
        families.count_forward_flops(config, n, (n + 1) / 2, with_head=False) for n in lengths
    )
    computed = families.count_forward_flops(config, len(packed_rows) * T, context, with_head=False)
    return Packing(
        rows,
        sum(map(len, parts)),
        T,
        sum(lengths),
        sum(response_lengths),
        blocks / whole,
        computed / needed,
    )


def _count_blocks(lengths: list[int], T: int, block: int) -> int:
    """Counts the blocks that attention computes in a row of these sequences.

    Each block of queries meets the key blocks from the start of its first sequence to the diagonal.
    """
    first_blocks, end = [], 0
    for n in lengths:
        first_blocks += [end // block] * n
        end += n
    first_blocks += [end // block] * (T - end)  # padding attends to itself
    return sum(i // block + 1 - first_blocks[i] for i in range(0, T, block))


def add_to_summary(stage: dict[str, Any], forecast: Forecast) -> None:
    """Adds a forecast to a stage in the summary of `roofline.summarise_run`."""
    for program in stage["programs"]:
        program["seconds_at_mean"] = forecast.program_seconds[program["name"]]
    stage["seconds_per_step_at_mean"] = forecast.total_seconds
    stage["at_mean"] = {
        "mean_response_tokens": forecast.mean_tokens,
        "micro_batches": forecast.packing.num_microbatches,
        "computed_over_real": forecast.packing.computed_over_real,
    }
    if decoding := forecast.decoding:
        stage["at_mean"] |= {
            "rows": decoding.rows,
            "live_rows": decoding.simulation.live_row_steps / decoding.steps,
            "decoding_steps": decoding.steps,
            "parked": decoding.simulation.num_parked,
            "read_over_needed": forecast.read_bytes / decoding.needed_bytes,
        }


def render_forecast(name: str, forecast: Forecast) -> str:
    """Renders a forecast as a table."""
    summary: dict[str, Any] = {
        "programs": [{"name": program} for program in forecast.program_seconds]
    }
    add_to_summary(summary, forecast)
    mean = summary["at_mean"]
    out = [f"stage {name}, responses of {forecast.mean_tokens:.0f} tokens in the mean"]
    out += [
        f"{program:<16}{s:>9.3g} s a step" for program, s in forecast.program_seconds.items() if s
    ]
    if forecast.decoding:
        out.append(
            f"  {mean['rows']} rows decode together, {mean['live_rows']:.0f} live on average, "
            f"for {mean['decoding_steps']} steps; {mean['parked']} parked; a step reads "
            f"{mean['read_over_needed']:.2f} times weights and filled tokens"
        )
    out.append(
        f"  {mean['micro_batches']} micro-batches, {mean['computed_over_real']:.2f} times "
        f"the FLOPs of their tokens; {forecast.total_seconds:.3g} s a step"
    )
    return "\n".join(out)
