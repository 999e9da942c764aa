"""Tests the Python API: the lines of docs/api.md run, and results equal those of the verbs."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import distill
from configs import quickstart
from distill.policy.policy import Policy
from models.errors import UserError
from tests.support.pages import find_blocks
from tests.support.paths import ROOT

STUDENT, TEACHER = str(ROOT / "assets/student"), str(ROOT / "assets/teacher")
CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


def read_documented_lines() -> tuple[str, str]:
    """Returns the code blocks of docs/api.md: the functions, and the config that they take."""
    lines, config = find_blocks((ROOT / "docs/api.md").read_text(), "python")
    return lines, config


def tiny_config() -> ConfigDict:
    c = quickstart.get_config("tiny")
    c.opd.steps = 2
    return c


@pytest.fixture(scope="module")
def models() -> tuple[Policy, Policy]:
    return distill.load(STUDENT, "float32"), distill.load(TEACHER, "float32")


@pytest.fixture(scope="module")
def completions(models: tuple[Policy, Policy]) -> list[distill.Completion]:
    return distill.sample(models[0], ["2+2=", CHAT, [17, 10]], samples=2, max_new_tokens=8)


def test_documented_lines_run(tmp_path: Path) -> None:
    """Uses tiny models instead of the hub's, and the config of the page."""
    lines, config = read_documented_lines()
    for hub_id, path in (("Qwen/Qwen3-0.6B", STUDENT), ("Qwen/Qwen3-8B", TEACHER)):
        assert hub_id in lines
        lines = lines.replace(hub_id, path)
    lines = re.sub(
        r'data="[^"]*"', f'data="{ROOT}/assets/rows/gsm8k.jsonl", limit=4, max_new_tokens=8', lines
    )
    lines = lines.replace("runs/x", str(tmp_path / "x"))
    names: dict[str, Any] = {}
    exec(compile(config + lines, "docs/api.md", "exec"), names)
    assert len(names["out"]) == 4
    assert list(names["run"].metrics()["step"]) == [0, 1]


def test_samples_are_ordered_and_reproducible(models, completions) -> None:
    assert len(completions) == 6
    assert completions[0].prompt_tokens == completions[1].prompt_tokens == [17, 10, 17, 28]
    assert completions[4].prompt_tokens == [17, 10]
    # The chat template adds tokens.
    assert len(completions[2].prompt_tokens) > len("What is 2 + 2?")
    for x in completions:
        assert len(x.tokens) == len(x.logprobs) <= 8 and x.finish_reason in ("stop", "length")
    again = distill.sample(models[0], ["2+2=", CHAT, [17, 10]], samples=2, max_new_tokens=8)
    assert [x.tokens for x in again] == [x.tokens for x in completions]


def test_logprobs_of_own_samples_equal_the_samplers(models, completions) -> None:
    for x, scores in zip(completions, distill.logprobs(models[0], completions), strict=True):
        np.testing.assert_allclose(scores, x.logprobs, atol=1e-4)


def test_reverse_kl_equals_the_sum_over_the_vocabulary(models, completions) -> None:
    """The sum is over the log-probabilities that `score` gives for each model."""
    student, teacher = models
    actual = distill.reverse_kl(student, teacher, completions)
    x = completions[0]
    ids = x.prompt_tokens + x.tokens
    size = student.config.vocab_size
    expected = np.zeros(len(x.tokens))
    rows = [top_of(model, ids, size) for model in models]
    for t in range(len(x.tokens)):
        logp, logq = (row[len(x.prompt_tokens) + t] for row in rows)
        expected[t] = np.sum(np.exp(logp) * (logp - logq))
    np.testing.assert_allclose(actual[0], expected, atol=1e-4)
    assert all(len(kl) == len(y.tokens) for kl, y in zip(actual, completions, strict=True))
    assert all((kl > -1e-6).all() for kl in actual)
    for kl in distill.reverse_kl(student, student, completions):
        assert not kl.any()


def top_of(model: Policy, ids: list[int], size: int) -> list[np.ndarray]:
    """Returns log-probabilities of the whole vocabulary at each position, by token id."""
    from distill.evaluation import scoring
    from distill.policy import policy

    with policy.use(model):
        ((_, top),) = scoring.score_sequences(model, [ids], batch_size=1, top_k=size)
    rows = [np.zeros(size)]
    for pairs in top[1:]:
        row = np.zeros(size)
        for token, logp in pairs or []:
            row[int(token)] = logp
        rows.append(row)
    return rows


def test_evaluate_equals_the_verb(models, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    summary = distill.evaluate(models[0], "arithmetic", out=out, limit=4, max_new_tokens=8)
    assert json.loads(json.dumps(summary)) == json.loads(
        (tmp_path / "out/summary.json").read_text()
    )
    assert len((tmp_path / "out/examples.jsonl").read_text().splitlines()) == 4


def test_a_run_trains_and_loads(tmp_path: Path) -> None:
    workdir = str(tmp_path / "x")
    table = distill.train(tiny_config(), workdir).metrics()
    assert {"step", "stage", "train/loss", "time/step"} <= set(table.columns)
    assert np.isfinite(table["train/loss"]).all()
    assert distill.Run(workdir).metrics().equals(table)
    trained = distill.load(workdir)
    assert distill.sample(trained, ["2+2="], max_new_tokens=4, temperature=0.0)[0].tokens


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([""], {}, "prompts[0]"),
        ([[5, 10**6]], {}, "prompts[0]: token id 1000000 is outside"),
        (["2"], {"temperature": -1.0}, "temperature=-1.0"),
        (["2"], {"max_new_tokens": 10**6}, "positions"),
        (["2"], {"smaples": 3}, "smaples"),
    ],
)
def test_bad_arguments_are_named_in_the_error(models, prompts, options, words) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        distill.sample(models[0], prompts, **options)


def test_a_path_without_a_model_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no/such/place"):
        distill.load("no/such/place")


def test_functions_keep_their_names_beside_the_verbs() -> None:
    """The module of a verb and the function with its name are both importable."""
    for name in ("train", "evaluate"):
        module = importlib.import_module(f"distill.{name}")
        assert isinstance(module, ModuleType) and module.main
        assert callable(getattr(distill, name)) and not isinstance(
            getattr(distill, name), ModuleType
        )


def test_importing_distill_loads_no_jax() -> None:
    code = "import sys, distill; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
