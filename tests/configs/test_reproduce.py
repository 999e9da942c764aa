"""The tables of papers: their commands parse, and results are printed beside what was published."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configs import paper_tables, reproduce
from distill.evaluation import protocols, statistics, tasks
from tests.support.paths import ROOT
from tests.support.recipes import at_home, parse_config  # noqa: F401  (at_home is a fixture)


@pytest.mark.parametrize("name", paper_tables.TABLES)
def test_published_figures_are_columns_and_protocols_are_those_of_the_tasks(name: str) -> None:
    table = paper_tables.TABLES[name]
    names = {figure.name for figure in table.figures}
    assert len(names) == len(table.figures)
    for row in table.rows.values():
        assert row.published.keys() <= names
    for figure in table.figures:
        if figure.benchmark in tasks.BENCHMARKS:  # "": hours
            settings = protocols.resolve_settings(figure.protocol, figure.benchmark, {})
            own = [x for x in shlex.split(figure.flags) if x.startswith("--samples=")]
            assert own or settings["samples"] == figure.samples, figure.benchmark


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", paper_tables.TABLES)
def test_commands_train_and_evaluate_every_row(name: str, tiny: bool, at_home: None) -> None:  # noqa: F811
    lines = [x for x in reproduce.list_commands(name, tiny) if not x.startswith("#")]
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["python", "-m"] and "{" not in line.replace("{question}", "").replace(
            "{}", ""
        )
        if words[2] == "distill.train":
            c = parse_config(*(x for x in words[3:] if not x.startswith("--workdir")))
            assert all(stage in c for stage in c.stages)
    table, folder = paper_tables.TABLES[name], f"{name}_tiny" if tiny else name
    made = {word for line in lines for word in shlex.split(line) if word.startswith("--out=")}
    for row in table.rows:
        for figure in table.figures:
            if figure.benchmark and (figure.tiny_rows or not tiny):
                assert f"--out=runs/{folder}/{row}/eval_{figure.benchmark}" in made


def write_evaluation(folder: Path, figure: paper_tables.Figure, samples: int) -> None:
    """Writes an evaluation of four problems, of which every second response is correct."""
    rows = [
        {
            "id": str(i // samples),
            "correct": i % 2 == 0,
            "outcome": "correct" if i % 2 == 0 else "x",
        }
        for i in range(4 * samples)
    ]
    ks = (1, 64) if samples >= 64 else (1,)
    summary = statistics.summarise_rows(rows, ks)
    summary["protocol"] = {
        "benchmark": figure.benchmark,
        "protocol": figure.protocol,
        "samples": samples,
    }
    path = folder / f"eval_{figure.benchmark}" / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary))


@pytest.mark.parametrize("name", paper_tables.TABLES)
def test_each_table_is_printed_from_results(name: str, tmp_path: Path) -> None:
    table = paper_tables.TABLES[name]
    first, *others = table.rows
    for figure in table.figures:
        if figure.benchmark:
            write_evaluation(tmp_path / first, figure, figure.samples)
        else:
            run = tmp_path / others[0]
            run.mkdir()
            rows = [{"step": i, "time/step": 900.0} for i in range(4)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            devices = {"devices": {"kind": "TPU", "count": 8}}
            (run / "environment.json").write_text(json.dumps(devices))
    text = reproduce.render_table(name, str(tmp_path))
    lines = text.splitlines()
    for figure in table.figures:
        line = next(x for x in lines if figure.title in x)
        published = table.rows[first].published.get(figure.name)
        if figure.benchmark:
            assert "-- none --" not in line
        if figure.benchmark and figure.k == 1 and figure.samples == 64:
            assert "50.0 [" in line
            if published is not None:
                assert f"{50 - published:+.1f} [" in line and f"  {published:g}  " in line
        if figure.k == 64:  # each problem has a correct sample
            assert "100.0 [" in line and f"{100 - (published or 0):+.1f} [" in line
    if name == "qwen3_21":
        assert "8.000" in text and "rl, accelerator hours: of 8 x TPU" in text
    assert f"{others[-1]}, {table.figures[0].title}: no {tmp_path}" in text
    assert table.source.split(",")[0] in text


def test_other_protocols_and_damaged_results_are_named(tmp_path: Path) -> None:
    figure = paper_tables.CONDITIONS.figures[0]
    write_evaluation(tmp_path / "opd", figure, 2)
    text = reproduce.render_table("conditions", str(tmp_path))
    assert "opd, GSM8K: samples 2, published 1" in text
    assert "opd, GSM8K: problems 4, published 1319" in text
    path = tmp_path / "opd" / "eval_gsm8k" / "summary.json"
    summary = json.loads(path.read_text())
    for damaged, words in (
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({**summary, "accuracy": None}), "cannot be read"),
        (json.dumps({**summary, "protocol": {"benchmark": "math"}}), "is of math"),
        (json.dumps({**summary, "outcomes": {"error": 3}}), "3 responses not graded"),
    ):
        path.write_text(damaged)
        assert words in reproduce.render_table("conditions", str(tmp_path)), damaged


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ([], 0, "qwen3_21      Qwen3's strong-to-weak"),
        (["conditions", "tiny"], 0, "--config=configs/conditions.py:opd,tiny --workdir=runs/"),
        (["qwen3"], 2, "error: configs/reproduce.py takes qwen3_21|post_math"),
        (["qwen3_21", "small"], 2, "error: configs/reproduce.py qwen3_21 takes tiny or --results="),
        (["qwen3_21", "--results=lost"], 2, "error: --results=lost: there is no such folder"),
    ],
)
def test_command_line(words: list[str], code: int, expected: str) -> None:
    command = [sys.executable, str(ROOT / "configs" / "reproduce.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code and expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
