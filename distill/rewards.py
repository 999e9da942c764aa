"""Graders: is a response's final answer right? One outcome, in a word, for each response.

"correct" and "wrong" judge an answer; "no_answer" is a response without one (cut short, or in the
wrong form); "timeout" and "error" are the grader giving up on it. Only "correct" earns a reward.

What a model writes is hostile input to a computer algebra system (9**9**9 is four tokens), so
free-form answers are graded in processes that are killed when their time is over. Those processes
import this module: it must stay free of jax.
"""

import logging
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import TimeoutError
from typing import Self

from pebble import ProcessPool

from models.errors import UserError

OUTCOMES = ("correct", "wrong", "no_answer", "timeout", "error")

# An answer is short; a longer one is not worth the algebra.
MAX_ANSWER_CHARACTERS = 1000
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_BOXED = re.compile(r"\\boxed\s*\{")
_MARKED = re.compile(
    r"(?:^[ \t]*A:|####|\b[Tt]he (?:final )?answer is:?)[ \t]*(\S.*)$", re.MULTILINE
)
_NUMBER = re.compile(
    r"-?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"
)


def final_text(response: str) -> str | None:
    """What a response says after thinking: the text behind its last `</think>`.

    The whole text where there is no think block; None where one was opened and never closed.
    """
    tail = response.rpartition("</think>")[2]
    return None if "<think>" in tail else tail.strip()


def grade_arithmetic(response: str, answer: str) -> str:
    """The final text must be one integer and nothing else, equal to the answer.

    "error" where `answer` is no integer.
    """
    final = final_text(response)
    if final is None or not _INTEGER.fullmatch(final):
        return "no_answer"
    if not _INTEGER.fullmatch(answer):
        return "error"
    return "correct" if int(final) == int(answer) else "wrong"


def grade_math(response: str, answer: str) -> str:
    """The final text's answer must be mathematically equal to `answer`, as math-verify decides.

    Unbounded in time and memory: call it through a Grader. "error" where `answer` does not parse.
    """
    from math_verify import parse, verify  # slow to import, and only here needed

    # It warns that its own timeouts are off; the pool's is the one that counts.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    final = final_text(response)
    found = None if final is None else _find_answer(final)
    if found is None:
        return "no_answer"
    if len(found) > MAX_ANSWER_CHARACTERS:
        return "wrong"
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=0)
    if not gold:
        return "error"
    prediction = parse(f"\\boxed{{{found}}}", parsing_timeout=0)
    return "correct" if verify(gold, prediction, timeout_seconds=0) else "wrong"


GRADERS: dict[str, Callable[[str, str], str]] = {
    "arithmetic": grade_arithmetic,
    "gsm8k": grade_math,
}


class Grader:
    """Grades lists of responses; a context manager, because it owns worker processes.

    An answer that takes longer than `timeout` seconds is a "timeout", one that brings its worker
    down is an "error"; the worker is replaced and the others' answers are graded all the same.
    The workers start with the first answer that needs one.
    """

    def __init__(self, timeout: float = 10.0, workers: int = 2) -> None:
        self._timeout = timeout
        self._pool = ProcessPool(
            max_workers=workers,
            context=multiprocessing.get_context("spawn"),  # a fork of a process using jax hangs
            initializer=_warm_up,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def grade(self, benchmark: str, responses: list[str], answers: list[str]) -> list[str]:
        """One of OUTCOMES for each response, in order.

        Raises UserError for a benchmark that has no grader.
        """
        if benchmark not in GRADERS:
            raise UserError(f"benchmark: {benchmark!r} is none of {', '.join(GRADERS)}")
        grade, pairs = GRADERS[benchmark], list(zip(responses, answers, strict=True))
        if grade is grade_arithmetic:  # a comparison of two integers needs no protection
            return [grade(*pair) for pair in pairs]
        futures = [self._pool.schedule(grade, pair, timeout=self._timeout) for pair in pairs]
        return [_outcome(future) for future in futures]


def _outcome(future) -> str:
    try:
        return future.result()
    except TimeoutError:
        return "timeout"
    except Exception:  # whatever the algebra raised, or how its process ended
        return "error"


def _warm_up() -> None:
    """Imports and compiles in a new worker what would else count as its first answer's time."""
    grade_math("1", "1")


def _find_answer(text: str) -> str | None:
    """The last box; else the number that follows the last marker; else the last number."""
    if _BOXED.search(text):
        return boxed(text)
    marked = _MARKED.findall(text)
    numbers = _NUMBER.findall(marked[-1] if marked else text)
    if not numbers:
        return None
    return (numbers[0] if marked else numbers[-1]).replace(",", "").replace("$", "")


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} of a text holds; None without one, or where it is not closed."""
    boxes = list(_BOXED.finditer(text))
    return _until_closed(text[boxes[-1].end() :]) if boxes else None


def _until_closed(text: str) -> str | None:
    """The text up to the brace that closes it; None where none does (the response was cut)."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return None
