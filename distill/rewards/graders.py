"""Graders: is a response's final answer right? One outcome, in a word, for each response.

"correct" and "wrong" judge an answer; "no_answer" is a response without one (cut short, or in the
wrong form) and "unparsed" one whose answer cannot be read as mathematics; "timeout" and "error"
are the grader giving up on it. Only "correct" earns a reward.

What a model writes is hostile input to a computer algebra system (9**9**9 is four tokens), so
free-form answers are graded in processes that are killed when their time is over, and that end
themselves if nobody is left to do so. Those processes import this module: it must stay free of jax.
"""

import contextlib
import dataclasses
import logging
import re
import resource
import signal
import sys
import types
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Self

from pebble import ProcessPool

OUTCOMES = ("correct", "wrong", "no_answer", "unparsed", "timeout", "error")

Grade = dict[str, object]
"""`outcome`, one of OUTCOMES, and whatever else a grader found."""

_GRACE_SECONDS = 2.0  # seconds that the pool is given to end a worker whose time is over
_WORKER_MEMORY_BYTES = (
    8 * 2**30
)  # bytes of address space of a worker; importing all that it needs takes 2

# An answer is short; a longer one is not worth the algebra.
MAX_ANSWER_CHARACTERS = 1000
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_BOXED = re.compile(r"\\boxed\s*\{")
_ANSWER_MARKER = re.compile(
    r"(?:^[ \t]*A:|####|\b[Tt]he (?:final )?answer is:?)[ \t]*(\S.*)$", re.MULTILINE
)
_NUMBER = re.compile(
    r"-?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?"
)


def strip_thinking(response: str) -> str | None:
    """What a response says after thinking: the text behind its last `</think>`.

    The whole text where there is no think block; None where one was opened and never closed.
    """
    tail = response.rpartition("</think>")[2]
    return None if "<think>" in tail else tail.strip()


def grade_arithmetic(response: str, answer: str) -> str:
    """The final text must be one integer and nothing else, equal to the answer.

    "error" where `answer` is no integer.
    """
    final = strip_thinking(response)
    if final is None or not _INTEGER.fullmatch(final):
        return "no_answer"
    if not _INTEGER.fullmatch(answer):
        return "error"
    return "correct" if int(final) == int(answer) else "wrong"


def grade_without_algebra(response: str, answer: str) -> str | None:
    """What `grade_math` finds where no algebra is needed: no answer, one that is too long to try,
    or an integer where an integer is wanted. None where it is needed."""
    extracted = extract_answer(response)
    if not extracted:
        return "no_answer"
    if len(extracted) > MAX_ANSWER_CHARACTERS:
        return "unparsed"
    if _INTEGER.fullmatch(extracted) and _INTEGER.fullmatch(answer):
        return "correct" if int(extracted) == int(answer) else "wrong"
    return None


def grade_math(response: str, answer: str) -> str:
    """The final text's answer must be mathematically equal to `answer`, as math-verify decides.

    "unparsed" where math-verify makes no expression of it and the texts differ, and where it is too
    long to try. Unbounded in time and memory: call it through a Grader. "error" where `answer` does
    not parse.
    """
    if (known := grade_without_algebra(response, answer)) is not None:
        return known
    from math_verify import parse, verify  # slow to import, and only here needed

    # It warns that its own timeouts are off; the pool's is the one that counts.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    extracted = extract_answer(response)
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=0)
    if not gold:
        return "error"
    prediction = parse(f"\\boxed{{{extracted}}}", parsing_timeout=0)
    if verify(gold, prediction, timeout_seconds=0):
        return "correct"
    # What it cannot read comes back as a text alone.
    return "unparsed" if all(isinstance(p, str) for p in prediction) else "wrong"


def is_integer(answer: str) -> bool:
    """Tells whether `grade_arithmetic` can compare with this answer."""
    return bool(_INTEGER.fullmatch(answer))


def is_short_expression(answer: str) -> bool:
    """Tells whether `grade_math` can compare with this answer, judged by its form.

    It must be short, with paired braces, and more than LaTeX markup. Math-verify itself would take
    minutes over a large set, and knows no more of these.
    """
    depth, least = 0, 0
    for c in answer.replace("\\{", "").replace("\\}", ""):
        depth += (c == "{") - (c == "}")
        least = min(least, depth)
    paired = depth == 0 and least == 0
    return paired and len(answer) <= MAX_ANSWER_CHARACTERS and bool(answer.strip(" ${}\\"))


@dataclasses.dataclass(frozen=True)
class GradingRule:
    """How a response is compared with an answer.

    grade: (response, answer) -> an outcome, or a Grade that says more. A module-level function: it
      runs in a worker process.
    precheck: grades at once, in this process, what needs no protection; None where it cannot.
    is_gradable: tells by its form whether responses can be compared with an answer.
    extract: finds the answer in a response, for the vote of maj@k; None: there is no one answer.
    right_response: a response that gives `answer`, in whose place the answer is put.
    """

    grade: Callable[[str, str], str | Grade]
    precheck: Callable[[str, str], str | None] = lambda response, answer: None
    is_gradable: Callable[[str], bool] = lambda answer: True
    extract: Callable[[str], str | None] | None = None
    right_response: str = "\\boxed{answer}"


class _Worker(SpawnProcess):
    """A new process (a fork of one with jax hangs) that does not import the main module again, as
    they else do: that is a verb, which imports jax, and takes seconds, also of each replacement."""

    def start(self) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    Process = _Worker


class Grader:
    """Grades responses; a context manager, because it owns worker processes.

    An answer that takes longer than `timeout` seconds is a "timeout", one that brings its worker
    down is an "error"; the worker is replaced and the others' answers are graded all the same.
    The workers start with the first answer that needs one.
    """

    def __init__(self, timeout: float = 10.0, workers: int = 2) -> None:
        self._timeout = timeout
        self._workers = workers
        self._pool: ProcessPool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if self._pool is not None:
            # Stopped while it replaces a worker, that one would complain at length.
            self._pool.close() if error_type is None else self._pool.stop()
            self._pool.join()

    def submit(self, rule: GradingRule, response: str, answer: str) -> "Future[str | Grade]":
        """Starts grading and returns at once; `wait_for_grade` waits for the result."""
        if (outcome := rule.precheck(response, answer)) is not None:
            done: Future[str | Grade] = Future()
            done.set_result(outcome)
            return done
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._workers,
                context=_Context(),
                initializer=_init_worker,
                initargs=(rule.grade,),
            )
        arguments = (rule.grade, response, answer, self._timeout + _GRACE_SECONDS)
        return self._pool.schedule(_grade_with_deadline, arguments, timeout=self._timeout)

    def grade(self, rule: GradingRule, responses: list[str], answers: list[str]) -> list[str]:
        """Returns one of OUTCOMES for each response, in order."""
        pairs = zip(responses, answers, strict=True)
        futures = [self.submit(rule, *pair) for pair in pairs]
        return [str(wait_for_grade(future)["outcome"]) for future in futures]


def wait_for_grade(future: "Future[str | Grade]") -> Grade:
    """Waits for a `Grader.submit`. Raises nothing: what goes wrong is an outcome too."""
    try:
        result = future.result()
    except TimeoutError:
        result = "timeout"
    except Exception:  # whatever the algebra raised, or how its process ended
        result = "error"
    return {"outcome": result} if isinstance(result, str) else result


def _init_worker(grade: Callable[[str, str], str | Grade]) -> None:
    """In a new worker: limits what it can take, and imports and compiles what would else count
    as its first answer's time."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY_BYTES, _WORKER_MEMORY_BYTES))
    with contextlib.suppress(Exception):  # this may be no answer in the benchmark's form
        grade("0.5", "0.5")


def _grade_with_deadline(
    grade: Callable[[str, str], str | Grade], response: str, answer: str, seconds: float
) -> str | Grade:
    """In a worker: grades, and is ended by the kernel after `seconds`. The pool comes first, unless
    its process was killed: nobody else would then end an algebra that does not come back."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return grade(response, answer)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def extract_answer(response: str) -> str | None:
    """The final text's answer: its last box; else the number that follows the last marker; else its
    last number. None where there is none, or where the box or the thinking never ends."""
    final = strip_thinking(response)
    return None if final is None else _extract_from_text(final)


def _extract_from_text(text: str) -> str | None:
    if _BOXED.search(text):
        return extract_boxed(text)
    marked = _ANSWER_MARKER.findall(text)
    numbers = _NUMBER.findall(marked[-1] if marked else text)
    if not numbers:
        return None
    return (numbers[0] if marked else numbers[-1]).replace(",", "").replace("$", "")


def extract_boxed(text: str) -> str | None:
    """What the last \\boxed{...} of a text holds; None without one, or where it is not closed."""
    boxes = list(_BOXED.finditer(text))
    return _cut_at_closing_brace(text[boxes[-1].end() :]) if boxes else None


def _cut_at_closing_brace(text: str) -> str | None:
    """The text up to the brace that closes it; None where none does (the response was cut)."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:i]
    return None


ARITHMETIC = GradingRule(
    grade_arithmetic, grade_arithmetic, is_integer, extract_answer, right_response="answer"
)
MATH = GradingRule(grade_math, grade_without_algebra, is_short_expression, extract_answer)
