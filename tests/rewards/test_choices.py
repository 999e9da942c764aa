"""Tests which option a response is taken to choose, against labels by construction."""

import itertools
import time

import pytest

from distill.rewards import choices, graders
from tests.support.answers import HOSTILE

OPTIONS = ["Paris", "the river Thames", "5.2 m/s", "-4"]
THOUGHTS = "<think>\nIt could be (A), or \\boxed{B}. The answer is D? No.\n</think>\n\n"

# {x} is the letter and {text} the option's text.
FORMS = (
    *("{x}", "({x})", "{x}.", "**{x}**", "`{x}`", "[{x}]", "{x}) {text}", "{x}. {text}", "{text}"),
    *("({x}) {text}", "**{x}: {text}**", "{text}.", "The answer is ({x}).", "The answer is {x}"),
    *("Answer: {x}", "**Answer:** {x}", "ANSWER: {x}.", "Answer: {text}", "answer: ({x}) {text}"),
    *('{{"answer": "{x}"}}', '"answer": "{x}"', '```json\n{{"answer": "{x}"}}\n```'),
    *("\\boxed{{{x}}}", "\\boxed{{\\text{{{x}}}}}", "$\\boxed{{\\mathrm{{{x}}}}}$"),
    *("\\boxed{{({x})}}", "\\boxed{{{text}}}", "\\boxed{{\\text{{({x}) {text}}}}}"),
    *("The correct answer is **{x}**.", "The final answer is: {x}. {text}", "So {x}."),
    *("The best option here is ({x}) {text}.", "I would choose ({x}).", "Therefore, ({x})"),
    *("Option {x} is correct.", "({x}) is the right answer, since the others fail."),
    *("### Final answer\n**{x}) {text}**", "The answer is \\({x}\\).", "The answer is “{x}”."),
    "The answer is not ({y}). The answer is ({x}).",
    "The answer is ({y}). Wait, that is wrong: the answer is ({x}).",
    "\\boxed{{{y}}} was my first thought, but \\boxed{{{x}}} it is.",
    "({y}) is too small and ({z}) too large. The correct choice is {x}.",
    "{y}) no\n{z}) no\n\nAnswer: {x}",
    "The answer is {x}, not {y}.",
)


def build_responses() -> list[tuple[str, str]]:
    """Returns pairs of a response and the letter that it chooses."""
    pairs = []
    for form, number in itertools.product(FORMS, range(len(OPTIONS))):
        others = [choices.LETTERS[i] for i in range(len(OPTIONS)) if i != number]
        text = form.format(
            x=choices.LETTERS[number], y=others[0], z=others[1], text=OPTIONS[number]
        )
        pairs += [(text, choices.LETTERS[number]), (THOUGHTS + text, choices.LETTERS[number])]
    return pairs


def test_300_responses_are_graded_as_they_were_built() -> None:
    pairs = build_responses()
    assert len(pairs) >= 300
    for response, letter in pairs:
        for right in "ABCD":
            grade = choices.grade_choice(response, choices.make_answer(right, OPTIONS))
            expected = "correct" if right == letter else "wrong"
            assert grade == {"outcome": expected, "found": letter, "right": right}, response


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        ("", "no_answer"),
        ("I do not know.", "no_answer"),
        ("<think>The answer is (A)", "no_answer"),
        ("The answer is E.", "no_answer"),  # no option
        ("The answer is A good question.", "no_answer"),  # an article
        ("The answer is none of these.", "no_answer"),
        ("The answer is A or C.", "unparsed"),
        ("The answer is (A) and (C)", "unparsed"),
        ("\\boxed{A, C}", "unparsed"),
        ("Answer: A/B", "unparsed"),
        ("A) yes\nB) yes\nC) yes", "unparsed"),
        ("Paris, or rather -4", "unparsed"),
        ("The answer is (B). On reflection it is A or C. The answer is A or C.", "unparsed"),
    ],
)
def test_what_is_no_choice_is_not_graded_as_wrong(response: str, outcome: str) -> None:
    grade = choices.grade_choice(response, choices.make_answer("A", OPTIONS))
    assert grade == {"outcome": outcome, "found": None, "right": "A"}


def test_numbers_and_words_are_told_apart() -> None:
    numbers = ["4", "42", "4.5", "-4"]
    assert choices.find_choice("The answer is 4.", numbers) == "A"
    assert choices.find_choice("\\boxed{42}", numbers) == "B"
    assert choices.find_choice("The answer is 4.5.", numbers) == "C"
    assert choices.find_choice("\\boxed{-4}", numbers) == "D"
    phrases = ["A mixture of salts", "A metal", "I and II"]
    assert choices.find_choice("The answer is A metal.", phrases) == "B"
    assert choices.find_choice("The answer is I and II.", phrases) == "C"
    assert choices.find_choice("The answer is A because it is dense.", phrases) == "A"


def test_a_letter_alone_is_an_answer_and_other_texts_are_none() -> None:
    assert choices.grade_choice("\\boxed{C}", "C")["outcome"] == "correct"
    for answer in ("", "Paris", "7", "{}", '{"letter": "E", "options": ["a", "b"]}', "[" * 5000):
        assert not choices.is_gradable(answer)
        assert choices.grade_choice("A", answer) == {"outcome": "error"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_responses_take_little_time(name: str) -> None:
    start = time.process_time()
    choices.grade_choice(HOSTILE[name], choices.make_answer("A", OPTIONS))
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "part", ["answer is ", "(A) ", "A) \n", "*", " ", "so A", "A or ", "answer a "]
)
def test_time_is_linear_in_the_text(part: str) -> None:
    times = []
    for count in (10_000, 80_000):
        start = time.process_time()
        choices.grade_choice(part * (count // len(part)), choices.make_answer("A", OPTIONS))
        times.append(time.process_time() - start)
    assert times[1] < 30 * times[0] + 0.2


def test_choices_are_graded_in_this_process() -> None:
    with graders.Grader() as grader:
        answer = choices.make_answer("B", OPTIONS)
        assert grader.grade(choices.CHOICES, ["B", "A"], [answer] * 2) == ["correct", "wrong"]
        assert grader._pool is None
