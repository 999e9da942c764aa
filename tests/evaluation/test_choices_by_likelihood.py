"""Tests choosing options by likelihood, and what is measured of the places of options."""

import json
from pathlib import Path

import numpy as np
import pytest

from distill.data import chat
from distill.evaluation import statistics
from tests.support.paths import ROOT
from tests.support.verbs import call, read, verb_module, write

evaluate, score = verb_module("evaluate"), verb_module("score")
STUDENT = ROOT / "assets" / "student"
ROWS = [
    {"id": f"q{i}", "question": f"{i} + {i} = ?", "options": [str(i), str(11 * i + 3), "-1", "7"],
     "answer": i % 4}
    for i in range(1, 8)
]  # fmt: skip


def run(out: Path, data: Path, *flags: str) -> list[dict]:
    fixed = (f"--model={STUDENT}", "--benchmark=choice", f"--data={data}", f"--out={out}")
    assert call(evaluate, *fixed, "--batch_size=8", "--dtype=float32", *flags) == 0
    return read(out / "examples.jsonl")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", ROWS)


def test_likelihoods_are_sums_of_token_scores_and_survive_a_kill(
    data: Path, tmp_path: Path
) -> None:
    """The verb `score` is compared with transformers elsewhere; it scores whole sequences here."""
    rows = run(tmp_path / "whole", data, "--choice_by=text")
    tokenizer = chat.load_tokenizer(STUDENT)
    assert tokenizer is not None
    ids = [[tokenizer.encode(x, add_special_tokens=False) for x in r["options"]] for r in ROWS]
    tokens = [r["prompt_tokens"] + x for r, own in zip(rows, ids, strict=True) for x in own]
    path, scored = (
        write(tmp_path / "t.jsonl", [{"tokens": x} for x in tokens]),
        tmp_path / "s.jsonl",
    )
    flags = (f"--model={STUDENT}", f"--tokens={path}", f"--out={scored}", "--dtype=float32")
    assert call(score, *flags) == 0
    logprobs = iter(x["logprobs"] for x in read(scored))
    for row, published, own in zip(rows, ROWS, ids, strict=True):
        sums = [sum(next(logprobs)[len(row["prompt_tokens"]) :]) for _ in own]
        np.testing.assert_allclose(row["option_logprobs"], sums, atol=1e-4)
        assert row["found"] == "ABCD"[int(np.argmax(sums))]
        lengths = [len(option) for option in published["options"]]
        assert row["found_normalised"] == "ABCD"[int(np.argmax(np.divide(sums, lengths)))]
        assert row["correct"] == (row["found"] == "ABCD"[published["answer"]])
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["protocol"]["choice_by"] == "text" and "accuracy_normalised" in summary
    bytes_whole = (tmp_path / "whole" / "examples.jsonl").read_bytes()
    lines = bytes_whole.splitlines(keepends=True)
    (tmp_path / "whole" / "summary.json").unlink()
    # Killed in the middle of the fourth row, which is in the middle of a chunk.
    (tmp_path / "whole" / "examples.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    run(tmp_path / "whole", data, "--choice_by=text")
    assert (tmp_path / "whole" / "examples.jsonl").read_bytes() == bytes_whole


@pytest.mark.long
def test_the_likeliest_letter_follows_the_listed_options(data: Path, tmp_path: Path) -> None:
    rows = run(tmp_path / "out", data, "--choice_by=letter", "--limit=2")
    tokens = [len(row["option_logprobs"]) for row in rows]
    assert tokens == [4, 4] and {row["response"] for row in rows} <= {*"ABCD"}
    assert "found_normalised" not in rows[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--choice_by=letter", "--temperature=1"), "--temperature would do nothing"),
        (("--choice_by=text", "--teacher=x"), "--teacher would do nothing"),
        (("--choice_by=text", "--model=http://127.0.0.1:1"), "needs a model that is run here"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple, message: str
) -> None:
    fixed = (f"--model={STUDENT}", "--benchmark=choice", f"--data={data}", f"--out={tmp_path}/o")
    assert call(evaluate, *fixed, *flags) == 2
    assert message in capsys.readouterr().err


def test_problems_without_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", [{"question": "A or B?", "answer": "A"}])
    fixed = (f"--model={STUDENT}", "--benchmark=choice", f"--data={path}", f"--out={tmp_path}/o")
    assert call(evaluate, *fixed, "--choice_by=text") == 2
    assert "x.jsonl:1: --choice_by=text: has no options" in capsys.readouterr().err


def test_a_model_that_always_says_a_is_found_out() -> None:
    """60 problems, right options evenly spread, always A: recall 1 for A, 0 for the others."""
    rows = [
        {"id": str(i), "right": "ABCD"[i % 4], "found": "A", "correct": i % 4 == 0, "outcome": "x"}
        for i in range(60)
    ]
    summary = statistics.summarise_rows(rows, (1,))["choices"]
    assert isinstance(summary, dict)
    letters = summary["letters"]
    assert letters["A"]["accuracy"] == 1 and letters["B"]["accuracy"] == 0
    assert letters["A"]["chosen"] == 1 and letters["A"]["problems"] == 15
    assert summary["recall_std"] == pytest.approx(np.std([1, 0, 0, 0]))
    low, high = letters["B"]["interval"]
    assert low == 0 and 0.1 < high < 0.3
