"""A run and its teacher in two processes: 30 steps end with the parameters of the run that has the
same teacher in its own process, for each of the three outputs."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.training import loop
from tests.support import processes
from tests.support.paths import ROOT
from tests.support.runs import final, numbers, tiny_model
from tests.support.teacher_runs import make_config, require_equal

STEPS = 30


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny_model(root / "student", 0), tiny_model(root / "teacher", 1, hidden_size=48)


@contextlib.contextmanager
def serve(model: str, log: Path, *flags: str) -> Iterator[str]:
    """Runs `python -m distill.serve` in a process of its own; yields its address."""
    words = [sys.executable, "-m", "distill.serve", f"--model={model}", "--port=0"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*words, "--dtype=float32", *flags], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    try:
        processes.wait_for(lambda: " at http" in log.read_text(), [process])
        yield log.read_text().strip().rpartition(" at ")[2].split()[0]
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def url(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch, serve(models[1], folder / "log") as url:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield url


@pytest.mark.parametrize("output", ["hidden", "top", "token"])
def test_thirty_steps_equal_those_with_the_teacher_here(output, models, url, tmp_path):
    found = []
    for address in ("", url):
        c = make_config(models, output, STEPS, address)
        loop.run(c, tmp_path / ("there" if address else "here"))
        found.append(final(tmp_path / ("there" if address else "here"), None))
    require_equal(*found)
    assert len(numbers(tmp_path / "there")) == STEPS


@pytest.mark.parametrize("objective", ["opd", "distill", "gkd"])
def test_two_processes_train_as_one(objective, models, url, tmp_path):
    """Each asks for the responses that it lays out."""
    found = []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        flags = [
            "--config=configs/quickstart.py:tiny",
            f"--workdir={workdir}",
            f"--config.student.path={models[0]}",
            f"--config.teacher.path={url}",
            "--config.student.dtype=float32",
            "--config.mesh.fsdp=-1",
            "--config.opd.steps=3",
            "--config.opd.max_prompt_tokens=60",
            "--config.opd.max_response_tokens=16",
            f"--config.opd.objective={objective}",
        ]
        processes.run("train", count, 2 // count, tmp_path / f"log{count}", flags)
        found.append(final(workdir, None))
    require_equal(*found)
    recorded = json.loads((tmp_path / "2" / "inputs.json").read_text())["inputs"]
    assert recorded["config.teacher.path"]["parts"][""]["model"].endswith("in float32 of float32")
