"""The reasoning problems: solved again from their words, in possible orders; disjoint splits."""

import collections
import itertools
import re

import numpy as np
import pytest

from studies import graphs
from studies.graphs import Statement

OPERATIONS = (2, 6)
QUESTION = re.compile(r"Boxes: red (\d), blue (\d), green (\d)\. (.*)\. How many in (\w+)\?")
LINE = re.compile(r"(\w+ \w+ \w+):(\d)([-+*])(\d)=(\d),(\d)(\d)(\d)")
BOXES: tuple[str, ...] = ("red", "blue", "green")
LAST_DIGIT = {
    "gains": lambda a, b: (a + b) % 10,
    "loses": lambda a, b: (a + 10 - b) % 10,
    "times": lambda a, b: a * b % 10,
}
SIGNS = {"gains": "+", "loses": "-", "times": "*"}


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return [graphs.make_row(0, i, "train", OPERATIONS) for i in range(6000)]


def read_question(row: dict) -> tuple[dict[str, int], list[str], str]:
    """The contents of the boxes, the statements and the box that is asked for."""
    found = QUESTION.fullmatch(row["question"])
    assert found, row
    contents = dict(zip(BOXES, map(int, found.groups()[:3]), strict=True))
    return contents, found[4].split(", "), found[5]


def read_lines(row: dict) -> tuple[str, list[tuple[str, ...]]]:
    """The first line of a solution, and the parts of the others."""
    found = re.fullmatch(r"<think>\n(.*)\n</think>\n\n(\d)", row["response"], re.DOTALL)
    assert found and found[2] == row["answer"], row
    first, *others = found[1].split("\n")
    lines = [LINE.fullmatch(line) for line in others]
    assert all(lines), row
    return first, [line.groups() for line in lines if line]


def carry_out(contents: dict[str, int], statement: str) -> tuple[int, int]:
    """Carries out a statement in place; returns the two numbers that it worked on."""
    box, operator, operand = statement.split()
    left, right = contents[box], contents[operand] if operand in contents else int(operand)
    contents[box] = LAST_DIGIT[operator](left, right)
    return left, right


def test_the_answer_is_that_of_the_questions_words(train: list[dict]) -> None:
    for row in train:
        contents, statements, asked = read_question(row)
        for statement in statements:
            carry_out(contents, statement)
        assert contents[asked] == int(row["answer"]), row


def test_a_solution_works_out_each_statement_once_with_the_contents_after_it(
    train: list[dict],
) -> None:
    for row in train:
        contents, statements, _ = read_question(row)
        first, lines = read_lines(row)
        assert first == "".join(str(contents[box]) for box in BOXES)
        assert sorted(line[0] for line in lines) == sorted(statements)
        for statement, left, sign, right, result, *after in lines:
            assert carry_out(contents, statement) == (int(left), int(right)), row
            assert sign == SIGNS[statement.split()[1]]
            assert contents[statement.split()[0]] == int(result)
            assert [contents[box] for box in BOXES] == [int(x) for x in after]


def test_a_solution_in_another_order_ends_with_the_same_contents(train: list[dict]) -> None:
    """Of the orders that are drawn some are not that of the question, and all boxes agree."""
    moved = 0
    for row in train:
        contents, statements, _ = read_question(row)
        _, lines = read_lines(row)
        moved += [line[0] for line in lines] != statements
        for statement in statements:
            carry_out(contents, statement)
        assert [str(contents[box]) for box in BOXES] == list(lines[-1][5:])
    assert 0.1 < moved / len(train) < 0.8


def test_just_the_orders_that_change_nothing_are_drawn() -> None:
    """Brute force: an order may be drawn if and only if neighbours that were swapped to reach it
    do not touch the same box in a way that matters."""
    statements = [
        Statement(0, "gains", 1, 5),
        Statement(1, "times", -1, 3),
        Statement(2, "loses", -1, 4),
        Statement(2, "gains", 0, 7),
    ]
    rng = np.random.default_rng(0)
    drawn = {tuple(graphs.draw_order(rng, statements)) for _ in range(2000)}

    def keeps_meaning(order: tuple[int, ...]) -> bool:
        ends = set()
        for contents in itertools.product((2, 3, 7), repeat=3):
            told = graphs.solve(contents, statements)[-1][-3:]
            moved = graphs.solve(contents, [statements[i] for i in order])[-1][-3:]
            ends.add(told == moved)
        return ends == {True}

    possible = set(filter(keeps_meaning, itertools.permutations(range(4))))
    assert drawn == possible - {order for order in possible if order.index(3) < order.index(2)}
    assert (2, 0, 1, 3) in drawn and (1, 0, 2, 3) not in drawn


def test_levels_are_the_statements_and_equally_frequent(train: list[dict]) -> None:
    assert all(row["level"] == len(read_question(row)[1]) for row in train)
    counts = collections.Counter(row["level"] for row in train)
    assert counts.keys() == set(range(2, 7))
    assert all(abs(count - 1200) < 160 for count in counts.values()), counts  # 5 deviations


def test_splits_share_no_expression(train: list[dict]) -> None:
    def write_expression(row: dict) -> str:
        contents, statements, asked = read_question(row)
        texts = {box: str(value) for box, value in contents.items()}
        for statement in statements:
            box, operator, operand = statement.split()
            texts[box] = f"({texts[box]}{SIGNS[operator]}{texts.get(operand, operand)})"
        return texts[asked]

    trained = {write_expression(row) for row in train}
    for split, seed in (("test", 0), ("valid", 0), ("test", 3)):
        rows = [graphs.make_row(seed, i, split, OPERATIONS) for i in range(500)]
        expressions = {write_expression(row) for row in rows}
        assert not trained & expressions
        assert {graphs.assign_split(x) for x in expressions} == {split}
    assert {graphs.assign_split(x) for x in trained} == {"train"}


def test_a_row_is_a_function_of_its_arguments() -> None:
    row = graphs.make_row(1, 2, "train", (3, 5))
    assert row == graphs.make_row(1, 2, "train", (3, 5))
    others = [(2, 2, "train"), (1, 3, "train"), (1, 2, "test"), (1, 2, "valid")]
    questions = {graphs.make_row(*x, (3, 5))["question"] for x in others}
    assert len(questions | {row["question"]}) == 5


@pytest.mark.parametrize(
    ("split", "operations"),
    [("dev", (2, 4)), ("train", (0, 4)), ("train", (5, 4)), ("test", (2, 99))],
)
def test_bad_arguments_are_refused(split: str, operations: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"no split|no range"):
        graphs.make_row(0, 0, split, operations)
