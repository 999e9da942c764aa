"""Hostile answers, written to bring graders down."""

import time

from distill.rewards import graders
from distill.rewards.graders import Grader

HOSTILE = {
    "100 kB of LaTeX": r"\boxed{" + r"\frac{1}{2}+" * 9000 + "1}",
    "100 kB without a box": r"$\frac{1}{2}+$" * 8000,
    "newlines": "\n" * 100_000,
    "nested braces": r"\boxed{" + "{" * 480 + "1" + "}" * 480 + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 80 + "2" + "}" * 80 + "}",
    "power": "9**9**9",
    "LaTeX power": r"\boxed{9^{9^{9}}}",
    "factorial": r"\boxed{((9!)!)!}",
    "never closed": r"\boxed{42",
    "unicode": "\\boxed{４１} 🦙 \ud800 \x00",
    "code": "\\boxed{__import__('os')._exit(0)}",
    "empty": "",
    "empty box": r"\boxed{}",
    "deep parentheses": r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}",
    "huge exponent": r"\boxed{10^{10^{10}}+1}",
}


# Each takes all the time it gets; tests/long uses these.
MORE_HOSTILE = {
    "deep roots": r"\boxed{" + r"\sqrt{" * 100 + "2" + "}" * 100 + "}",
    "tower": r"\boxed{2^{3^{4^{5^{6}}}}}",
    "digits": r"\boxed{" + "7" * 900 + "^{" + "7" * 90 + "}}",
    "sum": r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^7}}",
    "equation": r"\boxed{x^{97}+x^{89}+x+1=0}",
}


def withstand(grader: Grader, hostile: dict[str, str], timeout: float) -> None:
    """Asserts that every answer is graded in time, that none is right, and that the graders still
    work."""
    started = time.monotonic()
    outcomes = grader.grade(graders.MATH, list(hostile.values()), ["42"] * len(hostile))
    # Each answer that is stopped costs its time limit and the start of a new worker.
    assert time.monotonic() - started < (timeout + 2) * len(hostile) + 10
    assert "correct" not in outcomes and set(outcomes) <= set(graders.OUTCOMES)
    assert "timeout" in outcomes
    twenty_boxes = r"\boxed{1} " * 19 + r"\boxed{\frac{84}{2}}"
    assert grader.grade(graders.MATH, [twenty_boxes, "#### 41.5"], ["42", "42"]) == [
        "correct",
        "wrong",
    ]
