"""Tests reward terms one by one, and that wrong answers earn nothing."""

import dataclasses

import pytest

from distill.rewards import terms
from models.errors import UserError

GOOD = terms.Response(
    text="<think>\n1 + 1 is 2\n</think>\n\n2",
    tokens=list(range(20)),
    finished=True,
    outcome="correct",
    thinking=True,
    limit=100,
    margin=20,
)


def changed(**fields) -> terms.Response:
    return dataclasses.replace(GOOD, **fields)


def test_a_truncated_response_is_never_rewarded_as_finished():
    cut = changed(finished=False)
    assert terms.accuracy_reward(GOOD) == terms.format_reward(GOOD) == 1
    assert terms.accuracy_reward(cut) == terms.format_reward(cut) == 0
    assert terms.overlong_reward(cut) == -1


@pytest.mark.parametrize("outcome", ["wrong", "no_answer", "timeout", "error"])
def test_only_correct_answers_are_rewarded(outcome):
    assert terms.accuracy_reward(changed(outcome=outcome)) == 0


def test_a_partly_right_response_earns_its_score_alone():
    half = changed(outcome="wrong", score=0.5)
    totals, _ = terms.compute_rewards([half, GOOD], {"score": 2.0, "correct": 1.0})
    assert totals == [1.0, 1.0]  # GOOD has no score here
    assert terms.score_reward(changed(outcome="wrong", score=0.5, finished=False)) == 0


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("<think>\n1\n</think>\n\n2", True, True),
        ("1\n</think>\n\n2", True, False),  # a tag that the prompt opened would be put back
        ("  <think></think>2", True, True),
        ("<think>1", True, False),
        ("2", True, False),
        ("so <think>1</think> 2", True, False),
        ("<think>1</think> <think>2</think> 3", True, False),
        ("</think> 2 <think>", True, False),
        ("2", False, True),
        ("<think></think> 2", False, False),
    ],
)
def test_well_formed_responses_close_their_thinking(
    text: str, thinking: bool, expected: bool
) -> None:
    assert terms.is_well_formed(text, thinking) == expected


@pytest.mark.parametrize(
    ("thinking", "text", "value"),
    [
        (True, "<think>a</think>b", 1),
        (True, "a</think>b", 0),  # a tag that the prompt opened would be put back
        (True, "<think>a</think>", 0),
        (True, "<think>a</think> \n", 0),
        (True, "<think>a b", 0),
        (True, "b", 0),
        (True, "<think>a</think><think>c</think>b", 0),
        (True, "<think>a</think>b</think>", 0),
        (True, "b<think>a</think>b", 0),
        (False, "b", 1),
        (False, "", 0),
        (False, "<think>a</think>b", 0),
    ],
)
def test_format_reward(thinking, text, value):
    assert terms.format_reward(changed(thinking=thinking, text=text)) == value


@pytest.mark.parametrize(
    ("count", "value"), [(1, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (200, -1)]
)
def test_length_penalty_counts_tokens_not_characters(count, value):
    """DAPO defines the penalty on tokens."""
    assert terms.overlong_reward(changed(tokens=[7] * count, text="x" * 10_000)) == value


def test_length_without_a_margin_has_no_penalty():
    assert terms.overlong_reward(changed(tokens=[1] * 100, margin=0)) == 0


def test_repetition_penalty():
    assert terms.repetition_reward(changed(tokens=list(range(500)))) == 0
    assert terms.repetition_reward(changed(tokens=[1, 2, 3])) == 0
    looped = terms.repetition_reward(changed(tokens=[1, 2, 3, 4] * 50))
    assert looped == pytest.approx(-(1 - 4 / 193))


def test_rewards_are_a_weighted_sum():
    total, values = terms.compute_rewards(
        [GOOD, changed(outcome="wrong")], {"correct": 1.0, "format": 0.25, "length": 0.0}
    )
    assert total == [1.25, 0.25]
    assert values == {"correct": [1, 0], "format": [1, 1]}
    with pytest.raises(UserError, match="'beauty' is none of correct, score, format"):
        terms.compute_rewards([GOOD], {"beauty": 1.0})
