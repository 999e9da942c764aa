"""`benchmarks.gpu`: what is repeated and what is not, stages that fail, and its arithmetic."""

import copy
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contest, costs, figures, gpu, gpu_report, gpu_stages, gpu_workers
from benchmarks.gpu_stages import Host, Stage
from distill.training import memory
from tests.support.verbs import call

# A worker that logs its jobs, and fails as it is told. "hang" has a child that would outlive it.
FAKE = """
import subprocess, sys, time
from benchmarks import workers

def answer(job):
    with open(sys.argv[1], "a") as log:
        log.write(job["what"] + "\\n")
    if job["what"] == "large":
        raise MemoryError("out of memory:\\n80 GiB")
    if job["what"] == "hang":
        child = subprocess.Popen(["sleep", "600"])
        open(sys.argv[1] + ".pid", "w").write(str(child.pid))
        time.sleep(600)
    if job["what"] == "absent":
        import nothing_of_this_name
    return {"devices": "1 x fake", "read": 1e9, "copy": 2e9, "float32": 1e12, "bfloat16": 2e12}

workers.serve_jobs(lambda: answer)
"""
PARTS = {"sampling": 6.0, "scoring": 1.0, "update": 2.5, "rest": 0.5}
DEVICE = {"device": "fake", "platform": "cpu", "memory_bytes": 2**30, "versions": {"jax": "1"}}


class Fakes:
    """Stages of a fake worker, in place of the real ones."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        (folder / "fake_gpu_worker.py").write_text(FAKE)
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{contest.ROOT}")
        self.log, self.out, self.stages = folder / "log", folder / "out", list[Stage]()
        patch.setattr(gpu_stages, "list_stages", lambda sizes: self.stages)
        patch.setattr(gpu, "find_device", lambda host: dict(DEVICE))

    def set_stages(self, **seconds: float) -> None:
        """Makes stages of these names and time limits; "limits" is the name of one that works."""

        def measure(host: Host, job: dict) -> dict:
            return host.ask("fake_gpu_worker", str(self.log), **job)

        self.stages = [Stage(x, limit, measure, {"what": x}) for x, limit in seconds.items()]

    def run(self, *arguments: str) -> list[str]:
        """Runs the command; returns the jobs that were done, in order."""
        self.log.write_text("")
        assert call(gpu, "--sizes=toy", f"--out={self.out}", *arguments) == 0
        return self.log.read_text().split()

    def read(self) -> dict[str, Any]:
        return json.loads((self.out / "gpu-toy.json").read_text())["stages"]


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(tmp_path, monkeypatch)


def test_stages_that_fail_leave_the_others(fakes: Fakes, capsys: pytest.CaptureFixture) -> None:
    fakes.set_stages(limits=60, large=60, hang=1.5, absent=60, last=60)
    assert fakes.run() == ["limits", "large", "hang", "absent", "last"]
    entries = fakes.read()
    assert [*entries] == ["limits", "large", "hang", "absent", "last"]
    assert entries["large"]["failed"] == "MemoryError: out of memory:"
    assert entries["hang"]["failed"] == "took too long, and was killed"
    assert "nothing_of_this_name" in entries["absent"]["failed"]
    assert entries["last"]["result"]["copy"] == 2e9 and 1.5 < entries["hang"]["seconds"] < 30
    child = int(fakes.log.with_name("log.pid").read_text())
    state = Path(f"/proc/{child}/stat")
    for _ in range(100):  # until it is taken down, or waits for its parent as a zombie
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of a worker that was killed lives on")
    table = (fakes.out / "gpu-toy.md").read_text()
    assert "| hang | took too long, and was killed |" in table
    assert capsys.readouterr().out == table


def test_what_is_measured_is_not_repeated(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.set_stages(limits=60, large=60, first=60, second=60)
    assert fakes.run("--stages=large,first") == ["limits", "large", "first"]
    assert fakes.run() == ["second", "large"]  # what failed comes last
    before = fakes.read()["first"]
    assert fakes.run() == ["large"] and fakes.read()["first"] == before
    fakes.stages[2] = dataclasses.replace(fakes.stages[2], job={"what": "first", "rows": 2})
    assert fakes.run("--stages=first") == ["first"]
    monkeypatch.setattr(gpu, "compute_revision", lambda: "other")
    assert fakes.run("--stages=second") == ["limits", "second"]
    monkeypatch.setattr(gpu, "find_device", lambda host: DEVICE | {"versions": {"jax": "2"}})
    assert fakes.run("--stages=limits") == ["limits"]


def test_a_report_is_written_as_each_stage_ends(fakes: Fakes) -> None:
    """A command that is interrupted in its second stage has kept the first."""
    fakes.set_stages(limits=60, second=60)

    def interrupt(host: Host, job: dict) -> dict:
        assert "result" in fakes.read()["limits"] and (fakes.out / "gpu-toy.md").exists()
        raise KeyboardInterrupt

    fakes.stages[1] = dataclasses.replace(fakes.stages[1], measure=interrupt)
    assert call(gpu, "--sizes=toy", f"--out={fakes.out}") == 130
    assert [*fakes.read()] == ["limits"]


def test_no_stage_begins_without_time(fakes: Fakes, capsys: pytest.CaptureFixture) -> None:
    fakes.set_stages(limits=60)
    assert fakes.run("--minutes=0") == []
    assert "no time left for limits; the same command goes on" in capsys.readouterr().err


def test_mistakes_are_one_line(fakes: Fakes, capsys: pytest.CaptureFixture) -> None:
    fakes.set_stages(limits=60)
    fakes.run()
    report = fakes.out / "gpu-toy.json"

    def refuse(*arguments: str) -> str:
        assert call(gpu, "--sizes=toy", f"--out={fakes.out}", *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        return line

    assert "--stages=train: none of limits begins so" in refuse("--stages=train")
    report.write_text(report.read_text().replace('"device": "fake"', '"device": "H100"'))
    assert "measured on H100, and this is fake; name another --out" in refuse()
    entry = '{"device": "fake", "sizes": "toy", "stages": {"limits": %s}}'
    for damaged in ("{", "[]", '{"stages": {}}', entry % "1", entry % '{"key": {}}'):
        report.write_text(damaged)
        assert "not a report of benchmarks.gpu; remove it" in refuse()


def test_real_sizes_need_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(Host, "ask", lambda *_, **__: dict(DEVICE))
    assert call(gpu, f"--out={tmp_path}") == 2
    assert "--sizes=real: JAX finds no GPU here" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_contender_takes_fewer_rows_if_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def ask(self: Host, module: str, *args: str, python: str, **job: Any) -> dict:
        asked.append(job["rows"])
        if job["rows"] > 2:
            raise gpu_stages.StageError("OutOfMemoryError: CUDA out of memory. Tried to")
        return {"seconds": [1.0]}

    monkeypatch.setattr(Host, "ask", ask)
    monkeypatch.setattr(Host, "require_packages", lambda *_: None)
    host, job = Host("gpu", "python", "python"), {"contender": "trl", "rows": 8}
    assert gpu_stages.measure_torch(host, job)["rows"] == 2 and asked == [8, 4, 2]


def test_missing_packages_are_named() -> None:
    host = Host("cpu", "/no/such/python", "python")
    with pytest.raises(gpu_stages.StageError, match="No module named 'vllm_of_nobody'"):
        host.require_packages(sys.executable, "vllm_of_nobody")
    with pytest.raises(gpu_stages.StageError, match="left out: /no/such/python does not run"):
        host.require_packages(host.torch_python, "torch")


@pytest.fixture
def report() -> dict[str, Any]:
    """Results of an H200 with round numbers."""
    stages = {stage.name: stage for stage in gpu_stages.list_stages(gpu_stages.ALL_SIZES["real"])}
    call_result = {"seconds": [3.0, 1.0, 1.25], "first_call_seconds": 9.0, "peak_bytes": 2**34}
    ours = {"sampler": "ours", "decode_tokens_per_second": 9000.0, "prefill_seconds": 0.5}
    theirs = {**ours, "sampler": "transformers", "decode_tokens_per_second": 1500.0, "seconds": 8.0}
    limits = {"devices": "1 x H200", "read": 4e12, "copy": 4e12, "float32": 5e13}
    results: dict[str, Any] = {
        "limits": {**limits, "bfloat16": 8e14},
        "train": {**call_result, "loss_seconds": [0.25]},
        "score": {**call_result, "logp": call_result},
        "train-trl": {**call_result, "rows": 2},
        "decode-32x2048": {**call_result, "seconds": [0.256], "rows": 32, "steps": 64},
        "decode-256x8192": {**call_result, "seconds": [2.56], "rows": 128, "steps": 64},
        "generate": {"samplers": [{**ours, "seconds": 2.0}, theirs]},
        "step": {**call_result, "parts": PARTS, "micro_batches": 32, "trained_tokens": 114_688},
    }
    entries = {
        name: {"key": {"settings": stages[name].job, "revision": "r"}, "result": result}
        for name, result in results.items()
    }
    entries["generate-vllm"] = {"key": {"revision": "r"}, "failed": "left out: no vllm"}
    machine = contest.describe_machine({"ours": {"jax": "1"}})
    return {"device": "NVIDIA H200", "sizes": "real", "machine": machine, "stages": entries}


def test_shares_are_those_of_hand_counts(report: dict[str, Any]) -> None:
    V, M, mean = 151_936, 8 * 4096, 4097 / 2
    student = 28 * (2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 6144)
    teacher = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    attention = {"student": 4 * M * mean * 28 * 2048, "teacher": 4 * M * mean * 36 * 4096}
    train = 3 * (2 * M * (student + V * 2048) + attention["student"])
    train += 2 * M * (teacher + V * 4096) + attention["teacher"]
    score = 2 * M * teacher + attention["teacher"]
    # A step reads all weights but the embeddings, and keys and values of 28 layers, 8 heads of 128.
    decode = 2 * (student + V * 2048) + 32 * (2048 + 32.5) * 28 * 2 * 8 * 128 * 2
    targets = {what: value for what, value, *_ in gpu_report.list_targets(report)}
    assert targets["train: MFU"] == pytest.approx(train / 1.25 / 989e12)
    assert targets["score: MFU"] == pytest.approx(score / 1.25 / 989e12)
    assert targets["decode-32x2048: of bandwidth"] == pytest.approx(decode / 0.004 / 4e12)
    assert targets["generate: times transformers' decoding"] == 6.0
    report["device"] = "unknown"  # then products that were measured stand in for the data sheet
    targets = {what: value for what, value, *_ in gpu_report.list_targets(report)}
    assert targets["train: MFU"] == pytest.approx(train / 1.25 / 8e14)


def test_tables_show_what_was_measured(report: dict[str, Any]) -> None:
    lines = gpu_report.render_report(report)
    (train,) = (line for line in lines if line.startswith("| train |"))
    assert train.split(" | ")[1:4] == ["8 x 4096", "1.25", "2.621e+04"]
    assert train.endswith("| 20% | 16.00 | 9.0 |")  # the loss's share, peak, first call
    assert any(line.startswith("| train-trl, trl, autocast | 2 x 4096 |") for line in lines)
    assert any(line.startswith("| 128 (the cache of 256 does not fit) | 8192 |") for line in lines)
    assert "| generate: times transformers' decoding | 6.0 | 5 | reached |" in lines
    (decode,) = (line for line in lines if line.startswith("| decode-32x2048: of bandwidth |"))
    assert decode.endswith("| 69.2% | 70% | not reached |")
    assert "| generate-vllm | left out: no vllm |" in lines
    assert "| sampling | 6 | 60% |" in lines
    assert "![Where the time goes](gpu-step.svg)" in lines
    only = copy.deepcopy(report)
    only["stages"] = {"generate-vllm": report["stages"]["generate-vllm"]}
    assert "## Targets" not in gpu_report.render_report(only)


def test_a_step_is_drawn(tmp_path: Path) -> None:
    figure = tmp_path / "step.svg"
    figures.save_figure(figures.draw_step, {"parts": PARTS, "title": "A step"}, figure)
    text = figure.read_text()
    assert "sampling: 6 s, 60%" in text and "rest: 0.5 s, 5%" in text and "A step" in text


def make_job(**changes: Any) -> dict[str, Any]:
    stages = gpu_stages.list_stages(gpu_stages.ALL_SIZES["toy"])
    return {**next(s for s in stages if s.name == "decode-2x32").job, "steps": 1, **changes}


def test_decoding_is_measured_with_as_many_rows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At toy size, in this process: 4 rows of 128 tokens, 256 bytes each in 2 layers, and a limit
    that leaves room for 2."""
    weights = 4 * costs.count_weights(gpu_stages.ALL_SIZES["toy"].student)
    limit = (weights + 2.9 * 128 * 2 * 2 * 2 * 16 * 4) / gpu_workers.POOL_SHARE
    monkeypatch.setattr(memory, "get_memory_limit", lambda: int(limit))
    answer = gpu_workers.measure_decode(make_job(rows=4))
    assert answer["rows"] == 2 and answer["steps"] == 8
    assert len(answer["seconds"]) == 1 and answer["seconds"][0] > 0


@pytest.mark.long
def test_every_stage_runs_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    assert call(gpu, "--sizes=toy", f"--out={tmp_path}") == 0
    stages = json.loads((tmp_path / "gpu-toy.json").read_text())["stages"]
    failed = {name: entry["failed"] for name, entry in stages.items() if "failed" in entry}
    assert {*failed} <= {"generate", "generate-static", "generate-vllm"}, failed
    assert len(stages) == len(gpu_stages.list_stages(gpu_stages.ALL_SIZES["toy"]))
    step = stages["step"]["result"]
    assert step["trained_tokens"] == 4 * 24 and min(step["parts"].values()) >= 0
    assert stages["numerics"]["result"]["two runs, --config.deterministic"].endswith("all the same")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("gpu-toy-step.svg", "gpu-toy.json", "gpu-toy.md"),
    ]
