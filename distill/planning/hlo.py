"""What a compiled program does, by its text: matrix products, memory traffic, collectives."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator


@dataclasses.dataclass(frozen=True)
class Costs:
    """Sums over a program's text, of one device.

    flops: operations of matrix products, those in kernels for attention and experts among them.
    attention: of these, in kernels for attention over whole rows.
    traffic: bytes that instructions read from HBM and write to it: operands and results, of slices
    and scatters only what is cut out or put in; of kernels for attention over pages without the
    pages, of which they read what the rows' lengths make them (models.layers.pages.read_bytes).
    once: of these bytes, those outside of loops of unknown length.
    collectives: kind -> (how many, bytes received). open_loops: loops of unknown length, of which
    one turn counts.
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
# What moves nothing: names for what is there, and the ends of what was counted when it began.
_WITHOUT_TRAFFIC = re.compile(
    r" (?:parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|"
    r"partition-id|replica-id|iota|opt-barrier|[\w\-]+-done|async-\w+)\("
)
# What gives a value in another form: inside a fusion it costs nothing.
_SAME_VALUES = re.compile(r" (?:parameter|bitcast|convert|copy|reshape|transpose)\(")
# What changes its first operand where it lies, and which operand it puts in.
_IN_PLACE = re.compile(r" (dynamic-update-slice|scatter)\(")
_UPDATE_OPERAND = {"dynamic-update-slice": 1, "scatter": 2}
# Jax's kernels for attention over pages, for TPU and GPU, and which operands are the pool.
_PAGED_KERNEL = re.compile(r"/jit\(((?:ragged_)?paged_attention)\)/")
_POOL_OPERANDS = {"ragged_paged_attention": slice(-1, None), "paged_attention": slice(1, -2)}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def parse_costs(text: str) -> Costs:
    """Adds up the text of a compiled program.

    A body of a loop counts as often as the loop turns; of branches the one with most operations
    counts; a collective that is split into a start and a done counts once.
    """
    computations, entry = _parse_computations(text)
    flops, attention, open_loops, depth = 0.0, 0.0, 0, 0
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
                continue  # what they apply is an addition of scalars
            depth += unknown
            for called in _CALLED.findall(rest):
                yield from walk(called, inner, fused or " fusion(" in rest)
            depth -= unknown
            if pairs := _BRANCHES.findall(rest):
                names = re.findall(r"[\w.\-]+", " ".join(" ".join(pair) for pair in pairs))
                yield from walk(max(names, key=measure_branch), inner, fused)

    def measure_branch(branch: str) -> tuple[float, int]:
        """Operations of a branch and, of two with as many, its length."""
        nonlocal open_loops
        before, every = open_loops, list(walk(branch, 1.0))
        open_loops = before
        products = (
            times * _count_matmul_flops(rest, lines)
            for times, _, _, _, rest, lines in every
            if " convolution(" in rest or " dot(" in rest
        )
        return sum(products), len(every)

    traffic = once = 0.0
    for times, fused, inside, instruction, rest, lines in walk(entry, 1.0):
        if not fused:
            moved = times * _count_hbm_bytes(rest, lines, computations)
            traffic, once = traffic + moved, once + (0 if depth else moved)
        kind = next((k for k in COLLECTIVES if re.search(rf" {k}(-start)?\(", rest)), None)
        if kind:
            # An exchange beside computation is named in every fusion that does a piece of it.
            same = re.findall(r'channel_id=\d+|chain_id="\d+"', rest) if fused else None
            key = f"{kind} {same}" if same else instruction
            if key in seen:
                continue
            seen.add(key)
            received = _count_received_bytes(kind, rest)
            if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):
                kind, received = "reduce-scatter", received / 2  # a fusion that keeps its own part
            count, size = collectives.get(kind, (0, 0))
            collectives[kind] = (count + int(times), size + int(times * received))
        elif " convolution(" in rest or " dot(" in rest:
            flops += times * _count_matmul_flops(rest, lines)
        elif 'custom_call_target="tpu_custom_call"' in rest:
            spent = times * _count_kernel_flops(instruction, rest)
            flops += spent
            attention += spent if instruction.startswith("splash") else 0.0
    return Costs(flops, attention, int(traffic), int(once), collectives, open_loops)


def _count_hbm_bytes(
    rest: str, lines: dict[str, str], computations: dict[str, dict[str, str]]
) -> float:
    """Bytes that one instruction of a program, no part of a fusion, moves from and to HBM."""
    if _WITHOUT_TRAFFIC.search(rest):
        return 0
    results, operands = _count_hbm_result_bytes(rest), _parse_operands(rest)
    if " custom-call(" in rest and (kernel := _PAGED_KERNEL.search(rest)):
        del operands[_POOL_OPERANDS[kernel.group(1)]]
    if " dynamic-slice(" in rest or " gather(" in rest:
        return 2 * results
    if re.search(r" slice(?:-start)?\(", rest):
        return _count_slice_bytes(rest)
    if "-start(" in rest:  # among its results are its operands again
        return results
    if put := _IN_PLACE.search(rest):
        return 2 * _count_hbm_result_bytes(lines.get(operands[_UPDATE_OPERAND[put.group(1)]], ""))
    inner = re.search(r" fusion\(.*calls=%?([\w.\-]+)", rest)
    body = computations.get(inner.group(1), {}) if inner else {}
    total, rewritten = 0.0, 0.0
    for i, name in enumerate(operands):
        cut, put = _trace_slices(_find_parameter(body, i), body, computations)
        whole = _count_hbm_result_bytes(lines.get(name, ""))
        if put is not None and whole:
            rewritten += min(whole, results)
            total += 2 * put
        else:
            total += whole if cut is None else min(cut, whole)
    return total + results - rewritten


def _count_slice_bytes(rest: str) -> float:
    """Bytes that a slice reads, and those that it writes to HBM; of a start the second result is
    the slice, the first its operand again."""
    shapes = _SHAPE_WITH_LAYOUT.findall(re.split(r" slice(?:-start)?\(", rest, maxsplit=1)[0])
    dtype, dims, layout = shapes[1 if " slice-start(" in rest else 0]
    return _count_shape_bytes(dtype, dims) * (1 if "S(" in layout else 2)


def _trace_slices(
    name: str | None, body: dict[str, str], computations: dict[str, dict[str, str]]
) -> tuple[float | None, float | None]:
    """Of a value inside a fusion: bytes that are cut out of it, if it is only cut; bytes that are
    put into it in place, if that is what becomes of it."""
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
    found = re.search(r" [a-z][\w\-]*\((.*)$", rest)
    return re.findall(r"%([\w.\-]+)", found.group(1).split("), ")[0]) if found else []


def _count_hbm_result_bytes(rest: str) -> float:
    """Bytes of what an instruction gives that lie in HBM, not in faster memory."""
    return _sum_result_bytes(rest, lambda layout: "S(" not in layout)


def _count_result_bytes(rest: str) -> float:
    return _sum_result_bytes(rest, lambda _: True)


def _sum_result_bytes(rest: str, predicate: Callable[[str], bool]) -> float:
    shapes = re.split(r" [a-z][\w\-]*\(", rest, maxsplit=1)[0]
    found = _SHAPE_WITH_LAYOUT.findall(shapes)
    return sum(
        _count_shape_bytes(dtype, dims) for dtype, dims, layout in found if predicate(layout)
    )


def _parse_computations(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """Computation -> its instructions, by name what follows the equals sign; and the entry."""
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
    """How often a loop turns: XLA's note, or what its condition compares its counter with."""
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
    found = re.match(r"[su]32\[\]\S* constant\((\d+)\)", line)
    return int(found.group(1)) if found else None


def _find_increment(body: dict[str, str], counter: int) -> int:
    """By how much a loop's counter grows in a turn: loops unrolled by the compiler take strides."""
    result = re.search(r" tuple\((.*?)\)", list(body.values())[-1])
    operands = re.findall(r"%([\w.\-]+)", result.group(1)) if result else []
    line = body.get(operands[counter], "") if len(operands) > counter else ""
    added = re.search(r" add\(%([\w.\-]+), %([\w.\-]+)\)", line)
    found = [_parse_constant(body.get(name, "")) for name in (added.groups() if added else ())]
    return next((n for n in found if n), 1)


def _parse_dims(shape: str) -> list[int]:
    return [int(n) for n in shape.split(",") if n]


def _count_shape_bytes(dtype: str, dims: str) -> float:
    width = (
        _DTYPE_BYTES.get(dtype) or int(re.sub(r"\D.*$", "", re.sub(r"^\D+", "", dtype)) or 8) / 8
    )
    return width * math.prod(_parse_dims(dims))


def _count_received_bytes(kind: str, rest: str) -> float:
    """Bytes that a device gets from others in one exchange, by its usual algorithm on a ring."""
    shapes = [_count_shape_bytes(*s) for s in _SHAPE.findall(rest.split(f" {kind}")[0])]
    group = _count_participants(rest)
    share = (group - 1) / group
    if kind == "all-gather":
        return max(shapes) * share  # a start's shape holds the operand beside the result
    if kind == "all-reduce":
        return 2 * sum(shapes) * share
    if kind == "reduce-scatter":
        return min(shapes) * (group - 1)
    return max(shapes) * (1 if kind == "collective-permute" else share)


def _count_participants(rest: str) -> int:
    """How many devices exchange."""
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota.group(2))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed.group(1).count(",") + 1
    return 2


def _count_matmul_flops(rest: str, lines: dict[str, str]) -> float:
    """Operations of one dot or convolution: 2 · elements of the result · length of the sums."""
    shape = _SHAPE.search(rest)
    assert shape
    operands = re.search(r"(?:convolution|dot)\(([^)]*)\)", rest)
    assert operands
    names = re.findall(r"%([\w.\-]+)", operands.group(1))
    inline = [_parse_dims(d) for _, d in _SHAPE.findall(operands.group(1))]

    def get_dims(i: int) -> list[int]:
        if len(inline) > i:
            return inline[i]
        found = _SHAPE.search(lines[names[i]])
        return _parse_dims(found.group(2)) if found else []

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


# Products of a block of queries with one of keys, in each kernel of splash attention.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def _count_kernel_flops(instruction: str, rest: str) -> float:
    """Operations of a Pallas kernel that this project calls; of others 0.

    Splash attention computes the blocks at and below the diagonal; how many there are, its table of
    them says. tgmm multiplies each row of x with the same of dy once, whatever the groups.
    """
    operand_layouts = rest.partition("operand_layout_constraints={")[2].partition(
        "frontend_attributes"
    )[0]
    floats = [_parse_dims(dims) for dtype, dims in _SHAPE.findall(operand_layouts) if "f" in dtype]
    if splash := re.match(r"splash_mha_(fwd|dq|dkv)", instruction):
        blocks = _parse_dims(_SHAPE.findall(operand_layouts)[0][1])[-1]
        *rows_and_heads, T, H = floats[0]  # the queries; one row alone has no axis of its own
        scores = (T / blocks) ** 2 * blocks * (blocks + 1) / 2
        return _SPLASH_PRODUCTS[splash.group(1)] * 2.0 * math.prod(rows_and_heads) * H * scores
    if instruction.startswith("tgmm"):
        (D, M), (_, F) = floats[-2:]
        return 2.0 * D * M * F
    return 0.0


def _count_taps(rest: str, axis: int, image: int, kernel: int, out: int) -> float:
    """How many places of a window fall on the image, in the mean over the results.

    TPUs write batches and transpositions of matrices as windows that mostly fall beside it.
    """
    window = re.search(r" window=\{([^}]*)\}", rest)
    fields = dict(f.split("=") for f in window.group(1).split()) if window else {}

    def parse_field(name: str, default: int) -> int:
        return int(fields[name].split("x")[axis]) if name in fields else default

    low = int(fields["pad"].split("x")[axis].split("_")[0]) if "pad" in fields else 0
    stride, spread = parse_field("stride", 1), parse_field("lhs_dilate", 1)
    at = (
        o * stride - low + k * parse_field("rhs_dilate", 1)
        for o in range(out)
        for k in range(kernel)
    )
    return sum(0 <= x <= (image - 1) * spread and x % spread == 0 for x in at) / out
