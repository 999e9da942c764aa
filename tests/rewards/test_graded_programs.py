"""Tests that programs get the verdict of plain execution, and cannot forge one."""

import base64
import contextlib
import ctypes
import json
import os
import pickle
import resource
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill.evaluation.tasks import humaneval
from distill.rewards import program_tests, programs, sandbox
from distill.rewards.graders import Grader
from distill.rewards.program_tests import BadTestsError, ProgramTests
from tests.support.answers import HOSTILE
from tests.support.programs import find_isolation, mutate, run_plainly, skip_without_sandbox
from tests.support.small_problems import make_rows


@pytest.fixture(autouse=True)
def require_a_sandbox() -> None:
    skip_without_sandbox()


def fence(program: str, text: str = "") -> str:
    return f"{text}\n```python\n{program}\n```\n"


ADD = ProgramTests(
    "add",
    checks=["def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0\n\ncheck(add)"],
    names=["add"],
)
SUM = ProgramTests("sum", cases=[["1 2\n", "3\n"], ["2 3\n", "5"]])
TOTAL = ProgramTests("total", cases=[["[1, 2]\n3", "6"], ["[]\n1", "1"]], function="total")


def grade(program: str, tests: ProgramTests = ADD) -> tuple[object, object]:
    result = (programs.grade_functions if tests.checks else programs.grade_contest)(
        fence(program), tests.to_answer()
    )
    return result["outcome"], result.get("score")


def compare_with_plain_execution(seeds: range, folder: Path) -> dict[bool, int]:
    """Grades each problem's solution (seed -1) and mutated ones; returns the count of verdicts."""
    rows, counts = make_rows(), {True: 0, False: 0}

    def compare(seed: int) -> bool:
        row = rows[seed % len(rows)]
        head = row["prompt"].split("\n")[3]
        source = f"{head}\n{row['canonical_solution']}"
        program = source if seed < 0 else mutate(source, seed)
        answer = humaneval.adapt_row(row, "x")["answer"]
        own = folder / str(seed)
        own.mkdir()
        plain = run_plainly(row, program, own)
        found = programs.grade_functions(fence(program), answer)
        assert found["outcome"] == ("correct" if plain else "wrong"), (program, found)
        return plain

    with ThreadPoolExecutor(2) as pool:
        for verdict in pool.map(compare, seeds):
            counts[verdict] += 1
    return counts


def test_right_and_mutated_solutions_agree_with_plain_execution(tmp_path: Path) -> None:
    counts = compare_with_plain_execution(range(-5, 15), tmp_path)
    assert min(counts.values()) >= 5, counts


@pytest.mark.long
def test_many_mutated_solutions_agree_with_plain_execution(tmp_path: Path) -> None:
    counts = compare_with_plain_execution(range(-20, 220), tmp_path)
    assert min(counts.values()) >= 40, counts


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "def add(xs):\n    import os\n    os._exit(0)",
        "class Equal:\n    __eq__ = lambda self, other: True\ndef add(xs):\n    return Equal()",
        "class E(int):\n    __eq__ = lambda self, other: True\ndef add(xs):\n    return E()",
        "import builtins\nbuiltins.AssertionError = None\ndef check(f):\n    pass\nadd = 1",
        "import sys, types\nsys.modules['checks'] = types.ModuleType('checks')\nadd = print",
        # Answers the harness as it answers a passed test, on every descriptor.
        "import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'[{}, {}]\\n' * 9)\n"
        "    except OSError:\n        pass",
        # Looks for the expected values in the harness's frames and objects.
        "import gc, sys\ndef add(xs):\n    frame, seen = sys._getframe(), ''\n    while frame:\n"
        "        seen += str(frame.f_locals)\n        frame = frame.f_back\n"
        "    return 3 if 'assert' in seen or 'assert' in str(gc.get_objects()) else -1",
        "import glob\ndef add(xs):\n    for name in glob.glob('/tmp/*'):\n"
        "        if 'ass' 'ert f(' in open(name).read():\n"
        "            return sum(xs)\n    return -1",
        "import atexit, os\natexit.register(os._exit, 0)\ndef add(xs):\n    return None",
        "def add(xs):\n    raise SystemExit(0)",
        "def add(xs):\n    return float('nan')",
    ],
)
def test_verdicts_cannot_be_forged(program: str) -> None:
    assert grade(program) == ("wrong", 0.0)


def test_programs_do_not_see_expected_outputs() -> None:
    reader = "import glob, os\nfor name in glob.glob('/tmp/**', recursive=True):\n"
    reader += (
        "    if os.path.isfile(name) and name != '/tmp/main.py':\n        print(open(name).read())"
    )
    reader += "\nfor fd in range(3, 64):\n    try:\n        os.set_blocking(fd, False)\n"
    reader += "        print(os.read(fd, 10**6).decode())\n"
    reader += "    except OSError:\n        pass"
    for tests in (SUM, TOTAL):
        assert grade(reader, tests) == ("wrong", 0.0)
        assert grade("import os\nos._exit(0)", tests) == ("wrong", 0.0)
    equal = "class Equal:\n    __eq__ = lambda self, other: True\n"
    assert grade(f"{equal}def total(xs, y):\n    return Equal()", TOTAL) == ("wrong", 0.0)


@pytest.mark.parametrize("kind", ["bubblewrap", "user namespaces"])
def test_each_kind_of_isolation_grades_each_kind_of_tests(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = find_isolation(kind)
    monkeypatch.setattr(sandbox, "find_isolation", lambda: way)
    assert grade("def add(xs):\n    return sum(xs)") == ("correct", 1.0)
    assert grade("print(sum(map(int, input().split())))", SUM) == ("correct", 1.0)
    assert grade("def total(xs, y):\n    return sum(xs) + y", TOTAL) == ("correct", 1.0)
    assert grade("import os\nos._exit(0)", TOTAL) == ("wrong", 0.0)


def test_scripts_are_graded_by_what_they_print() -> None:
    assert grade("print(sum(map(int, input().split())))", SUM) == ("correct", 1.0)
    assert grade("print(3)", SUM) == ("wrong", 0.5)
    assert grade("a, b = map(int, input().split())\nprint(f'{a + b}.0  ')\n", SUM)[0] == "correct"
    assert grade("if __name__ == '__main__':\n    print(gcd(6, 9))", SUM) == ("wrong", 0.5)
    assert grade("print(3)\nraise ValueError", SUM) == ("wrong", 0.0)
    late = "from __future__ import annotations\nx: List[int] = [3]\nprint(*x)"
    assert grade(late, SUM) == ("wrong", 0.5)


def test_functions_and_methods_are_called() -> None:
    method = "class Solution:\n    def total(self, xs: List[int], y: int) -> int:\n"
    assert grade(f"{method}        return sum(xs) + y", TOTAL) == ("correct", 1.0)
    assert grade(f"{method}        return sum(xs) + 1", TOTAL) == ("wrong", 0.5)
    assert grade("def total(xs, y):\n    print('noise')\n    return sum(xs) + y", TOTAL)[1] == 1
    assert grade("def other(xs, y):\n    return 6", TOTAL) == ("wrong", 0.0)
    assert grade("def total(xs, y:", TOTAL) == ("wrong", 0.0)
    pair = ProgramTests("pair", cases=[["1", "[1, [2]]"]], function="pair")
    assert grade("def pair(x):\n    return (1, [2])", pair) == ("correct", 1.0)  # as the authors
    assert grade("def pair(x):\n    return [1, (2,)]", pair) == ("wrong", 0.0)


def test_tests_may_use_objects_of_the_program_and_arguments_that_it_changes() -> None:
    """As MBPP's tests build linked nodes, and others look at a list that was sorted in place."""
    tests = ProgramTests(
        "nodes",
        checks=[
            "assert depth(root) == 2",
            "xs = [3, 1]\nassert order(xs) is None and xs == [1, 3]",
            "try:\n    depth(0)\n    assert False\nexcept AttributeError:\n    pass",
            "assert list(walk(2)) == [0, 1] and walk(2) != [0, 1]",
            "assert walk(1) and sorted([2, 1]) == [1, 2]",
        ],
        names=["Node", "depth", "order", "walk"],
        setup="root = Node(1)\nroot.left = Node(2)",
    )
    program = (
        "class Node:\n    def __init__(self, x):\n        self.x, self.left = x, None\n"
        "def depth(n):\n    return 1 + (depth(n.left) if n.left else 0)\n"
        "def order(xs):\n    xs.sort()\n"
        "def walk(n):\n    yield from range(n)\n"
        "def sorted(xs):\n    return 0\n"
    )
    assert grade(program, tests) == ("correct", 1.0)
    assert grade(program.replace("xs.sort()", "pass"), tests) == ("wrong", 0.8)


def test_values_survive_the_way() -> None:
    values = [
        *(None, True, 0, -1.5, 10**4000, "é\ud800", b"\x00", 1j, (1, (2,)), {1: [2], (1,): {3}}),
        *(frozenset({1}), [[]], {}, set(), (), range(1, 9, 2), float("inf"), "'\n\0"),
    ]
    checks = [f"assert same({value!r}) == {value!r}" for value in values]
    checks += [f"assert type(same({value!r})) is {type(value).__name__}" for value in values[1:]]
    tests = ProgramTests("same", checks=checks, names=["same"], setup="from math import inf")
    result = programs.grade_functions(fence("def same(x):\n    return x"), tests.to_answer())
    assert result["outcome"] == "correct", result


def test_a_test_that_cannot_be_run_here_is_an_error() -> None:
    tests = ProgramTests("f", checks=["assert f(lambda x: x) == 1"], names=["f"])
    assert grade("def f(x):\n    return 1", tests) == ("error", None)
    ending = ProgramTests("f", checks=["import os\nos._exit(0)"], names=["f"])
    assert grade("def f(x):\n    return 1", ending) == ("error", None)
    assert programs.grade_contest("x", "0.5")["outcome"] == "error"
    for check in ("import missing_module", "assert f(1) == undefined"):
        lacking = ProgramTests("f", checks=[check], names=["f"])
        assert grade("def f(x):\n    return 1", lacking) == ("error", None)
    lacking = ProgramTests("f", checks=["assert f(1)"], names=["f"], setup="import missing_module")
    assert grade("def f(x):\n    return 1", lacking) == ("error", None)
    imports = ProgramTests("f", checks=["assert f(1) == 1"], names=["f"])
    assert grade("import missing_module\ndef f(x):\n    return 1", imports) == ("wrong", 0.0)
    assert grade("def f(x):\n    return undefined", imports) == ("wrong", 0.0)


def test_a_slow_program_is_wrong_and_further_tests_are_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(programs, "Limits", lambda seconds: sandbox.Limits(seconds=1))
    program = "import time\nif input() == '2 3':\n    time.sleep(99)\nprint(3)"
    tests = ProgramTests("sum", cases=[*SUM.cases, *SUM.cases])
    answer = tests.to_answer()
    result = programs.grade_contest(fence(program), answer)
    assert (result["outcome"], result["passed"], result["tests"]) == ("wrong", 1, 4)
    assert result["failure"] == "limit of time"
    monkeypatch.setattr(programs, "PROGRAM_SECONDS", 0.0)
    result = programs.grade_contest(fence("print(sum(map(int, input().split())))"), answer)
    assert (result["outcome"], result["passed"]) == ("timeout", 1)


def test_programs_are_found_in_responses() -> None:
    prompt = "import math\n\ndef add(a, b):\n    '''Adds.'''\n"
    tests = ProgramTests("add", checks=["assert add(1, 2) == 3"], names=["add"], prompt=prompt)

    def find(response: str, tests: ProgramTests = SUM) -> str | None:
        return programs.extract_program(response, tests)

    assert find(f"<think>{fence('no')}</think>{fence('a')}{fence('b', 'or')}end") == "b"
    assert find(f"<think>{fence('a')}") is None and find("<think>a</think>") is None
    assert find("text ```x``` and\n```python\nprint(1)") is None
    assert find("1. So:\n   ```py\n   if x:\n       y\n   ```\n") == "if x:\n    y"
    for response in (
        "    return a + b\n\nprint(add(1, 2))\nmore",
        fence("def add(a, b):\n    return a + b"),
        fence("from __future__ import annotations\ndef add(a, b):\n    return a + b"),
        fence("    return a + b"),
        "def add(a, b):\n    return a + b\n",
    ):
        program = find(response, tests)
        assert program and programs.grade_functions(response, tests.to_answer())["score"] == 1
    assert find("I would add a and b.", tests) is None
    assert programs.grade_functions("", tests.to_answer())["outcome"] == "no_answer"


def test_outputs_are_compared_as_the_authors_do() -> None:
    for printed, expected, same in (
        (" 1 2 \n\n", "1 2", True),
        ("1\n2", "1 2", False),
        ("1.50 2", "1.5 2.0", True),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("YES", "Yes", False),
        ("50000000000000001", "50000000000000000", False),
        ("nan", "nan", True),
        ("sNaN 1", "1 1", False),
        ("1e999999999", "1", False),
    ):
        assert programs.have_same_output(printed, expected) == same, (printed, expected)


def pack(content: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


def test_private_tests_are_decoded_and_never_unpickled() -> None:
    cases = [{"input": "1\n", "output": "é", "testtype": "stdin"}]
    for text in (json.dumps(cases), pack(json.dumps(cases)), pack(json.dumps(cases * 9000))):
        assert program_tests.decode_private_cases(text)[0] == ["1\n", "é"]
    assert program_tests.decode_private_cases("") == []

    class Evil:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("unpickled",))

    bomb = base64.b64encode(zlib.compress(b"\0" * 2**20)).decode()
    good = pack("[]")
    for text in (pack(Evil()), pack(["[]", "[]"]), pack(3), pack("{"), "????", bomb, good[:-8]):
        with pytest.raises(BadTestsError):
            program_tests.decode_private_cases(text)


def test_hostile_texts_are_no_programs() -> None:
    rule, names = programs.FUNCTIONS, [*HOSTILE]
    with Grader(timeout=20) as grader:
        outcomes = grader.grade(rule, [HOSTILE[n] for n in names], [ADD.to_answer()] * len(names))
    assert dict(zip(names, outcomes, strict=True)) == dict.fromkeys(names, "no_answer")


@pytest.mark.long
def test_trivial_programs_are_graded_at_20_a_second_on_two_cores() -> None:
    """By the time that they take of the processors, as others may use them too."""
    rows = make_rows()
    pairs = [
        (fence(f"{row['prompt']}\n{row['canonical_solution']}"), humaneval.adapt_row(row, "x"))
        for row in rows
    ] * 25
    texts, answers = [text for text, _ in pairs], [row["answer"] for _, row in pairs]
    assert len(texts) == 500
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    # Of a sandbox that is killed the kernel tells the time only to who waits for its processes.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    with Grader(workers=2) as grader:
        outcomes = grader.grade(programs.FUNCTIONS, texts, answers)
    wall = time.monotonic() - started
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert set(outcomes) == {"correct"}
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds / 500:.4f} s of a processor for each program; {500 / wall:.1f} a second")
    assert seconds / 500 <= 0.1
