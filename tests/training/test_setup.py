"""Checks of a stage's rows before training."""

import functools
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from configs import base
from distill.data import chat, dataset
from distill.training import graded_rows, setup, stages
from models.errors import UserError
from tests.support.paths import ROOT


@pytest.mark.parametrize("answer", [math.nan, math.inf, ["4"], {"a": 4}, True, None, "", " "])
def test_a_grader_refuses_rows_without_an_answer(tmp_path: Path, answer: Any) -> None:
    s = base.get_config().opd
    s.objective, s.samples, s.reward.grader = "grpo", 2, "math"
    s.data.source = str(tmp_path / "rows.jsonl")
    loss, _ = stages.resolve_objective("opd", s)
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "student")
    check_example = functools.partial(setup._check_example, "opd", s, loss, 100, 1000)

    def load(**row: Any) -> dataset.Example:
        Path(s.data.source).write_text(json.dumps({"question": "2+2?", **row}) + "\n")
        source = dataset.load_source(s.data, tokenizer, 0, False, check_example)
        return source.read_example(0)

    with pytest.raises(UserError, match=r"rows\.jsonl:1: no answer to compare a response with"):
        load(answer=answer)
    s.data.columns = "answer=final"
    assert load(answer=answer, final=4.0).answer == "4"
    s.reward.correct = 0.0  # nothing reads the answer
    s.data.columns = ""
    assert load(answer=answer).answer == ""


def test_all_prompts_that_are_too_long_are_counted_at_once(tmp_path: Path) -> None:
    s = base.get_config().opd
    s.data.source, s.max_prompt_tokens = str(tmp_path / "rows.jsonl"), 20
    rows = [{"question": "2+2?"}, {"question": "1+" * 40 + "1?"}, {"question": "1+" * 60 + "1?"}]
    Path(s.data.source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss, _ = stages.resolve_objective("opd", s)
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "student")
    check = functools.partial(setup._check_example, "opd", s, loss, s.max_prompt_tokens, 1000)

    def load() -> dataset.Source:
        return dataset.load_source(s.data, tokenizer, 0, False, check)

    with pytest.raises(UserError) as error:
        load()
    assert f"of {s.data.source}, 2 of 3 prompts are longer, the longest 130 tokens" in str(
        error.value
    )
    s.data.on_bad_row = "skip"
    assert load().size == 1
    s.data.on_bad_row, s.max_prompt_tokens = "fail", 130
    check = functools.partial(setup._check_example, "opd", s, loss, s.max_prompt_tokens, 1000)
    assert load().size == 3


def test_the_settings_are_those_of_the_base_config() -> None:
    c = base.get_config()
    stages_and_teachers = {"sft", "opd", "teacher"}
    assert set(c) - stages_and_teachers == {*setup.SETTINGS, *setup.PARTS}
    assert setup.explain_unknown_entries(c) == {}


def test_an_entry_that_nothing_reads_is_named_with_the_nearest_key() -> None:
    c = base.get_config()
    c.lgo, c.grpo, c.original = 3, base.make_stage("grpo"), base.make_teacher()
    assert setup.explain_unknown_entries(c) == {
        "lgo": "config.lgo: is neither a setting nor a stage or a teacher; did you mean 'log'?"
    }


def test_rows_of_ifeval_become_prompts_that_its_grader_can_grade(tmp_path: Path) -> None:
    """As published, or with the answer already in the grader's form; others are refused."""
    s = base.get_config().opd
    s.objective, s.samples, s.reward.grader = "grpo", 2, "ifeval"
    s.data.source = str(tmp_path / "rows.jsonl")
    loss, _ = stages.resolve_objective("opd", s)
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "student")
    check_example = functools.partial(setup._check_example, "opd", s, loss, 100, 1000)
    adapt_row = graded_rows.make_row_adapter("opd", s)

    def load(**row: Any) -> dataset.Example:
        Path(s.data.source).write_text(json.dumps(row) + "\n")
        source = dataset.load_source(
            s.data, tokenizer, 0, False, check_example, adapt_row=adapt_row
        )
        return source.read_example(0)

    published = {
        "key": 7,
        "prompt": "2+2? No commas.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"num_words": None}],
    }
    answer = load(**published).answer
    assert json.loads(answer)["ids"] == ["punctuation:no_comma"]
    assert load(question="2+2? No commas.", answer=answer).answer == answer
    with pytest.raises(UserError, match="grader ifeval cannot compare with the answer '4'"):
        load(question="2+2?", answer="4")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: kwargs is not a list"):
        load(**{**published, "kwargs": 3})


def test_a_grader_that_is_not_installed_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s = base.get_config().opd
    s.reward.grader = "ifeval"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^config.opd.reward.grader=ifeval: lm_eval is not inst"):
        graded_rows.make_row_adapter("opd", s)
