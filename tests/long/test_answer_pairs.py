"""Compares answers on longer lists: Qwen3's, and those that math-verify judges alone."""

import json
import logging
from pathlib import Path

from math_verify import parse, verify

from tests.support.answer_pairs import Pair, compare, list_pairs


def test_qwen3_answers_keep_their_number_of_right_ones(shared_data: Path) -> None:
    """Of 500 answers of Qwen3 to MATH-500, without labels, 298 equal the reference."""
    lines = (shared_data / "math500" / "qwen3_answer_pairs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    boxed = [(row["answer"], (row["prediction"] or "")) for row in rows]
    assert sum(bool(compare(gold, text)) for gold, text in boxed) == 298


def judge_by_math_verify(pair: Pair) -> bool:
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    gold, answer = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=0) for text in (pair.gold, pair.answer)
    )
    return verify(gold, answer, timeout_seconds=0)


def test_where_math_verify_alone_is_right_so_are_we() -> None:
    pairs = list(dict.fromkeys(list_pairs()))
    right = [pair for pair in pairs if judge_by_math_verify(pair) == pair.equal]
    lost = [pair for pair in right if bool(compare(pair.gold, pair.answer)) != pair.equal]
    print(f"math-verify alone is right about {len(right)} of {len(pairs)} pairs")
    assert lost == [] and len(right) > 600
