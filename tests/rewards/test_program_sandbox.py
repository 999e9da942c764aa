"""Tests that hostile programs reach nothing, use no more than they may, and leave nothing."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill.rewards import isolation, programs, sandbox, system_calls
from distill.rewards.isolation import Isolation, LimitError, Limits
from models.errors import UserError
from tests.support.programs import HOSTILE, SLOW, find_isolation

KINDS = ("bubblewrap", "user namespaces")
LIMITS = Limits(seconds=1, memory_bytes=2**30)


def list_descendants(root: int) -> set[int]:
    parents = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
            parents[int(name)] = int(stat[1])
    found, grown = {root}, True
    while grown:
        grown = [pid for pid, parent in parents.items() if parent in found and pid not in found]
        found |= set(grown)
    return found - {root}


@contextlib.contextmanager
def leaves_nothing(folder: Path) -> Iterator[None]:
    """Asserts that no process and no file is left. Orphans become children of this process."""
    libc, before = ctypes.CDLL(None), list_descendants(os.getpid())
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(folder))
            yield
        deadline = time.monotonic() + 3
        while left := list_descendants(os.getpid()) - before:
            for pid in left:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.01)
    finally:
        libc.prctl(36, 0, 0, 0, 0)
    assert {path.name for path in folder.iterdir()} == {"secret"}


def run_hostile(kind: str, names: list[str], folder: Path) -> None:
    way = find_isolation(kind)
    (folder / "secret").write_text("the secret")
    folder.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server, leaves_nothing(folder):
        port = server.getsockname()[1]

        def run(name: str) -> tuple[object, bytes, float]:
            source, _ = HOSTILE[name]
            source = source.replace("FOLDER", str(folder)).replace("PORT", str(port))
            started = time.monotonic()
            try:
                result = sandbox.run_script(source, b"", LIMITS, way)
                return result.code, result.stdout, time.monotonic() - started
            except LimitError as error:
                return str(error), b"", time.monotonic() - started

        with ThreadPoolExecutor(4) as pool:
            results = dict(zip(names, pool.map(run, names), strict=True))
    for name, (outcome, printed, seconds) in results.items():
        expected = HOSTILE[name][1]
        assert expected is None or outcome == expected, (name, outcome, printed)
        assert b"secret" not in printed, name
        assert seconds < LIMITS.wall_seconds + 4, (name, seconds)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_programs_are_held(kind: str, tmp_path: Path) -> None:
    run_hostile(kind, [name for name in HOSTILE if name not in SLOW], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_programs_that_take_their_time_are_held(kind: str, tmp_path: Path) -> None:
    run_hostile(kind, list(SLOW), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_worker_takes_its_program_along(kind: str, tmp_path: Path) -> None:
    """The pool kills a worker at its time limit; a program must not outlive it."""
    find_isolation(kind)
    (tmp_path / "secret").touch()
    code = (
        "import sys; from distill.rewards import isolation, sandbox\n"
        "ways = [w for w in isolation.list_isolations() if w.name == sys.argv[1]]\n"
        "sandbox.list_isolations = lambda: ways\n"
        "sandbox.find_isolation()\n"
        "print('ready', flush=True)\n"
        "sandbox.run_script('import time; time.sleep(1000)', b'', isolation.Limits(seconds=50))\n"
    )
    with leaves_nothing(tmp_path):
        command = [sys.executable, "-c", code, kind]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
            assert worker.stdout and worker.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 20
            while len(list_descendants(worker.pid)) < 3:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            worker.send_signal(signal.SIGKILL)


def test_without_isolation_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find_isolation = sandbox.find_isolation.__wrapped__
    monkeypatch.setattr(sandbox, "list_isolations", lambda: [])
    monkeypatch.delenv(sandbox.UNSAFE_VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"there is none here .*--unsafe_code"):
        find_isolation()
    monkeypatch.setenv(sandbox.UNSAFE_VARIABLE, "1")
    assert find_isolation() is isolation.NO_ISOLATION
    monkeypatch.setattr(sandbox, "find_isolation", find_isolation)
    assert sandbox.describe_isolation().startswith("sandbox: none; not limited: network, files")
    result = sandbox.run_script("print(input() * 2)", b"ab\n", LIMITS)
    assert result == sandbox.ScriptResult(b"abab\n", 0)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="only on Linux"):
        find_isolation()


def test_isolation_that_does_not_limit_processes_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "run_script", lambda *_: sandbox.ScriptResult(b"unlimited", 0))
    with pytest.raises(UserError, match=r"none here \(.*: unlimited"):
        sandbox.find_isolation.__wrapped__()


def test_a_missing_bubblewrap_leaves_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    assert {way.name for way in isolation.list_isolations()} == {"user namespaces"}
    monkeypatch.setattr(system_calls, "make_filter", lambda: None)
    assert {way.missing for way in isolation.list_isolations()} == {("system calls",)}


def test_a_failing_sandbox_is_an_error_and_not_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = Isolation("broken", lambda command, *_: ["/bin/sh", "-c", "echo no >&2; exit 1"])
    monkeypatch.setattr(sandbox, "find_isolation", lambda: broken)
    tests = programs.ProgramTests("p", cases=[["", "1"]]).to_answer()
    grade = programs.grade_contest("```python\nprint(1)\n```", tests)
    assert grade == {"outcome": "error", "failure": "no"}
