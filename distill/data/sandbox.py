"""Bounds the time and the size of chat templates, which are programs that come with a model.

transformers renders them in Jinja's sandbox, which keeps them from Python's objects, but not from
loops without end or texts of gigabytes. `BoundedEnvironment` takes the sandbox's place in
transformers. It counts what a template does where it loops, calls, or makes a larger value of
smaller ones, in the thread that renders: a signal reaches the main thread only, and rows are
rendered in others, too.
"""

import contextlib
import functools
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

SECONDS = 2.0  # for one conversation; a real template takes milliseconds
MAX_SIZE = 10_000_000  # characters of a text or a value; ten times a long context
_MAX_ELEMENTS = 1_000_000  # of a value, those within others included
MAX_TEMPLATE = 1_000_000  # characters of a template; published ones have at most 20,000
_MAX_BITS = 10_000  # of an integer

_WIDTH = re.compile(r"\d{6,}")  # of a field that a format pads
_deadlines = threading.local()


@contextlib.contextmanager
def limit_time() -> Iterator[None]:
    """Context in which templates that this thread renders fail once SECONDS are over, in all. A
    context within another one ends with it."""
    before = getattr(_deadlines, "end", math.inf)
    _deadlines.end = min(before, time.monotonic() + SECONDS)
    try:
        yield
    finally:
        _deadlines.end = before


def _check_time() -> None:
    if time.monotonic() > getattr(_deadlines, "end", math.inf):
        raise SecurityError(f"it takes longer than {SECONDS:g} s")


def _check_size(*values: Any) -> None:
    """Raises SecurityError if values have more than MAX_SIZE characters or _MAX_ELEMENTS."""
    characters, elements, stack = 0, 0, list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, list | tuple):
            stack += value
        elements += 1
        if characters > MAX_SIZE or elements > _MAX_ELEMENTS:
            raise SecurityError("a text or a value is too large")


def _get_length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _check_arguments(*values: Any) -> None:
    """Raises SecurityError for arguments that a function may make something too large of."""
    _check_time()
    _check_size(*values)
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_SIZE:
            raise SecurityError(f"a number above {MAX_SIZE:,} is given to a function")


def _check_format(text: Any) -> None:
    if isinstance(text, str) and _WIDTH.search(text):
        raise SecurityError("a format has a field of 100,000 characters or more")


def _bound_filter(name: str, function: Callable) -> Callable:
    @functools.wraps(function)  # with Jinja's marks of what is passed first
    def call(*arguments: Any, **options: Any) -> Any:
        _check_arguments(*arguments, *options.values())
        if name == "format":
            _check_format(arguments[0])
        result = function(*arguments, **options)
        _check_size(result)
        return result

    return call


class _BoundLoops(NodeTransformer):
    """Makes each round of a loop, and each concatenation, a call."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("count_round"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        function = nodes.EnvironmentAttribute("join_texts")
        call = nodes.Call(function, node.nodes, [], None, None)
        call.set_lineno(node.lineno)
        return call


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which everything that grows or takes time is bounded."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, finalize=_check_output, **options)
        self.filters = {name: _bound_filter(name, f) for name, f in self.filters.items()}
        self.globals.pop("lipsum", None)  # makes text of any length

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_TEMPLATE:
            raise SecurityError(f"it has more than {MAX_TEMPLATE:,} characters")
        return _BoundLoops().visit(super()._parse(source, name, filename))

    def count_round(self) -> None:
        """Is called in each round of a loop; `call` looks at the time."""

    def join_texts(self, *parts: Any) -> str:
        text = "".join(map(str, parts))
        _check_size(text)
        return text

    def concat(self, parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        texts, size = [], 0
        for part in parts:
            _check_time()
            size += len(part)
            if size > MAX_SIZE:
                raise SecurityError(f"it writes more than {MAX_SIZE:,} characters")
            texts.append(part)
        return "".join(texts)

    def call(self, context: Any, function: Any, /, *arguments: Any, **options: Any) -> Any:
        _check_arguments(*arguments, *options.values())
        if getattr(function, "__name__", "") in ("format", "format_map"):
            _check_format(getattr(function, "__self__", ""))
        result = super().call(context, function, *arguments, **options)
        if isinstance(result, str | list):
            _check_size(result)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_time()
        if operator == "%":
            _check_format(left)
        elif isinstance(left, int) and isinstance(right, int):
            factor = max(0, right) if operator == "**" else 1
            if left.bit_length() * factor + right.bit_length() > _MAX_BITS:
                raise SecurityError(f"a number has more than {_MAX_BITS:,} bits")
        elif operator == "*":
            count, other = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(count, int) and _get_length(other) * count > MAX_SIZE:
                raise SecurityError(f"a text is repeated to more than {MAX_SIZE:,} characters")
        elif _get_length(left) + _get_length(right) > MAX_SIZE:
            raise SecurityError(f"a text has more than {MAX_SIZE:,} characters")
        return super().call_binop(context, operator, left, right)


def _check_output(value: Any) -> Any:
    """Checks a value before it is written, as a text of which parts may occur many times."""
    if not isinstance(value, str):
        _check_size(value)
    return value


# The name by which transformers finds the sandbox. Where a later version has another one, this
# line fails, and no template is rendered without bounds.
_ = chat_template_utils.ImmutableSandboxedEnvironment
chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
