"""Rollouts are graded as responses that speak for themselves, whatever their prompts end with."""

import pytest

from configs import base
from distill import rollout
from distill.data import chat
from distill.data.examples import Encoding, make_example
from distill.rewards import graders
from distill.training import grading
from tests.support.paths import ROOT
from tests.support.templates import INSTRUCT, THINKING_ONLY


@pytest.mark.parametrize(
    ("template", "text", "ended", "correct", "format_value"),
    [
        (THINKING_ONLY, "2+2 is\n</think>\n\n4", True, 1.0, 1.0),
        (THINKING_ONLY, "so it is 4", False, 0.0, 0.0),  # cut within the thoughts
        (THINKING_ONLY, "4", True, 0.0, 0.0),  # never left them
        (INSTRUCT, "4", True, 1.0, 1.0),
        (INSTRUCT, "<think>\n4\n</think>\n\n4", True, 1.0, 0.0),
        ("", "<think>\n4\n</think>\n\n4", True, 1.0, 1.0),
        ("", "4", True, 1.0, 0.0),
    ],
)
def test_rollouts_are_graded_with_the_tag_that_their_prompt_opened(
    template: str, text: str, ended: bool, correct: float, format_value: float
) -> None:
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "student")
    assert tokenizer is not None
    tokenizer.chat_template = template or tokenizer.chat_template
    row = {"question": "2+2?", "answer": "4"}
    example = make_example(row, "f:1", Encoding(tokenizer, with_responses=False))
    stage = base.make_stage("grpo")
    stage.samples, stage.max_response_tokens = 1, 64
    stage.reward.grader, stage.reward.correct, stage.reward.format = "arithmetic", 1.0, 0.5
    sequence = rollout.Sequence(example.prompt, (0, 0), 64, thinking=example.thinking)
    sequence.tokens = chat.encode_response(tokenizer, text)[: None if ended else -1]
    sequence.finish_reason = "stop" if ended else "length"
    with graders.Grader() as grader:
        rewards, terms = grading.grade_sequences(stage, tokenizer, grader, [sequence], [example])
    assert (terms["correct"], terms["format"]) == ([correct], [format_value])
    assert rewards == [correct + 0.5 * format_value]


def test_a_grader_that_gives_up_is_named_and_partial_scores_are_paid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = chat.load_tokenizer(ROOT / "assets" / "student")
    assert tokenizer is not None
    example = make_example(
        {"question": "2+2?", "answer": "4"}, "f:1", Encoding(tokenizer, with_responses=False)
    )
    stage = base.make_stage("grpo")
    stage.samples, stage.max_response_tokens = 3, 64
    stage.reward.correct, stage.reward.score = 0.0, 2.0
    sequences = []
    for _ in range(3):
        x = rollout.Sequence(example.prompt, (0, 0), 64, where="f:1")
        x.tokens, x.finish_reason = chat.encode_response(tokenizer, "4"), "stop"
        sequences.append(x)
    grades = [{"outcome": "wrong", "score": 0.25}, {"outcome": "correct"}, {"outcome": "timeout"}]
    monkeypatch.setattr(graders.Grader, "collect_grades", lambda *_: grades)
    with graders.Grader() as grader:
        rewards, terms = grading.grade_sequences(stage, tokenizer, grader, sequences, [example])
    assert rewards == [0.5, 2.0, 0.0] and terms["score"] == [0.25, 1.0, 0.0]
    said = " ".join(capsys.readouterr())
    assert "the grader gave up on 1 of 3 responses" in said and "timeout: f:1" in said
