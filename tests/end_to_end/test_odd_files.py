"""Verbs on paths and rows as people have them, in this process."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from distill import clean, compare, verify
from tests.support.paths import ROOT
from tests.support.verbs import call, read, verb_module, write

HALF = "\ud83d"
ANSWER = "\\boxed{4}"
SAMPLES = [{"text": ANSWER, "tokens": [1], "finish_reason": "stop"}]
evaluate = verb_module("evaluate")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory; the working directory is another, in which no ~ may appear."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home [v2]"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "home [v2]").mkdir()
    return tmp_path / "home [v2]"


def test_verbs_read_and_write_the_home_directory(home: Path) -> None:
    table = pa.table({"question": ["2+2?"], "response": [ANSWER], "icon": [b"\x89PNG"]})
    parquet.write_table(table, home / "rows.parquet")
    flags = ["--data=~/rows.parquet", "--out=~/o/out.jsonl", "--report=~/o/report.jsonl"]
    assert call(clean, *flags) == 0
    row = {"question": "2+2?", "response": ANSWER, "icon": "iVBORw=="}
    assert read(home / "o" / "out.jsonl") == [row] and read(home / "o" / "report.jsonl") == []
    write(home / "stored.jsonl", [{"id": 1, "response": ANSWER, "answer": "4"}])
    for out in ("a", "b"):
        stored = ("--benchmark=math", "--responses=~/stored.jsonl", f"--out=~/{out}")
        assert call(evaluate, *stored) == 0
    assert call(compare, "--runs=~/a,~/b", "--out=~/compared.json") == 0
    assert json.loads((home / "compared.json").read_text())["paired"]
    assert not list(Path.cwd().iterdir())


def test_an_output_never_replaces_what_is_read(home: Path, capsys) -> None:
    rows = write(home / "rows.jsonl", [{"question": "2+2?", "answer": 4, "samples": SAMPLES}])
    before = rows.read_bytes()
    for verb, *flags in (
        (clean, "--data=~/rows.jsonl", f"--out={rows}"),
        (clean, "--data=~/rows.jsonl", "--out=~/out.jsonl", f"--report={rows}"),
        (clean, "--data=~/rows.jsonl", "--out=~/out.jsonl", "--report=~/out.jsonl"),
        (verify, "--data=~/rows.jsonl", "--benchmark=math", "--out=~/rows.jsonl"),
    ):
        assert call(verb, *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("is also read or written, and would be lost"), line
    assert rows.read_bytes() == before and os.listdir(home) == ["rows.jsonl"]


def test_half_a_surrogate_pair_is_a_bad_row_where_it_is_read(home: Path, capsys) -> None:
    good = {"question": "2+2?", "answer": "4", HALF: [HALF], "samples": SAMPLES}
    chat = [{"role": "user", "content": HALF}]
    bad = {"answer": HALF, "question": "2+2+0?", "samples": SAMPLES}
    rows = write(home / "rows.jsonl", [good, bad, {"messages": chat}, {"question": HALF}])
    words = " holds half a surrogate pair, which is no character"
    cleaned = home / "out.jsonl"
    assert call(clean, f"--data={rows}", f"--out={cleaned}") == 2
    assert f"rows.jsonl:3: messages[0].content{words}" in capsys.readouterr().err
    assert call(clean, f"--data={rows}", f"--out={cleaned}", "--on_bad_row=skip") == 0
    assert "2 bad row" in capsys.readouterr().err and read(cleaned) == [good, bad]
    flags = (f"--data={cleaned}", "--benchmark=math", f"--out={home / 'kept.jsonl'}")
    assert call(verify, *flags) == 2
    assert f"out.jsonl:2: answer{words}" in capsys.readouterr().err
    assert call(verify, *flags, "--on_bad_row=skip") == 0
    (kept,) = read(home / "kept.jsonl")
    assert kept[HALF] == [HALF] and kept["samples"][0]["correct"]


def test_generate_and_evaluate_write_any_row_and_print_any_id(home: Path, capsys) -> None:
    """Numbers as ids, half a pair in one, and a value that JSON lacks."""
    table = pa.table({"question": ["2+2?"], "answer": ["4"], "id": [7], "x": [b"\xff"]})
    parquet.write_table(table, home / "rows.parquet")
    write(home / "rows.jsonl", [{"question": "2+2?", "answer": "4", "id": HALF, "x": float("nan")}])
    model = (f"--model={ROOT / 'assets' / 'student'}", "--max_new_tokens=2")
    generate = verb_module("generate")
    for name, row_id in (("rows.parquet", 7), ("rows.jsonl", HALF)):
        data = f"{home}/{name}"
        assert call(generate, *model, f"--prompts={data}", f"--out={data}.out") == 0
        (row,) = read(Path(f"{data}.out"))
        assert row["id"] == row_id and row["x"] == ("/w==" if row_id == 7 else None)
        flags = ("--benchmark=math", f"--data={data}", f"--out={data}.eval", "--limit=1")
        assert call(evaluate, *model, *flags) == 0
        assert "--- " in capsys.readouterr().out
