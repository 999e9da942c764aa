"""Guards for parsers that are given hostile input, and strategies that draw it."""

import contextlib
import json
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from models.errors import UserError

SECONDS = 5.0  # of CPU time, in user mode; a parser that takes longer hangs
MAX_SECONDS = 60.0  # in all: other work may share the cores
Strategy = st.SearchStrategy


class Violation(BaseException):
    """What a parser must never do. No handler of Exceptions catches it."""


# Audit events of what no parser does: write, start something, or reach out.
_WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_REFUSED = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class")
_REFUSED += ("socket.connect", "socket.getaddrinfo", "ctypes.dlopen")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_WORKERS = ("pickle.find_class",)  # what a pool of processes needs, too
_root: str | None = None  # the only directory that may be written; None: nothing is watched
_others: set[int] = set()  # threads of earlier tests: what they do is not the parser's
_seen: list[str] = []


def _audit(event: str, arguments: tuple) -> None:
    if _root is None or threading.get_ident() in _others:
        return
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, int) or not (flags & _WRITE_FLAGS or set(mode or "") & set("wax+")):
            return
    elif event in _WRITES:
        path = arguments[0]
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # within an open directory
            path = f"{os.readlink(f'/proc/self/fd/{arguments[1]}')}/{path}"
    elif event in _REFUSED:
        _seen.append(f"{event}{arguments}")
        return
    else:
        return
    path = os.path.abspath(os.fsdecode(path))
    if not path.startswith(_root) and path != os.devnull:
        _seen.append(f"{event} {path}")


sys.addaudithook(_audit)  # it cannot be removed


def _stop(number: int, _: object) -> None:
    kind, seconds = ("", MAX_SECONDS) if number == signal.SIGALRM else (" of CPU time", SECONDS)
    raise Violation(f"still running after {seconds:g} s{kind}")


@contextlib.contextmanager
def guard(root: Path, has_workers: bool = False) -> Iterator[None]:
    """Context in which a parser may fail with UserError only, within SECONDS of CPU time and
    MAX_SECONDS in all, and may write only below `root`. Raises Violation, or the exception that it
    failed with."""
    global _root, _others
    sys.dont_write_bytecode = True  # modules are imported on first use
    # Not SIGPROF, which libtpu sends to the process that loaded it, as its own profiler's.
    before = {n: signal.signal(n, _stop) for n in (signal.SIGVTALRM, signal.SIGALRM)}
    _others = {thread.ident for thread in threading.enumerate() if thread.ident}
    _others.discard(threading.get_ident())
    _seen.clear()
    _root = os.path.abspath(root)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        with contextlib.suppress(UserError):
            yield
    finally:
        for number in before:  # at once: an alarm within these lines would undo the rest of them
            signal.signal(number, signal.SIG_IGN)
        _root = None
        for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    seen = [event for event in _seen if not (has_workers and event.startswith(_WORKERS))]
    if seen:
        raise Violation("; ".join(seen))


# Texts on which parsers have failed, here or elsewhere.
SNIPPETS = (
    *(
        "",
        " ",
        "\n",
        "\0",
        "\x1b[2J",
        "\ud800",
        "\udfff\ud800",
        "\ufeff",
        "\u202e",
        "é",
        "👍🏽",
        "٣",
    ),
    *("<think>", "</think>", "<think>\n\n</think>\n\n", "/no_think", "<|im_end|>", "<|im_start|>"),
    *("\\boxed{", "\\boxed{4}", "{", "}", "}}", "####", "#### 4", "\\frac{1}{", "9**9**9**9"),
    *(
        "1e999",
        "-0",
        "NaN",
        "null",
        "0x10",
        "1_000",
        "9" * 5000,
        "(" * 3000,
        "a" * 3000,
        "4",
        "4.0",
    ),
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        "~",
        "~root",
        "%s%n",
        "{0.__class__}",
    ),
    *(
        "[]",
        "{}",
        '{"name": "f", "arguments": {}}',
        "[" * 2000,
        "user",
        "assistant",
        "system",
        "tool",
    ),
)
NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 10**400, -(10**18), 0.0, -0.0, 0.5, 1e308, 1e-320)
NUMBERS += (float("nan"), float("inf"), float("-inf"))

texts: Strategy[str] = st.one_of(
    st.sampled_from(SNIPPETS),
    st.text(max_size=12),
    st.lists(st.sampled_from(SNIPPETS), max_size=4).map("".join),
)
scalars: Strategy[Any] = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(-3, 600), texts
)


def make_values(keys: Strategy[str] = texts, leaves: Strategy[Any] = scalars) -> Strategy[Any]:
    """Draws values of JSON whose objects have these keys."""
    return st.recursive(
        leaves,
        lambda x: st.lists(x, max_size=4) | st.dictionaries(keys, x, max_size=4),
        max_leaves=8,
    )


values = make_values()
_DELETE = types.SimpleNamespace()


def list_paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields the path of every value within a document."""
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in items if not isinstance(value, list) else enumerate(value):
        yield (*path, key)
        yield from list_paths(inner, (*path, key))


def mutate(document: Any, added: Strategy[str] = texts, leaves: Strategy[Any] = values) -> Strategy:
    """Draws documents that differ from a valid one in a few values."""
    paths = list(list_paths(document))
    change = st.tuples(st.sampled_from(paths), leaves | st.just(_DELETE))
    addition = st.tuples(added.map(lambda key: (key,)), leaves)

    def apply(changes: list[tuple[tuple, Any]]) -> Any:
        changed = json.loads(json.dumps(document))
        for path, value in changes:
            parent = changed
            try:
                for key in path[:-1]:
                    parent = parent[key]
                if value is not _DELETE:
                    parent[path[-1]] = value
                else:
                    del parent[path[-1]]
            except (LookupError, TypeError):
                continue  # an earlier change has removed it
        return changed

    return st.lists(change | addition, max_size=3).map(apply)


def mutate_bytes(content: bytes) -> Strategy[bytes]:
    """Draws contents that differ from a valid one in a few bytes, or end early."""
    at = st.integers(0, len(content))
    edit = st.tuples(at, st.integers(0, 8), st.binary(max_size=4) | texts.map(to_bytes))

    def apply(edits: list[tuple[int, int, bytes]], end: int | None) -> bytes:
        changed = content[:end]
        for start, removed, inserted in edits:
            changed = changed[:start] + inserted + changed[start + removed :]
        return changed

    return st.builds(apply, st.lists(edit, max_size=4), st.none() | at)


def to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def to_json(value: Any) -> bytes:
    """Writes a value as a hostile writer may: NaN and Infinity bare, half surrogate pairs."""
    return json.dumps(value).encode()


def as_files(documents: Strategy[Any]) -> Strategy[bytes]:
    """Draws the content of files of one document, mostly JSON."""
    broken = st.builds(lambda x, end: to_json(x)[:end], documents, st.integers(0, 200))
    return documents.map(to_json) | documents.map(to_json) | broken | st.binary(max_size=40)


def as_lines(rows: Strategy[Any]) -> Strategy[bytes]:
    """Draws the content of jsonl files."""
    line = rows.map(to_json) | rows.map(to_json) | st.binary(max_size=20)
    ends = st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b""])
    lines = st.lists(st.tuples(line, ends).map(b"".join), min_size=1, max_size=4)
    return lines.map(b"".join)
