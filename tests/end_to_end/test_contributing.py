"""CONTRIBUTING's examples, followed in a copy of the project: they end in passing tests."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDERS = ("distill", "models", "configs", "benchmarks", "assets", "studies", "tests")
FILES = ("README.md", "CONTRIBUTING.md", "LOG.md", "Makefile", "pyproject.toml", "launch_tpu.sh")


def read_section(name: str) -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def read_blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def insert(path: Path, before: str, new: str) -> None:
    """Puts `new` before the only place of `before`."""
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, new + before))


def run(copy: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the page in the copy, by this interpreter."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0].endswith("python")
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=copy, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project without its history and environment."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def add_benchmark(copy: Path) -> None:
    """Steps 1 and 2."""
    section = read_section("Add a benchmark")
    (code,) = read_blocks(section, "python")
    prose = " ".join(section.split())
    path = re.search(r"`(distill/evaluation/tasks/(\w+)\.py)`, for example", prose)
    row = re.search(r'`("\w+": \w+\.TASK)` to `BENCHMARKS`', prose)
    assert path and row
    (copy / path[1]).write_text(code)
    table = copy / "distill/evaluation/tasks/__init__.py"
    insert(
        table,
        "from distill.evaluation.tasks.task import",
        f"from distill.evaluation.tasks import {path[2]}\n",
    )
    text = table.read_text()
    end = text.rindex("}")
    table.write_text(f"{text[:end]}    {row[1]},\n{text[end:]}")
    house = copy / "tests/house.py"
    house.write_text(
        re.sub(
            r'("evaluation\.tasks": (?:"[^"]*"\s*)*"[^"]*?)(\btask")',
            rf"\1{path[2]} \2",
            house.read_text(),
        )
    )


def add_objective(copy: Path) -> None:
    """Step 1."""
    row = read_blocks(read_section("Add an objective"), "python")[0]
    losses = copy / "distill/objectives/losses.py"
    text = losses.read_text()
    start = text.index("OBJECTIVES: dict")
    end = text.index("\n}", start)
    losses.write_text(f"{text[:end]}\n    {row.strip()}{text[end:]}")


def test_the_benchmark_of_the_page_evaluates(copy: Path) -> None:
    """Its steps 1, 2 and 5: a file, a row, a run on three rows."""
    add_benchmark(copy)
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)]
    (copy / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = read_blocks(read_section("Add a benchmark"), "bash")[-1]
    run(copy, command)
    out = re.search(r"--out=(\S+)", command)
    assert out
    summary = json.loads((copy / out[1] / "summary.json").read_text())
    assert summary["problems"] == 3 and summary["protocol"]["benchmark"] in command
    run(copy, "python -m pytest -q tests/house.py")


@pytest.mark.long
def test_the_tests_of_the_benchmark_pass(copy: Path) -> None:
    add_benchmark(copy)
    run(copy, read_blocks(read_section("Add a benchmark"), "bash")[0])


@pytest.mark.long
def test_the_objective_of_the_page_trains_and_its_tests_pass(copy: Path) -> None:
    add_objective(copy)
    commands = read_blocks(read_section("Add an objective"), "bash")
    assert len(commands) == 2
    for command in commands:
        done = run(copy, command)
    assert re.search(r"[1-9]\d* passed", done.stdout)


def test_the_objective_of_the_page_is_a_row(copy: Path) -> None:
    """It can be chosen by a flag, and what it says is a loss."""
    add_objective(copy)
    (row,) = re.findall(r'^"(\w+)"', read_blocks(read_section("Add an objective"), "python")[0])
    code = f"from distill.objectives.losses import OBJECTIVES; print(OBJECTIVES['{row}'])"
    assert "teacher=1.0" in run(copy, f"python -c {shlex.quote(code)}").stdout
