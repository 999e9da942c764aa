"""Graders: compare the final answer of a response with the right one, and return an outcome.

"correct" and "wrong" judge an answer. "no_answer" means that there is none (the response was cut
short, or has the wrong form), "unparsed" that it cannot be read as mathematics; "timeout" and
"error" mean that the grader gave up. Only "correct" earns the reward of a right answer; a grader
that can tell how much of an answer is right says so too, as a score.

Model output is hostile input to a computer algebra system (9**9**9 is four tokens), so free-form
answers are graded in processes that are killed on a timeout, and that end themselves if their
parent is gone. Those processes import this module, so it must not import jax.
"""

import contextlib
import dataclasses
import resource
import signal
import sys
import types
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Self

from pebble import CONSTS, ProcessPool

from distill.rewards import equality
from distill.rewards.answers import extract_answer, strip_thinking
from distill.rewards.answers import extract_boxed as extract_boxed
from distill.rewards.equality import INTEGER, MAX_ANSWER_CHARACTERS

OUTCOMES = ("correct", "wrong", "no_answer", "unparsed", "timeout", "error")

Grade = dict[str, object]
"""`outcome`, one of OUTCOMES, and any further results of a grader.

`score`, a share from 0 to 1, says how much is right: of tests passed, or of words. A grade without
it has 1 if it is "correct", else 0; see `get_score`."""

CONSTS.term_timeout = 0.0  # the pool kills a worker at once: see `_init_worker`
_GRACE_SECONDS = 2.0  # time for the pool to end a worker that timed out
_WORKER_MEMORY_BYTES = 8 * 2**30  # address space of a worker; its imports take 2 GiB


def grade_arithmetic(response: str, answer: str) -> str:
    """Grades a response whose final text must be exactly one integer, equal to the answer.

    Returns "error" if `answer` is not an integer.
    """
    final = strip_thinking(response)
    if final is None or not INTEGER.fullmatch(final):
        return "no_answer"
    if not INTEGER.fullmatch(answer):
        return "error"
    return "correct" if int(final) == int(answer) else "wrong"


def grade_without_algebra(response: str, answer: str) -> str | None:
    """Returns the result of `grade_math` if it takes no algebra, else None.

    It takes none if there is no answer, if it is too long to parse, or if both answers are
    integers, words, or the same but for marks.
    """
    extracted = extract_answer(response)
    if not extracted:
        return "no_answer"
    if len(extracted) > MAX_ANSWER_CHARACTERS:
        return "unparsed"
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "error"
    right, found = equality.normalise(answer), equality.normalise(extracted)
    equal = equality.compare_without_algebra(right, found)
    return None if equal is None else "correct" if equal else "wrong"


def grade_math(response: str, answer: str) -> str:
    """Grades a response whose final answer must be equal to `answer`.

    Time and memory are unbounded, so call it through a Grader. Returns "unparsed" if the answer is
    too long, or if math-verify cannot parse it and the texts differ; "error" if `answer` does not
    parse.
    """
    if (known := grade_without_algebra(response, answer)) is not None:
        return known
    extracted = extract_answer(response)
    assert extracted is not None
    try:
        equal = equality.compare_with_algebra(
            equality.normalise(answer), equality.normalise(extracted)
        )
    except equality.NoAnswerError:
        return "error"
    return "unparsed" if equal is None else "correct" if equal else "wrong"


def is_integer(answer: str) -> bool:
    """Returns True if `grade_arithmetic` can compare responses with this answer."""
    return bool(INTEGER.fullmatch(answer))


@dataclasses.dataclass(frozen=True)
class GradingRule:
    """A rule for comparing a response with an answer.

    grade: (response, answer) -> an outcome, or a Grade with further results. Runs in a worker
      process, so it must be a module-level function.
    precheck: (response, answer) -> the result if it takes no risky computation, else None. Runs in
      this process.
    is_gradable: returns True if responses can be compared with an answer, judged by its form.
    extract: extracts the answer of a response, for the vote of maj@k. None if responses have none.
    right_response: template of a response that gives the answer, in place of the word `answer`; ""
      if an answer's form does not say what is right.
    seconds: the time limit of a grade; 0: the Grader's own.
    shorten: converts an answer to what results say of it; for answers that are too long to repeat.
    """

    grade: Callable[[str, str], str | Grade]
    precheck: Callable[[str, str], "str | Grade | None"] = lambda response, answer: None
    is_gradable: Callable[[str], bool] = lambda answer: True
    extract: Callable[[str], str | None] | None = None
    right_response: str = "\\boxed{answer}"
    seconds: float = 0.0
    shorten: Callable[[str], str] = lambda answer: answer


class _Worker(SpawnProcess):
    """A spawned process (a fork of a process with jax hangs) that does not import the main module.

    By default it would: the main module is a verb, which imports jax and so would delay each worker
    by seconds.
    """

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
    """Grades responses in worker processes. A context manager, since it owns them.

    An answer that takes longer than `timeout` seconds is a "timeout", and one that crashes its
    worker an "error"; the worker is replaced, and other answers are not affected. Workers start
    with the first answer that needs one.
    """

    def __init__(self, timeout: float = 10.0, workers: int = 2) -> None:
        self._timeout = timeout
        self._workers = workers
        self._pool: ProcessPool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if self._pool is not None:
            # A pool that is stopped while it replaces a worker would print a long traceback.
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
        timeout = rule.seconds or self._timeout
        arguments = (rule.grade, response, answer, timeout + _GRACE_SECONDS)
        return self._pool.schedule(_grade_with_deadline, arguments, timeout=timeout)

    def grade(self, rule: GradingRule, responses: list[str], answers: list[str]) -> list[str]:
        """Returns one of OUTCOMES for each response, in order."""
        return [str(grade["outcome"]) for grade in self.collect_grades(rule, responses, answers)]

    def collect_grades(
        self, rule: GradingRule, responses: list[str], answers: list[str]
    ) -> list[Grade]:
        """Returns the whole grade of each response, in order."""
        pairs = zip(responses, answers, strict=True)
        futures = [self.submit(rule, *pair) for pair in pairs]
        return [wait_for_grade(future) for future in futures]


def wait_for_grade(future: "Future[str | Grade]") -> Grade:
    """Waits for the result of `Grader.submit`. Never raises: a failure is an outcome too."""
    try:
        result = future.result()
    except TimeoutError:
        result = "timeout"
    except Exception:  # raised by the algebra, or its process died
        result = "error"
    return {"outcome": result} if isinstance(result, str) else result


def get_score(grade: Grade) -> float:
    """Returns how much of a response is right, from 0 to 1: the grader's score, or else 1 for
    "correct" and 0 for all other outcomes."""
    score = grade.get("score")
    right = grade["outcome"] == "correct"
    return float(score if isinstance(score, int | float) else right)


def _init_worker(grade: Callable[[str, str], str | Grade]) -> None:
    """Initialises a worker: limits its memory, and grades once, so that imports and compilation do
    not count towards the time of its first answer."""
    # A scheduler sends SIGTERM to all processes of a job, and the answer that a worker grades would
    # count as an error. The pool kills its workers instead: see CONSTS.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY_BYTES, _WORKER_MEMORY_BYTES))
    with contextlib.suppress(Exception):  # 0.5 may not be an answer in the benchmark's form
        grade("1/2", "0.5")  # this takes algebra


def _grade_with_deadline(
    grade: Callable[[str, str], str | Grade], response: str, answer: str, seconds: float
) -> str | Grade:
    """Grades in a worker, which the kernel ends after `seconds`.

    The pool's own timeout is shorter; this one ends workers whose pool was killed.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return grade(response, answer)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


ARITHMETIC = GradingRule(
    grade_arithmetic, grade_arithmetic, is_integer, extract_answer, right_response="answer"
)
MATH = GradingRule(grade_math, grade_without_algebra, equality.is_gradable, extract_answer)
