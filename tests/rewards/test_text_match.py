"""Tests comparing short answers, by the behaviour that SQuAD's evaluation script documents."""

import json
from pathlib import Path

import pytest

from distill.evaluation import problems
from distill.rewards import text_match
from models.errors import UserError
from tests.support.answers import HOSTILE
from tests.support.verbs import call, read, verb_module, write

evaluate = verb_module("evaluate")


@pytest.mark.parametrize(
    ("response", "answer", "exact", "f1"),
    [
        ("The Battle of Hastings!", "battle of Hastings", True, 1.0),
        ("an   apple, the pear", "apple pear", True, 1.0),
        ("in 1066", "1066", False, 2 / 3),  # precision 1/2, recall 1
        ("William", "William the Conqueror", False, 2 / 3),  # precision 1, recall 1/2
        ("red red blue", "red", False, 0.5),  # one of two "red" counts: 1/3 and 1
        ("green", "blue", False, 0.0),
        ("anthem", "them", False, 0.0),  # articles are words, not parts of words
        ("The", "a", True, 1.0),  # nothing is left of either
        ("The", "cat", False, 0.0),
        ("U.S.", "US", True, 1.0),
        ("twenty-one", "twentyone", True, 1.0),  # punctuation is removed, not replaced
    ],
)
def test_f1_and_exact_match_follow_squad(
    response: str, answer: str, exact: bool, f1: float
) -> None:
    assert (text_match.normalise(response) == text_match.normalise(answer)) == exact
    assert text_match.compute_f1(response, answer) == pytest.approx(f1)


def test_the_best_of_several_answers_counts() -> None:
    answer = text_match.make_answer(["Edward the Confessor", "King Edward"])
    thought = "<think>King Edward?</think>"
    assert text_match.grade_text(thought + "It was King Edward.", answer) == {
        "outcome": "correct",
        "exact": False,
        "contained": True,
        "score": pytest.approx(2 / 3),
    }
    assert text_match.grade_text("Harold", answer)["outcome"] == "wrong"
    for empty in ("", "<think>King Edward"):
        assert text_match.grade_text(empty, answer)["outcome"] == "no_answer"
    assert text_match.grade_text("Edwardian", "Edward")["contained"] is False
    assert text_match.grade_text("x", "the")["outcome"] == "error"
    assert text_match.is_gradable("1066") and not text_match.is_gradable(" , ")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_responses_are_graded(name: str) -> None:
    assert text_match.grade_text(HOSTILE[name], "42")["outcome"] in (
        "wrong",
        "no_answer",
        "correct",
    )


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answer": "1066"}, ["1066"]),
        ({"answer": 1066}, ["1066"]),
        ({"answers": ["1066", "in 1066", "1066"]}, ["1066", "in 1066"]),
        ({"answers": {"text": ["1066"], "answer_start": [3]}, "context": "So."}, ["1066"]),
        ({"answer": {"value": "1066", "aliases": ["AD 1066"]}}, ["1066", "AD 1066"]),
    ],
)
def test_rows_with_answers_are_read(tmp_path: Path, row: dict, answers: list) -> None:
    path = write(tmp_path / "x.jsonl", [{"id": 3, "question": "When?", **row}])
    ((_, problem),) = problems.load_problems("qa", str(path), 0)
    assert json.loads(problem["answer"])["answers"] == answers and problem["id"] == 3
    assert problem["question"] == ("So.\n\nWhen?" if "context" in row else "When?")
    for training_row in (problem, {"question": "When?", **row}):  # read again, or as published
        adapted = problems.adapt_prompt_row("qa", training_row, "f:1")
        assert adapted["answer"] == problem["answer"]


def test_rows_without_answers_are_left_out_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "q", "answers": {"text": []}}, {"question": "q", "answer": "x"}]
    loaded = problems.load_problems("qa", str(write(tmp_path / "x.jsonl", rows)), 0)
    assert len(loaded) == 1 and "1 rows of" in " ".join(capsys.readouterr())
    for row, message in (
        ({"question": "q"}, "none of answers, answer among its fields"),
        ({"answer": "x"}, "no question among its fields"),
        ({"question": "q", "answer": ["x", None]}, "is no text"),
        ({"question": "q", "answer": "..."}, "is no text"),
    ):
        with pytest.raises(UserError, match=r"x\.jsonl:1: .*" + message):
            problems.load_problems("qa", str(write(tmp_path / "x.jsonl", [row])), 0)


def test_stored_answers_get_three_figures_with_intervals(tmp_path: Path) -> None:
    stored = [
        {"id": "a", "answer": "1066", "response": "1066"},
        {"id": "b", "answer": "1066", "response": "In 1066"},
        {"id": "c", "answer": "1066", "response": "no idea"},
    ]
    path, out = write(tmp_path / "r.jsonl", stored), tmp_path / "out"
    assert call(evaluate, "--benchmark=qa", f"--responses={path}", f"--out={out}") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"] == summary["contained"] == pytest.approx(2 / 3)
    assert summary["exact"] == pytest.approx(1 / 3)
    assert summary["score"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    low, high = summary["score_interval"]
    assert 0 <= low < summary["score"] < high <= 1
    assert [row["score"] for row in read(out / "examples.jsonl")] == pytest.approx([1, 2 / 3, 0])
