"""Programs compiled ahead of time, for devices that may not be there, and what they will cost.

libtpu's compiler runs on a machine without a TPU, so memory, matrix products and collectives of a
program are known before a slice is rented. Where a number is not to be had from this compiler, it
is None, never a guess.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies

from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation (cloud.google.com/tpu/docs/system-architecture-tpu-vm).

    hbm_gib is what libtpu's own compiler lets a program have. ici_gbs is what a device can receive
    from all its neighbours together, in 10^9 bytes a second.
    """

    hbm_gib: float
    bf16_tflops: float
    hbm_gbs: float
    ici_gbs: float
    host: str  # how libtpu names a machine of this generation


CHIPS = {
    "v4": Chip(15.25, 137.5, 614.0, 75.0, "v4-8"),  # a device is one of the chip's two cores
    "v5e": Chip(15.75, 197.0, 819.0, 100.0, "v5litepod-4"),
    "v5p": Chip(95.73, 459.0, 2765.0, 300.0, "v5p-8"),
    "v6e": Chip(31.24, 918.0, 1640.0, 224.0, "v6e-4"),
}


def chip(topology: str) -> Chip:
    """The row of CHIPS for a name such as v5e:8x8.

    Raises:
      UserError: for another generation.
    """
    generation = topology.partition(":")[0]
    if generation in ("v7x", "tpu7x"):
        raise UserError(f"--topology={topology}: TPU7x is not served; take v6e or v5p")
    if generation not in CHIPS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", topology):
        raise UserError(
            f"--topology={topology}: name one of {', '.join(CHIPS)} and its shape, such as v5e:8x8"
        )
    return CHIPS[generation]


def devices(topology: str) -> list[Any]:
    """The devices of a TPU slice that need not exist, in the order of their coordinates.

    Raises:
      UserError: if there is no such slice, or no libtpu to ask.
    """
    os.environ |= {  # libtpu asks the machine who it is, and logs that it does not know
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": chip(topology).host,
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the plugin raises many kinds, over several lines
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "libtpu" in reason or "No module" in reason:
            raise UserError(
                f"planning for a TPU needs its compiler: pip install libtpu ({reason})"
            ) from None
        raise UserError(f"--topology={topology}: no such slice ({reason})") from None
    return list(found.devices)


@dataclasses.dataclass(frozen=True)
class Program:
    """What one compiled program costs one device; bytes and operations are of one call.

    Of loops whose length is known only when they run, one turn is counted, and `open_loops` says
    how many there are.
    """

    name: str
    seconds: float  # of compilation
    arguments: int
    outputs: int
    aliased: int  # bytes of the outputs that reuse arguments
    temporaries: int
    code: int
    peak: int
    flops: float | None  # of matrix products; None where the compiler gives no text
    collectives: dict[str, tuple[int, int]] | None  # kind -> (how many, bytes received)
    open_loops: int


def compile(name: str, lower: Callable[[], Any], hbm_gib: float) -> Program:
    """Compiles what `lower()` lowers.

    Raises:
      OutOfMemory: if the program does not fit the device.
    """
    start = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "CompileTimeHbmOom" not in str(error):
            raise
        raise OutOfMemory(name, str(error), hbm_gib) from None
    took, memory = time.perf_counter() - start, compiled.memory_analysis()
    try:
        costs = read(compiled.as_text())
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10 cannot print programs for v5p and v6e
        costs = None
    return Program(
        name=name,
        seconds=took,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=costs.flops if costs else None,
        collectives=costs.collectives if costs else None,
        open_loops=costs.open_loops if costs else 0,
    )


class OutOfMemory(Exception):
    """A program is larger than the device; `needs` is the compiler's own sentence."""

    def __init__(self, name: str, message: str, hbm_gib: float) -> None:
        found = re.search(
            r"Used ([0-9.]+)G of|required for HLO temporaries \(([0-9.]+)G\)", message
        )
        self.program = name
        self.needs_gib = float(next(g for g in found.groups() if g)) if found else math.nan
        self.largest = re.findall(r"Size: ([0-9.]+[KMG])\n.*?Shape: (\S+)", message, re.DOTALL)[:5]
        super().__init__(f"{name} needs {self.needs_gib:.2f} GiB of {hbm_gib:.2f}")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Sums over a program's text; see Program."""

    flops: float
    collectives: dict[str, tuple[int, int]]
    open_loops: int


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|async_execution)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_SHAPE = re.compile(r"\b([a-z]\w*)\[([0-9,]*)\]")
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f64": 8, "c64": 8, "s4": 0.5, "u4": 0.5}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def read(text: str) -> Costs:
    """Counts matrix products and collectives in the text of a compiled program.

    A body of a loop counts as often as the loop turns; a collective that is split into a start and
    a done counts once.
    """
    computations, entry = _computations(text)
    flops, open_loops = 0.0, 0
    found: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()

    def walk(name: str, times: float) -> Iterator[tuple[float, str, str, dict[str, str]]]:
        nonlocal open_loops
        lines = computations.get(name, {})
        for instruction, rest in lines.items():
            yield times, instruction, rest, lines
            inner = times
            if " while(" in rest:
                trips = _trips(rest, computations)
                open_loops += trips is None
                inner = times * (trips or 1)
            if " reduce(" in rest or " all-reduce(" in rest or " reduce-scatter(" in rest:
                continue  # what they apply is an addition of scalars
            for called in _CALLED.findall(rest):
                yield from walk(called, inner)
            for several, one in _BRANCHES.findall(rest):
                for branch in re.findall(r"[\w.\-]+", several or one):
                    yield from walk(branch, inner)

    for times, instruction, rest, lines in walk(entry, 1.0):
        kind = next((k for k in COLLECTIVES if re.search(rf" {k}(-start)?\(", rest)), None)
        if kind:
            channel = re.search(r"channel_id=(\d+)", rest)
            key = channel.group(1) if channel else instruction
            if key in seen:
                continue  # the same exchange, named again where it is waited for
            seen.add(key)
            count, size = found.get(kind, (0, 0))
            found[kind] = (count + int(times), size + int(times * _received(kind, rest)))
        elif " convolution(" in rest or " dot(" in rest:
            flops += times * _products(rest, lines)
    return Costs(flops, found, open_loops)


def _computations(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """Computation -> its instructions, by name what follows the equals sign; and the entry."""
    found: dict[str, dict[str, str]] = {}
    entry = ""
    current: dict[str, str] = {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif instruction := _INSTRUCTION.match(line):
            current[instruction.group(1)] = instruction.group(2)
    return found, entry


def _trips(rest: str, computations: dict[str, dict[str, str]]) -> int | None:
    """How often a loop turns: XLA's note, or what its condition compares its counter with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(known.group(1))
    condition, body = (
        computations.get(name.group(1), {}) if name else {}
        for name in (re.search(rf"{part}=%?([\w.\-]+)", rest) for part in ("condition", "body"))
    )
    if any(" and(" in line or " fusion(" in line for line in condition.values()):
        return None  # it may end early
    limits = [n for line in condition.values() if (n := _constant(line)) is not None]
    counters = [int(m) for line in condition.values() for m in re.findall(r"index=(\d+)", line)]
    if len(limits) != 1 or len(counters) != 1:
        return None
    return -(-limits[0] // _increment(body, counters[0]))


def _constant(line: str) -> int | None:
    found = re.match(r"[su]32\[\]\S* constant\((\d+)\)", line)
    return int(found.group(1)) if found else None


def _increment(body: dict[str, str], counter: int) -> int:
    """By how much a loop's counter grows in a turn: loops unrolled by the compiler take strides."""
    result = re.search(r" tuple\((.*?)\)", list(body.values())[-1])
    operands = re.findall(r"%([\w.\-]+)", result.group(1)) if result else []
    line = body.get(operands[counter], "") if len(operands) > counter else ""
    added = re.search(r" add\(%([\w.\-]+), %([\w.\-]+)\)", line)
    found = [_constant(body.get(name, "")) for name in (added.groups() if added else ())]
    return next((n for n in found if n), 1)


def _dims(shape: str) -> list[int]:
    return [int(n) for n in shape.split(",") if n]


def _size(dtype: str, dims: str) -> float:
    width = _BYTES.get(dtype) or int(re.sub(r"\D.*$", "", re.sub(r"^\D+", "", dtype)) or 8) / 8
    return width * math.prod(_dims(dims))


def _received(kind: str, rest: str) -> float:
    """Bytes that a device gets from others in one exchange, by its usual algorithm on a ring."""
    shapes = [_size(*s) for s in _SHAPE.findall(rest.split(f" {kind}")[0])]
    group = _group(rest)
    share = (group - 1) / group
    if kind == "all-gather":
        return max(shapes) * share  # a start's shape holds the operand beside the result
    if kind == "all-reduce":
        return 2 * sum(shapes) * share
    if kind == "reduce-scatter":
        return min(shapes) * (group - 1)
    return max(shapes) * (1 if kind == "collective-permute" else share)


def _group(rest: str) -> int:
    """How many devices exchange."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota.group(2))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed.group(1).count(",") + 1
    return 2


def _products(rest: str, lines: dict[str, str]) -> float:
    """Operations of one dot or convolution: 2 · elements of the result · length of the sums."""
    shape = _SHAPE.search(rest)
    assert shape
    operands = re.search(r"(?:convolution|dot)\(([^)]*)\)", rest)
    assert operands
    names = re.findall(r"%([\w.\-]+)", operands.group(1))
    inline = [_dims(d) for _, d in _SHAPE.findall(operands.group(1))]

    def dims(i: int) -> list[int]:
        if len(inline) > i:
            return inline[i]
        found = _SHAPE.search(lines[names[i]])
        return _dims(found.group(2)) if found else []

    if contracted := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest):
        length = math.prod(dims(0)[i] for i in _dims(contracted.group(1)))
    else:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
        assert labels
        image, kernel, out = (
            dict(zip(names, sizes, strict=True))
            for names, sizes in zip(
                labels.groups(), (dims(0), dims(1), _dims(shape.group(2))), strict=True
            )
        )
        length = kernel["i"]
        for i, axis in enumerate(sorted(label for label in kernel if label.isdigit())):
            length *= _taps(rest, i, image[axis], kernel[axis], out[axis])
    return 2.0 * math.prod(_dims(shape.group(2))) * length


def _taps(rest: str, axis: int, image: int, kernel: int, out: int) -> float:
    """How many places of a window fall on the image, in the mean over the results.

    TPUs write batches and transpositions of matrices as windows that mostly fall beside it.
    """
    window = re.search(r" window=\{([^}]*)\}", rest)
    fields = dict(f.split("=") for f in window.group(1).split()) if window else {}

    def field(name: str, otherwise: int) -> int:
        return int(fields[name].split("x")[axis]) if name in fields else otherwise

    low = int(fields["pad"].split("x")[axis].split("_")[0]) if "pad" in fields else 0
    stride, spread = field("stride", 1), field("lhs_dilate", 1)
    at = (o * stride - low + k * field("rhs_dilate", 1) for o in range(out) for k in range(kernel))
    return sum(0 <= x <= (image - 1) * spread and x % spread == 0 for x in at) / out
