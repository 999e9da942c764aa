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
    workdir = tmp_path / "x"
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


def test_samples_of_something_else_than_prompts_are_refused(models) -> None:
    """A text is a list of characters to Python, and a chat one of messages."""
    for prompts, words in (
        ("2+2=", "prompts='2+2=': must be a list of texts"),
        (CHAT, "prompts[0]={"),
        ([17, 10], "prompts[0]=17: is no text"),
        (None, "prompts=None: must be a list"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            distill.sample(models[0], prompts)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be a whole number, at least 1"),
        ({"max_new_tokens": 4.5}, "max_new_tokens=4.5: must be a whole number"),
        ({"max_new_tokens": "4"}, "max_new_tokens='4': must be"),
        ({"samples": 0}, "samples=0: must be"),
        ({"samples": True}, "samples=True: must be"),
        ({"seed": "x"}, "seed='x': must be"),
        ({"seed": 2**32}, "seed=4294967296: must be a whole number, at least 0 and at most 4,294,"),
        ({"batch_size": -1}, "batch_size=-1: must be"),
        ({"top_k": 2.5}, "top_k=2.5: must be a whole number"),
        ({"presence_penalty": "x"}, "presence_penalty=x: must be a finite number"),
        ({"thinking": "off"}, "thinking='off': must be True or False"),
    ],
)
def test_options_are_checked_alike_by_sample_and_evaluate(models, options, words) -> None:
    for call in (
        lambda: distill.sample(models[0], ["2+2="], **options),
        lambda: distill.evaluate(models[0], "arithmetic", limit=1, **options),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            call()
    with pytest.raises(UserError, match="stop_strings='ab': must be a list of texts"):
        distill.sample(models[0], ["2+2="], stop_strings="ab")


def test_numbers_of_numpy_are_numbers(models) -> None:
    (x,) = distill.sample(models[0], ["2+2="], max_new_tokens=np.int64(3), temperature=np.float32())
    assert 1 <= len(x.tokens) <= 3


def test_arguments_of_another_kind_are_named_without_flags(models, tmp_path: Path) -> None:
    student, data = models[0], tmp_path / "none.jsonl"
    wrong: Any = None
    for call, words in (
        (lambda: distill.load(wrong), "path=None: must be a path"),
        (lambda: distill.load(""), "path: is empty"),
        (lambda: distill.load(STUDENT, "int8"), "dtype='int8': must be one of"),
        (lambda: distill.sample(STUDENT, ["2"]), f"model='{STUDENT[:5]}"),  # pyright: ignore
        (lambda: distill.logprobs(student, ["x"]), "completions[0]='x': must be a Compl"),  # pyright: ignore
        (lambda: distill.evaluate(student, "arithmetic", limit=-1), "limit=-1: must be"),
        (lambda: distill.evaluate(student, "trivia"), "benchmark='trivia': must be one of"),
        (lambda: distill.evaluate(student, "gsm8k"), "data: gsm8k needs a jsonl file"),
        (lambda: distill.evaluate(student, "gsm8k", data), f"{data}: no such file"),
        (lambda: distill.train({}, tmp_path), "config={}: must be the ConfigDict"),  # pyright: ignore
        (lambda: distill.train(tiny_config(), ""), "workdir: is empty"),
        (lambda: distill.train(tiny_config(), "s3://x/y"), "workdir=s3://x/y: is neither"),
        (lambda: distill.Run(tmp_path).metrics(), "metrics.jsonl: no such file"),
    ):
        with pytest.raises(distill.UserError, match="^(?!--).*" + re.escape(words)):
            call()


def test_a_completion_that_another_model_cannot_read_is_refused(models) -> None:
    size = models[0].config.vocab_size
    unknown = distill.Completion([size], [5], [0.0], "", "stop")
    with pytest.raises(UserError, match=rf"completions\[0\]: token id {size} is outside"):
        distill.logprobs(models[0], [unknown])
    long = distill.Completion([5] * 600, [5], [0.0], "", "stop")
    with pytest.raises(UserError, match=r"completions\[0\]: 601 tokens exceed"):
        distill.reverse_kl(models[0], models[1], [long])


def test_models_and_completions_are_shown_in_a_line(models, completions) -> None:
    student = models[0]
    assert isinstance(student, distill.Policy)
    size = f"{student.config.num_parameters:,} parameters in float32"
    assert re.fullmatch(rf"Policy\('{STUDENT}': {size} on \d+ × cpu\)", repr(student))
    assert repr(completions[0]).startswith("Completion('")
    long = distill.Completion([1], [2], [0.0], "a\n" * 500, "stop")
    assert "\n" not in repr(long) and len(repr(long)) < 130


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
