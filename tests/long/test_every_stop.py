"""Tests that runs of every kind, stopped after every step, have the bits of unbroken ones."""

import json
import signal

import numpy as np
import pytest

from benchmarks import fingerprints
from distill.runtime import mesh as mesh_lib
from distill.training import loop
from tests.support import processes
from tests.support.runs import numbers, read_run, stop_after

ROWS = "assets/rows/gsm8k.jsonl"
MIXED = {"data.source": "", "data.mixture": (("arithmetic", 3.0), (ROWS, 1.0))}
MIXED |= {"max_prompt_tokens": 200}
LEVELS = {"data.source": "LEVELS", "max_prompt_tokens": 200, "data.difficulty": "level"}
ALL = {
    ".student.lora.rank": 4,
    ".student.ema_decay": 0.9,
    ".teacher.path": "ema",
    "accumulate": 2,
    "rollout.asynchronous": True,
    "rollout.token_budget": 64,
    "rollout.segment": 8,
}
FURTHER = {
    "mixed sources": MIXED,
    **{f"{x} prompts": LEVELS | {"data.curriculum": x} for x in ("ordered", "widening")},
    "weighted prompts": LEVELS | {"data.curriculum": "weighted"},
    "all at once": MIXED | ALL,
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    rows = [f'{{"question": "1+{i}?", "level": {i / 40}}}\n' for i in range(40)]
    (folder / "levels.jsonl").write_text("".join(rows))
    return fingerprints.write_expert_model(folder)


def make_config(name, experts):
    fingerprints.OPTIONS(["", "--out=unused"])
    with pytest.MonkeyPatch.context() as patch:
        for further, changes in FURTHER.items():
            patch.setitem(fingerprints.VARIANTS, further, changes)
        c = fingerprints.make_config(name, experts)
    for stage in c.stages:
        if c[stage].data.source == "LEVELS":
            c[stage].data.source = str(experts.parent / "levels.jsonl")
    return c


@pytest.mark.parametrize("name", [*fingerprints.list_runs(), *FURTHER])
def test_a_run_stopped_after_every_step(name, experts, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.run(make_config(name, experts), whole)
    expected = read_run(whole)
    steps = len(expected["metrics"])
    for step in range(steps - 1):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(SystemExit) as end:
                loop.run(make_config(name, experts), stopped)
        assert end.value.code == 128 + signal.SIGTERM
        assert len(numbers(stopped)) == step + 1
    loop.run(make_config(name, experts), stopped)
    actual = read_run(stopped)
    for found in (expected, actual):  # others were saved at other steps
        del found["checkpoints"][1:]
    assert actual == expected


@pytest.mark.parametrize("name", ["packed traces", "opd", "grpo", "all at once"])
def test_a_run_goes_on_on_another_mesh(name, experts, tmp_path):
    """With the same rows in the same order, and all numbers equal within rounding."""

    loop.run(make_config(name, experts), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 0)
        with pytest.raises(SystemExit):
            loop.run(make_config(name, experts), tmp_path / "moved")
    mesh = mesh_lib.make_mesh(1, 2, 2)
    with pytest.MonkeyPatch.context() as patch:  # as if this config found more devices
        patch.setattr(mesh_lib, "make_meshes", lambda c: (mesh, mesh))
        loop.run(make_config(name, experts), tmp_path / "moved")
    compare_rounded(tmp_path / "whole", tmp_path / "moved")


@pytest.mark.parametrize("counts", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_hosts(counts, tmp_path):
    """Traces, samples and rewards: same rows in the same order, all numbers within rounding."""
    words = ["--config=configs/conditions.py:sft_then_grpo,tiny", "--config.mesh.fsdp=4"]
    words += ["--config.sft.optim.schedule=constant", "--config.grpo.optim.schedule=constant"]
    words += ["--config.sft.steps=2", "--config.log.transcripts_every=1"]
    for name, lives in (("whole", [(1, 3)]), ("moved", [(counts[0], 1), (counts[1], 3)])):
        for count, steps in lives:
            flags = [*words, f"--config.grpo.steps={steps}", f"--workdir={tmp_path / name}"]
            processes.run("train", count, 4 // count, tmp_path / f"{name}.log", flags)
    compare_rounded(tmp_path / "whole", tmp_path / "moved")


def compare_rounded(whole, moved):
    expected, actual = read_run(whole), read_run(moved)
    assert len(expected["metrics"]) > 1
    for row, other in zip(expected["metrics"], actual["metrics"], strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            if key == "rollout/utilisation":  # slots are rounded to a multiple of the devices
                continue
            if isinstance(value, float):
                np.testing.assert_allclose(other[key], value, rtol=2e-3, atol=1e-5, err_msg=key)
            else:
                assert other[key] == value, key
    for found in (expected, actual):
        found["transcripts"] = {
            file: [(row["prompt_tokens"], row["tokens"]) for row in map(json.loads, text)]
            for file, text in ((f, x.splitlines()) for f, x in found["transcripts"].items())
        }
    assert actual["transcripts"] == expected["transcripts"]
