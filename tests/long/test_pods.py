"""Two processes with four devices each are one process with eight; one that is lost ends the other,
and what comes after is as if it had not been."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from distill.policy import hub, policy
from distill.runtime import mesh as mesh_lib
from tests.support.processes import end, run, said, start, wait_for

TINY = ["--config.mesh.fsdp=-1", "--config.checkpoint.every=1", "--config.log.transcripts_every=1"]
EVAL = ["--config.eval.every=2", "--config.eval.benchmark=arithmetic", "--config.eval.data="]
EVAL += ["--config.eval.limit=12", "--config.eval.max_new_tokens=16"]
GRPO = ["--config.student.lora.rank=0", "--config.grpo.reward.format=0.5"]
GRPO += ["--config.grpo.reward.repetition=0.5"]


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what the clock says."""
    path = workdir / "metrics.jsonl"
    read = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    timed = ("time/", "startup/", "rollout/tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read]


def alike(a: Any, b: Any, where: str = "") -> None:
    """Equal; numbers to 1e-5."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            alike(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            alike(*pair, f"{where}[{i}]")
    elif isinstance(a, float) and b is not None:
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5), where
    else:
        assert a == b, where


def files(folder: Path, pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of jsonl files by path; without `key`, a hash of the weights' very bits."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        read = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(folder))] = [{**row, "key": ""} for row in read]
    return found


def trained(workdir: Path) -> dict[str, np.ndarray]:
    run = policy.make_abstract(str(workdir), "float32", False, mesh_lib.make_mesh(1, 1, 1))
    params, step = policy.restore_trained_params(run, None)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert hub.read_run_lora(str(workdir)) or len(leaves) > 5
    return {f"{step}{jax.tree_util.keystr(path)}": np.asarray(x) for path, x in leaves}


@pytest.mark.parametrize(
    "recipe, flags, apart",
    [
        ("sft_then_opd", EVAL, 0),
        ("grpo_only", [*EVAL, *GRPO], 0),
        ("sft_then_opd", [*EVAL, "--config.student.lora.rank=0"], 4),
    ],
    ids=["sft, opd of a LoRA", "rewards, all parameters", "teacher on half of the devices"],
)
def test_two_processes_are_one(recipe: str, flags: list[str], apart: int, tmp_path: Path) -> None:
    words = [f"--config=configs/conditions.py:{recipe},tiny", *TINY, *flags]
    words += ["--config.teacher_mesh.tensor=2", "--config.mesh.context=2"] if apart else []
    for count in (1, 2):
        logs = tmp_path / f"log{count}"
        own = [f"--config.teacher_mesh.devices={apart // count}"]
        own += [f"--workdir={tmp_path / str(count)}"]
        run("train", count, 8 // count, logs, [*words, *own])
    one, two = tmp_path / "1", tmp_path / "2"
    assert rows(one)[-1]["eval/accuracy"] is not None
    alike(rows(one), rows(two))
    for pattern in ("rollouts/*.jsonl", "eval/*/examples.jsonl"):
        assert files(one, pattern)
        alike(files(one, pattern), files(two, pattern))
    for folder in (one, one / "best"):
        before, after = trained(folder), trained(two / folder.relative_to(one))
        assert before.keys() == after.keys()
        for name, x in before.items():
            np.testing.assert_allclose(x, after[name], atol=1e-5, err_msg=name)
    assert not said(tmp_path / "log2", 1).replace("[Gloo]", "").count("loss"), "process 1 speaks"
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    logs = tmp_path / "verbs"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": f"{i} + 1"}) + "\n" for i in range(5)))
    for count in (1, 2):
        asked = [f"--model={two}", "--max_new_tokens=12"]
        out = f"--out={tmp_path / f'generated{count}.jsonl'}"
        words = [f"--prompts={prompts}", "--samples=2", out]
        run("generate", count, 8 // count, logs, asked + words)
        words = ["--benchmark=arithmetic", "--limit=9", f"--out={tmp_path / f'judged{count}'}"]
        run("evaluate", count, 8 // count, logs, asked + words)
    one, two = (files(tmp_path, f"generated{n}.jsonl") for n in (1, 2))
    alike([*one.values()], [*two.values()])
    one, two = (files(tmp_path / f"judged{n}", "examples.jsonl") for n in (1, 2))
    alike(one, two)


def test_tasks_of_slurm_are_one_run(tmp_path: Path) -> None:
    """By what `srun` tells each task, as docs/gpus.md has it for GPUs."""
    words = ["--config=configs/quickstart.py:tiny", "--config.mesh.fsdp=-1"]
    words += [f"--workdir={tmp_path / 'run'}"]
    codes = end(start("train", 2, 2, tmp_path / "log", words, slurm=True), tmp_path / "log")
    assert not any(codes), said(tmp_path / "log", 0)[-2000:]
    about = json.loads((tmp_path / "run/environment.json").read_text())
    assert about["devices"]["processes"] == 2 and about["devices"]["count"] == 4


WORDS = ["--config=configs/conditions.py:opd,tiny", "--config.opd.steps=30", *TINY]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by two processes that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run("train", 2, 1, folder / "log", [*WORDS, f"--workdir={folder / 'run'}"])
    return folder / "run"


@pytest.mark.parametrize("lost", [1, 0])
def test_one_is_killed(lost: int, whole: Path, tmp_path: Path) -> None:
    words, logs, workdir = (
        [*WORDS, f"--workdir={tmp_path / 'run'}"],
        tmp_path / "log",
        tmp_path / "run",
    )
    both = start("train", 2, 1, logs, words)
    wait_for(lambda: len(rows(workdir)) > 3, both)
    os.kill(both[lost].pid, signal.SIGKILL)
    begin = time.monotonic()
    codes = end(both, logs)
    assert time.monotonic() - begin < 65, "the heartbeat is 60 s"
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 75
    last = said(logs, 1 - lost).splitlines()[-1]
    assert last.startswith("error: another process of this run is lost"), last
    assert len(rows(workdir)) < 30
    # Then one is asked to stop, and both do, after the same step.
    both = start("train", 2, 1, logs, words)
    before = len(rows(workdir))
    wait_for(lambda: len(rows(workdir)) > before, both)
    both[1 - lost].send_signal(signal.SIGTERM)
    assert end(both, logs) == [128 + signal.SIGTERM] * 2
    done = len(rows(workdir))
    assert done < 30 and f"stopped after step {done};" in said(logs, 0)
    assert (workdir / "checkpoints" / str(done)).is_dir()
    run("train", 2, 1, logs, words)
    assert rows(workdir) == rows(whole)
    assert files(workdir, "rollouts/*.jsonl") == files(whole, "rollouts/*.jsonl")
    assert all((x == trained(whole)[name]).all() for name, x in trained(workdir).items())


def test_one_is_frozen(tmp_path: Path) -> None:
    """It closes no connection: only its silence tells."""
    logs, workdir = tmp_path / "log", tmp_path / "run"
    both = start("train", 2, 1, logs, [*WORDS, f"--workdir={workdir}"], beat=10)
    wait_for(lambda: len(rows(workdir)) > 1, both)
    both[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert both[0].wait(timeout=120) == 75
    assert 5 < time.monotonic() - begin < 30
    end(both[:1], logs)
    both[1].kill()
    both[1].wait()
    assert "another process of this run is lost" in said(logs, 0).splitlines()[-1]


def test_a_mistake_ends_all_of_them(tmp_path: Path) -> None:
    words = ["--config=configs/conditions.py:opd,tiny", f"--workdir={tmp_path / 'run'}"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    logs = tmp_path / "log"
    assert end(start("train", 2, 1, logs, words), logs) == [2, 2]
    for number in (0, 1):
        assert "not a run to resume" in said(logs, number).splitlines()[-1]
