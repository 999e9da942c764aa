"""Questions on documents, from rows of question and answers; has no data set of its own.

Answers are `answer` or `answers`: a text, a list of texts that are all right, or what SQuAD
({"text": [...]}) and TriviaQA ({"value": ..., "aliases": [...]}) have. A row's `context`, if it has
one, stands before its question. Rows without an answer, such as SQuAD 2.0's unanswerable ones, are
left out.
"""

from typing import Any

from distill.data import answers as texts
from distill.evaluation.tasks.task import Record, Task, find_id
from distill.rewards import text_match
from models.errors import UserError

PROMPT = "{question}\n\nAnswer with a few words, and nothing else."
_NAMES = ("answers", "answer")


def adapt_row(row: Record, where: str) -> Record | None:
    """Reads a row; None if it says that its question has no answer.

    Raises UserError naming the row if it has no question or no answers.
    """
    question, context = row.get("question"), row.get("context")
    question = "" if question is None and "response" in row else question  # a stored response
    if not isinstance(question, str) or not (question.strip() or "response" in row):
        raise UserError(f"{where}: no question among its fields {sorted(row)}")
    name = next((name for name in _NAMES if row.get(name) is not None), None)
    if name is None:
        raise UserError(f"{where}: none of {', '.join(_NAMES)} among its fields {sorted(row)}")
    found = _read_answers(row[name])
    if found is None or (found and not any(map(text_match.normalise, found))):
        raise UserError(
            f"{where}: {name}={str(row[name])[:60]!r} is no text, and no list of texts with words"
        )
    if not found:
        return None
    stem = f"{context.strip()}\n\n" if isinstance(context, str) and context.strip() else ""
    answer = text_match.make_answer(found)
    return {**find_id(row), "question": stem + question.strip(), "answer": answer}


def _read_answers(value: Any) -> list[str] | None:
    """Returns the right answers; None if the value is in no known form."""
    if isinstance(value, str) and value.startswith('{"answers"'):
        return text_match.read_answers(value)
    if isinstance(value, dict):
        if isinstance(value.get("value"), str):
            aliases = value.get("aliases")
            value = [value["value"], *(aliases if isinstance(aliases, list) else [])]
        else:
            value = value.get("text")
    if not isinstance(value, list):
        value = [value]
    found = [texts.to_text(x) for x in value]
    return list(dict.fromkeys(found)) if all(found) else None


TASK = Task(text_match.TEXT_MATCH, PROMPT, adapt_row=adapt_row)
