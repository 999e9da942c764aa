"""MBPP (arXiv 2108.07732), and MBPP+ of EvalPlus (arXiv 2305.01210), whose rows have nearly its
form: --data=hf:evalplus/mbppplus::test."""

import builtins
import re

from distill.evaluation.tasks.task import ROW_NUMBER, Record, Task
from distill.rewards import programs, sandbox
from distill.rewards.program_tests import ProgramTests
from models.errors import UserError

# The authors' prompt without its three solved examples, which models in chat do not need.
_PROMPT = (
    "You are an expert Python programmer, and here is your task: {question}\n\n"
    "Write the program in a markdown code block."
)

_DEFINITION = re.compile(r"^(?:def|class)\s+(\w+)", re.MULTILINE)
_IMPORT = re.compile(r"^(?:import|from)\s[^(\\\n]*$", re.MULTILINE)
_CALL = re.compile(r"(?<![\w.])([A-Za-z_]\w*)\s*\(")


def _read_texts(row: Record, name: str, where: str) -> list[str]:
    """Reads a list of texts, or one text; [] if there is none."""
    value = row.get(name) or []
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{where}: {name} is no list of texts")
    return value


def _find_names(solution: object, checks: list[str]) -> list[str]:
    """Returns the functions and classes under test: those of the reference solution that the tests
    name or, without one, those that the tests call.

    Only these are asked of a program: one that defines its own `set` or `sorted` must not change
    what a test compares.
    """
    text = "\n".join(checks)
    if isinstance(solution, str) and (defined := _DEFINITION.findall(solution)):
        words = set(re.findall(r"\w+", text))
        if names := [name for name in dict.fromkeys(defined) if name in words]:
            return names
    own = {*vars(builtins), *_DEFINITION.findall(text)}
    return [name for name in dict.fromkeys(_CALL.findall(text)) if name not in own]


def adapt_row(row: Record, where: str) -> Record:
    """Converts a published row (text or prompt, test_list, code) to question and answer; MBPP+ has
    the tests in `test`, too.

    Raises UserError naming the row if it has another form.
    """
    text = row.get("text") or row.get("prompt")
    shown = _read_texts(row, "test_list", where)
    if not isinstance(text, str) or not shown:
        raise UserError(
            f"{where}: no text or prompt, and test_list, among {sorted(row.keys() - {ROW_NUMBER})}"
        )
    setup = _read_texts(row, "test_imports", where) + _read_texts(row, "test_setup_code", where)
    checks = _read_texts(row, "test", where) or shown
    # Tests may use a module that only the reference solution imports.
    setup = _IMPORT.findall(str(row.get("code") or "")) + setup
    listed = "\n".join(shown)
    problem = str(row.get("task_id", row.get("id", where)))
    tests = ProgramTests(
        problem,
        checks=checks,
        names=_find_names(row.get("code"), [*setup, *shown, *checks]),
        setup="\n".join(setup),
    )
    return {
        "id": problem,
        "question": f"{text.strip()} Your code should pass these tests:\n\n{listed}",
        "answer": tests.to_answer(),
    }


TASK = Task(
    programs.FUNCTIONS,
    _PROMPT,
    hf="hf:google-research-datasets/mbpp:full:test",
    adapt_row=adapt_row,
    answer_field="test_list",
    require_installed=sandbox.require_isolation,
    explain_ungradable=programs.explain_ungradable,
    describe_grader=sandbox.describe_isolation,
)
