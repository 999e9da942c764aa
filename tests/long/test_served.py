"""generate and evaluate give the same from `python -m distill.serve` as from the model itself."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distill import generate
from distill.evaluation.problems import load_problems
from tests.support.evaluations import summary_of
from tests.support.paths import ROOT
from tests.support.verbs import call, read, verb_module, write

MODEL = "assets/teacher"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server of the tiny teacher, in a process of its own."""
    command = [sys.executable, "-m", "distill.serve", f"--model={MODEL}", "--port=0"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    found = next(filter(None, (re.search(r"http://\S+", line) for line in process.stderr)))
    yield found[0]
    process.terminate()
    process.communicate(timeout=60)


@pytest.mark.parametrize("flags", [[], [f"--tokenizer={MODEL}"]])
def test_greedy_samples_are_those_of_the_model_itself(
    flags: list[str], address: str, tmp_path: Path
) -> None:
    rows = [row for _, row in load_problems("arithmetic", "", 12)]
    rows += [{"prompt": "12+"}, {"tokens": [5, 6]}, {"question": "1+1", "max_new_tokens": 2}]
    prompts = write(tmp_path / "rows.jsonl", rows)
    shared = (f"--prompts={prompts}", "--temperature=0", "--max_new_tokens=48")
    assert call(generate, f"--model={MODEL}", *shared, f"--out={tmp_path / 'here.jsonl'}") == 0
    served = f"--out={tmp_path / 'served.jsonl'}"
    assert call(generate, f"--model={address}", *shared, *flags, served) == 0
    for here, there in zip(
        read(tmp_path / "here.jsonl"), read(tmp_path / "served.jsonl"), strict=True
    ):
        expected, actual = (row["samples"][0].pop("logprobs") for row in (here, there))
        np.testing.assert_allclose(actual, expected, atol=1e-4)
        assert there == here


def test_an_evaluation_is_that_of_the_model_itself(address: str, tmp_path: Path) -> None:
    evaluate = verb_module("evaluate")
    shared = ("--benchmark=arithmetic", "--limit=40", "--max_new_tokens=64")
    for name, model in (("here", MODEL), ("served", address)):
        assert call(evaluate, f"--model={model}", *shared, f"--out={tmp_path / name}") == 0
    rows = {}
    for name in ("here", "served"):
        rows[name] = read(tmp_path / name / "examples.jsonl")
        for row in rows[name]:
            del row["key"]
    assert json.dumps(rows["served"]) == json.dumps(rows["here"])
    here, served = (summary_of(tmp_path / name) for name in ("here", "served"))
    for name in ("accuracy", "interval", "mean_length", "format_rate", "truncation_rate"):
        assert served[name] == here[name]
