"""Tests how a study's files are read: what is refused, and what is noted and left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill import report
from distill.reporting import study_read
from tests.support.study_files import (
    CONTRAST,
    REACH,
    SLOPE,
    make_definition,
    make_result,
    make_results,
    write_study,
)
from tests.support.verbs import call


def read_notes(folder: Path) -> str:
    return "\n".join(study_read.read_study(str(folder)).notes)


def test_a_whole_study_has_no_notes(tmp_path: Path) -> None:
    study = study_read.read_study(str(write_study(tmp_path / "z")))
    assert study.notes == []
    assert [(x.arm, x.seed) for x in study.results[:4]] == [
        ("start", 0),
        ("opd", 0),
        ("opd", 1),
        ("opd", 2),
    ]
    assert [(x.arm, x.trial) for x in study.trials] == [("opd", 0), ("opd", 1)]


def test_an_interrupted_study_names_what_it_lacks(tmp_path: Path) -> None:
    results = [
        x
        for x in make_results()
        if x["arm"] != "grpo" and (x["arm"], x["seed"]) != ("sft 100", 1) and x["trial"] != 0
    ]
    results.append(make_result("opd", 1000, [0.5], phase="tuning", trial=3))
    notes = read_notes(write_study(tmp_path / "z", None, results))
    assert "9 of 13 runs are there: the study goes on, or was stopped" in notes
    assert "grpo: no result yet" in notes and "sft 100: no result of seed 1" in notes
    assert "opd: trials of tuning are missing: 0, 2" in notes
    empty = read_notes(write_study(tmp_path / "y", None, []))
    assert "0 of 13 runs" in empty and "opd: no trial of tuning" in empty


def test_arms_of_unequal_tuning_are_noted(tmp_path: Path) -> None:
    definition = make_definition()
    definition["arms"][2]["tuned"] = True
    more = [make_result("grpo", 1000, [0.5], phase="tuning", trial=0)]
    notes = read_notes(write_study(tmp_path / "z", definition, [*make_results(), *more]))
    assert "not tuned with equally many trials: opd 2, grpo 1" in notes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        ("[1]", "holds no object"),
        ({"study": "y"}, 'is of another study, "y"'),
        ({"study": None}, "is of another study, null"),
        ({"arm": "odd"}, 'arm: "odd" is not in study.json'),
        ({"arm": ["opd"]}, 'arm: ["opd"] is not in study.json'),
        ({"phase": "x" * 99}, "is neither final nor tuning"),
        ({"seed": "0"}, "has no seed"),
        ({"seed": True}, "has no seed"),
        ({"seed": 9}, "seed 9 is not in study.json"),
        ({"phase": "tuning", "trial": None}, "no trial of tuning"),
        ({}, "is of the run of opd.seed0.json"),
    ],
    ids=lambda x: x if isinstance(x, str) and 0 < len(x) < 60 else "",
)
def test_results_that_cannot_be_used_are_noted(tmp_path: Path, content: Any, words: str) -> None:
    folder = write_study(tmp_path / "z")
    if isinstance(content, dict):
        content = json.dumps(make_result("opd", 0, [0.1]) | content)
    path = folder / "runs" / "zz.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    study = study_read.read_study(str(folder))
    (note,) = study.notes
    assert note.startswith("runs/zz.json: ") and words in note and note.endswith("; left out")
    assert len(study.results) == 13


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "z")
    with (folder / "runs" / "zz.json").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    assert "zz.json: has 1048576 MiB, more than a result has" in read_notes(folder)


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    odd = {"greedy": None, "kl": 0.5, "a": "x", "b": True, "c": [1], "d": 10**400}
    points = [odd, 7, {"step": 1, "greedy": float("nan")}, {"step": float("-inf")}]
    result = make_result("opd", 0, [], final=odd, points=points, seconds="x", config=3, machine=1)
    (read,) = study_read.read_study(str(write_study(tmp_path / "z", None, [result]))).results
    assert read.final == {"kl": 0.5} and read.points == [{"kl": 0.5}, {"step": 1.0}]
    assert read.seconds is None and read.config == {} and read.processor == ""


def test_results_that_were_not_made_alike_are_noted(tmp_path: Path) -> None:
    results = make_results()
    first, second = (x for x in results if x["arm"] == "grpo" and x["seed"] < 2)
    first["revision"] = "b" * 40
    second |= {"dirty": True, "config": {"seed": 1, "opd": {"steps": 30}}}
    third = next(x for x in results if x["arm"] == "opd" and x["seed"] == 2)
    third["changes"] = {"rate": 0.3}
    for x in results:  # the place of an earlier stage's model is no difference
        x["config"] = x["config"] | {
            "student": f"runs/{x['arm']}.seed{x['seed']}_0.{x['seed']}ab/model"
        }
    notes = read_notes(write_study(tmp_path / "z", None, results))
    assert "several revisions: aaaaaaaaaa (14 runs), bbbbbbbbbb (1 runs)" in notes
    assert "changes that no commit holds: grpo.seed1.json" in notes
    assert "grpo: its seeds differ in config: opd.steps" in notes
    assert "opd: its seeds differ in changes: rate" in notes and notes.count("differ") == 2


BROKEN = [
    ({"study": 3}, "study: 3 is not a text"),
    ({"seeds": None}, "seeds: null is not a list"),
    ({"seeds": [0, 0]}, "seeds: [0, 0] are not different integers"),
    ({"seeds": []}, "seeds: [] are not different integers"),
    ({"seeds": [True]}, "seeds: [true] are not different integers"),
    ({"arms": []}, "arms: names none"),
    ({"arms": {}}, "arms: {} is not a list"),
    ({"arms": [3]}, "arms[0]: 3 is not an object"),
    ({"arms": [{}]}, "arms[0].name: null is not a text"),
    ({"arms": [{"name": "a"}, {"name": "a"}]}, 'arms[1].name: "a" is an earlier arm\'s'),
    ({"arms": [{"name": "a", "seeds": 1}]}, "arms[0].seeds: 1 is not a list"),
    ({"arms": [{"name": "a", "tuned": 1}]}, "arms[0].tuned: 1 is not true or false"),
    ({"figures": []}, "figures: names none"),
    ({"figures": [{"key": "x", "title": None}]}, "figures[0].title: null is not a text"),
    ({"curves": [{"x": "step"}]}, "curves[0].y: null is not a text"),
    ({"tuning": "x"}, 'tuning: "x" is not an object'),
    ({"tuning": {"figure": 1}}, "tuning.figure: 1 is not a text"),
    ({"claims": [CONTRAST | {"kind": "odd"}]}, 'claims[0].kind: "odd" is none of contrast, reach'),
    ({"claims": [CONTRAST | {"figure": 1}]}, "claims[0].figure: 1 is not a text"),
    ({"claims": [CONTRAST | {"why": None}]}, "claims[0].why: null is not a text"),
    ({"claims": [CONTRAST | {"weights": {}}]}, "weights: {} are not numbers by arm"),
    ({"claims": [CONTRAST | {"weights": {"opd": "1"}}]}, "are not numbers by arm"),
    ({"claims": [CONTRAST | {"weights": {"opd": 1e9}}]}, "at most 1000 each"),
    ({"claims": [CONTRAST | {"weights": {"odd": 1}}]}, 'weights: "odd" is not among the arms'),
    ({"claims": [CONTRAST | {"expected": "x"}]}, 'expected: "x" is none of above, below, none'),
    ({"claims": [CONTRAST | {"expected": "none"}]}, "margin: null is not a number"),
    ({"claims": [REACH | {"claimed_range": [2, 1]}]}, "claimed_range: [2, 1] is not [low, high]"),
    ({"claims": [REACH | {"axis": None}]}, "axis: null is not a text"),
    ({"claims": [REACH | {"at": "x"}]}, 'at: "x" is not a number'),
    ({"claims": [REACH | {"slow": ["opd"]}]}, 'slow: ["opd"] is not among the arms'),
    ({"claims": [SLOPE | {"amounts": {"sft 100": 1}}]}, "are not different amounts above 0"),
    ({"claims": [SLOPE | {"amounts": {"sft 100": 0, "sft 400": 1}}]}, "different amounts above 0"),
    ({"claims": [SLOPE | {"reach_of": None}]}, 'cost: "flops" is not a text beside `reach_of`'),
    ({"claims": [SLOPE | {"reach_of": "odd"}]}, 'reach_of: "odd" is not among the arms'),
]


@pytest.mark.parametrize(("changes", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_a_wrong_definition_is_one_line_that_names_the_field(
    tmp_path: Path, capsys: Any, changes: dict[str, Any], words: str
) -> None:
    folder = write_study(tmp_path / "z", make_definition(**changes), [])
    out = tmp_path / "out.html"
    assert call(report, str(folder), f"--out={out}") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {folder}/study.json: ")
    assert words in captured.err and captured.err.count("\n") == 1 and not out.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, "1" * 10_000], ids=["a", "b", "c", "d", "e"]
)
def test_a_broken_definition_is_one_line(tmp_path: Path, capsys: Any, content: str) -> None:
    folder = write_study(tmp_path / "z")
    (folder / "study.json").write_text(content)
    assert call(report, str(folder), f"--out={tmp_path}/out.html") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {folder}/study.json: ")
    assert captured.err.count("\n") == 1 and captured.out == ""
