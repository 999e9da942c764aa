"""Reads and checks the rows of a stage whose responses are graded by a benchmark's rule."""

import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from distill.data.examples import Example
from distill.evaluation import problems, tasks
from models.errors import UserError

Row = dict[str, Any]


def make_row_adapter(name: str, s: ConfigDict) -> Callable[[Row, str], Row]:
    """Returns what reads the published rows of the benchmark whose grader stage `name` uses.

    Raises UserError if that grader lacks a package, and would give up on every response.
    """
    grader = s.reward.grader
    try:
        problems.require_task(grader)
    except UserError as error:
        reason = str(error).removeprefix(f"--benchmark={grader}: ")
        raise UserError(f"config.{name}.reward.grader={grader}: {reason}") from None
    return functools.partial(problems.adapt_prompt_row, grader)


def require_gradable(s: ConfigDict, example: Example) -> None:
    """Raises UserError naming an example whose responses the stage's grader cannot grade here."""
    if not (s.reward.correct or s.reward.score):
        return
    if not example.answer:
        raise UserError(f"{example.where}: no answer to compare a response with")
    task = tasks.BENCHMARKS[s.reward.grader]
    if not task.grading.is_gradable(example.answer):
        raise UserError(
            f"{example.where}: the grader {s.reward.grader} cannot compare with the answer "
            f"{example.answer[:60]!r}"
        )
    if reason := task.explain_ungradable([example.answer]):
        raise UserError(f"{example.where}: {reason}")
