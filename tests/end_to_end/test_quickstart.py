"""Tests the tiny quick start: its files, resuming and refused arguments."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from distill import quickstart
from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from distill.training import loop
from models import transformer
from tests.support.paths import ROOT
from tests.support.runs import tiny_model
from tests.support.verbs import call, read, write

JUDGED = ("student_before", "student_after", "teacher")
IDS = [382, 17, 3, 250, 384, 511, 0, 42, 99, 5, 5, 301]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return tiny_model(root / "student", 0), tiny_model(root / "teacher", 1, hidden_size=48)


def start(models: tuple[str, str], workdir: Path, *flags: str) -> int:
    """Runs the tiny quick start on these models; returns its exit code."""
    for name in [name for name in quickstart.OPTIONS if name.startswith("config.")]:
        delattr(quickstart.OPTIONS, name)  # overrides from an earlier call
    return call(
        quickstart,
        f"--config={ROOT}/configs/quickstart.py:tiny",
        f"--config.student.path={models[0]}",
        f"--config.teacher.path={models[1]}",
        "--config.mesh.fsdp=1",
        f"--workdir={workdir}",
        "--problems=8",
        *flags,
    )


@pytest.fixture(scope="module")
def done(models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the quick start to the end; returns its directory."""
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    assert start(models, workdir) == 0
    return workdir


def summary_of(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "summary.json").read_text())


def untimed(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {k: untimed(v) for k, v in entry.items() if "seconds" not in k and k != "export"}
    return entry


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files that a second run must leave alone: all but its own time and command."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if name != "environment.json"}


def test_summary_equals_what_the_files_say(done: Path, models) -> None:
    """Checks the contract of summary.json against the other files."""
    summary = summary_of(done)
    assert summary["seconds"] > summary["distillation_seconds"] > 0
    assert summary["export"] == str(done / "student")
    for name in JUDGED:
        entry = summary[name]
        for kind, manner in (("", "greedy"), ("_sampled", "sampled")):
            rows = read(done / "eval" / name / manner / "examples.jsonl")
            assert len(rows) == 8
            rate, (low, high) = entry["accuracy" + kind], entry["interval" + kind]
            assert rate == np.mean([row["correct"] for row in rows])
            assert 0 <= low <= rate <= high <= 1 and low < high
        greedy = read(done / "eval" / name / "greedy" / "examples.jsonl")
        assert entry["mean_length"] == np.mean([len(row["tokens"]) for row in greedy])
        assert entry["seconds"] > 0
    shapes = {name: summary[name]["parameters"] for name in JUDGED}
    assert shapes["student_before"] == shapes["student_after"] < shapes["teacher"]
    network = Qwen3ForCausalLM.from_pretrained(models[1])
    assert shapes["teacher"] == sum(p.numel() for p in network.parameters())


def test_distillation_lowers_the_divergence(done: Path) -> None:
    summary = summary_of(done)
    before, after, teacher = (
        summary[name]["reverse_kl"] for name in ("student_before", "student_after", "teacher")
    )
    assert 0 < after < before
    assert abs(teacher) < 1e-6


def test_the_quick_start_trains_a_normal_run(done: Path) -> None:
    rows = read(done / "metrics.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [(i, "opd") for i in range(3)]
    assert json.loads((done / "config.json").read_text())["opd"]["steps"] == 3
    assert sorted(p.name for p in (done / "rollouts").iterdir()) == ["000000.jsonl", "000002.jsonl"]
    assert (done / "environment.json").is_file() and (done / "checkpoints").is_dir()
    page = (done / "report.html").read_text()
    assert "eval/student_after/greedy" in page and 'id="tokens"' in page


def test_the_export_equals_the_trained_model(done: Path, models) -> None:
    """In transformers it has the logits of the trained run, not those of the initial student."""
    path = summary_of(done)["export"]
    network = Qwen3ForCausalLM.from_pretrained(path)
    with torch.no_grad():
        theirs = network(torch.tensor([IDS])).logits[0].numpy()
    mesh = mesh_lib.make_mesh(1, 1, 1)

    def logits(where: str) -> np.ndarray:
        loaded = policy.load(policy.make_abstract(where, "float32", False, mesh), "float32")
        ids = np.array([IDS])
        positions, segments = np.arange(len(IDS))[None], np.ones_like(ids)
        with policy.use(loaded):
            hidden, _ = jax.jit(loaded.model.apply)(
                {"params": loaded.params}, ids, positions, segments
            )
            return np.asarray(hidden @ transformer.get_output_head(loaded.params).T)[0]

    for where in (path, str(done)):
        np.testing.assert_allclose(logits(where), theirs, atol=1e-4)
    assert np.abs(logits(models[0]) - theirs).max() > 0.01
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(models[0]).get_vocab()
    assert tokenizer.chat_template


def table_lines(out: str) -> dict[str, str]:
    return {line.split()[0]: line for line in out.splitlines() if line.startswith(JUDGED)}


def test_a_second_run_only_prints_the_results(
    done: Path, models, capsys: pytest.CaptureFixture[str]
) -> None:
    before, summary = contents(done), summary_of(done)
    assert start(models, done) == 0
    assert contents(done) == before
    lines = table_lines(out := capsys.readouterr().out)
    assert set(lines) == set(JUDGED)
    for name, line in lines.items():
        entry = summary[name]
        low, high = (100 * end for end in entry["interval"])
        assert f"{entry['parameters']:,}" in line
        assert f"{100 * entry['accuracy']:.1f} [{low:.1f}, {high:.1f}]" in line
        assert f"{entry['reverse_kl']:.4f}" in line and f"{entry['mean_length']:.1f}" in line
    assert f"{summary['distillation_seconds']:.0f} s to distil" in out
    assert str(done / "student") in out and str(done / "report.html") in out


def test_an_interrupted_quick_start_resumes(
    done: Path, models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed while the distilled student is evaluated: nothing earlier is repeated, and the
    results are the same."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    shutil.rmtree(tmp_path / "eval" / "student_after")
    trained = contents(tmp_path / "checkpoints")

    def no_step(*_: Any) -> None:
        raise AssertionError("a step was trained again")

    monkeypatch.setattr(loop.update, "make_update", lambda *_, **__: no_step)
    assert start(models, tmp_path) == 0
    assert contents(tmp_path / "checkpoints") == trained
    actual, expected = untimed(summary_of(tmp_path)), untimed(summary_of(done))
    assert actual["student_after"].pop("model") == str(tmp_path / "student")
    assert expected["student_after"].pop("model") == str(done / "student")
    for name in JUDGED:
        kl = actual[name].pop("reverse_kl")
        assert kl == pytest.approx(expected[name].pop("reverse_kl"), rel=1e-4, abs=1e-6)
    assert actual == expected
    for manner in ("greedy", "sampled"):
        name = Path("eval") / "student_after" / manner / "examples.jsonl"
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()
    name = Path("student") / "model.safetensors"
    assert (tmp_path / name).read_bytes() == (done / name).read_bytes()


def test_the_share_of_the_gap_closed_is_printed(done: Path, models, tmp_path: Path, capsys) -> None:
    """The output is computed from summary.json: with these numbers, a half and a quarter."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    summary = summary_of(done)

    def set_accuracies(flips: int) -> str:
        """Returns what is printed where `flips` problems of each model are right in place of
        others: accuracies stay, and the pairs tell less."""
        for name, *accuracies in zip(JUDGED, (0.2, 0.5, 0.8), (0.4, 0.5, 0.8), strict=True):
            summary[name] |= dict(zip(("accuracy", "accuracy_sampled"), accuracies, strict=True))
            for manner, accuracy in zip(("greedy", "sampled"), accuracies, strict=True):
                right = {(i + flips * JUDGED.index(name)) % 100 for i in range(int(100 * accuracy))}
                rows = [{"id": i, "answer": "1", "correct": i in right} for i in range(100)]
                write(tmp_path / "eval" / name / manner / "examples.jsonl", rows)
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert start(models, tmp_path) == 0
        return capsys.readouterr().out

    out = set_accuracies(0)  # of 100 problems, 10 more: intervals overlap, and the pairs tell
    assert "50% of the greedy gap" in out and "25% of the sampled gap" in out
    out = set_accuracies(30)
    assert "50% of the greedy gap" in out and "the sampled gap" not in out
    assert "sampled: 100 problems do not tell the student after from the student before" in out
    assert "(paired difference +10.0 points, 95% interval -" in out


MISTAKES = [
    (("--problems=7",), "problems was 8, now 7"),
    (("--problems=0",), "problems"),
    (
        ("--config.opd.optim.learning_rate=0.5",),
        "opd.optim.learning_rate was 0.001",
    ),
    (("--config.teacher.path=",), "config.teacher.path"),
    (("--config.student.path=no/such/place",), "no/such/place: no model directory"),
    (("--config.opd.batch_size=7", "--config.mesh.fsdp=2"), "config.opd.batch_size=7"),
    (("--config.opd.stepps=7",), "--config.opd.stepps"),
    (("--config.stages=sft",), "config.stages"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES)
def test_user_errors_are_one_line(
    done: Path, models, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    before = contents(done)
    assert start(models, done, *flags) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], captured.err
    assert "Traceback" not in captured.err and captured.out == ""
    assert contents(done) == before
