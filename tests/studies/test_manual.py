"""The price lists: answers follow from the list that a row shows, and from nothing else."""

import collections
import re

import pytest

from models.errors import UserError
from studies import manual


def read_manual(text: str) -> dict[str, int]:
    found = re.findall(r"A (\w+) costs (\d)\.", text)
    assert len(found) == text.count(".") == len(manual.THINGS)
    return {thing: int(price) for thing, price in found}


def find_things(question: str) -> list[str]:
    assert re.fullmatch(r"What (does a \w+|do (a \w+, )?a \w+ and a \w+) cost\?", question)
    return re.findall(r"\ba (\w+)", question)


def check_solution(row: dict, question: str, prices: dict[str, int]) -> None:
    things = find_things(question)
    assert len(things) == row["level"]
    assert int(row["answer"]) == sum(prices[thing] for thing in things), row
    found = re.fullmatch(r"<think>\n([\w ,]+)[:;](.*)\n</think>\n\n(\d+)", row["response"])
    assert found, row
    read, sums, answer = found.groups()
    assert answer == row["answer"]
    assert [tuple(x.split()) for x in read.split(", ")] == [(x, str(prices[x])) for x in things]
    lines = re.findall(r"(\d+)\+(\d)=(\d+);", sums)
    assert len(lines) == len(things) - 1
    total = prices[things[0]]
    for thing, (left, right, result) in zip(things[1:], lines, strict=True):
        assert (int(left), int(right)) == (total, prices[thing])
        total += prices[thing]
        assert int(result) == total


def test_a_row_shows_a_manual_of_its_own_and_is_answered_by_it() -> None:
    manuals = {manual.write_manual(manual.make_manual(0))}
    for i in range(2000):
        row = manual.make_row(0, i, "train")
        system, user = row["messages"]
        assert (system["role"], user["role"]) == ("system", "user") and "question" not in row
        check_solution(row, user["content"], read_manual(system["content"]))
        manuals.add(system["content"])
    assert len(manuals) == 2001  # and none is the fixed one of the same seed


@pytest.mark.parametrize("split", manual.SPLITS)
def test_a_row_of_a_fixed_manual_does_not_show_it(split: str) -> None:
    fixed = manual.make_manual(4)
    assert read_manual(manual.write_manual(fixed)) == fixed
    for i in range(500):
        row = manual.make_row(0, i, split, fixed)
        assert "messages" not in row
        check_solution(row, row["question"], fixed)


def test_prices_of_a_fixed_manual_cannot_be_guessed() -> None:
    answers = []
    for seed in range(20):
        fixed = manual.make_manual(seed)
        assert len(set(fixed.values())) > 3
        answers += [manual.make_row(0, i, "test", fixed)["answer"] for i in range(100)]
    assert collections.Counter(answers).most_common(1)[0][1] / len(answers) < 0.15


def test_splits_share_no_set_of_things() -> None:
    fixed = manual.make_manual(0)
    sets = {
        split: {
            tuple(sorted(find_things(manual.make_row(9, i, split, fixed)["question"])))
            for i in range(3000)
        }
        for split in manual.SPLITS
    }
    assert not sets["train"] & sets["test"]
    assert not sets["valid"] & (sets["train"] | sets["test"])
    assert {len(x) for x in sets["train"]} == {1, 2, 3} and {len(x) for x in sets["test"]} == {2, 3}
    assert len(sets["test"]) > 40 and len(sets["train"]) > 180
    assert {x for things in sets["train"] for x in things} == set(manual.THINGS)


def test_levels_are_equally_frequent() -> None:
    for split, levels in (("train", (1, 2, 3)), ("test", (2, 3))):
        counts = collections.Counter(manual.make_row(1, i, split)["level"] for i in range(1500))
        assert counts.keys() == set(levels)
        assert all(abs(n - 1500 / len(levels)) < 100 for n in counts.values()), counts


def test_a_row_is_a_function_of_its_arguments() -> None:
    row = manual.make_row(7, 3, "train")
    assert row == manual.make_row(7, 3, "train")
    others = [(8, 3, "train"), (7, 4, "train"), (7, 3, "test")]
    assert all(manual.make_row(*x)["messages"] != row["messages"] for x in others)
    assert manual.make_manual(1) == manual.make_manual(1) != manual.make_manual(2)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(UserError, match="split: 'dev' is none of train, valid, test"):
        manual.make_row(0, 0, "dev")
    with pytest.raises(UserError, match="index -1 must not be negative"):
        manual.make_row(0, -1, "train")
    with pytest.raises(UserError, match="seed: -2"):
        manual.make_manual(-2)
    with pytest.raises(UserError, match="manual: its things are not bag"):
        manual.make_row(0, 0, "train", {"pen": 4})


def test_a_fixed_manual_is_shown_in_the_row_of_the_same_question() -> None:
    fixed = manual.make_manual(3)
    row = manual.make_row(0, 4, "test", fixed)
    shown = manual.show(row, fixed)
    system, user = shown.pop("messages")
    assert system == {"role": "system", "content": manual.write_manual(fixed)}
    assert user == {"role": "user", "content": row.pop("question")}
    assert shown == row
