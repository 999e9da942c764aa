"""What compiled programs of a step cost and how fast they can be at best, as rows and as tables."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from distill.planning import aot
from distill.training import calls

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
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
    def total(self) -> int:
        return self.peak + self.beside


def limits(
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


def row(call: calls.Call, program: aot.Program, beside: int, chip: aot.Chip, count: int) -> Row:
    """A program's row, on one of `count` devices."""
    useful = call.useful / count
    flops = max(program.flops or 0, useful)
    traffic = None
    if program.traffic is not None:
        shared = (program.once or 0) * (1 - 1 / call.segment)
        traffic = program.traffic + call.reads - int(shared)
    times = limits(chip, flops, traffic, program.collectives)
    bound = max(times, key=lambda name: times[name])
    mfu = None
    if program.flops is not None:
        mfu = useful / (chip.bf16_tflops * 1e12 * times[bound])
    return Row(
        name=call.name,
        calls=call.turns,
        peak=program.peak,
        beside=beside,
        temporaries=program.temporaries,
        useful=useful,
        compiled=program.flops,
        attention=program.attention,
        traffic=traffic,
        collectives=program.collectives,
        seconds=times[bound] * call.turns,
        bound=bound,
        mfu=mfu,
        compilation=program.seconds,
        kind=call.kind,
        reads=call.reads,
        head=call.head / count,
    )


def fullest(found: dict[str, list[Row]]) -> float:
    """GiB of the largest of all programs, with what lies beside it."""
    return max(row.total for rows in found.values() for row in rows) / GIB


def summary(c: ConfigDict, topology: str, found: dict[str, list[Row]]) -> dict[str, Any]:
    """What --json prints of a run that fits."""
    chip, count = aot.chip(topology), len(aot.devices(topology))
    chips = count // 2 if topology.startswith("v4") else count
    told, hours = {}, 0.0
    for name, rows in found.items():
        seconds = sum(row.seconds for row in rows)
        hours += seconds * c[name].steps * chips / 3600
        told[name] = {
            "programs": [{**dataclasses.asdict(row), "peak_with_all": row.total} for row in rows],
            "seconds_per_step_at_least": seconds,
            "steps_per_hour_at_most": 3600 / seconds,
        }
    return {
        "topology": topology,
        "devices": count,
        "hbm_gib": chip.hbm_gib,
        "fits": True,
        "peak_gib": fullest(found),
        "stages": told,
        "chip_hours_at_least": hours,
    }


def show(c: ConfigDict, topology: str, found: dict[str, list[Row]]) -> str:
    """The tables."""
    chip, told = aot.chip(topology), summary(c, topology, found)
    out = [
        f"{topology}: {told['devices']} devices of {chip.hbm_gib} GiB, "
        f"{chip.bf16_tflops:g} TFLOP/s, {chip.hbm_gbs:g} GB/s; config.mesh {dict(c.mesh)}"
    ]
    head = ("", "peak GiB", "alone", "of it temp.", "TFLOP", "useful", "GB HBM", "GB links")
    line = "{:<16}{:>9}{:>9}{:>12}{:>9}{:>8}{:>9}{:>9}{:>9}{:>10}{:>8}  {}"
    for name, rows in found.items():
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
                    f"{row.total / GIB:.2f}",
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
        step = told["stages"][name]
        out.append(
            f"  at least {step['seconds_per_step_at_least']:.3g} s a step, at most "
            f"{step['steps_per_hour_at_most']:.3g} steps an hour"
        )
    out.append(f"fits: {told['peak_gib']:.2f} of {chip.hbm_gib} GiB a device at the fullest")
    out.append(f"{told['chip_hours_at_least']:.3g} chip-hours at least for all steps")
    return "\n".join(out)
