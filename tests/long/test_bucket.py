"""A run on gs://, by gcsfs and tensorstore themselves, against a bucket that is played here."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.bucket import Server, bucket
from tests.support.paths import ROOT
from tests.support.runs import read_scalars
from tests.support.verbs import write

WORDS = ["--config=configs/conditions.py:sft_then_opd,tiny", "--workdir=gs://bucket/runs/x"]
WORDS += ["--config.checkpoint.every=1", "--config.compilation_cache=gs://bucket/compiled"]
WORDS += ["--config.eval.every=2", "--config.eval.benchmark=arithmetic", "--config.eval.data="]
WORDS += ["--config.eval.limit=4", "--config.eval.max_new_tokens=8"]


def run_verb(server: Server, name: str, *words: str) -> str:
    """Runs a verb that reaches the bucket; returns its stderr."""
    call = [sys.executable, "-W", "ignore", "-m", f"distill.{name}", *words]
    environment = os.environ | server.variables
    done = subprocess.run(call, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_a_run_on_a_bucket(tmp_path: Path) -> None:
    pytest.importorskip("gcsfs")
    with bucket() as server:
        verb = functools.partial(run_verb, server)
        assert "0 of them from the cache" in verb("train", *WORDS)
        held = {name.removeprefix("runs/x/") for name in server.held if name.startswith("runs/x/")}
        assert {"config.json", "environment.json", "metrics.jsonl"} <= held
        assert {"eval/000002/summary.json", "eval/000002/examples.jsonl"} <= held
        assert "best/config.json" in held and "rollouts/000000.jsonl" in held
        assert not any("tmp" in name for name in held)
        whole = server.held["runs/x/metrics.jsonl"][0]
        assert whole.count(b"\n") == 4
        for name in list(server.held):  # as if it had been stopped after step 3
            if name.startswith("runs/x/checkpoints/4/"):
                del server.held[name]
        told = verb("train", *WORDS)
        assert "0 of them from the cache" not in told and "from the cache" in told
        again = server.held["runs/x/metrics.jsonl"][0]
        assert again.count(b"\n") == 4 and again.splitlines()[:3] == whole.splitlines()[:3]
        prefix = "runs/x/tensorboard/"
        for name in [name for name in server.held if name.startswith(prefix)]:
            (tmp_path / name.removeprefix(prefix)).write_bytes(server.held[name][0])
        events = [event[:2] for event in read_scalars(tmp_path)]
        assert len(events) == len(set(events)) and {step for step, _ in events} == set(range(4))
        verb("export", "--run=gs://bucket/runs/x", f"--out={tmp_path / 'out'}")
        assert (tmp_path / "out" / "adapter_config.json").is_file()
        words = ["--benchmark=arithmetic", "--limit=4", "--max_new_tokens=8", "--out=gs://bucket/e"]
        verb("evaluate", "--model=gs://bucket/runs/x", *words)
        assert {"e/summary.json", "e/examples.jsonl"} <= server.held.keys()
        verb("compare", "--runs=gs://bucket/runs/x/eval/000002,gs://bucket/e")
    assert not (ROOT / "gs:").exists()


def test_stored_scores_in_a_bucket(tmp_path: Path) -> None:
    pytest.importorskip("gcsfs")
    rows = [{"tokens": [5, 6, i], "response_tokens": [7, i, 8]} for i in range(8)]
    traces, scores = write(tmp_path / "traces.jsonl", rows), "gs://bucket/scores"
    words = ["--model=assets/teacher", f"--tokens={traces}", "--output=hidden", f"--out={scores}"]
    with bucket() as server:
        verb = functools.partial(run_verb, server)
        verb("score", *words)
        before = dict(server.held)
        names = {name.removeprefix("scores/") for name in before}
        assert {"scores.json", "head.safetensors", "shard-00000.safetensors"} <= names
        assert "tokenizer/tokenizer.json" in names and not any("tmp" in name for name in names)
        del server.held["scores/shard-00000.safetensors"]
        assert "shard-00000.safetensors: no such file" in verb("score", *words)
        assert {x: data for x, (data, _) in server.held.items()} == {
            x: data for x, (data, _) in before.items()
        }
        flags = ["--config=configs/quickstart.py:tiny", '--config.stages=("sft",)']
        flags += ["--config.sft.objective=distill", f"--config.sft.data.source={traces}"]
        flags += ["--config.sft.batch_size=8", "--config.sft.steps=2", f"--workdir={tmp_path}/run"]
        flags += ["--config.sft.max_prompt_tokens=8", "--config.sft.max_response_tokens=8"]
        told = verb("train", *flags, f"--config.teacher.path={scores}")
        assert "reverse KL" in told
