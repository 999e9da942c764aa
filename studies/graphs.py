"""Generates reasoning problems over a dependency graph, told as text.

Ann has 4. Ida has Ann times Zoe. Zoe has 3. Leo has Ida plus Ann. Max has 8. How many has Leo?

<think>
Ida: Ann times Zoe=4*3=2; Leo: Ida plus Ann=2+4=6;
</think>

6

Counts are the last digits of results. A solution computes what the question needs, each quantity
after those that it depends on, in an order drawn from all such orders: a model of these solutions
is uncertain about what comes next, and right all the same. The statements are shuffled, and some
are not needed. The design is iGSM's (arXiv 2407.20311), with fewer words. A problem is a pure
function of (seed, index, split, operations).
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

SPLITS = ("train", "valid", "test")
NAMES = (
    *("Amy", "Ann", "Ben", "Bob", "Dan", "Eli", "Eva", "Gus"),
    *("Ian", "Ida", "Jim", "Kim", "Leo", "Max", "Tom", "Zoe"),
)
OPERATORS = {"plus": "+", "minus": "-", "times": "*"}
MODULUS = 10
MAX_OPERATIONS = 10  # as many people as the names allow


@dataclass(frozen=True)
class Quantity:
    """A node of the graph: a given count, or an operation on two earlier quantities."""

    value: int
    operator: str = ""  # a key of OPERATORS; "": given
    left: int = -1
    right: int = -1


def make_row(seed: int, index: int, split: str, operations: tuple[int, int]) -> dict[str, Any]:
    """Makes problem number `index` of a split as a training row: question, answer, response, level.

    The number of operations that the solution needs, the level, is uniform in the inclusive range
    `operations`. One expression in ten is a test problem's and one in ten a validation problem's,
    whatever the seed, so splits share no problem, not even with other names or statements.

    Raises:
      ValueError: for an unknown split, or a range that is not 1 <= low <= high <= MAX_OPERATIONS.
    """
    low, high = operations
    if split not in SPLITS or not 1 <= low <= high <= MAX_OPERATIONS:
        raise ValueError(f"no split {split!r} of {SPLITS}, or no range of operations {operations}")
    rng = np.random.default_rng((seed, index, SPLITS.index(split)))
    count = int(rng.integers(low, high + 1))
    graph = draw_graph(rng, count)
    while assign_split(write_expression(graph, len(graph) - 1)) != split:
        graph = draw_graph(rng, count)
    needed, asked = find_needed(graph), len(graph) - 1
    for _ in range(int(rng.integers(0, 3))):  # quantities that the question does not need
        graph.insert(0, Quantity(int(rng.integers(MODULUS))))
        graph = [graph[0], *(_shift(quantity) for quantity in graph[1:])]
        needed, asked = {i + 1 for i in needed}, asked + 1
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[: len(graph)]]
    statements = [_tell(graph, i, names) for i in rng.permutation(len(graph))]
    lines, known = [], {i for i, x in enumerate(graph) if not x.operator}
    while asked not in known:
        ready = [
            i for i in sorted(needed - known) if {graph[i].left, graph[i].right} <= known
        ]
        i = ready[int(rng.integers(len(ready)))]
        lines.append(_solve(graph, i, names))
        known.add(i)
    answer = str(graph[asked].value)
    return {
        "id": f"graphs-{split}-{seed}-{index}",
        "question": f"{' '.join(statements)} How many has {names[asked]}?",
        "answer": answer,
        "response": f"<think>\n{' '.join(lines)}\n</think>\n\n{answer}",
        "level": count,
    }


def draw_graph(rng: np.random.Generator, operations: int) -> list[Quantity]:
    """Draws given counts, and then `operations` operations, all of which the last one needs."""
    while True:
        graph = [Quantity(int(rng.integers(MODULUS))) for _ in range(2 + operations // 3)]
        for _ in range(operations):
            used = {i for x in graph for i in (x.left, x.right)}
            unused = [i for i in range(len(graph)) if i not in used]
            left = unused[int(rng.integers(len(unused)))]
            right = int(rng.integers(len(graph) - 1))
            right += right >= left
            if rng.integers(2):
                left, right = right, left
            operator = tuple(OPERATORS)[int(rng.integers(len(OPERATORS)))]
            value = compute(operator, graph[left].value, graph[right].value)
            graph.append(Quantity(value, operator, left, right))
        if len(find_needed(graph)) == len(graph):
            return graph


def compute(operator: str, left: int, right: int) -> int:
    """Returns the last digit of the result; of a negative one that of its residue, 3-5=8."""
    return {"plus": left + right, "minus": left - right, "times": left * right}[operator] % MODULUS


def find_needed(graph: list[Quantity]) -> set[int]:
    """Returns the quantities that the last one depends on, with itself."""
    needed, waiting = set(), [len(graph) - 1]
    while waiting:
        i = waiting.pop()
        needed.add(i)
        waiting += [j for j in (graph[i].left, graph[i].right) if j >= 0 and j not in needed]
    return needed


def write_expression(graph: list[Quantity], i: int) -> str:
    """Returns a quantity as an expression of given counts, without names."""
    quantity = graph[i]
    if not quantity.operator:
        return str(quantity.value)
    left, right = (write_expression(graph, j) for j in (quantity.left, quantity.right))
    return f"({left}{OPERATORS[quantity.operator]}{right})"


def assign_split(expression: str) -> str:
    """Returns the split of an expression."""
    return {0: "test", 1: "valid"}.get(zlib.crc32(expression.encode()) % 10, "train")


def _shift(quantity: Quantity) -> Quantity:
    if not quantity.operator:
        return quantity
    return Quantity(quantity.value, quantity.operator, quantity.left + 1, quantity.right + 1)


def _tell(graph: list[Quantity], i: int, names: list[str]) -> str:
    quantity = graph[i]
    if not quantity.operator:
        return f"{names[i]} has {quantity.value}."
    return f"{names[i]} has {names[quantity.left]} {quantity.operator} {names[quantity.right]}."


def _solve(graph: list[Quantity], i: int, names: list[str]) -> str:
    quantity = graph[i]
    left, right = quantity.left, quantity.right
    operands = f"{graph[left].value}{OPERATORS[quantity.operator]}{graph[right].value}"
    return (
        f"{names[i]}: {names[left]} {quantity.operator} {names[right]}"
        f"={operands}={quantity.value};"
    )
