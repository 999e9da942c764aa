"""Multiple choice from any rows of question, options and answer; has no data set of its own.

Options are a list (`options` or `choices`), an object of letters and texts, or columns A, B, ...
The answer is a letter, the number of the option from 0, or an option's text, in one of ANSWERS.
"""

import re
from collections.abc import Sequence
from typing import Any

from distill.evaluation.tasks.task import CHOICE_PROMPT, Record, Task, find_id
from distill.rewards import choices
from models.errors import UserError

OPTIONS = ("options", "choices")
# `answerKey` is ARC's, `answer_index` MMLU-Pro's, `answer_idx` MedQA's.
ANSWERS = ("answer", "answerKey", "answer_index", "answer_idx")
_QUESTIONS = ("question", "problem", "prompt", "Question")
# Of "(A) Paris", "A. Paris", where the texts repeat their letters.
_OWN_LETTER = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[).:])\s+")


def make_problem(question: object, options: Sequence[str], letter: str, where: str) -> Record:
    """Returns question, with its options listed, stem, without them, and answer.

    Raises UserError naming the row if it has no question, or its options cannot be listed.
    """
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: no question")
    if not 2 <= len(options) <= len(choices.LETTERS):
        raise UserError(f"{where}: {len(options)} options; there must be 2 to 26")
    lines = [f"({x}) {text}" for x, text in zip(choices.LETTERS, options, strict=False)]
    listed = "\n".join([f"{question.strip()}\n", *lines])
    answer = choices.make_answer(letter, options)
    return {"question": listed, "stem": question.strip(), "answer": answer}


def adapt_row(row: Record, where: str) -> Record:
    """Reads a row of question, options and answer; or one whose question lists its options, with
    a letter, or what this function wrote, as its answer.

    Raises UserError naming the row if it has no question or options, or its answer is none of them.
    """
    question = next((row[name] for name in _QUESTIONS if isinstance(row.get(name), str)), None)
    texts, labels = _read_options(row, where)
    given = {name: row[name] for name in ANSWERS if row.get(name) is not None}
    if not given:
        raise UserError(f"{where}: none of {', '.join(ANSWERS)} among its fields {sorted(row)}")
    if texts is None:
        answer = str(next(iter(given.values())))
        if not choices.is_gradable(answer):
            raise UserError(
                f"{where}: none of {', '.join(OPTIONS)} among its fields {sorted(row)}, and "
                f"{answer[:60]!r} is no letter"
            )
        return {**find_id(row), "question": question, "answer": answer}
    letters = {name: find_letter(value, texts, labels) for name, value in given.items()}
    for name, letter in letters.items():
        if letter is None:
            raise UserError(
                f"{where}: {name}={str(given[name])[:60]!r} is none of its {len(texts)} options: "
                "write the letter, the number from 0, or the text of one"
            )
    if len({*letters.values()}) > 1:
        raise UserError(f"{where}: {' and '.join(letters)} are different options")
    letter = str(next(iter(letters.values())))
    if question is None and "response" in row:  # a stored response, which needs none
        return {**find_id(row), "question": None, "answer": choices.make_answer(letter, texts)}
    return {**find_id(row), **make_problem(question, texts, letter, where)}


def find_letter(value: object, texts: Sequence[str], labels: Sequence[str]) -> str | None:
    """Returns the letter of the option that a letter or another label, an index from 0, or a text
    names; None if it names none, or two."""
    letters = choices.LETTERS[: len(texts)]
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    if isinstance(value, int):
        return letters[value] if 0 <= value < len(texts) else None
    name = value.strip()
    if name in labels:
        return letters[labels.index(name)]
    same = [x for x, text in zip(letters, texts, strict=True) if text.strip() == name]
    letter = name.strip("().").upper()
    if len(letter) == 1 and letter in letters:
        return letter if same in ([], [letter]) else None  # "A" may be the text of option B
    return same[0] if len(same) == 1 else None


def _read_options(row: Record, where: str) -> tuple[list[str] | None, list[str]]:
    """Returns the texts of a row's options, and their labels if it names them; None if it has no
    options."""
    value = next((row[name] for name in OPTIONS if row.get(name)), None)
    columns = [x for x in choices.LETTERS if x in row]
    if value is None and len(columns) > 1:
        value = {x: row[x] for x in columns if row[x] is not None}
    labels: Any = []
    if isinstance(value, dict):
        # {"text": [...], "label": [...]} is ARC's, {"A": ..., "B": ...} MedQA's.
        is_arc = value.keys() == {"text", "label"}
        labels, value = (value["label"], value["text"]) if is_arc else ([*value], [*value.values()])
    if value is None:
        return None, []
    is_list = isinstance(value, list) and isinstance(labels, list)
    if not is_list or not all(isinstance(x, str | int | float) for x in [*value, *labels]):
        raise UserError(f"{where}: its options are not a list of texts")
    texts = [str(x).strip() for x in value]
    own = [_OWN_LETTER.match(text) for text in texts]
    if all(own) and [m[1] or m[2] for m in own if m] == [*choices.LETTERS[: len(texts)]]:
        texts = [text[m.end() :] for text, m in zip(texts, own, strict=True) if m]
    return texts, [str(x) for x in labels] if len(labels) == len(texts) else []


TASK = Task(choices.CHOICES, CHOICE_PROMPT, adapt_row=adapt_row)
