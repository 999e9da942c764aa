"""Twenty SIGTERMs at random moments of one run: each ends it within 10 s, with a checkpoint of the
step that it was in; and in the end it has the bits of a run that was never stopped."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from tests.support.paths import ROOT
from tests.support.runs import numbers, transcripts

NUM_SIGNALS = 20
NUM_STEPS = 60
STARTUP_SECONDS = 15.0  # of a run whose programs are compiled, about
WORDS = [
    "--config=configs/conditions.py:sft_then_grpo,tiny",
    *("--config.checkpoint.every=1000", "--config.log.transcripts_every=5"),
    *("--config.grpo.rollout.segment=4", f"--config.grpo.steps={NUM_STEPS}"),
    *("--config.eval.every=4", "--config.eval.benchmark=arithmetic", "--config.eval.data="),
    *("--config.eval.limit=12", "--config.eval.batch_size=4", "--config.eval.max_new_tokens=24"),
]


def start(workdir: Path, cache: str = "") -> subprocess.Popen:
    """Starts the run as a script would in the background: SIGINT is ignored.

    `cache` is a directory of compiled programs, in place of the tests' own.
    """
    cached = {"JAX_COMPILATION_CACHE_DIR": cache} if cache else {}
    train = [sys.executable, "-u", "-W", "ignore", "-m", "distill.train", *WORDS]
    return subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "", *train, f"--workdir={workdir}"],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | cached,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_trained(workdir: Path) -> list[np.ndarray]:
    described = policy.make_abstract(str(workdir), "float32", False, mesh_lib.make_mesh(1, 1, 1))
    params, _ = policy.restore_trained_params(described, None)
    return [np.asarray(x) for x in jax.tree.leaves(params)]


def count_rows(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def list_steps(workdir: Path) -> list[int]:
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def test_twenty_signals(tmp_path: Path) -> None:
    seconds: list[float] = []
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    process = start(whole)
    errors = process.communicate(timeout=1800)[1]
    assert process.returncode == 0, errors
    print("\n after   stopped in  exit  checkpoint  rows  said")
    for number in range(NUM_SIGNALS):
        # Each second one compiles.
        process = start(broken, str(tmp_path / f"cache{number}") if number % 4 == 1 else "")
        begin = time.monotonic()
        if number % 2:  # on a fast machine, before it can end
            delay, num_rows = draw.uniform(0, STARTUP_SECONDS), count_rows(broken) + 3
            while time.monotonic() - begin < delay and count_rows(broken) < num_rows:
                time.sleep(0.02)
        else:  # in one of its first steps, or in the evaluation, save or stage after it
            num_rows = count_rows(broken) + draw.randint(1, 3)
            while count_rows(broken) < num_rows and process.poll() is None:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.5))
        delay, rows_before = time.monotonic() - begin, count_rows(broken)
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        said = process.communicate(timeout=300)[1]
        took = time.monotonic() - begin
        newest = max(list_steps(broken), default=0)
        last = said.splitlines()[-1] if said else ""
        figures = f"{process.returncode:4}  {newest:10}  {count_rows(broken):4}"
        print(f"{delay:5.1f} s  {took:8.1f} s  {figures}  {last}", flush=True)
        seconds.append(took)
        # Before the program's first line runs, the system ends it.
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM), said
        assert "Traceback" not in said
        assert newest >= rows_before, "no finished step is lost"
        if stopped := re.search(r"stopped after step (\d+);", said):
            assert newest == int(stopped[1])
        assert not [p for p in (broken / "checkpoints").glob("*") if not p.name.isdigit()]
    process = start(broken)
    errors = process.communicate(timeout=1800)[1]
    assert process.returncode == 0, errors
    assert numbers(broken) == numbers(whole)
    assert transcripts(broken) == transcripts(whole)
    for a, b in zip(read_trained(broken), read_trained(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    for path in whole.glob("eval/*/examples.jsonl"):
        other = broken / path.relative_to(whole)
        assert [json.loads(x) for x in other.read_text().splitlines()] == [
            json.loads(x) for x in path.read_text().splitlines()
        ]
    assert max(seconds) < 10, "or the machine is busy with something else"
