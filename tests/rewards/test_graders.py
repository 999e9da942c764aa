"""Tests the graders: agreement with published labels, and hostile answers."""

import itertools
import json
import operator
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.rewards import graders, ifeval
from distill.rewards.graders import (
    Grader,
    GradingRule,
    grade_arithmetic,
    grade_math,
    strip_thinking,
)
from tests.support.answers import HOSTILE, withstand
from tests.support.paths import DATA, ROOT

LABELLED = DATA / "gsm8k" / "graded_completions.jsonl"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout=2.0, workers=2) as grader:
        yield grader


@pytest.mark.parametrize(
    ("response", "final"),
    [
        ("<think>\n1+1=2\n</think>\n\n2", "2"),
        ("<think>\n</think> 1 <think> 2 </think> 3", "3"),
        ("no thinking: 4\n", "no thinking: 4"),
        ("1+1=2\n</think>\n\n2", "2"),  # the prompt opened the block
        ("</think></think>", ""),
        ("<think>\n1+1=2\n", None),
        ("<think>a</think> 5 <think> again", None),
        ("", ""),
    ],
)
def test_final_text_follows_the_thinking_block(response: str, final: str | None) -> None:
    assert strip_thinking(response) == final


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        ("<think>\n9-2=7\n</think>\n\n7", "correct"),
        ("7", "correct"),
        ("<think>\n9-2=7\n</think>\n\n8", "wrong"),
        ("<think>\n9-2=7\n</think>\n\n-7", "wrong"),
        ("<think>\n9-2=7\n</think>\n\n7 7", "no_answer"),
        ("<think>\n9-2=7\n</think>\n\n7.0", "no_answer"),
        ("<think>\n9-2=7\n</think>\n\n", "no_answer"),
        ("<think>\n9-2=7", "no_answer"),
        ("٧", "no_answer"),
        ("7" * 100_000, "no_answer"),
    ],
)
def test_arithmetic_needs_the_exact_integer(response: str, outcome: str) -> None:
    assert grade_arithmetic(response, "7") == outcome


@pytest.mark.parametrize(
    ("response", "answer", "outcome"),
    [
        (r"<think>\boxed{1}</think>so \boxed{42}.", "42", "correct"),
        (r"\boxed{1}, no: \boxed{42}", "42", "correct"),
        (r"\boxed{\frac{1}{2}}", "0.5", "correct"),
        (r"\boxed{\frac{1}{2}}", r"\frac{2}{4}", "correct"),
        (r"\boxed{41} but also 42", "42", "wrong"),
        (r"it is 42, \boxed{42", "42", "no_answer"),
        ("<think> A: 42", "42", "no_answer"),
        ("2 and 3\nA: 1,042", "1042", "correct"),
        ("#### $42 for 7 days", "42", "correct"),
        ("The answer is 42. I checked 3 times.", "42", "correct"),
        ("The final answer is: -$4.50", "-4.5", "correct"),
        ("6 * 7 = 42", "42", "correct"),
        ("#### 43", "42", "wrong"),
        ("I do not know", "42", "no_answer"),
        (r"\boxed{" + "4" * 2000 + "}", "42", "unparsed"),
        (r"\boxed{\frac{4}{}", "42", "no_answer"),
        (r"\boxed{((}", "42", "unparsed"),
        (r"\boxed{\text{forty-two}}", "42", "wrong"),
        (r"\boxed{\text{east}}", r"\text{east}", "correct"),
        (r"\boxed{}", "42", "no_answer"),
    ],
)
def test_math_answers_are_extracted_and_compared(response: str, answer: str, outcome: str) -> None:
    assert grade_math(response, answer) == outcome


def test_integer_comparison_agrees_with_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ["0", "-0", "007", "7", "-7", "70", "10", "999999999999999999", "999999999999999998"]
    pairs = list(itertools.product(whole, whole))
    quick = [graders.grade_without_algebra(rf"\boxed{{{a}}}", b) for a, b in pairs]
    assert quick.count("correct") == len(whole) + 4
    monkeypatch.setattr(graders, "grade_without_algebra", lambda response, answer: None)
    assert quick == [grade_math(rf"\boxed{{{a}}}", b) for a, b in pairs]


@pytest.mark.skipif(not LABELLED.exists(), reason="no labelled completions beside the project")
def test_grades_agree_with_published_labels(grader: Grader) -> None:
    with LABELLED.open() as lines:
        rows = [json.loads(line) for line in lines][::4]
    outcomes = grader.grade(
        graders.MATH, [row["completion"] for row in rows], [row["answer"] for row in rows]
    )
    agree = [(o == "correct") == row["is_correct"] for o, row in zip(outcomes, rows, strict=True)]
    assert len(rows) >= 600 and sum(agree) >= 0.995 * len(rows)


# Qwen's evaluator compared "10000" with the reference 10{,}000 as strings.
MISLABELLED = ["math-cot100-72"]


def test_grades_agree_with_labels_of_math_completions(grader: Grader, shared_data: Path) -> None:
    """All 400 agree, except one whose label is wrong."""
    lines = (shared_data / "math500" / "graded_completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = [(text, row["answer"]) for row in rows for text in row["completions"]]
    names = [(row["id"], i) for row in rows for i in range(len(row["completions"]))]
    labels = [label for row in rows for label in row["is_correct"]]
    outcomes = grader.grade(graders.MATH, *map(list, zip(*pairs, strict=True)))
    differ = [
        name
        for name, outcome, label in zip(names, outcomes, labels, strict=True)
        if (outcome == "correct") != label
    ]
    assert len(names) == 400 and [name for name, _ in differ] == MISLABELLED
    assert "error" not in outcomes and "timeout" not in outcomes


def test_hostile_answers_time_out_and_the_pool_survives(grader: Grader) -> None:
    withstand(grader, HOSTILE, 2.0)


def test_answers_are_never_executed(grader: Grader, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"__import__('os').system('touch {marker}')"
    forms = [code, rf"\boxed{{{code}}}", rf"\boxed{{\text{{{code}}}}}", f"A: {code}", f"$${code}$$"]
    forms += [
        rf"\boxed{{eval({code!r})}}",
        rf"\boxed{{x if {code} else 1}}",
        f"<think>{code}</think>",
    ]
    outcomes = grader.grade(graders.MATH, forms, ["42"] * len(forms))
    outcomes += grader.grade(graders.MATH, ["42"] * len(forms), forms)  # nor those of a data file
    assert "correct" not in outcomes and not marker.exists()


def test_parse_failure_wrong_answer_and_timeout_differ(grader: Grader) -> None:
    answers = [r"\boxed{((}", r"\boxed{41}", r"\boxed{9^{9^{9^{9}}}}", "I do not know"]
    assert grader.grade(graders.MATH, answers, ["42"] * 4) == [
        "unparsed",
        "wrong",
        "timeout",
        "no_answer",
    ]


def test_grader_memory_is_bounded(grader: Grader) -> None:
    bomb: list = [20 << 30]
    rule = GradingRule(operator.mul)  # pyright: ignore[reportArgumentType]
    assert grader.grade(rule, ["x"], bomb) == ["error"]
    assert grader.grade(graders.MATH, ["42.0"], ["42"]) == ["correct"]


ORPHAN = """
import operator, os, signal, sys, time
from distill.rewards import graders
open("imported", "a").write("x")
if __name__ == "__main__":
    with graders.Grader(timeout=1.0, workers=1) as grader:
        grader.grade(graders.MATH, ["1.0"], ["1"])
        power = graders.GradingRule(operator.pow)
        future = grader.submit(power, 7, 10**9)  # minutes within one bytecode
        while not future.running():
            time.sleep(0.01)
        print(*[w.pid for w in grader._pool._pool_manager.worker_manager.workers.values()])
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(pid: int) -> bool:
    """Returns whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_hanging_worker_does_not_outlive_its_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    pid_file = tmp_path / "said"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with pid_file.open("w") as file:
        command = [sys.executable, str(script)]
        code = subprocess.call(command, stdout=file, env=environment, cwd=tmp_path)
    (pid,) = map(int, pid_file.read_text().split())
    assert code == -9 and alive(pid)
    assert (tmp_path / "imported").read_text() == "x"  # workers do without the main module
    deadline = time.monotonic() + 1.0 + graders._GRACE_SECONDS + 10  # the last on a busy machine
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(pid)


def test_hanging_and_dying_workers_are_replaced(grader: Grader) -> None:
    rule = GradingRule(operator.call)  # pyright: ignore[reportArgumentType]  # f(x) of f, x
    calls, arguments = [time.sleep, os._exit, operator.neg, str], [60, 1, "x", "correct"]
    outcomes = grader.grade(rule, calls, arguments)  # pyright: ignore[reportArgumentType]
    assert outcomes == ["timeout", "error", "error", "correct"]
    assert grader.grade(graders.MATH, ["#### 42.0"], ["42"]) == ["correct"]


def test_workers_warm_up_on_an_answer_that_takes_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their first answer would pay for the imports."""
    monkeypatch.setattr(graders.resource, "setrlimit", lambda *_: None)  # not of this process
    grades: list[tuple[str, str]] = []
    graders._init_worker(lambda *pair: grades.append(pair) or "correct")
    (pair,) = grades
    assert graders.grade_without_algebra(*pair) is None and grade_math(*pair) == "correct"


def test_integer_answers_start_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with Grader() as grader:
        monkeypatch.setattr(grader, "_pool", None)
        assert grader.grade(graders.ARITHMETIC, ["7", "8"], ["7", "7"]) == ["correct", "wrong"]
        assert grader.grade(graders.MATH, ["#### 7", "8"], ["7", "7"]) == ["correct", "wrong"]
        assert grader._pool is None
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("rule", "answer", "can"),
    [
        *(
            (graders.MATH, text, True)
            for text in (
                "72",
                "\\frac{1}{2}",
                "\\{1,2\\}",
                "(1, 2)",
                "+",
                "None",
                "\\left\\{ 5 \\right.",
            )
        ),
        *((graders.MATH, text, False) for text in ("", "$", "\\frac{1", "}{1", "{}", "1" * 1001)),
        *((graders.MATH, text, False) for text in ("NaN", "nan", "\\\\{", "€", ".", " ")),
        *((graders.ARITHMETIC, text, text == "-7") for text in ("-7", "seven", "7.5", "")),
        (ifeval.INSTRUCTIONS, '{"prompt": "p", "ids": ["x:y"], "kwargs": [{}]}', True),
        *((ifeval.INSTRUCTIONS, text, False) for text in ("{}", "4", "[")),
    ],
)
def test_reference_answers_are_checked_for_gradability(
    rule: GradingRule, answer: str, can: bool
) -> None:
    assert rule.is_gradable(answer) is can
