"""Grades programs that a model wrote, by running them against tests (`sandbox`).

An answer is JSON text: `Tests` says what it holds. Outcomes are those of `graders`: a program that
fails a test, or reaches a limit in one, is "wrong", a response without a program has "no_answer",
and "error" and "timeout" mean that tests could not be run. A grade also has `passed` of `tests`,
their quotient `share`, and `failure`, what went wrong first.

Outputs and values are compared here, and assertions run in a sandbox of their own: the program never
sees what is expected.
"""

import ast
import base64
import binascii
import dataclasses
import json
import pickletools
import re
import textwrap
import time
import zlib
from collections.abc import Iterator
from decimal import Decimal, DecimalException
from typing import Any, Self

from distill.rewards import sandbox, sandbox_driver
from distill.rewards.graders import Grade, GradingRule
from distill.rewards.sandbox import LimitError, Limits, SandboxError

PROGRAM_SECONDS = 120.0  # for all tests of a response
_MAX_TESTS_BYTES = 2**30  # of a problem's decoded tests

# What LiveCodeBench's authors put before each program, whose solutions rely on it.
_PRELUDE = "".join(
    f"from {name} import *\n"
    for name in (
        *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
        *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins"),
        "typing",
    )
) + (
    "import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics\n"
    "import itertools, functools, operator, io, sys, json\n"
    "sys.setrecursionlimit(50000)\n"
)

# Where a base model's continuation of a function has gone on to something else.
_NEXT_STATEMENT = re.compile(r"\n(?:class|def|if|print|assert|#|@|```)")
_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)
_UNPICKLED = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
_PICKLE_FRAME = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP")


class TestsError(ValueError):
    """Tests that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Tests:
    """The tests of a problem, as its answer holds them.

    Either `cases`, or `private` (as LiveCodeBench publishes it) with or without them: pairs of
    input and output of a script or, with `function`, of lines of arguments and a value, in JSON. Or
    `checks`: assertions about the functions and classes `names` of the program, run after `setup`;
    `prompt` is the beginning of the program that the response continues or repeats.
    """

    problem: str
    cases: list[list[str]] = dataclasses.field(default_factory=list)
    private: str = ""
    function: str = ""
    checks: list[str] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)
    setup: str = ""
    prompt: str = ""

    def to_answer(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_answer(cls, answer: str) -> Self:
        """Raises TestsError if the answer is none of `to_answer`."""
        try:
            return cls(**json.loads(answer))
        except (ValueError, TypeError, RecursionError):
            raise TestsError("no tests of a program") from None

    def list_cases(self) -> list[tuple[str, str]]:
        """Lists all pairs of input and output, decoded. Raises TestsError if they cannot be."""
        return [(a, b) for a, b in (*self.cases, *decode_private_cases(self.private))]

    def require_readable(self) -> None:
        """Raises TestsError if these tests cannot be run, or are none."""
        for source in (self.setup, self.prompt, *self.checks):
            try:
                ast.parse(source)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise TestsError(f"no Python: {error}") from None
        cases = self.list_cases()
        if not cases and not self.checks:
            raise TestsError("there are none")
        if self.checks and not self.names:
            raise TestsError("they name no function of the program")
        for given, expected in cases if self.function else ():
            parse_call(given, expected)


def parse_call(given: str, expected: str) -> tuple[list[Any], Any]:
    """Parses the arguments of a call, a line each, and its value. Raises TestsError."""
    try:
        return [json.loads(line) for line in given.split("\n")], json.loads(expected)
    except (ValueError, RecursionError) as error:
        raise TestsError(f"arguments or value are no JSON: {error}") from None


def read_cases(text: str) -> list[list[str]]:
    """Reads a JSON list of {input, output}. Raises TestsError."""
    try:
        cases = [[case["input"], case["output"]] for case in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise TestsError("no JSON list of input and output") from None
    if not all(isinstance(part, str) for case in cases for part in case):
        raise TestsError("input or output is no text")
    return cases


def decode_private_cases(text: str) -> list[list[str]]:
    """Decodes LiveCodeBench's private_test_cases: JSON, or base64 of zlib of a pickle of JSON.

    Reads the text that the pickle holds; nothing is unpickled.

    Raises TestsError.
    """
    if not text or text.lstrip().startswith("["):
        return read_cases(text or "[]")
    try:
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(base64.b64decode(text, validate=True), _MAX_TESTS_BYTES)
        if not unpacker.eof:
            raise TestsError(f"cut short, or larger than {_MAX_TESTS_BYTES:,} bytes")
        operations = [(opcode.name, value) for opcode, value, _ in pickletools.genops(pickled)]
    except (binascii.Error, zlib.error, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, TestsError):
            raise
        raise TestsError(f"not base64 of zlib of a pickle: {error}") from None
    texts = [value for name, value in operations if name in _UNPICKLED]
    others = {name for name, _ in operations} - {*_UNPICKLED, *_PICKLE_FRAME}
    if others or len(texts) != 1:
        raise TestsError("the pickle holds something other than one text")
    return read_cases(str(texts[0]))


def find_blocks(text: str) -> list[str]:
    """Finds the fenced blocks of a text that are closed, in order."""
    blocks: list[str] = []
    lines: list[str] | None = None
    for line in text.split("\n"):
        fence = line.strip()
        if lines is None and fence.startswith("```"):
            lines = []
        elif lines is not None and fence == "```":
            blocks.append(textwrap.dedent("\n".join(lines)))
            lines = None
        elif lines is not None:
            lines.append(line)
    return blocks


def extract_program(response: str, tests: Tests) -> str | None:
    """Extracts the program of a response: the last fenced block after thinking, or all of it if it
    has no fence and begins or continues a function that the tests name. None if there is none.

    Where the tests have a prompt, the program begins with it, so that its imports and helpers exist.
    """
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    blocks = [block for block in find_blocks(text) if block.strip()]
    program = blocks[-1] if blocks else text.lstrip("\n") if "```" not in text else ""
    name = rf"(?:{'|'.join(map(re.escape, tests.names))})\b"
    defines = bool(tests.names) and bool(
        re.search(rf"^(?:(?:async\s+)?def\s+|class\s+)?{name}", program, re.MULTILINE)
    )
    if not blocks and not defines:
        if not tests.prompt or not program.startswith((" ", "\t")):
            return None
        program = program[: match.start()] if (match := _NEXT_STATEMENT.search(program)) else program
    if not program.strip():
        return None
    if not tests.prompt:
        return program
    if not defines:
        return f"{tests.prompt.rstrip()}\n{program}\n"
    future = "\n".join(_FUTURE.findall(program))
    return f"{future}\n{tests.prompt.rstrip()}\n\n{_FUTURE.sub('', program)}\n"


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


def _run_scripts(program: str, tests: Tests, limits: Limits) -> Verdicts:
    for given, expected in tests.list_cases():
        result = sandbox.run_script(program, given.encode("utf-8", "surrogatepass"), limits)
        printed = result.stdout.decode("utf-8", "replace")
        if result.code:
            yield f"exit code {result.code}"
        else:
            yield "" if have_same_output(printed, expected) else "wrong output"


def _run_calls(program: str, tests: Tests, limits: Limits) -> Verdicts:
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


def _run_checks(program: str, tests: Tests, limits: Limits) -> Verdicts:
    fields = {"program": program, "names": tests.names, "setup": tests.setup}
    task = json.dumps({**fields, "tests": tests.checks}).encode()
    setup, *reports = json.loads(sandbox.run_checks(task, limits))
    if setup:
        reports = [setup] * len(tests.checks)
    for report in reports:
        if "unsupported" in report:
            raise SandboxError(f"a test passes {report['unsupported']}")
        yield str(report.get("raised", ""))


def _grade(response: str, answer: str, limits: Limits) -> Grade:
    try:
        tests = Tests.from_answer(answer)
        count = len(tests.checks) or len(tests.list_cases())
    except TestsError as error:
        return {"outcome": "error", "failure": f"tests: {error}"}
    program = extract_program(response, tests)
    if program is None:
        return _make_grade("no_answer", 0, count, "no program")
    if tests.checks:
        verdicts = _run_checks(program, tests, limits)
    elif tests.function:
        verdicts = _run_calls(_PRELUDE + program, tests, limits)
    else:
        verdicts = _run_scripts(_PRELUDE + program, tests, limits)
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
    share = passed / tests if tests else 0.0
    grade = {"outcome": outcome, "passed": passed, "tests": tests, "share": share}
    return {**grade, "failure": failure}


def grade_contest(response: str, answer: str) -> Grade:
    """Grades a program by inputs and outputs: LiveCodeBench's 6 s for each test."""
    return _grade(response, answer, Limits(seconds=6))


def grade_functions(response: str, answer: str) -> Grade:
    """Grades a program by assertions about its functions: 10 s for all."""
    return _grade(response, answer, Limits(seconds=10))


def is_gradable(answer: str) -> bool:
    """Returns True if programs can be run against the tests of this answer."""
    try:
        Tests.from_answer(answer).require_readable()
    except TestsError:
        return False
    return True


def explain_ungradable(answers: list[str]) -> str:
    """Says how many problems have tests that cannot be run, and why the first; "" if all can."""
    reasons = []
    for answer in answers:
        try:
            tests = Tests.from_answer(answer)
            try:
                tests.require_readable()
            except TestsError as error:
                reasons.append(f"{tests.problem}: {error}")
        except TestsError as error:
            reasons.append(str(error))
    if not reasons:
        return ""
    return f"{len(reasons)} of {len(answers)} problems have tests that cannot be run: {reasons[0]}"


def shorten_answer(answer: str) -> str:
    """Returns what a row of results keeps of an answer: the problem's name."""
    try:
        return f"tests of {Tests.from_answer(answer).problem}"
    except TestsError:
        return answer


CONTEST = GradingRule(grade_contest, is_gradable=is_gradable)
FUNCTIONS = GradingRule(grade_functions, is_gradable=is_gradable)
