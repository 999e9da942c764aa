"""The reasoning problems: solved again from their words, in every order, with disjoint splits."""

import collections
import re

import numpy as np
import pytest

from studies import graphs

OPERATIONS = (2, 6)
GIVEN = re.compile(r"(\w+) has (\d)")
COMPUTED = re.compile(r"(\w+) has (\w+) (plus|minus|times) (\w+)")
LINE = re.compile(r"(\w+): (\w+) (plus|minus|times) (\w+)=(\d)([-+*])(\d)=(\d)")
LAST_DIGIT = {
    "plus": lambda a, b: (a + b) % 10,
    "minus": lambda a, b: (a + 10 - b) % 10,
    "times": lambda a, b: a * b % 10,
}
SIGNS = {"plus": "+", "minus": "-", "times": "*"}


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return [graphs.make_row(0, i, "train", OPERATIONS) for i in range(10_000)]


@pytest.fixture(scope="module")
def test() -> list[dict]:
    return [graphs.make_row(0, i, "test", OPERATIONS) for i in range(500)]


def read_statements(question: str) -> tuple[dict[str, int], dict[str, tuple[str, str, str]]]:
    """What a question states: the given counts, and (left, operator, right) of the others."""
    given, computed = {}, {}
    for statement in question.split("\n")[:-1]:
        if found := GIVEN.fullmatch(statement):
            given[found[1]] = int(found[2])
        else:
            found = COMPUTED.fullmatch(statement)
            assert found, statement
            assert {found[2], found[4]} <= given.keys() | computed.keys()  # told before
            computed[found[1]] = (found[2], found[3], found[4])
    assert len(given) + len(computed) == question.count("\n")
    assert not given.keys() & computed.keys()
    return given, computed


def evaluate(name: str, given: dict, computed: dict) -> int:
    if name in given:
        return given[name]
    left, op, right = computed[name]
    return LAST_DIGIT[op](evaluate(left, given, computed), evaluate(right, given, computed))


def write_expression(name: str, given: dict, computed: dict) -> str:
    if name in given:
        return str(given[name])
    left, op, right = computed[name]
    texts = [write_expression(x, given, computed) for x in (left, right)]
    return f"({texts[0]}{SIGNS[op]}{texts[1]})"


def find_asked(row: dict) -> str:
    return re.search(r"\nHow many has (\w+)\?$", row["question"])[1]  # pyright: ignore[reportOptionalSubscript]


def read_lines(row: dict) -> list[tuple[str, ...]]:
    found = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(\d)", row["response"], re.DOTALL)
    assert found, row
    assert found[2] == row["answer"]
    lines = [LINE.fullmatch(line) for line in found[1].split("\n")]
    assert all(lines), row
    return [line.groups() for line in lines if line]


def test_the_answer_is_that_of_the_questions_words(train: list[dict], test: list[dict]) -> None:
    for row in [*train, *test]:
        given, computed = read_statements(row["question"])
        assert evaluate(find_asked(row), given, computed) == int(row["answer"]), row


def test_a_solution_computes_what_the_statements_say_in_a_possible_order(train: list[dict]) -> None:
    for row in train:
        given, computed = read_statements(row["question"])
        known = dict(given)
        lines = read_lines(row)
        for name, left, op, right, a, sign, b, result in lines:
            stated = computed[name]
            turned = (right, op, left) if op != "minus" else stated  # a sum may be turned round
            assert stated in ((left, op, right), turned), row
            assert sign == SIGNS[op] and name not in known
            assert (known[left], known[right]) == (int(a), int(b)), row  # both are known by now
            assert LAST_DIGIT[op](int(a), int(b)) == int(result), row
            known[name] = int(result)
        assert lines[-1][0] == find_asked(row)
        assert {line[0] for line in lines} == computed.keys()  # no more and no less than needed


def test_every_order_of_solving_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one graph, a+b, c*d and e-f are ready at once: all six orders of them occur."""
    given = [graphs.Quantity(value) for value in (1, 2, 3, 4, 9, 5)]
    graph = [
        *given,
        graphs.Quantity(3, "plus", 0, 1),
        graphs.Quantity(2, "times", 2, 3),
        graphs.Quantity(4, "minus", 4, 5),
        graphs.Quantity(5, "plus", 6, 7),
        graphs.Quantity(9, "plus", 8, 9),
    ]
    split = graphs.assign_split(graphs.write_expression(graph, 10))
    monkeypatch.setattr(graphs, "draw_graph", lambda rng, count: list(graph))
    orders = collections.Counter()
    for i in range(1000):
        signs = [line[5] for line in read_lines(graphs.make_row(0, i, split, (5, 5)))]
        assert len(signs) == 5
        orders["".join(signs)] += 1
    # The sums of two results are + too; the first may come before e-f, which only the second needs.
    assert orders.keys() == {"+*-++", "+*+-+", "*+-++", "*++-+", "+-*++", "*-+++", "-+*++", "-*+++"}
    assert min(orders.values()) > 10, orders


def test_levels_are_the_operations_and_equally_frequent(train: list[dict]) -> None:
    assert all(row["level"] == len(read_lines(row)) for row in train)
    counts = collections.Counter(row["level"] for row in train)
    assert counts.keys() == set(range(2, 7))
    assert all(abs(count - 2000) < 200 for count in counts.values()), counts  # 5 deviations


def test_solutions_of_one_problem_differ_in_order_and_operands(train: list[dict]) -> None:
    """Lines mostly follow the order of the statements; sums and products are as often turned."""
    in_order, turned = [], []
    for row in train[:3000]:
        _, computed = read_statements(row["question"])
        lines = read_lines(row)
        in_order.append([line[0] for line in lines] == list(computed))
        turned += [computed[x[0]][0] != x[1] for x in lines if x[2] != "minus" and x[1] != x[3]]
        assert all(computed[x[0]][0] == x[1] for x in lines if x[2] == "minus")
    assert 0.5 < sum(in_order) / len(in_order) < 0.95
    assert abs(sum(turned) / len(turned) - 0.5) < 0.03


def test_some_statements_are_not_needed(train: list[dict]) -> None:
    unneeded = collections.Counter()
    for row in train[:2000]:
        given, computed = read_statements(row["question"])
        used = {x for left, _, right in computed.values() for x in (left, right)}
        unneeded[len(given.keys() - used)] += 1
    assert unneeded.keys() == {0, 1, 2}
    assert all(count > 500 for count in unneeded.values())


def test_splits_share_no_expression(train: list[dict], test: list[dict]) -> None:
    valid = [graphs.make_row(3, i, "valid", OPERATIONS) for i in range(500)]
    found = {}
    for name, rows in (("train", train), ("valid", valid), ("test", test)):
        found[name] = {
            write_expression(find_asked(row), *read_statements(row["question"])) for row in rows
        }
        assert {graphs.assign_split(expression) for expression in found[name]} == {name}
    assert not found["train"] & found["test"] | found["valid"] & (found["train"] | found["test"])
    assert len(found["train"]) > 8000 and len(found["test"]) > 400


def test_a_row_is_a_function_of_its_arguments() -> None:
    row = graphs.make_row(7, 3, "train", OPERATIONS)
    np.random.seed(0)
    assert row == graphs.make_row(7, 3, "train", OPERATIONS)
    others = [(8, 3, "train", (2, 6)), (7, 4, "train", (2, 6)), (7, 3, "test", (2, 6))]
    questions = {graphs.make_row(*arguments)["question"] for arguments in others}
    assert len({row["question"], *questions}) == 4
    assert len({graphs.make_row(*arguments)["id"] for arguments in others}) == 3
    hardest = (graphs.MAX_OPERATIONS, graphs.MAX_OPERATIONS)
    assert graphs.make_row(0, 0, "test", hardest)["level"] == graphs.MAX_OPERATIONS


@pytest.mark.parametrize(
    ("split", "operations"),
    [("dev", (2, 4)), ("train", (0, 4)), ("train", (4, 2)), ("train", (2, 11))],
)
def test_unknown_splits_and_impossible_ranges_raise(split: str, operations: tuple) -> None:
    with pytest.raises(ValueError, match=re.escape(str(operations))):
        graphs.make_row(0, 0, split, operations)
