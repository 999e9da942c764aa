"""One run of a study: what a --measure says, and a tiny run from training to figures."""

import json
import signal
from pathlib import Path

import pytest

from distill.data import arithmetic
from distill.evaluation import evaluator
from distill.runtime import mesh as mesh_lib
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


def test_figures_are_named_by_measurement(tmp_path, monkeypatch):
    """And each is measured as it says, here by a stand-in."""
    rows = write(tmp_path / "rows.jsonl", [{"question": "1+1", "answer": "2"}])
    asked = []

    def evaluate(model, problems, spec, out, dtype, judge):
        asked.append((model, len(problems), spec, out.name, judge))
        figures = {"accuracy": 0.5, "think_rate": 1.0, "f1": None, "mean_length": 7.5}
        figures |= {f"pass@{k}": 0.5 + k / 100 for k in spec.ks}
        return figures | ({"reverse_kl": 0.25} if judge else {})

    monkeypatch.setattr(evaluator, "evaluate_model", evaluate)
    form = f"arithmetic:{rows}"
    measures = [f"greedy:{form}:0:9:no_think", f"sampled:{form}:4:8:judged", f"many:{form}:2:8"]
    flags = [f"--measure={x}" for x in measures]
    command = [f"--workdir={tmp_path}", "--model=m", "--teacher=t", "--seed=3", *flags]
    assert call(worker, *command) == 0
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured == {
        "figures": {
            **{"greedy": 0.5, "greedy/think_rate": 1.0},
            **{"sampled": 0.5, "sampled/think_rate": 1.0, "sampled/reverse_kl": 0.25},
            **{"sampled/pass@1": 0.51, "sampled/pass@2": 0.52, "sampled/pass@4": 0.54},
            **{"sampled/length": 7.5, "many/length": 7.5},
            **{"many": 0.5, "many/think_rate": 1.0, "many/pass@1": 0.51, "many/pass@2": 0.52},
        }
    }
    about = [(model, count, name, judge) for model, count, _, name, judge in asked]
    assert about == [("m", 1, "greedy", ""), ("m", 1, "sampled", "t"), ("m", 1, "many", "")]
    samples = [spec.sample for _, _, spec, _, _ in asked]
    assert [x.sampling.temperature for x in samples] == [0.0, 1.0, 1.0]
    assert [(x.samples, x.max_new_tokens, x.seed) for x in samples] == [
        *((1, 9, 3), (4, 8, 3), (2, 8, 3))
    ]
    assert [spec.thinking for _, _, spec, _, _ in asked] == [False, True, True]


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
        "--config.mesh.fsdp=1",
        "--config.opd.max_prompt_tokens=100",
        "--config.opd.max_response_tokens=16",
        f"--measure=sampled:arithmetic:{test}:2:16:judged",
        f"--teacher={ROOT / 'assets' / 'teacher'}",
        "--seed=3",
    ]
    monkeypatch.chdir(ROOT)
    one_device = mesh_lib.make_mesh(1, 1, 1)  # for which programs compile three times faster
    monkeypatch.setattr(mesh_lib, "make_reader_mesh", lambda *_: one_device)
    monkeypatch.setattr(worker, "measure", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert call(worker, *command) == 128 + signal.SIGTERM
    metrics = (workdir / "metrics.jsonl").read_text()
    assert len(metrics.splitlines()) == 2 and not (workdir / "measured.json").exists()
    monkeypatch.setattr(worker, "measure", measure)
    assert call(worker, *command) == 0
    assert (workdir / "metrics.jsonl").read_text() == metrics, "it was trained again"
    measured = json.loads((workdir / "measured.json").read_text())
    figures = measured["figures"]
    assert {"sampled", "sampled/pass@1", "sampled/pass@2"} <= figures.keys()
    assert all(0 <= figures[key] <= 1 for key in figures if "pass" in key or "/" not in key)
    assert figures["sampled"] == pytest.approx(figures["sampled/pass@1"])
    assert figures["sampled/pass@1"] <= figures["sampled/pass@2"]
    assert figures["sampled/reverse_kl"] > 0 and 0 < figures["sampled/length"] <= 16
    assert 20 < measured["prompt_tokens"] < 100
