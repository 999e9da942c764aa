"""Counts matrix products, memory traffic and collectives in the text of a compiled program."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a program on one device, summed over its text.

    flops: FLOPs of matrix products, including kernels for attention and experts.
    attention_flops: the part of `flops` in kernels for attention over whole rows.
    hbm_bytes: bytes read from and written to HBM: operands and results of each instruction. Slices
    and scatters count only the elements they read or write. Paged attention kernels count without
    the pages: how many they read depends on the rows' lengths (models.layers.pages.count_read_bytes
    counts them).
    hbm_bytes_outside_loops: the part of `hbm_bytes` outside loops of unknown length.
    collectives: kind -> (number of calls, bytes received).
    open_loops: number of loops of unknown length; one iteration of each is counted.
    """

    flops: float
    attention_flops: float
    hbm_bytes: int
    hbm_bytes_outside_loops: int
    collectives: dict[str, tuple[int, int]]
    open_loops: int


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations|async_execution)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_SHAPE = re.compile(r"\b([a-z]\w*)\[([0-9,]*)\]")
_DTYPE_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f64": 8, "c64": 8, "s4": 0.5, "u4": 0.5}
_SHAPE_WITH_LAYOUT = re.compile(r"\b([a-z]\w*)\[([0-9,]*)\](\{[^}]*\})?")
# Instructions without traffic: aliases of existing buffers, and the `-done` half of asynchronous
# instructions, which are counted at their start.
_WITHOUT_TRAFFIC = re.compile(
    r" (?:parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|"
    r"partition-id|replica-id|iota|opt-barrier|[\w\-]+-done|async-\w+)\("
)
# Instructions that only change the form of a value: free inside a fusion.
_SAME_VALUES = re.compile(r" (?:parameter|bitcast|convert|copy|reshape|transpose)\(")
# Instructions that update their first operand in place, and the index of the update operand.
_IN_PLACE = re.compile(r" (dynamic-update-slice|scatter)\(")
_UPDATE_OPERAND = {"dynamic-update-slice": 1, "scatter": 2}
# JAX's paged attention kernels for TPU and GPU, and which of their operands are the page pool.
_PAGED_KERNEL = re.compile(r"/jit\(((?:ragged_)?paged_attention)\)/")
_POOL_OPERANDS = {"ragged_paged_attention": slice(-1, None), "paged_attention": slice(1, -2)}
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|triton_kernel_call_ffi)"')
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def parse_costs(text: str) -> Costs:
    """Sums the costs of a compiled program from its text.

    A loop body counts once per iteration. Of several branches, only the one with the most FLOPs
    counts. A collective that is split into a start and a done instruction counts once.
    """
    computations, entry = _parse_computations(text)
    flops, attention_flops, open_loops, depth = 0.0, 0.0, 0, 0
    collectives: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()

    def walk(
        name: str, times: float, fused: bool = False
    ) -> Iterator[tuple[float, bool, str, str, str, dict[str, str]]]:
        nonlocal open_loops, depth
        lines = computations.get(name, {})
        for instruction, rest in lines.items():
            yield times, fused, name, instruction, rest, lines
            inner, unknown = times, False
            if " while(" in rest:
                trips = _count_trips(rest, computations)
                unknown = trips is None
                open_loops += unknown
                inner = times * (trips or 1)
            if " reduce(" in rest or " all-reduce(" in rest or " reduce-scatter(" in rest:
                continue  # the computation they apply adds scalars
            depth += unknown
            for called in _CALLED.findall(rest):
                yield from walk(called, inner, fused or " fusion(" in rest)
            depth -= unknown
            if pairs := _BRANCHES.findall(rest):
                names = re.findall(r"[\w.\-]+", " ".join(" ".join(pair) for pair in pairs))
                yield from walk(max(names, key=measure_branch), inner, fused)

    def measure_branch(branch: str) -> tuple[float, int]:
        """Returns the sort key of a branch: its FLOPs, with its length as the tie-break."""
        nonlocal open_loops
        before, instructions = open_loops, list(walk(branch, 1.0))
        open_loops = before
        products = (
            times * _count_matmul_flops(rest, lines)
            for times, _, _, _, rest, lines in instructions
            if " convolution(" in rest or " dot(" in rest
        )
        return sum(products), len(instructions)

    hbm_bytes = outside = 0.0
    for times, fused, inside, instruction, rest, lines in walk(entry, 1.0):
        if not fused:
            moved = times * _count_hbm_bytes(rest, lines, computations)
            hbm_bytes, outside = hbm_bytes + moved, outside + (0 if depth else moved)
        kind = next((k for k in COLLECTIVES if re.search(rf" {k}(-start)?\(", rest)), None)
        if kind:
            # A collective overlapped with computation appears in every fusion that does part of it.
            channels = re.findall(r'channel_id=\d+|chain_id="\d+"', rest) if fused else None
            key = f"{kind} {channels}" if channels else instruction
            if key in seen:
                continue
            seen.add(key)
            received = _count_received_bytes(kind, rest)
            if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
                kind, received = "reduce-scatter", received / 2  # each device keeps only its shard
            count, size = collectives.get(kind, (0, 0))
            collectives[kind] = (count + int(times), size + int(times * received))
        elif " convolution(" in rest or " dot(" in rest:
            flops += times * _count_matmul_flops(rest, lines)
        elif _KERNEL.search(rest):
            kernel_flops = times * _count_kernel_flops(instruction, rest)
            flops += kernel_flops
            attention_flops += kernel_flops if instruction.startswith("splash") else 0.0
    return Costs(flops, attention_flops, int(hbm_bytes), int(outside), collectives, open_loops)


def _count_hbm_bytes(
    rest: str, lines: dict[str, str], computations: dict[str, dict[str, str]]
) -> float:
    """Counts the bytes that one instruction outside of fusions moves to and from HBM."""
    if _WITHOUT_TRAFFIC.search(rest):
        return 0
    results, operands = _count_hbm_result_bytes(rest), _parse_operands(rest)
    if " custom-call(" in rest and (kernel := _PAGED_KERNEL.search(rest)):
        del operands[_POOL_OPERANDS[kernel.group(1)]]
    if " dynamic-slice(" in rest or " gather(" in rest:
        return 2 * results
    if re.search(r" slice(?:-start)?\(", rest):
        return _count_slice_bytes(rest)
    if "-start(" in rest:  # its results include its operands
        return results
    if put := _IN_PLACE.search(rest):
        return 2 * _count_hbm_result_bytes(lines.get(operands[_UPDATE_OPERAND[put.group(1)]], ""))
    inner = re.search(r" fusion\(.*calls=%?([\w.\-]+)", rest)
    body = computations.get(inner.group(1), {}) if inner else {}
    total, rewritten = 0.0, 0.0
    for i, name in enumerate(operands):
        read_bytes, written_bytes = _trace_slices(_find_parameter(body, i), body, computations)
        operand_bytes = _count_hbm_result_bytes(lines.get(name, ""))
        if written_bytes is not None and operand_bytes:
            rewritten += min(operand_bytes, results)
            total += 2 * written_bytes
        else:
            total += operand_bytes if read_bytes is None else min(read_bytes, operand_bytes)
    return total + results - rewritten


def _count_slice_bytes(rest: str) -> float:
    """Counts the bytes that a slice reads and, if its result lies in HBM, writes.

    A slice-start returns its operand first and the slice second.
    """
    shapes = _SHAPE_WITH_LAYOUT.findall(re.split(r" slice(?:-start)?\(", rest, maxsplit=1)[0])
    dtype, dims, layout = shapes[1 if " slice-start(" in rest else 0]
    return _count_shape_bytes(dtype, dims) * (1 if "S(" in layout else 2)


def _trace_slices(
    name: str | None, body: dict[str, str], computations: dict[str, dict[str, str]]
) -> tuple[float | None, float | None]:
    """Follows a value through a fusion: (bytes read from it in slices, bytes written into it).

    The first is None unless the value is only sliced, the second None unless it is only updated in
    place.
    """
    cuts, puts = [], []
    for user, rest in body.items():
        operands = _parse_operands(rest)
        if name not in operands:
            continue
        inner = _CALLED.search(rest) if " fusion(" in rest else None
        within = computations.get(inner.group(1), {}) if inner else {}
        if within and not all(_SAME_VALUES.search(r) for r in within.values()):
            cut, put = _trace_slices(
                _find_parameter(within, operands.index(name)), within, computations
            )
        elif within or _SAME_VALUES.search(rest):
            cut, put = _trace_slices(user, body, computations)
        elif re.search(r" (?:dynamic-slice|slice|gather)\(", rest):
            cut, put = _count_result_bytes(rest), None
        elif (put := _IN_PLACE.search(rest)) and operands[0] == name:
            cut, put = (
                None,
                _count_result_bytes(body.get(operands[_UPDATE_OPERAND[put.group(1)]], "")),
            )
        else:
            return None, None
        cuts.append(cut)
        puts.append(put)
    if cuts and None not in cuts:
        return sum(cuts), None
    return None, (sum(puts) if puts and None not in puts else None)


def _find_parameter(body: dict[str, str], i: int) -> str | None:
    return next((n for n, rest in body.items() if re.search(rf" parameter\({i}\)", rest)), None)


def _parse_operands(rest: str) -> list[str]:
    call = re.search(r" [a-z][\w\-]*\((.*)$", rest)
    return re.findall(r"%([\w.\-]+)", call.group(1).split("), ")[0]) if call else []


def _count_hbm_result_bytes(rest: str) -> float:
    """Counts the bytes of an instruction's results that lie in HBM, not in faster memory."""
    return _sum_result_bytes(rest, lambda layout: "S(" not in layout)


def _count_result_bytes(rest: str) -> float:
    return _sum_result_bytes(rest, lambda _: True)


def _sum_result_bytes(rest: str, predicate: Callable[[str], bool]) -> float:
    shapes = re.split(r" [a-z][\w\-]*\(", rest, maxsplit=1)[0]
    results = _SHAPE_WITH_LAYOUT.findall(shapes)
    return sum(
        _count_shape_bytes(dtype, dims) for dtype, dims, layout in results if predicate(layout)
    )


def _parse_computations(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """Returns {computation: {instruction: text after its equals sign}} and the entry's name."""
    computations: dict[str, dict[str, str]] = {}
    entry = ""
    current: dict[str, str] = {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif instruction := _INSTRUCTION.match(line):
            current[instruction.group(1)] = instruction.group(2)
    return computations, entry


def _count_trips(rest: str, computations: dict[str, dict[str, str]]) -> int | None:
    """Counts a loop's iterations, from XLA's annotation or from the limit in its condition.

    Returns None if the number is not known at compile time.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(known.group(1))
    condition, body = (
        computations.get(name.group(1), {}) if name else {}
        for name in (re.search(rf"{part}=%?([\w.\-]+)", rest) for part in ("condition", "body"))
    )
    if any(" and(" in line or " fusion(" in line for line in condition.values()):
        return None  # it may end early
    limits = [n for line in condition.values() if (n := _parse_constant(line)) is not None]
    counters = [int(m) for line in condition.values() for m in re.findall(r"index=(\d+)", line)]
    if len(limits) != 1 or len(counters) != 1:
        return None
    return -(-limits[0] // _find_increment(body, counters[0]))


def _parse_constant(line: str) -> int | None:
    constant = re.match(r"[su]32\[\]\S* constant\((\d+)\)", line)
    return int(constant.group(1)) if constant else None


def _find_increment(body: dict[str, str], counter: int) -> int:
    """Returns the increment of a loop's counter, above 1 where the compiler unrolled the loop."""
    result = re.search(r" tuple\((.*?)\)", list(body.values())[-1])
    operands = re.findall(r"%([\w.\-]+)", result.group(1)) if result else []
    line = body.get(operands[counter], "") if len(operands) > counter else ""
    added = re.search(r" add\(%([\w.\-]+), %([\w.\-]+)\)", line)
    constants = [_parse_constant(body.get(name, "")) for name in (added.groups() if added else ())]
    return next((n for n in constants if n), 1)


def _parse_dims(shape: str) -> list[int]:
    return [int(n) for n in shape.split(",") if n]


def _count_shape_bytes(dtype: str, dims: str) -> float:
    width = (
        _DTYPE_BYTES.get(dtype) or int(re.sub(r"\D.*$", "", re.sub(r"^\D+", "", dtype)) or 8) / 8
    )
    return width * math.prod(_parse_dims(dims))


def _count_received_bytes(kind: str, rest: str) -> float:
    """Counts the bytes that a device receives in one collective, assuming the ring algorithm."""
    shapes = [_count_shape_bytes(*s) for s in _SHAPE.findall(rest.split(f" {kind}")[0])]
    group = _count_participants(rest)
    share = (group - 1) / group
    if kind == "all-gather":
        return max(shapes) * share  # a start's result holds the operand too
    if kind == "all-reduce":
        return 2 * sum(shapes) * share
    if kind == "reduce-scatter":
        return min(shapes) * (group - 1)
    return max(shapes) * (1 if kind == "collective-permute" else share)


def _count_participants(rest: str) -> int:
    """Counts the devices in each group of a collective."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota.group(2))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed.group(1).count(",") + 1
    return 2


def _count_matmul_flops(rest: str, lines: dict[str, str]) -> float:
    """Counts the FLOPs of a dot or convolution: 2 · result elements · contracted length."""
    shape = _SHAPE.search(rest)
    assert shape
    operands = re.search(r"(?:convolution|dot)\(([^)]*)\)", rest)
    assert operands
    names = re.findall(r"%([\w.\-]+)", operands.group(1))
    inline = [_parse_dims(d) for _, d in _SHAPE.findall(operands.group(1))]

    def get_dims(i: int) -> list[int]:
        if len(inline) > i:
            return inline[i]
        operand_shape = _SHAPE.search(lines[names[i]])
        return _parse_dims(operand_shape.group(2)) if operand_shape else []

    if contracted := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest):
        length = math.prod(get_dims(0)[i] for i in _parse_dims(contracted.group(1)))
    else:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
        assert labels
        image, kernel, out = (
            dict(zip(names, sizes, strict=True))
            for names, sizes in zip(
                labels.groups(),
                (get_dims(0), get_dims(1), _parse_dims(shape.group(2))),
                strict=True,
            )
        )
        length = kernel["i"]
        for i, axis in enumerate(sorted(label for label in kernel if label.isdigit())):
            length *= _count_taps(rest, i, image[axis], kernel[axis], out[axis])
    return 2.0 * math.prod(_parse_dims(shape.group(2))) * length


# Matrix products for each pair of a query and a key block, by kernel of splash attention.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def _count_kernel_flops(instruction: str, rest: str) -> float:
    """Counts the FLOPs of a kernel that this project calls; 0 for any other kernel.

    Splash attention computes the blocks on and below the diagonal; the shape of its block table
    says how many there are. Grouped products multiply each row once, whatever the groups.
    """
    operands = _SHAPE.findall(rest.partition("operand_layout_constraints={")[2].partition("}}")[0])
    floats = [_parse_dims(dims) for dtype, dims in operands if "f" in dtype]
    if splash := re.match(r"splash_mha_(fwd|dq|dkv)", instruction):
        blocks = _parse_dims(operands[0][1])[-1]
        *rows_and_heads, T, H = floats[0]  # the queries; a single row has no batch axis
        scores = (T / blocks) ** 2 * blocks * (blocks + 1) / 2
        return _SPLASH_PRODUCTS[splash.group(1)] * 2.0 * math.prod(rows_and_heads) * H * scores
    if instruction.startswith("tgmm"):
        (D, M), (_, F) = floats[-2:]
        return 2.0 * D * M * F
    if "TritonRaggedDot" in rest:
        return 2.0 * math.prod(floats[0]) * _parse_dims(operands[1][1])[-1]
    return 0.0


def _count_taps(rest: str, axis: int, image: int, kernel: int, out: int) -> float:
    """Counts the window positions that fall on the image, averaged over the results.

    libtpu expresses batched and transposed matrix products as convolutions whose windows lie mostly
    outside the image.
    """
    window = re.search(r" window=\{([^}]*)\}", rest)
    fields = dict(f.split("=") for f in window.group(1).split()) if window else {}

    def parse_field(name: str, default: int) -> int:
        return int(fields[name].split("x")[axis]) if name in fields else default

    low = int(fields["pad"].split("x")[axis].split("_")[0]) if "pad" in fields else 0
    stride, spread = parse_field("stride", 1), parse_field("lhs_dilate", 1)
    positions = (
        o * stride - low + k * parse_field("rhs_dilate", 1)
        for o in range(out)
        for k in range(kernel)
    )
    return sum(0 <= x <= (image - 1) * spread and x % spread == 0 for x in positions) / out
