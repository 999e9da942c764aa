"""Compares short answers by their words: exact match, containment, and token F1.

Texts are normalised as in SQuAD's evaluation script (arXiv 1606.05250; evaluate-v2.0.py on its
page): lower case, no punctuation (string.punctuation), no articles a, an, the, single spaces. Of
several right answers the one that fits best counts. A response is read whole, without its thoughts.
"""

import collections
import json
import re
import string
from collections.abc import Sequence

from distill.rewards.answers import strip_thinking
from distill.rewards.graders import Grade, GradingRule

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """Normalises a text as SQuAD does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def compute_f1(response: str, answer: str) -> float:
    """Computes the F1 of the words of two texts, which counts each word as often as it occurs.

    If one has no words, it is 1 if the other has none either, else 0.
    """
    found, right = normalise(response).split(), normalise(answer).split()
    if not found or not right:
        return float(found == right)
    common = sum((collections.Counter(found) & collections.Counter(right)).values())
    return 2 * common / (len(found) + len(right))


def is_contained(answer: str, response: str) -> bool:
    """Returns True if the words of an answer stand together in a response."""
    return f" {normalise(answer)} " in f" {normalise(response)} "


def make_answer(answers: Sequence[str]) -> str:
    """Returns the JSON answer that `grade_text` reads."""
    return json.dumps({"answers": list(answers)}, ensure_ascii=False)


def read_answers(answer: str) -> list[str]:
    """Returns the right answers that have words: those of `make_answer`, or a text alone."""
    answers: object = [answer]
    if answer.startswith("{"):
        try:
            answers = json.loads(answer)["answers"]
        except (ValueError, TypeError, KeyError, RecursionError):
            answers = [answer]
    texts = answers if isinstance(answers, list) else []
    return [text for text in texts if isinstance(text, str) and normalise(text)]


def is_gradable(answer: str) -> bool:
    """Returns True if responses can be compared with this answer: it has words."""
    return bool(read_answers(answer))


def grade_text(response: str, answer: str) -> Grade:
    """Grades a response by its words.

    Returns `outcome`, which is "correct" if the response contains a right answer; `exact` and
    `contained`; and as `score` the greatest F1.
    """
    answers = read_answers(answer)
    if not answers:
        return {"outcome": "error"}
    final = strip_thinking(response)
    if not final:
        return {"outcome": "no_answer", "exact": False, "contained": False, "score": 0.0}
    exact = any(normalise(final) == normalise(text) for text in answers)
    contained = any(is_contained(text, final) for text in answers)
    score = max(compute_f1(final, text) for text in answers)
    outcome = "correct" if contained else "wrong"
    return {"outcome": outcome, "exact": exact, "contained": contained, "score": score}


TEXT_MATCH = GradingRule(grade_text, grade_text, is_gradable, right_response="")
