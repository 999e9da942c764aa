"""Evaluations that are killed."""

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


STOPS = [384, *range(0, 380, 19)]  # so many that some responses end before their limit


def strict(text: str) -> Any:
    """JSON whose numbers are finite."""

    def refuse(constant: str):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def summary_of(out: Path) -> dict[str, Any]:
    return strict((out / "summary.json").read_text())


def untimed(summary: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in summary.items() if k not in TIMES}


def killed(model: str, folder: Path, kills: int, problems: int, seed: int) -> None:
    """The verb, killed without a word at random rows, again and again, ends with the file of one
    that nobody killed. On arithmetic problems graded as mathematics, so with graders at work."""
    rows = load_problems("arithmetic", "", problems)
    asked = write(folder / "asked.jsonl", [row for _, row in rows])
    flags = ("--benchmark=math", f"--data={asked}", "--samples=2", "--temperature=1", "--k=1,2")
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
    draw, examples, died, at = random.Random(seed), folder / "broken" / "examples.jsonl", 0, 0
    for left in range(kills, 0, -1):
        at += draw.randint(0, max(0, (2 * problems - at) // (left + 1)))
        process = start("broken")
        while process.poll() is None:
            there = examples.read_bytes().count(b"\n") if examples.exists() else -1
            if there >= at:
                time.sleep(draw.random() * 0.05)
                process.kill()
                break
            time.sleep(0.002)
        process.communicate()
        died += process.returncode == -9
        at = max(at, examples.read_bytes().count(b"\n"))
    assert died >= min(kills, 2)
    finish("broken")
    assert examples.read_bytes() == (folder / "whole" / "examples.jsonl").read_bytes()
    found, expected = (untimed(summary_of(folder / name)) for name in ("broken", "whole"))
    assert found == expected
