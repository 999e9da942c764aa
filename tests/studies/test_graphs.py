"""The reasoning problems: solved again from their words, in every order, with disjoint splits."""

import collections
import re

import numpy as np
import pytest

from studies import graphs

OPERATIONS = (2, 6)
GIVEN = re.compile(r"(\w+) has (\d)\.")
COMPUTED = re.compile(r"(\w+) has (\w+) (plus|minus|times) (\w+)\.")
LINE = re.compile(r"(\w+): (\w+) (plus|minus|times) (\w+)=(\d)([-+*])(\d)=(\d);")
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
    given = {name: int(value) for name, value in GIVEN.findall(question)}
    computed = {name: (left, op, right) for name, left, op, right in COMPUTED.findall(question)}
    assert len(given) + len(computed) == question.count(".")
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
    return re.fullmatch(r".*\. How many has (\w+)\?", row["question"])[1]  # pyright: ignore[reportOptionalSubscript]


def read_lines(row: dict) -> list[tuple[str, ...]]:
    found = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(\d)", row["response"])
    assert found, row
    thoughts, answer = found.groups()
    assert answer == row["answer"]
    lines = LINE.findall(thoughts)
    assert thoughts.count(";") == len(lines)
    return lines


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
            assert computed[name] == (left, op, right), row
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
    assert min(orders.values()) > 50, orders


def test_levels_are_the_operations_and_equally_frequent(train: list[dict]) -> None:
    assert all(row["level"] == len(read_lines(row)) for row in train)
    counts = collections.Counter(row["level"] for row in train)
    assert counts.keys() == set(range(2, 7))
    assert all(abs(count - 2000) < 200 for count in counts.values()), counts  # 5 deviations


def test_statements_are_shuffled_and_some_are_not_needed(train: list[dict]) -> None:
    unneeded = collections.Counter()
    given_first = 0
    for row in train[:2000]:
        given, computed = read_statements(row["question"])
        used = {x for left, _, right in computed.values() for x in (left, right)}
        unneeded[len(given.keys() - used)] += 1
        given_first += bool(GIVEN.match(row["question"]))
    assert unneeded.keys() == {0, 1, 2}
    assert all(count > 500 for count in unneeded.values())
    assert 400 < given_first < 1600


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
