"""Generates reasoning problems over a dependency graph, told as text.

Ann has 4                <think>                     Counts are the last digits of results. A
Max has 8                Zoe=3 times Ann=4: Ida=2    quantity is told after those that it depends
Zoe has 3                Ida=2 plus Ann=4: Leo=6     on, and some are not needed. A solution
Ida has Ann times Zoe    </think>                    computes each after those that it depends on.
Leo has Ida plus Ann
How many has Leo?        6

There are many right solutions: their lines have an order of their own, mostly that of the
statements, and sums and products may be turned round. So a model of solutions is uncertain about
what comes next, and right all the same. The design is iGSM's (arXiv 2407.20311), with fewer words.
A problem is a pure function of (seed, index, split, operations).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SPLITS = ("train", "valid", "test")
NAMES = (
    *("Amy", "Ann", "Ben", "Bob", "Dan", "Eli", "Eva", "Gus"),
    *("Ian", "Ida", "Jim", "Kim", "Leo", "Max", "Tom", "Zoe"),
)
OPERATORS = {"plus": "+", "minus": "-", "times": "*"}
COMMUTATIVE = ("plus", "times")
MODULUS = 10
IN_ORDER = 0.7  # share of a solution's lines that follow the order of the statements
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
    asked, num_needed = len(graph) - 1, len(graph)
    graph += [Quantity(int(rng.integers(MODULUS))) for _ in range(int(rng.integers(0, 3)))]
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[: len(graph)]]
    told = draw_order(rng, graph, set(), range(len(graph)), share_in_order=0.0)
    given = {i for i, quantity in enumerate(graph) if not quantity.operator}
    computed = [i for i in told if i < num_needed and i not in given]
    solved = draw_order(rng, graph, given, computed, share_in_order=IN_ORDER)
    statements = [_tell(graph, i, names) for i in told]
    lines = [_solve(rng, graph, i, names) for i in solved]
    answer = str(graph[asked].value)
    return {
        "id": f"graphs-{split}-{seed}-{index}",
        "question": "\n".join([*statements, f"How many has {names[asked]}?"]),
        "answer": answer,
        "response": "\n".join(["<think>", *lines, "</think>", "", answer]),
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


def draw_order(
    rng: np.random.Generator,
    graph: list[Quantity],
    known: set[int],
    quantities: Sequence[int],
    share_in_order: float,
) -> list[int]:
    """Draws an order of `quantities` in which each follows those that it depends on, as far as
    these are not `known`.

    The next one is the first that may follow, with probability `share_in_order`, or else any that
    may.
    """
    order, known, waiting = [], set(known), list(quantities)
    while waiting:
        ready = [i for i in waiting if {graph[i].left, graph[i].right} <= known | {-1}]
        is_first = rng.random() < share_in_order
        chosen = ready[0] if is_first else ready[int(rng.integers(len(ready)))]
        waiting.remove(chosen)
        known.add(chosen)
        order.append(chosen)
    return order


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


def _tell(graph: list[Quantity], i: int, names: list[str]) -> str:
    quantity = graph[i]
    if not quantity.operator:
        return f"{names[i]} has {quantity.value}"
    return f"{names[i]} has {names[quantity.left]} {quantity.operator} {names[quantity.right]}"


def _solve(rng: np.random.Generator, graph: list[Quantity], i: int, names: list[str]) -> str:
    """Returns a line of the solution; sums and products may have their operands turned round."""
    quantity = graph[i]
    left, right = quantity.left, quantity.right
    if quantity.operator in COMMUTATIVE and rng.integers(2):
        left, right = right, left
    return (
        f"{names[left]}={graph[left].value} {quantity.operator} "
        f"{names[right]}={graph[right].value}: {names[i]}={quantity.value}"
    )
