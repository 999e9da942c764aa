"""The tests of a program, as a problem's answer holds them, in JSON."""

import ast
import base64
import binascii
import dataclasses
import json
import pickletools
import zlib
from typing import Any, Self

_MAX_TESTS_BYTES = 2**30  # of a problem's decoded tests
_UNPICKLED = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
_PICKLE_FRAME = ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP")


class BadTestsError(ValueError):
    """Tests that cannot be read."""


@dataclasses.dataclass(frozen=True)
class ProgramTests:
    """The tests of a problem, as its answer holds them.

    Either `cases`, or `private` (as LiveCodeBench publishes it) with or without them: pairs of
    input and output of a script or, with `function`, of lines of arguments and a value, in JSON. Or
    `checks`: assertions about the functions and classes `names` of the program, run after `setup`;
    `prompt` is the beginning of the program that the response continues or repeats. A `difficulty`
    is repeated in the grade.
    """

    problem: str
    cases: list[list[str]] = dataclasses.field(default_factory=list)
    private: str = ""
    function: str = ""
    checks: list[str] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)
    setup: str = ""
    prompt: str = ""
    difficulty: str = ""

    def to_answer(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_answer(cls, answer: str) -> Self:
        """Raises BadTestsError if the answer is none of `to_answer`."""
        try:
            return cls(**json.loads(answer))
        except (ValueError, TypeError, RecursionError):
            raise BadTestsError("no tests of a program") from None

    def list_cases(self) -> list[tuple[str, str]]:
        """Lists all pairs of input and output, decoded. Raises BadTestsError if they cannot be."""
        return [(a, b) for a, b in (*self.cases, *decode_private_cases(self.private))]

    def require_readable(self) -> None:
        """Raises BadTestsError if these tests cannot be run, or are none."""
        for source in (self.setup, self.prompt, *self.checks):
            try:
                ast.parse(source)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise BadTestsError(f"no Python: {error}") from None
        cases = self.list_cases()
        if not cases and not self.checks:
            raise BadTestsError("there are none")
        if self.checks and not self.names:
            raise BadTestsError("they name no function of the program")
        for given, expected in cases if self.function else ():
            parse_call(given, expected)


def parse_call(given: str, expected: str) -> tuple[list[Any], Any]:
    """Parses the arguments of a call, a line each, and its value. Raises BadTestsError."""
    try:
        return [json.loads(line) for line in given.split("\n")], json.loads(expected)
    except (ValueError, RecursionError) as error:
        raise BadTestsError(f"arguments or value are no JSON: {error}") from None


def read_cases(text: str) -> list[list[str]]:
    """Reads a JSON list of {input, output}. Raises BadTestsError."""
    try:
        cases = [[case["input"], case["output"]] for case in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadTestsError("no JSON list of input and output") from None
    if not all(isinstance(part, str) for case in cases for part in case):
        raise BadTestsError("input or output is no text")
    return cases


def decode_private_cases(text: str) -> list[list[str]]:
    """Decodes LiveCodeBench's private_test_cases: JSON, or base64 of zlib of a pickle of JSON.

    Reads the text that the pickle holds; nothing is unpickled.

    Raises BadTestsError.
    """
    if not text or text.lstrip().startswith("["):
        return read_cases(text or "[]")
    try:
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(base64.b64decode(text, validate=True), _MAX_TESTS_BYTES)
        if not unpacker.eof:
            raise BadTestsError(f"cut short, or larger than {_MAX_TESTS_BYTES:,} bytes")
        operations = [(opcode.name, value) for opcode, value, _ in pickletools.genops(pickled)]
    except (binascii.Error, zlib.error, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, BadTestsError):
            raise
        raise BadTestsError(f"not base64 of zlib of a pickle: {error}") from None
    texts = [value for name, value in operations if name in _UNPICKLED]
    others = {name for name, _ in operations} - {*_UNPICKLED, *_PICKLE_FRAME}
    if others or len(texts) != 1:
        raise BadTestsError("the pickle holds something other than one text")
    return read_cases(str(texts[0]))
