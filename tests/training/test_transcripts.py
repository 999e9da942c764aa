"""Tests the transcripts of a step: the texts of tokens, and the likeliest tokens."""

import json
import math

import pytest
from transformers import AutoTokenizer

from distill.training import loop, metrics_log
from tests.support.paths import TOKENIZER
from tests.support.runs import config, tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7+5=12\n",
        "na\u00efve \u65e5\u672c\u8a9e \U0001f642 end",
        "\u05e9\u05dc\u05d5\u05dd",
        2 * "\U0001f642",
    ],
)
def test_the_parts_of_a_text_make_the_text(tokenizer, text) -> None:
    ids = tokenizer.encode(text)
    parts = metrics_log.split_text(tokenizer, ids)
    assert len(parts) == len(ids) and "".join(parts) == text


def test_bytes_of_no_character_are_parts_of_their_own(tokenizer) -> None:
    """A response that ends within a character, and bytes that begin none."""
    ids = tokenizer.encode("\U0001f642")
    assert len(ids) == 4, "the embedded tokenizer has no token for it"
    mark = metrics_log.REPLACEMENT
    assert metrics_log.split_text(tokenizer, ids[:3]) == [mark] * 3
    after = tokenizer.encode("7")
    parts = metrics_log.split_text(tokenizer, ids[1:] + after)
    assert parts[-1] == "7" and "".join(parts[:-1]) == mark * 3


@pytest.mark.long
def test_likeliest_tokens_agree_with_the_drawn_ones(tmp_path) -> None:
    """Wherever the drawn token is among the likeliest, its log-probability there is the one that
    the row has for it, under both models: the lists belong to their tokens, not to neighbours."""
    models = tiny_model(tmp_path / "student", 0), tiny_model(tmp_path / "teacher", 1)
    c = config(models)
    c.stages, c.opd.steps, c.log.overlap_top_k = ("opd",), 1, 200
    c.opd.objective = "hybrid"
    loop.run(c, tmp_path / "run")
    rows = [
        json.loads(x) for x in (tmp_path / "run/rollouts/000000.jsonl").read_text().splitlines()
    ]
    found = 0
    for row in rows:
        assert isinstance(row["reward"], float)
        for side, name in (("student", "logp"), ("teacher", "teacher_logp")):
            tops = row[f"{side}_top"]
            assert len(tops) == len(row["tokens"])
            for token, logp, top in zip(row["tokens"], row[name], tops, strict=True):
                values = [x for _, x in top]
                assert len(top) == 200 and values == sorted(values, reverse=True)
                assert sum(map(math.exp, values)) < 1.001
                assert {str(x) for x, _ in top} <= row["top_texts"].keys()
                if token in dict(top):
                    found += 1
                    assert dict(top)[token] == pytest.approx(logp, abs=1e-3)
    assert found > 20
