"""One run of a study: what a --measure says, and a tiny run from training to figures."""

import json
import signal
from pathlib import Path

import pytest

from distill.data import arithmetic
from models.errors import UserError
from studies import worker
from studies.worker import Measurement, parse_measurement
from tests.support.paths import ROOT
from tests.support.verbs import call, write

TEXT = "x:ifeval:rows.jsonl:4:40"


@pytest.mark.parametrize(
    ("options", "is_judged", "is_thinking"),
    [
        ("", False, True),
        (":judged", True, True),
        (":no_think", False, False),
        (":judged:no_think", True, False),
    ],
)
def test_a_measurement_is_parsed(options: str, is_judged: bool, is_thinking: bool) -> None:
    wanted = Measurement("x", "ifeval", "rows.jsonl", 4, 40, is_judged, is_thinking)
    assert parse_measurement(TEXT + options) == wanted


@pytest.mark.parametrize(
    "text", ["x:ifeval:rows.jsonl:4", f"{TEXT}:judge", f"{TEXT}:no_think:judged", "x:y:z:a:40"]
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--measure={text}: is no NAME:"):
        parse_measurement(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x:arithmetic:ROWS", "is no NAME:BENCHMARK:ROWS:SAMPLES:TOKENS"),
        ("x:arithmetik:ROWS:0:8", "arithmetik: is no benchmark; did you mean 'arithmetic'?"),
        ("x:arithmetic:missing.jsonl:0:8", "missing.jsonl: no such file"),
        ("x:arithmetic:ROWS:2:8:judged", "judged, and no --teacher"),
        ("first:arithmetic:ROWS:0:8", "another measurement is named first"),
    ],
)
def test_a_bad_measurement_is_named_before_anything_runs(tmp_path, capsys, text, reason):
    rows = write(tmp_path / "rows.jsonl", [{"question": "1+1", "answer": "2"}])
    workdir, text = tmp_path / "run", text.replace("ROWS", str(rows))
    measures = [f"--measure={x}" for x in (f"first:arithmetic:{rows}:0:8", text)]
    assert call(worker, f"--workdir={workdir}", "--model=no/model", *measures) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --measure={text}: {reason}") and error.count("\n") == 1
    assert not workdir.exists()


def test_a_run_is_of_a_config_or_of_a_model(tmp_path, capsys):
    assert call(worker, f"--workdir={tmp_path}") == 2
    assert capsys.readouterr().err == "error: --config or --model: name one of them\n"


def write_problems(path: Path, split: str, count: int) -> Path:
    problems = [arithmetic.make_problem(0, i, split, (2, 2)) for i in range(count)]
    return write(path, [{"question": x.question, "answer": x.answer} for x in problems])


def test_a_tiny_run_that_is_stopped_before_it_measures_is_completed(tmp_path, monkeypatch):
    train = write_problems(tmp_path / "train.jsonl", "train", 16)
    test = write_problems(tmp_path / "test.jsonl", "test", 8)
    workdir, measure = tmp_path / "run", worker.measure
    command = [
        f"--workdir={workdir}",
        "--config=configs/miniature.py:opd,tiny",
        f"--config.student.path={ROOT / 'assets' / 'student'}",
        f"--config.teacher.path={ROOT / 'assets' / 'teacher'}",
        f"--config.opd.data.source={train}",
        "--config.opd.max_prompt_tokens=100",
        "--config.opd.max_response_tokens=16",
        f"--measure=greedy:arithmetic:{test}:0:16",
        f"--measure=sampled:arithmetic:{test}:2:16:judged",
        f"--teacher={ROOT / 'assets' / 'teacher'}",
        "--seed=3",
    ]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(worker, "measure", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert call(worker, *command) == 128 + signal.SIGTERM
    metrics = (workdir / "metrics.jsonl").read_text()
    assert len(metrics.splitlines()) == 2 and not (workdir / "measured.json").exists()
    monkeypatch.setattr(worker, "measure", measure)
    assert call(worker, *command) == 0
    assert (workdir / "metrics.jsonl").read_text() == metrics, "it was trained again"
    measured = json.loads((workdir / "measured.json").read_text())
    figures = measured["figures"]
    assert {"greedy", "sampled", "sampled/pass@1", "sampled/pass@2"} <= figures.keys()
    assert not figures.keys() & {"sampled/pass@4", "greedy/length", "greedy/reverse_kl"}
    assert all(0 <= figures[key] <= 1 for key in figures if "pass" in key or "/" not in key)
    assert figures["sampled"] == pytest.approx(figures["sampled/pass@1"])
    assert figures["sampled/pass@1"] <= figures["sampled/pass@2"]
    assert figures["sampled/reverse_kl"] > 0 and 0 < figures["sampled/length"] <= 16
    assert 20 < measured["prompt_tokens"] < 100
