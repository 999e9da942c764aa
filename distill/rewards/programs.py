"""Grades programs that a model wrote, by running them against tests (`sandbox`).

An answer is JSON text (`ProgramTests`). Outcomes are those of `graders`: a program that
fails a test, or reaches a limit in one, is "wrong", a response without a program has "no_answer",
and "error" and "timeout" mean that tests could not be run. A grade also has `passed` of `tests`,
their quotient `score`, and `failure`, what went wrong first.

Outputs and values are compared here, and assertions run in a sandbox of their own: the program
never sees what is expected.
"""

import functools
import importlib
import json
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal, DecimalException
from typing import Any

from distill.rewards import sandbox, sandbox_driver
from distill.rewards.graders import Grade, GradingRule
from distill.rewards.isolation import LimitError, Limits, SandboxError
from distill.rewards.program_tests import BadTestsError, ProgramTests, parse_call

PROGRAM_SECONDS = 120.0  # for all tests of a response

# The modules that LiveCodeBench's authors import before each program, all their names first and
# then by name, since solutions rely on it.
_PRELUDE_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins"),
    "typing",
)
_PRELUDE_END = "import sys\nsys.setrecursionlimit(50000)\n"

# Where a base model's continuation of a function has gone on to something else.
_NEXT_STATEMENT = re.compile(r"\n(?:class|def|if|print|assert|#|@|```)")
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)


def find_blocks(text: str) -> list[str]:
    """Finds the fenced blocks of a text that are closed, in order."""
    blocks: list[str] = []
    lines: list[str] | None = None
    for line in text.split("\n"):
        fence = line.strip()
        if lines is None and fence.startswith("```"):
            lines = []
        elif lines is not None and fence == "```":
            blocks.append("\n".join(lines))
            lines = None
        elif lines is not None:
            lines.append(line)
    return blocks


def extract_program(response: str, tests: ProgramTests) -> str | None:
    """Extracts the program of a response: the last fenced block after thinking, or all of it if it
    has no fence and begins or continues a function that the tests name. None if there is none.

    Where the tests have a prompt, the program begins with it, so that imports and helpers exist.
    """
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    blocks = [textwrap.dedent(block) for block in find_blocks(text) if block.strip()]
    program = blocks[-1] if blocks else text.lstrip("\n") if "```" not in text else ""
    name = rf"(?:{'|'.join(map(re.escape, tests.names))})\b"
    defines = bool(tests.names) and bool(
        re.search(rf"^(?:(?:async\s+)?def\s+|class\s+)?{name}", program, re.MULTILINE)
    )
    if not blocks and not defines:
        if not tests.prompt or not program.startswith((" ", "\t")):
            return None
        program = (
            program[: match.start()] if (match := _NEXT_STATEMENT.search(program)) else program
        )
    if not program.strip():
        return None
    if not tests.prompt:
        return program
    if not defines:
        body = textwrap.indent(program, "    ") if blocks else program
        return f"{tests.prompt.rstrip()}\n{body}\n"
    return _join(f"{tests.prompt.rstrip()}\n", program)


@functools.cache
def _list_exports() -> dict[str, frozenset[str]]:
    """Lists the names that `from MODULE import *` brings, for the modules of the prelude."""
    exports = {}
    for name in _PRELUDE_MODULES:
        module = importlib.import_module(name)
        public = [x for x in dir(module) if not x.startswith("_")]
        exports[name] = frozenset(getattr(module, "__all__", public))
    return exports


def add_prelude(program: str) -> str:
    """Puts before a program those imports of the authors' prelude that can matter to it: of the
    names that occur in it. All of them would cost more time than most programs."""
    words = set(re.findall(r"[^\W\d]\w*", program))
    stars = [name for name, exported in _list_exports().items() if words & exported]
    if set(stars) <= {"builtins"}:
        stars = []
    lines = [f"from {name} import *\n" for name in stars]
    lines += [f"import {name}\n" for name in _PRELUDE_MODULES if name in words and name != "typing"]
    return _join(f"{''.join(lines)}{_PRELUDE_END}", program)


def _join(beginning: str, program: str) -> str:
    """Puts lines before a program, but after what it imports from __future__."""
    future = "".join(f"{line}\n" for line in _FUTURE.findall(program))
    return f"{future}{beginning}\n{_FUTURE.sub('', program) if future else program}\n"


def have_same_output(printed: str, expected: str) -> bool:
    """Compares outputs as LiveCodeBench's authors do: line by line without the white space around,
    and lines that differ as decimals."""
    ours, theirs = ([x.strip() for x in t.strip().split("\n")] for t in (printed, expected))
    return len(ours) == len(theirs) and all(map(_have_same_words, ours, theirs))


def _have_same_words(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    try:
        return [Decimal(x) for x in ours.split()] == [Decimal(x) for x in theirs.split()]
    except (DecimalException, ValueError):
        return False


# Of one test: "" if it passed, else why not.
Verdicts = Iterator[str]


def _run_scripts(program: str, tests: ProgramTests, limits: Limits) -> Verdicts:
    for given, expected in tests.list_cases():
        result = sandbox.run_script(program, given.encode("utf-8", "surrogatepass"), limits)
        printed = result.stdout.decode("utf-8", "replace")
        if result.code:
            yield f"exit code {result.code}"
        else:
            yield "" if have_same_output(printed, expected) else "wrong output"


def _run_calls(program: str, tests: ProgramTests, limits: Limits) -> Verdicts:
    """Calls the function, or the method of this name of a class Solution, once for each test."""
    cases = [parse_call(*case) for case in tests.list_cases()]

    def to_line(*request: object) -> bytes:
        return json.dumps(sandbox_driver.encode_value(list(request), _refuse)).encode()

    with sandbox.open_program(limits, len(cases)) as channel:

        def ask(line: bytes) -> Any:
            """Returns what a line is answered; raises _CallError."""
            channel.send(line, limits.wall_seconds)
            answer = channel.receive(limits.wall_seconds)
            if answer is None:
                raise _CallError("the program ended")
            try:
                content = json.loads(answer)
                if isinstance(content, dict):
                    raise _CallError(str(content["raised"])[:100])
                return content[0]
            except (ValueError, TypeError, KeyError, IndexError, RecursionError):
                raise _CallError("no answer to the call") from None

        def get_handle(value: Any) -> dict:
            if not isinstance(value, dict) or "handle" not in value:
                raise _CallError(f"no function {tests.function}")
            return {"handle": value["handle"]}

        def request(operation: str, target: dict, content: object) -> bytes:
            return json.dumps([operation, target, content]).encode()

        try:
            ask(json.dumps(program).encode())
            target = {"handle": tests.function}
            if "class Solution" in program:
                made = ask(request("call", {"handle": "Solution"}, [[], {"dict": []}]))
                target = get_handle(ask(request("get", get_handle(made), tests.function)))
        except _CallError as error:
            yield from [str(error)] * len(cases)
            return
        for arguments, expected in cases:
            try:
                encoded = sandbox_driver.encode_value(arguments, _refuse)
                value = ask(request("call", target, [encoded, {"dict": []}]))
                value = sandbox_driver.decode_value(value, lambda name: _NOTHING)
                value = list(value) if isinstance(value, tuple) else value
                yield "" if value == expected else "wrong value"
            except _CallError as error:
                yield str(error)
            except (ValueError, TypeError, KeyError, RecursionError):
                yield "wrong value"


_NOTHING = object()


class _CallError(Exception):
    """A call that brought no value."""


def _refuse(value: object) -> str:
    raise TypeError(f"{type(value).__name__} is no JSON")


def _run_checks(program: str, tests: ProgramTests, limits: Limits) -> Verdicts:
    fields = {"program": program, "names": tests.names, "setup": tests.setup}
    task = json.dumps({**fields, "tests": tests.checks}).encode()
    setup, *reports = json.loads(sandbox.run_checks(task, limits))
    if "unsupported" in setup:
        raise SandboxError(f"the tests cannot be run here: {setup['unsupported']}")
    if setup:
        reports = [setup] * len(tests.checks)
    for report in reports:
        if "unsupported" in report:
            raise SandboxError(f"a test cannot be run here: {report['unsupported']}")
        yield str(report.get("raised", ""))


def _grade(response: str, answer: str, limits: Limits) -> Grade:
    try:
        tests = ProgramTests.from_answer(answer)
        count = len(tests.checks) or len(tests.list_cases())
    except BadTestsError as error:
        return {"outcome": "error", "failure": f"tests: {error}"}
    program = extract_program(response, tests)
    grade = _grade_program(program, tests, count, limits)
    return {**grade, **({"difficulty": tests.difficulty} if tests.difficulty else {})}


def _grade_program(program: str | None, tests: ProgramTests, count: int, limits: Limits) -> Grade:
    if program is None:
        return _make_grade("no_answer", 0, count, "no program")
    if tests.checks:
        verdicts = _run_checks(program, tests, limits)
    elif tests.function:
        verdicts = _run_calls(add_prelude(program), tests, limits)
    else:
        verdicts = _run_scripts(add_prelude(program), tests, limits)
    passed, failure, started = 0, "", time.monotonic()
    try:
        for verdict in verdicts:
            passed += not verdict
            failure = failure or verdict
            if time.monotonic() - started > PROGRAM_SECONDS:
                break
        else:
            return _make_grade("wrong" if failure else "correct", passed, count, failure)
    except LimitError as error:  # what is left would cost as much again
        return _make_grade("wrong", passed, count, failure or f"limit of {error}")
    except (SandboxError, OSError, ValueError) as error:
        return {"outcome": "error", "failure": str(error)[:200]}
    outcome = "wrong" if failure else "timeout"
    return _make_grade(outcome, passed, count, failure or f"over {PROGRAM_SECONDS:.0f} s")


def _make_grade(outcome: str, passed: int, tests: int, failure: str) -> Grade:
    score = passed / tests if tests else 0.0
    grade = {"outcome": outcome, "passed": passed, "tests": tests, "score": score}
    return {**grade, "failure": failure}


def grade_contest(response: str, answer: str) -> Grade:
    """Grades a program by inputs and outputs: LiveCodeBench's 6 s for each test."""
    return _grade(response, answer, Limits(seconds=6))


def grade_functions(response: str, answer: str) -> Grade:
    """Grades a program by assertions about its functions: 5 s for all."""
    return _grade(response, answer, Limits(seconds=5))


def is_gradable(answer: str) -> bool:
    """Returns True if programs can be run against the tests of this answer."""
    try:
        ProgramTests.from_answer(answer).require_readable()
    except BadTestsError:
        return False
    return True


def explain_ungradable(answers: Sequence[str]) -> str:
    """Says how many problems have tests that cannot be run, and why the first; "" if all can."""
    reasons = []
    for answer in answers:
        try:
            tests = ProgramTests.from_answer(answer)
            try:
                tests.require_readable()
            except BadTestsError as error:
                reasons.append(f"{tests.problem}: {error}")
        except BadTestsError as error:
            reasons.append(str(error))
    if not reasons:
        return ""
    return f"{len(reasons)} of {len(answers)} problems have tests that cannot be run: {reasons[0]}"


def shorten_answer(answer: str) -> str:
    """Returns what a row of results keeps of an answer: the problem's name."""
    try:
        return f"tests of {ProgramTests.from_answer(answer).problem}"
    except BadTestsError:
        return answer


def _make_rule(grade: Callable[[str, str], Grade]) -> GradingRule:
    return GradingRule(
        grade,
        is_gradable=is_gradable,
        right_response="",
        seconds=PROGRAM_SECONDS + 30,  # the last test may begin just before
        shorten=shorten_answer,
    )


CONTEST = _make_rule(grade_contest)
FUNCTIONS = _make_rule(grade_functions)
