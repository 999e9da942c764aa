"""What compiled programs of a step cost and how fast they can be at best, as rows and as tables."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from distill.planning import aot
from distill.training import calls

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """A program on one device. bytes, operations and seconds; None: not to be had."""

    name: str
    calls: float  # in a step
    peak: int  # of the program alone
    beside: int  # what lies in memory beside it
    temporaries: int
    useful: float  # operations of the formula, a call
    compiled: float | None  # operations of the program, a call
    attention: float | None  # of these, in attention over whole rows
    traffic: int | None  # HBM bytes, a call
    collectives: dict[str, tuple[int, int]] | None
    seconds: float  # a step: the roofline's
    bound: str
    mfu: float | None  # useful operations over what the device could do in these seconds, at most
    compilation: float
    kind: str  # of calls.Call
    head: float  # of the useful operations, by output heads
    reads: int  # of the traffic, what attention reads of the sampler's cache

    @property
    def total_bytes(self) -> int:
        return self.peak + self.beside


def estimate_seconds(
    chip: aot.Chip,
    flops: float,
    traffic: float | None,
    collectives: dict[str, tuple[int, int]] | None,
) -> dict[str, float]:
    """Seconds that each of what a call uses needs at best."""
    times = {"compute": flops / (chip.bf16_tflops * 1e12)}
    if traffic is not None:
        times["HBM"] = traffic / (chip.hbm_gbs * 1e9)
    if collectives:
        received = sum(size for _, size in collectives.values())
        times["interconnect"] = received / (chip.ici_gbs * 1e9)
    return times


def estimate_cost(
    call: calls.ProgramCall,
    program: aot.Program,
    resident_bytes: int,
    chip: aot.Chip,
    num_devices: int,
) -> ProgramCost:
    """A program's row, on one of `count` devices."""
    useful = call.flops / num_devices
    flops = max(program.flops or 0, useful)
    traffic = None
    if program.hbm_bytes is not None:
        shared = (program.hbm_bytes_outside_loops or 0) * (1 - 1 / call.turns_per_call)
        traffic = program.hbm_bytes + call.kernel_bytes_read - int(shared)
    times = estimate_seconds(chip, flops, traffic, program.collectives)
    bound = max(times, key=lambda name: times[name])
    mfu = None
    if program.flops is not None:
        mfu = useful / (chip.bf16_tflops * 1e12 * times[bound])
    return ProgramCost(
        name=call.name,
        calls=call.calls_per_step,
        peak=program.peak_bytes,
        beside=resident_bytes,
        temporaries=program.temporary_bytes,
        useful=useful,
        compiled=program.flops,
        attention=program.attention_flops,
        traffic=traffic,
        collectives=program.collectives,
        seconds=times[bound] * call.calls_per_step,
        bound=bound,
        mfu=mfu,
        compilation=program.compile_seconds,
        kind=call.call_scaling,
        reads=call.kernel_bytes_read,
        head=call.head_flops / num_devices,
    )


def find_peak_gib(stage_costs: dict[str, list[ProgramCost]]) -> float:
    """GiB of the largest of all programs, with what lies beside it."""
    return max(row.total_bytes for rows in stage_costs.values() for row in rows) / GIB


def summarise_run(
    c: ConfigDict, topology: str, stage_costs: dict[str, list[ProgramCost]]
) -> dict[str, Any]:
    """What --json prints of a run that fits."""
    chip, count = aot.get_chip(topology), len(aot.get_devices(topology))
    chips = count // 2 if topology.startswith("v4") else count
    stages, hours = {}, 0.0
    for name, rows in stage_costs.items():
        seconds = sum(row.seconds for row in rows)
        hours += seconds * c[name].steps * chips / 3600
        stages[name] = {
            "programs": [
                {**dataclasses.asdict(row), "peak_with_all": row.total_bytes} for row in rows
            ],
            "seconds_per_step_at_least": seconds,
            "steps_per_hour_at_most": 3600 / seconds,
        }
    return {
        "topology": topology,
        "devices": count,
        "hbm_gib": chip.hbm_gib,
        "fits": True,
        "peak_gib": find_peak_gib(stage_costs),
        "stages": stages,
        "chip_hours_at_least": hours,
    }


def render_tables(c: ConfigDict, topology: str, stage_costs: dict[str, list[ProgramCost]]) -> str:
    """The tables."""
    chip, summary = aot.get_chip(topology), summarise_run(c, topology, stage_costs)
    out = [
        f"{topology}: {summary['devices']} devices of {chip.hbm_gib} GiB, "
        f"{chip.bf16_tflops:g} TFLOP/s, {chip.hbm_gbs:g} GB/s; config.mesh {dict(c.mesh)}"
    ]
    head = ("", "peak GiB", "alone", "of it temp.", "TFLOP", "useful", "GB HBM", "GB links")
    line = "{:<16}{:>9}{:>9}{:>12}{:>9}{:>8}{:>9}{:>9}{:>9}{:>10}{:>8}  {}"
    for name, rows in stage_costs.items():
        out += [f"stage {name}", line.format(*head, "calls", "s a step", "MFU <=", "bound by")]
        for row in rows:
            links = None
            if row.collectives is not None:
                links = sum(size for _, size in row.collectives.values()) / 1e9
            whole, share = row.compiled, None
            if whole:
                share = f"{100 * row.useful / whole:.0f}%"
            out.append(
                line.format(
                    row.name,
                    f"{row.total_bytes / GIB:.2f}",
                    f"{row.peak / GIB:.2f}",
                    f"{row.temporaries / GIB:.2f}",
                    f"{(whole if whole is not None else row.useful) / 1e12:.3g}",
                    share or "-",
                    "-" if row.traffic is None else f"{row.traffic / 1e9:.3g}",
                    "-" if links is None else f"{links:.3g}",
                    f"{row.calls:g}",
                    f"{row.seconds:.3g}",
                    "-" if row.mfu is None else f"{100 * row.mfu:.0f}%",
                    row.bound,
                )
            )
            if row.collectives:
                kinds = row.collectives.items()
                said = (f"{kind} {n} x, {size / 1e9:.3g} GB" for kind, (n, size) in kinds)
                out.append("           " + "; ".join(said))
        step = summary["stages"][name]
        out.append(
            f"  at least {step['seconds_per_step_at_least']:.3g} s a step, at most "
            f"{step['steps_per_hour_at_most']:.3g} steps an hour"
        )
    out.append(f"fits: {summary['peak_gib']:.2f} of {chip.hbm_gib} GiB a device at the fullest")
    out.append(f"{summary['chip_hours_at_least']:.3g} chip-hours at least for all steps")
    return "\n".join(out)
