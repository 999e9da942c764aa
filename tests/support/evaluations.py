"""Helpers for evaluations that are killed and resumed."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from distill.evaluation.problems import load_problems
from tests.support.paths import ROOT
from tests.support.verbs import write

TIMES = ("seconds", "seconds_per_problem", "tokens_per_second", "memory")


STOPS = [384, *range(0, 380, 19)]  # enough that some responses end before their limit


def strict(text: str) -> Any:
    """Parses JSON and refuses numbers that are not finite."""

    def refuse(constant: str):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def summary_of(out: Path) -> dict[str, Any]:
    return strict((out / "summary.json").read_text())


def untimed(summary: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in summary.items() if k not in TIMES}


def killed(model: str, folder: Path, kills: int, problems: int, seed: int) -> None:
    """Kills the verb without warning at random rows several times; asserts that it ends with the
    files of an undisturbed run. Arithmetic problems are graded as mathematics, so that graders are
    at work."""
    rows = load_problems("arithmetic", "", problems)
    questions = write(folder / "questions.jsonl", [row for _, row in rows])
    flags = ("--benchmark=math", f"--data={questions}", "--samples=2", "--temperature=1", "--k=1,2")
    limits = ("--max_new_tokens=12", "--batch_size=4", "--template={question}", f"--model={model}")

    def start(out: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "distill.evaluate", *flags, *limits]
        return subprocess.Popen(
            [*command, f"--out={folder / out}"], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )

    def finish(out: str) -> str:
        _, errors = (process := start(out)).communicate(timeout=300)
        assert process.returncode == 0, errors
        return errors

    finish("whole")
    draw, examples, died, kill_at = random.Random(seed), folder / "broken" / "examples.jsonl", 0, 0
    for left in range(kills, 0, -1):
        kill_at += draw.randint(0, max(0, (2 * problems - kill_at) // (left + 1)))
        process = start("broken")
        while process.poll() is None:
            num_rows = examples.read_bytes().count(b"\n") if examples.exists() else -1
            if num_rows >= kill_at:
                time.sleep(draw.random() * 0.05)
                process.kill()
                break
            time.sleep(0.002)
        process.communicate()
        died += process.returncode == -9
        kill_at = max(kill_at, examples.read_bytes().count(b"\n"))
    assert died >= min(kills, 2)
    finish("broken")
    assert examples.read_bytes() == (folder / "whole" / "examples.jsonl").read_bytes()
    actual, expected = (untimed(summary_of(folder / name)) for name in ("broken", "whole"))
    assert actual == expected
