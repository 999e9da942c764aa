"""The `Task` class that describes a benchmark, and code that most benchmarks share.

This folder must not import jax: worker processes import it to run a task's grader.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill.rewards.graders import GradingRule

Record = dict[str, Any]

# The prompt that Qwen3's model card recommends for mathematics. configs/base.py repeats it, since
# configs/ imports nothing from here; a test compares the two.
BOXED_PROMPT = (
    "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)

# The prompt of EvalPlus (arXiv 2305.01210), by which the Qwen3 report evaluates programs.
PROGRAM_PROMPT = (
    "Please provide a self-contained Python script that solves the following problem in a markdown "
    "code block:\n{question}\n"
)

# The sentence that Qwen3's model card recommends for multiple choice.
CHOICE_PROMPT = (
    "{question}\n\nPlease show your choice in the `answer` field with only the choice letter, "
    'e.g., `"answer": "C"`.'
)

# A field that `problems.load_problems` adds to published rows: their numbers in the set, from 0.
ROW_NUMBER = "_row"
_ID_FIELDS = ("id", "unique_id", "key")
# Fields by which a response names its problem.
NAME_FIELDS = (*_ID_FIELDS, "task_id", "question_id", "question", "problem", "prompt")


def find_id(row: Record) -> Record:
    """Returns {"id": …} from the first id field that the row has; {} if it has none."""
    name = next((row[field] for field in _ID_FIELDS if row.get(field) is not None), None)
    return {} if name is None else {"id": name}


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark. The defaults suit rows of question and answer that are graded one by one."""

    grading: GradingRule
    prompt: str = "{question}"  # template of the prompt
    # the set that --data=hf: stands for; several are read one after another
    hf: str | tuple[str, ...] = ""
    tfds: str = ""  # the set that --data=tfds: stands for
    qwen3: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings of the report
    # (published row, its location) -> row with question (or messages), answer and maybe id, or
    # None for a row that the benchmark leaves out. Without it rows are read like those of training
    # (distill/data/columns.py).
    adapt_row: Callable[[Record, str], Record | None] | None = None
    answer_field: str = "answer"  # of a published row; without it a response has no own answer
    # For a benchmark without data: generates problem number i, from 0; and the default count.
    make_problem: Callable[[int], Record] | None = None
    num_problems: int = 0
    # Raises UserError if the grader needs a package that is not installed.
    require_installed: Callable[[], None] = lambda: None
    # Says how the grader works here, in one line that is printed once; "" if it always works so.
    describe_grader: Callable[[], str] = lambda: ""
    # Explains which of these answers cannot be graded here, and the remedy; "" if all can.
    explain_ungradable: Callable[[Sequence[str]], str] = lambda answers: ""
    # Computes further statistics of graded rows for the summary.
    summarise: Callable[[Sequence[Record]], Record] = lambda rows: {}
