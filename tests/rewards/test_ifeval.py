"""Tests the official IFEval checkers against labels published with their responses."""

import dataclasses
import json
from pathlib import Path

import pytest

from distill.evaluation import problems, tasks
from distill.rewards import graders, ifeval
from models.errors import UserError
from tests.support.verbs import call, read, verb_module, write

evaluate = verb_module("evaluate")

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of lm-eval and its imports

COMMA = {
    "key": 7,
    "prompt": "Say yes in lower case, without commas.",
    "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
    "kwargs": [{}, {"relation": None}],
}


# Lower case is checked together with the language, which needs some text to detect.
YES = "the answer to your question is yes and this is all there is to say"


@pytest.fixture(scope="module")
def installed() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")


def test_ifeval_grades_equal_published_labels(
    installed: None, shared_data: Path, tmp_path: Path
) -> None:
    """Strict and loose grades of each instruction; those that need nltk's data only if it is
    there."""
    published = read(shared_data / "ifeval" / "graded_responses.jsonl")
    out = tmp_path / "out"
    stored = shared_data / "ifeval" / "graded_responses.jsonl"
    assert call(evaluate, "--benchmark=ifeval", f"--responses={stored}", f"--out={out}") == 0
    graded, checked, prompts = read(out / "examples.jsonl"), 0, 0
    for row, ours in zip(published, graded, strict=True):
        assert ours["id"] == str(row["key"])
        for way in ("strict", "loose"):
            for name, label, expected in zip(
                row["instruction_id_list"], ours[way], row[way], strict=True
            ):
                if label is None:
                    assert name in ifeval.NEED_PUNKT
                else:
                    checked += 1
                    assert label == expected, (row["key"], name, way)
        if None not in ours["strict"]:
            prompts += 1
            assert ours["correct"] == row["strict_all"]
    assert checked >= 2 * 375 and prompts >= 240
    summary = json.loads((out / "summary.json").read_text())["ifeval"]
    assert summary["prompt_strict"] <= summary["prompt_loose"]
    assert summary["unchecked"] * 2 + checked == 2 * sum(len(row["strict"]) for row in published)


def test_published_prompts_load_as_problems(shared_data: Path, monkeypatch) -> None:
    task = dataclasses.replace(tasks.BENCHMARKS["ifeval"], require_installed=lambda: None)
    monkeypatch.setitem(tasks.BENCHMARKS, "ifeval", task)
    source = str(shared_data / "ifeval" / "prompts.jsonl")
    rows = problems.load_problems("ifeval", source, 0)
    assert len(rows) == 541
    where, row = rows[0]
    assert row.keys() == {"id", "question", "answer"} and where.endswith("prompts.jsonl:1")
    assert (
        problems.render_question("ifeval", row)["question"] == row["question"]
    )  # nothing is added
    assert json.loads(str(row["answer"]))["prompt"] == row["question"]


@pytest.mark.parametrize(
    ("response", "outcome", "strict", "loose"),
    [
        (YES, "correct", [True, True], [True, True]),
        (YES + ", sir", "wrong", [False, True], [False, True]),
        ("Sure, here it is:\n" + YES, "wrong", [False, False], [True, True]),
        (f"<think>\nWell, hm.\n</think>\n\n{YES}", "correct", [True, True], [True, True]),
        ("<think>\n" + YES, "no_answer", [False, False], [False, False]),
        ("", "wrong", [False, False], [False, False]),
    ],
)
def test_strict_and_loose_grades_of_instructions(
    installed: None, response: str, outcome: str, strict: list, loose: list
) -> None:
    graded = ifeval.grade_instructions(response, ifeval.make_answer(COMMA, "x"))
    assert graded == {"outcome": outcome, "strict": strict, "loose": loose}


def test_instructions_that_need_nltk_data_are_not_guessed(installed: None, monkeypatch) -> None:
    """Without the data they have no grade, and an evaluation that samples from a model is
    refused."""
    monkeypatch.setattr(ifeval, "_has_punkt", lambda: False)
    row = COMMA | {
        "instruction_id_list": [*COMMA["instruction_id_list"], ifeval.NEED_PUNKT[0]],
        "kwargs": [{}, {}, {"num_sentences": 3, "relation": "less than"}],
    }
    answer = ifeval.make_answer(row, "x")
    assert ifeval.grade_instructions(YES, answer) == {
        "outcome": "error",
        "strict": [True, True, None],
        "loose": [True, True, None],
    }
    assert (
        ifeval.grade_instructions(YES + ", sir", answer)["outcome"] == "wrong"
    )  # whatever the third one would be
    problem: problems.Record = {"id": 1, "question": "q", "answer": answer}
    with pytest.raises(UserError, match="1 of the problems are checked with nltk's data"):
        problems.check_gradable("ifeval", [("x", problem)])
    easy: problems.Record = {"id": 1, "question": "q", "answer": ifeval.make_answer(COMMA, "x")}
    problems.check_gradable("ifeval", [("x", easy)])


def test_missing_lm_eval_is_reported_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ifeval.importlib.util, "find_spec", lambda name: None)
    stored = write(tmp_path / "stored.jsonl", [COMMA | {"response": "yes"}])
    flags = ("--benchmark=ifeval", f"--responses={stored}", f"--out={tmp_path / 'out'}")
    assert call(evaluate, *flags) == 2
    assert "lm_eval is not installed: pip install -r requirements-eval.txt" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": None}, "no prompt, instruction_id_list among"),
        ({"instruction_id_list": []}, "no prompt, instruction_id_list among"),
        ({"kwargs": [{}]}, "kwargs is not a list of one object for each instruction"),
    ],
)
def test_rows_without_instructions_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        ifeval.make_answer(COMMA | changes, "file:3")
    assert str(error.value).startswith("file:3: ") and words in str(error.value)


def test_grader_pool_grades_instructions(installed: None) -> None:
    with graders.Grader(workers=1) as grader:
        outcomes = grader.grade(
            ifeval.INSTRUCTIONS, [YES, "No, no"], [ifeval.make_answer(COMMA, "x")] * 2
        )
    assert outcomes == ["correct", "wrong"]
