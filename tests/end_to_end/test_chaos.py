"""Tests that a run which is killed again and again ends with the bits of an undisturbed one."""

import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize(
    "flags",
    [
        ("--stages=opd", "--steps=3", "--kills=2"),
        pytest.param(("--kills=50",), marks=pytest.mark.long),
        pytest.param(("--kills=20", "--processes=2", "--steps=5"), marks=pytest.mark.long),
    ],
)
def test_a_run_killed_again_and_again(flags: tuple[str, ...]) -> None:
    """`make chaos` prints the table of kills."""
    words = [sys.executable, "-m", "tests.support.chaos", *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
