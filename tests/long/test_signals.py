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
NUM_STEPS = 12
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


def list_steps(workdir: Path) -> list[int]:
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def test_twenty_signals(tmp_path: Path) -> None:
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    process = start(whole)
    begin = time.monotonic()
    assert "error" not in process.communicate(timeout=900)[1] and process.returncode == 0
    seconds = time.monotonic() - begin
    print(f"\nunbroken: {seconds:.0f} s\n after   stopped in  exit  checkpoint  rows  said")
    for number in range(NUM_SIGNALS):
        # Each second one compiles.
        process = start(broken, str(tmp_path / f"cache{number}") if number % 2 else "")
        delay = draw.uniform(0, 0.7 * seconds)
        time.sleep(delay)
        rows_before = len(numbers(broken)) if (broken / "metrics.jsonl").exists() else 0
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        said = process.communicate(timeout=300)[1]
        took = time.monotonic() - begin
        newest = max(list_steps(broken), default=0)
        rows = numbers(broken) if (broken / "metrics.jsonl").exists() else []
        last = said.splitlines()[-1] if said else ""
        figures = f"{process.returncode:4}  {newest:10}  {len(rows):4}"
        print(f"{delay:5.1f} s  {took:8.1f} s  {figures}  {last}", flush=True)
        assert took < 10
        # Before the program's first line runs, the system ends it.
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM, 0), said
        assert "Traceback" not in said
        assert newest >= rows_before, "no finished step is lost"
        if stopped := re.search(r"stopped after step (\d+);", said):
            assert newest == int(stopped[1])
        assert not [p for p in (broken / "checkpoints").glob("*") if not p.name.isdigit()]
    process = start(broken)
    assert process.communicate(timeout=900)[1] is not None and process.returncode == 0
    assert numbers(broken) == numbers(whole)
    assert transcripts(broken) == transcripts(whole)
    for a, b in zip(read_trained(broken), read_trained(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    for path in whole.glob("eval/*/examples.jsonl"):
        other = broken / path.relative_to(whole)
        assert [json.loads(x) for x in other.read_text().splitlines()] == [
            json.loads(x) for x in path.read_text().splitlines()
        ]
