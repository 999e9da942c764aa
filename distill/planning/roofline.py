"""Costs of a step's compiled programs, their roofline times, and the tables that show both."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from distill.planning import aot
from distill.training import calls

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """The costs of a program on one device; None if unknown. Fields are keys of `plan --json`."""

    name: str
    calls: float  # per step
    peak: int  # bytes of the program alone
    beside: int  # bytes of everything else that is in memory then
    temporaries: int  # bytes
    useful: float  # FLOPs per call, by the formula
    compiled: float | None  # FLOPs per call of the compiled program
    attention: float | None  # the part of `compiled` in attention over whole rows
    traffic: int | None  # bytes moved to and from HBM, per call
    collectives: dict[str, tuple[int, int]] | None  # kind -> (number, bytes received), per call
    seconds: float  # per step: the lower bound of the roofline
    bound: str  # "compute", "HBM" or "interconnect"
    mfu: float | None  # upper bound: `useful` over the FLOPs the chip could do in that time
    compilation: float  # seconds
    kind: str  # ProgramCall.call_scaling
    head: float  # the part of `useful` in output heads
    reads: int  # the part of `traffic` that a kernel reads from the sampler's cache

    @property
    def total_bytes(self) -> int:
        return self.peak + self.beside


def estimate_seconds(
    chip: aot.Chip,
    flops: float,
    traffic: float | None,
    collectives: dict[str, tuple[int, int]] | None,
) -> dict[str, float]:
    """Returns the lower bound on a call's seconds by resource: compute, HBM, interconnect."""
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
    """Estimates the costs of a compiled program on one of `num_devices` devices.

    resident_bytes: bytes of everything else on the device.
    """
    useful = call.flops / num_devices
    flops = max(program.flops or 0, useful)
    traffic = None
    if program.hbm_bytes is not None:
        # A call's iterations share the traffic outside of their loop.
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
    """Returns the largest GiB of any program, with everything else in memory then."""
    return max(cost.total_bytes for costs in stage_costs.values() for cost in costs) / GIB


def summarise_run(
    c: ConfigDict, topology: str, stage_costs: dict[str, list[ProgramCost]]
) -> dict[str, Any]:
    """Returns the object that `plan --json` prints for a run that fits."""
    chip, count = aot.get_chip(topology), len(aot.get_devices(topology))
    chips = count // 2 if topology.startswith("v4") else count
    stages, hours = {}, 0.0
    for name, costs in stage_costs.items():
        seconds = sum(cost.seconds for cost in costs)
        hours += seconds * c[name].steps * chips / 3600
        stages[name] = {
            "programs": [
                {**dataclasses.asdict(cost), "peak_with_all": cost.total_bytes} for cost in costs
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
    """Renders a table of programs for each stage."""
    chip, summary = aot.get_chip(topology), summarise_run(c, topology, stage_costs)
    out = [
        f"{topology}: {summary['devices']} devices of {chip.hbm_gib} GiB, "
        f"{chip.bf16_tflops:g} TFLOP/s, {chip.hbm_gbs:g} GB/s; config.mesh {dict(c.mesh)}"
    ]
    head = ("", "peak GiB", "alone", "of it temp.", "TFLOP", "useful", "GB HBM", "GB links")
    line = "{:<16}{:>9}{:>9}{:>12}{:>9}{:>8}{:>9}{:>9}{:>9}{:>10}{:>8}  {}"
    for name, costs in stage_costs.items():
        out += [f"stage {name}", line.format(*head, "calls", "s a step", "MFU <=", "bound by")]
        for cost in costs:
            out.append(line.format(*_render_cells(cost)))
            if cost.collectives:
                kinds = (
                    f"{kind} {n} x, {size / 1e9:.3g} GB"
                    for kind, (n, size) in cost.collectives.items()
                )
                out.append("           " + "; ".join(kinds))
        step = summary["stages"][name]
        out.append(
            f"  at least {step['seconds_per_step_at_least']:.3g} s a step, at most "
            f"{step['steps_per_hour_at_most']:.3g} steps an hour"
        )
    out.append(f"fits: {summary['peak_gib']:.2f} of {chip.hbm_gib} GiB a device at the fullest")
    out.append(f"{summary['chip_hours_at_least']:.3g} chip-hours at least for all steps")
    return "\n".join(out)


def _render_cells(cost: ProgramCost) -> tuple[str, ...]:
    """Returns a program's cells in the table."""
    links = None
    if cost.collectives is not None:
        links = sum(size for _, size in cost.collectives.values()) / 1e9
    flops = cost.useful if cost.compiled is None else cost.compiled
    return (
        cost.name,
        f"{cost.total_bytes / GIB:.2f}",
        f"{cost.peak / GIB:.2f}",
        f"{cost.temporaries / GIB:.2f}",
        f"{flops / 1e12:.3g}",
        f"{100 * cost.useful / cost.compiled:.0f}%" if cost.compiled else "-",
        "-" if cost.traffic is None else f"{cost.traffic / 1e9:.3g}",
        "-" if links is None else f"{links:.3g}",
        f"{cost.calls:g}",
        f"{cost.seconds:.3g}",
        "-" if cost.mfu is None else f"{100 * cost.mfu:.0f}%",
        cost.bound,
    )
