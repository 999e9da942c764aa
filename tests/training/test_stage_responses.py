"""Tests that what is scored in advance for a stage is what the stage then reads."""

import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from distill.data import chat, dataset, teacher_context
from distill.evaluation import storing
from distill.training.stage_responses import open_stage_responses
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.verbs import write

STUDENT = str(ROOT / "assets/student")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Rows of both modes, of one mode, of a chat, and of token ids."""
    return str(
        write(
            tmp_path / "rows.jsonl",
            [
                {"question": "1+1?", "response": "<think>\nAdd.\n</think>\n\n2", "direct": "2"},
                {"question": "1+2?", "response": "3"},
                {
                    "messages": [
                        {"role": "user", "content": "Hi."},
                        {"role": "assistant", "content": "Hello."},
                    ]
                },
                {"tokens": [5, 6], "response_tokens": [7, 8]},
            ],
        )
    )


def config(source: str, **fields: object) -> ConfigDict:
    c = base.get_config()
    c.stages = ("sft",)
    c.student.path, c.sft.objective, c.sft.data.source = STUDENT, "distill", source
    for name, value in fields.items():
        *groups, field = name.split("__")
        group = c.sft
        for part in groups:
            group = group[part]
        group[field] = value
    return c


def list_scored(c: ConfigDict) -> set[bytes]:
    source = open_stage_responses(c, "")
    return {storing.hash_example(x) for row in range(source.num_rows) for x in source.read(row)}


def list_read(c: ConfigDict, count: int) -> set[bytes]:
    """Returns the keys of what the stage reads in `count` examples."""
    s, tokenizer = c.sft, chat.load_tokenizer(STUDENT)
    context = teacher_context.load_context(s.context, "config.sft.context")
    source = dataset.load_source(s.data, tokenizer, c.seed, True, context=context)
    examples = [dataset.get_example(source, ordinal, c.seed) for ordinal in range(count)]
    return {storing.hash_example(x) for x in examples}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"data__thinking": 0.5},
        {"data__thinking": 0.5, "data__template": "Solve: {question}"},
        {"data__turns": "all"},
        {"context__text": "hint.txt"},
    ],
    ids=str,
)
def test_all_that_a_stage_reads_is_scored(rows, fields, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hint.txt").write_text("Be brief.")
    if "context__text" in fields:
        lines = Path(rows).read_text().splitlines()[:3]  # ids have no place for a context
        Path(rows).write_text("\n".join(lines))
    c = config(rows, **fields)
    scored = list_scored(c)
    assert list_read(c, 64) <= scored
    assert (scored == list_scored(config(rows))) == (not fields)


def test_bad_rows_that_are_skipped_are_not_scored(rows):
    text = Path(rows).read_text()
    Path(rows).write_text(json.dumps({"question": "1+1?"}) + "\n" + text)
    with pytest.raises(UserError, match=r"rows\.jsonl:1"):
        list_scored(config(rows))
    assert list_scored(config(rows, data__on_bad_row="skip")) == list_read(
        config(rows, data__on_bad_row="skip"), 64
    )


def test_the_rows_of_a_mixture_are_those_of_its_sources(rows, tmp_path):
    other = str(write(tmp_path / "other.jsonl", [{"question": "2+2?", "response": "4"}]))
    c = config(rows)
    c.sft.data.mixture = ((rows, 1.0), (other, 3.0))
    assert (
        list_read(c, 400)
        == list_scored(c)
        == list_scored(config(rows)) | list_scored(config(other))
    )


def test_stages_without_traces_are_refused(rows):
    for change, message in (
        ({"objective": "opd"}, "config.sft: the student writes all responses of opd"),
        ({"data__source": "arithmetic"}, "config.sft.data.max_rows: set it, arithmetic has no end"),
        ({"data__source": "nowhere.jsonl"}, "config.sft.data.source=nowhere.jsonl"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            open_stage_responses(config(rows, **change), "")
    c = config(rows)
    with pytest.raises(UserError, match="--stage=opd: is not among"):
        open_stage_responses(c, "opd")
    c.student.path = ""
    with pytest.raises(UserError, match=r"config\.student\.path: name a model"):
        open_stage_responses(c, "sft")
