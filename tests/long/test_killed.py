"""An evaluation that is killed ten times; the pace and the patience of the graders."""

import json
import time
from pathlib import Path

import pytest

from distill.rewards import graders
from tests.support.answers import HOSTILE, MORE_HOSTILE, withstand
from tests.support.evaluations import STOPS, killed
from tests.support.paths import TOKENIZER
from tests.support.tiny_models import tiny_qwen3


def test_killed_ten_times(tmp_path: Path) -> None:
    model = tmp_path / "model"
    fields = {"vocab_size": 512, "hidden_size": 33, "eos_token_id": STOPS}
    tiny_qwen3(model, tokenizer=TOKENIZER, **fields)
    killed(str(model), tmp_path, kills=10, problems=60, seed=1)


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_graders_keep_up(shared_data: Path, name: str) -> None:
    """200 answers a second from two workers; on a machine too busy for it, a third as many at least
    as math-verify grades alone in this process, at the same time."""
    lines = (shared_data / name / "graded_completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [(r["completion"], r["answer"]) for r in rows if "completion" in r]
    texts += [(text, r["answer"]) for r in rows for text in r.get("completions", ())]
    with graders.Grader(workers=2) as grader:
        grader.grade(graders.MATH, ["1/2", "1/4"], ["0.5", "0.25"])
        start = time.monotonic()
        grader.grade(graders.MATH, *map(list, zip(*texts, strict=True)))
        pace = len(texts) / (time.monotonic() - start)
    start = time.monotonic()
    for pair in texts:
        graders.grade_math(*pair)
    alone = len(texts) / (time.monotonic() - start)
    print(f"{name}: {pace:.0f} answers a second, {pace / alone:.2f} of math-verify alone")
    assert pace >= min(200, alone / 3)


def test_all_that_is_hostile() -> None:
    with graders.Grader(timeout=2.0) as grader:
        withstand(grader, HOSTILE | MORE_HOSTILE, 2.0)
