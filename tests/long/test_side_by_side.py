"""The side-by-side benchmarks, whole, on tiny models: what they write, and that samplers agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_qwen3


def test_samplers_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tiny_qwen3(tmp_path / "model", max_position_embeddings=1024)
    command = [sys.executable, "-m", "benchmarks.rollout", f"--model={tmp_path / 'model'}"]
    flags = ["--batches=2", "--new_tokens=24", "--rounds=1", "--cap=32", "--slots=2"]
    flags += ["--tunix_python=/no/such/python", f"--out={tmp_path / 'results'}"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results" / "rollout-float32.json").read_text())
    rows = {row["sampler"]: row for row in results["decode"]}
    assert "not installed" in rows["tunix"]["absent"]
    for name in ("ours", "transformers", "transformers, static cache"):
        assert rows[name].get("agrees_with_ours", 1.0) == 1.0, rows[name]
    assert results["bandwidth"]["read"] > 1e8 and results["tail"]["static_tokens_per_second"] > 0
    table = (tmp_path / "results" / "rollout-float32.md").read_text()
    assert table in done.stdout and "not installed" in table
    assert (tmp_path / "results" / "rollout-float32.svg").stat().st_size > 1000


@pytest.mark.parametrize("name", ["train_step", "score", "loss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_models_side_by_side(tmp_path: Path, name: str, dtype: str) -> None:
    for library in ("matplotlib", "trl"):
        pytest.importorskip(library)
    command = [sys.executable, "-m", f"benchmarks.{name}", f"--dtype={dtype}", "--layers=1"]
    flags = ["--vocabulary=256", "--rows=1", "--tokens=16", "--rounds=1", "--steps=1"]
    flags += ["--tunix_python=/no/such/python", f"--out={tmp_path}"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / f"{name}-{dtype}.json").read_text())["rows"]
    assert {row["name"] for row in rows} >= {"ours"} and len(rows) > 1
    for row in rows:
        if row["name"] == "tunix":
            assert "not installed" in row["absent"]
        else:
            assert row.get("seconds", 0) > 0 and row["peak_bytes"] > 2**20, row
    if name == "loss":  # each has its own random numbers, of one scale
        ours, theirs = ({row["name"]: row for row in rows}[of] for of in ("ours", "trl"))
        for figure in ("value", "norm_by_hidden", "norm_by_head"):
            assert 0.8 < ours[figure] / theirs[figure] < 1.25, figure
    assert (tmp_path / f"{name}-{dtype}.md").read_text() in done.stdout
    assert (tmp_path / f"{name}-{dtype}.svg").stat().st_size > 1000
