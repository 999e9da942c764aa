"""LiveCodeBench (arXiv 2403.07974): problems of programming contests, by month.

Versions differ in the months that they cover. The authors' own set needs a script that `datasets`
no longer runs; lighteval's has the same rows. The Qwen3 report takes v5, October 2024 to February
2025: --data=hf: --window=2024-10:2025-02. A file of the authors' (test5.jsonl) works too.
"""

import json
from collections.abc import Sequence

import numpy as np

from distill.evaluation.tasks.task import ROW_NUMBER, Record, Task
from distill.rewards import programs, sandbox
from distill.rewards.program_tests import BadTestsError, ProgramTests, read_cases
from models.errors import UserError

# The authors' prompt (lcb_runner/prompts/code_generation.py), for chat models.
_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) "
    "and will generate a correct Python program that matches the specification and passes all "
    "tests."
)
_WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose "
    "your code within delimiters."
)
_WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly "
    "test on the sample inputs). Enclose your code within delimiters as follows. Ensure that when "
    "the python program runs, it reads the inputs, runs the algorithm and writes output to STDOUT."
)


def render_problem(content: str, starter_code: str) -> str:
    """Renders a problem as the authors do."""
    form, code = _WITHOUT_STARTER, "# YOUR CODE HERE"
    if starter_code:
        form, code = _WITH_STARTER, starter_code
    return (
        f"### Question:\n{content}\n\n### Format: {form}\n```python\n{code}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )


def _read_function(row: Record, where: str) -> str:
    """Reads the name of the function to call from metadata; "" for programs that read stdin."""
    metadata = row.get("metadata") or "{}"
    try:
        fields = json.loads(metadata) if isinstance(metadata, str) else metadata
        name = fields.get("func_name") or ""
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{where}: metadata is no JSON object") from None
    if not isinstance(name, str) or (name and not name.isidentifier()):
        raise UserError(f"{where}: func_name {str(name)[:60]!r} is no name of a function")
    return name


def adapt_row(row: Record, where: str) -> Record:
    """Converts a published row to question, messages, answer and date.

    Tests that cannot be decoded are found by `explain_ungradable`, which counts them.

    Raises UserError naming the row if it has another form.
    """
    names = ("question_content", "public_test_cases", "private_test_cases")
    missing = [name for name in names if not isinstance(row.get(name), str)]
    if missing:
        raise UserError(
            f"{where}: no text in {', '.join(missing)}; it has {sorted(row.keys() - {ROW_NUMBER})}"
        )
    name = str(row.get("question_id") or where)
    try:
        cases = read_cases(row["public_test_cases"])
    except BadTestsError as error:
        raise UserError(f"{where}: public_test_cases: {error}") from None
    tests = ProgramTests(
        name,
        cases=cases,
        private=row["private_test_cases"],
        function=_read_function(row, where),
        difficulty=str(row.get("difficulty") or ""),
    )
    question = render_problem(row["question_content"], str(row.get("starter_code") or ""))
    return {
        "id": name,
        "question": question,
        "messages": [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": question},
        ],
        "answer": tests.to_answer(),
        "date": str(row.get("contest_date") or "")[:10],
    }


def summarise(rows: Sequence[Record]) -> Record:
    """Computes the accuracy of each difficulty, where the problems have one."""
    levels = dict.fromkeys(row["difficulty"] for row in rows if "difficulty" in row)
    accuracies = {
        level: float(np.mean([row["correct"] for row in rows if row.get("difficulty") == level]))
        for level in levels
    }
    return {"accuracy_by_difficulty": accuracies} if accuracies else {}


TASK = Task(
    programs.CONTEST,
    hf="hf:lighteval/code_generation_lite:release_v5:test",
    adapt_row=adapt_row,
    answer_field="public_test_cases",
    require_installed=sandbox.require_isolation,
    explain_ungradable=programs.explain_ungradable,
    describe_grader=sandbox.describe_isolation,
    summarise=summarise,
)
