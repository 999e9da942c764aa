"""Tests the progress of long tasks: plain lines, the live line of a terminal, and time left."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from distill.runtime import compiling, console, progress
from tests.support.paths import ROOT


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still, and a progress thread that sees nothing by itself."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "POLL_SECONDS", 3600.0)
    return now


def test_plain_lines_come_with_the_first_figures_then_rarely_and_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture
) -> None:
    with progress.show_progress(1000, 200, "sft") as bar:
        for done in range(201, 1001):
            clock[0] += 0.1
            bar.update(done, f"loss {1 / done:.4f}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "sft 201/1,000: 1 min left, loss 0.0050"
    assert lines[1] == "sft 302/1,000: 1 min left, loss 0.0033"
    assert lines[-1] == "sft 1,000/1,000: loss 0.0010" and len(lines) == 9


def test_without_figures_a_short_task_prints_its_end_only(
    clock: list[float], capsys: pytest.CaptureFixture
) -> None:
    with progress.show_progress(46, 0, "generate") as bar:
        for done in range(1, 47):
            clock[0] += 0.01
            bar.update(done)
    assert capsys.readouterr().err == "generate 46/46\n"


def test_a_minor_task_is_silent_unless_it_takes_long(
    clock: list[float], capsys: pytest.CaptureFixture
) -> None:
    for seconds, expected in (
        (0.1, []),
        (4.0, ["load 3/4: 4 s left", "load 4/4"]),
    ):
        with progress.show_progress(4, 0, "load", is_minor=True) as bar:
            for done in range(1, 5):
                clock[0] += seconds
                bar.update(done)
        assert capsys.readouterr().err.splitlines() == expected


def test_time_left_leaves_out_what_was_compiled(
    clock: list[float], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step compiles for 50 s; the others take 2 s."""
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(progress, "PRINT_SECONDS", 0.0)
    compiles = threading.Event()
    compiles.set()
    monkeypatch.setattr(compiling, "is_compiling", lambda thread: compiles.is_set())
    with progress.show_progress(10, 0, "opd") as bar:
        for _ in range(5):
            clock[0] += 10.0
            wait_until(lambda: bar._poll_time == clock[0])
        compiles.clear()
        clock[0] += 5.0
        bar.update(1)
        for done in (2, 3):
            clock[0] += 2.0
            bar.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "opd 0/10: compiling",
        "opd 0/10: compiling for 40 s",  # 30 s after the first
        "opd 1/10",
        "opd 2/10: 16 s left",
        "opd 3/10: 14 s left",
    ]


def wait_until(reached) -> None:
    deadline = time.time() + 10
    while not reached():
        assert time.time() < deadline
        time.sleep(0.001)


def test_rows_that_run_together_foretell_nothing_before_one_batch_has_ended(
    clock: list[float], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows end after 10 s, the first of them alone would foretell hours."""
    monkeypatch.setattr(progress, "PRINT_SECONDS", 0.0)
    with progress.show_progress(640, 0, "gsm8k", concurrent=64) as bar:
        clock[0] += 10.0
        for done in range(1, 65):
            bar.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "gsm8k 1/640" and lines[-1] == "gsm8k 64/640: 2 min left"


def test_a_thread_that_compiles_says_so(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "SHORT_SECONDS", 0.05)

    @jax.jit
    def compute(x: jax.Array) -> jax.Array:
        for i in range(100):
            x = jnp.sin(x) * i + jnp.tanh(x @ x)
        return x

    with progress.show_progress(1, 0, "task"):
        compute(jnp.ones((8, 8))).block_until_ready()
    assert capsys.readouterr().err == "task 0/1: compiling\n"


def test_the_live_line_of_a_terminal() -> None:
    code = (
        "from distill.runtime import progress, run_files\n"
        "with progress.show_progress(4, 1, 'sft') as bar:\n"
        "    bar.update(3, 'loss 0.25')\n"
        "    run_files.log_line('hello')\n"
        "    bar.update(4, 'loss 0.125')\n"
    )
    shown = run_on_terminal(code)
    assert "4/4" in shown and "loss 0.125" in shown and "hello" in shown
    assert not re.search(r"it/s|\?", shown)


def run_on_terminal(code: str) -> str:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    chunks: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(master, 1024)
            except OSError:  # the other end is closed
                return
            if not chunk:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    subprocess.run([sys.executable, "-c", code], stderr=slave, check=True, cwd=ROOT)
    os.close(slave)
    reader.join(10)
    os.close(master)
    return b"".join(chunks).decode()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.00113, "0.0011 s"),
        (0.42, "0.42 s"),
        (9.6, "9.6 s"),
        (42.4, "42 s"),
        (59.6, "1 min"),
        (170, "3 min"),
        (3599, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (50_000, "14 h"),
        (300_000, "3.5 days"),
    ],
)
def test_durations_are_written_as_people_say_them(seconds: float, text: str) -> None:
    assert console.format_duration(seconds) == text


def test_commands_are_quoted_for_a_shell() -> None:
    command = console.format_command("evaluate", model="runs/my run", data="", limit=None, k=4)
    assert command == "python -m distill.evaluate '--model=runs/my run' --k=4"


def test_an_end_names_what_was_made_and_the_next_command(capsys: pytest.CaptureFixture) -> None:
    console.print_end(["wrote a.jsonl"], ["python -m distill.verify --data=a.jsonl"])
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "wrote a.jsonl",
        "next:",
        "  python -m distill.verify --data=a.jsonl",
    ]
    assert not captured.out
