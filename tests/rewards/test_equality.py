"""Tests which answers are equal: pairs of all kinds, and what is compared without algebra."""

import pytest

from distill.rewards import equality
from tests.support.answer_pairs import Pair, compare, list_pairs

# Pairs with the label that sense gives them, by the reason why the grader thinks otherwise.
DISAGREEMENTS = {
    "units are dropped, not compared": [
        Pair(r"5\text{ km}", r"5\text{ m}", False),
        Pair("18 eggs", "18 ducks", False),
    ],
    "without the question, the letter of a unit behind a number is the unit": [
        Pair("2", "2s", False)
    ],
    "a base may be left out, so an answer without one is in any base": [
        Pair("1010", "1010_2", False)
    ],
    "a set may be listed with repetitions": [Pair("1,1,2", "1,2", False)],
    "an interval that is asked for is not an inequality": [Pair(r"(5,\infty)", "x>5", True)],
    "angles in degrees are not evaluated": [Pair(r"\frac{1}{2}", r"\sin 30^\circ", True)],
    "i in an exponent is a variable": [Pair("-1", r"e^{i\pi}", True)],
    "capitals in a row, and letters with a vowel, are a word and not a product": [
        Pair("AB", "BA", True),
        Pair("ax", "xa", True),
    ],
    "letters are compared without their case": [Pair(r"\Delta", r"\delta", False)],
    "numbers in words are not multiplied": [Pair("5000000", "5 million", True)],
}


def test_answers_are_equal_if_their_values_are() -> None:
    disputed = [pair for pairs in DISAGREEMENTS.values() for pair in pairs]
    pairs = list(dict.fromkeys([*list_pairs(), *disputed]))
    differ = [pair for pair in pairs if bool(compare(pair.gold, pair.answer)) != pair.equal]
    assert differ == disputed
    right = sum(pair.equal for pair in pairs)
    assert right > 400 and len(pairs) - right > 400


def test_every_mark_occurs_in_the_pairs() -> None:
    texts = {text for pair in list_pairs() for text in (pair.gold, pair.answer)}
    unused = dict.fromkeys(range(len(equality.MARKS)))
    for text in texts:
        text = text.translate(equality._CHARACTERS)
        for number, (pattern, replacement) in enumerate(equality._MARKS):
            text, count = pattern.subn(replacement, text)
            if count:
                unused.pop(number, None)
    assert [equality.MARKS[number] for number in unused] == []


def test_an_answer_too_long_to_compare_stays_as_it_is() -> None:
    """Half a million characters would take the patterns minutes."""
    text = "1" + " 111" * 125_000
    assert equality.normalise(f" {text}\n") == text
    assert equality.normalise(text[:9]) == "1111111"


def test_normalised_answers_stay_as_they_are() -> None:
    """Voting and grading normalise answers that may be normalised already."""
    for pair in list_pairs():
        once = equality.normalise(pair.answer)
        assert equality.normalise(once) == once


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("1000000", r"\$1{,}000{,}000.", True),
        ("1000000", "1\u202f000\u202f001", False),
        ("-3", "−3", True),
        ("BCA", "ABC", False),
        (r"\text{east}", "East.", True),
        (r"\frac{1}{3}", r"0.\overline{3}", True),
        (r"\left(1, 2\right)", r"\left(1,2\right)", True),
        ("1010_2", "1010_3", False),
        (r"\Delta", r"\delta", None),
        ("1 2", "12", None),
        ("x+1", "1+x", None),
    ],
)
def test_much_is_compared_without_algebra(gold: str, answer: str, equal: bool | None) -> None:
    pair = equality.normalise(gold), equality.normalise(answer)
    assert equality.compare_without_algebra(*pair) is equal


@pytest.mark.parametrize("gold", ["2s", "2m", "2t", r"\frac{1}{2}h", "x + t", "2 a b"])
def test_a_variable_of_the_right_answer_is_not_a_unit(gold: str) -> None:
    assert compare(gold, gold + ".") and not compare(gold, gold[:-1])


def test_no_number_is_taken_out_of_what_does_not_parse() -> None:
    assert not compare("4", r"(\foo \{, 4)")
    assert not compare("3", r"2 @ 3")
    assert not compare(r"\frac{1}{2}", r"\foo @ \frac{1}{2}")


def test_a_right_answer_that_does_not_parse_is_an_error() -> None:
    with pytest.raises(equality.NoAnswerError):
        equality.compare_with_algebra("", "5")
