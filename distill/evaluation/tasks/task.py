"""A benchmark, and what most benchmarks share.

No jax in this folder: graders that a task brings along run in processes that import it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.rewards.graders import GradingRule
from models.errors import UserError

Record = dict[str, Any]

# Qwen3's model card asks users to append this to a mathematical problem. configs/base.py has it too
# (configs/ imports nothing from here); a test compares them.
BOXED_PROMPT = (
    "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)

_ID_FIELDS = ("id", "unique_id", "key")
_QUESTION_FIELDS = ("question", "problem")
NAME_FIELDS = (*_ID_FIELDS, *_QUESTION_FIELDS, "prompt")  # by which a response names its problem


def find_id(row: Record) -> Record:
    """Returns {"id": …} of a row, from any of the fields that published sets use; {} without."""
    name = next((row[field] for field in _ID_FIELDS if row.get(field) is not None), None)
    return {} if name is None else {"id": name}


def adapt_row(row: Record, where: str) -> Record:
    """Returns a published row with `question`, `answer` and, where it has one, `id`.

    Raises UserError naming a row without an answer.
    """
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: no answer among its fields {sorted(row)}")
    question = next((row[field] for field in _QUESTION_FIELDS if field in row), None)
    question_fields = {} if question is None else {"question": question}
    return {**row, **find_id(row), **question_fields, "answer": _extract_final_answer(answer)}


def _extract_final_answer(answer: str | int | float) -> str:
    """GSM8K is published with the solution before its answer, AMC with answers such as 27.0."""
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    _, marker, tail = str(answer).rpartition("####")
    return tail.strip().replace(",", "") if marker else str(answer)


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark. The defaults suit rows of question and answer, graded each on its own."""

    grading: GradingRule
    prompt: str = "{question}"  # how a question is put
    hf: str = ""  # the set that --data=hf: stands for
    tfds: str = ""  # the set that --data=tfds: stands for
    qwen3: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its settings in the report
    # (published row, where it stands) -> row with question (or messages), answer and maybe id
    adapt_row: Callable[[Record, str], Record] = adapt_row
    answer_field: str = "answer"  # of a published row: without it a response has no own answer
    # The problem of each number from 0, of a benchmark that needs no data; how many by default.
    make_problem: Callable[[int], Record] | None = None
    num_problems: int = 0
    # Raises UserError if the grader needs a package that is not installed.
    require_installed: Callable[[], None] = lambda: None
    # Says which of these answers cannot be graded on this machine, and the remedy; "": none.
    explain_ungradable: Callable[[Sequence[str]], str] = lambda answers: ""
    # Further figures of graded rows, for the summary.
    summarise: Callable[[Sequence[Record]], Record] = lambda rows: {}
