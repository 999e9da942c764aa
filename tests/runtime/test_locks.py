"""Tests locks: who is refused, what is stale, and what is left behind."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from distill.runtime import locks
from distill.runtime.locks import Lock, Owner
from distill.training import loop
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.runs import config, tiny_model


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.05)


@pytest.fixture(params=["disk without locks", "bucket"])
def without_flock(request, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    if request.param == "bucket":
        monkeypatch.setattr(Lock, "_open_and_flock", lambda self: False)


def write_owner(path, **fields):
    owner = Owner("elsewhere", 7, time.time() - 60, renewed=time.time())
    owner = dataclasses.replace(owner, **fields)
    path.write_text(json.dumps(dataclasses.asdict(owner)))
    return owner


def take_and_release(path):
    with locks.hold_lock(path, "--workdir=w"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_second_owner_is_refused_and_nothing_is_left(tmp_path):
    path = tmp_path / "run" / "lock"
    with locks.hold_lock(path, "--workdir=w"):
        with pytest.raises(UserError) as refused, locks.hold_lock(path, "--workdir=w"):
            pass
        assert str(refused.value).startswith(f"--workdir=w: is in use by process {os.getpid()} on ")
        assert "\n" not in str(refused.value)
        time.sleep(0.2)  # the time in the file is renewed
        owner = json.loads(path.read_text())
        assert owner["renewed"] > owner["started"] + 0.1
    assert not path.parent.exists()  # which the lock had made
    with pytest.raises(KeyboardInterrupt), locks.hold_lock(path, "--workdir=w"):
        raise KeyboardInterrupt
    with locks.hold_lock(path, "--workdir=w"):
        (path.parent / "metrics.jsonl").write_text("")
    assert [x.name for x in path.parent.iterdir()] == ["metrics.jsonl"]


CHILD = """
import sys, time
from distill.runtime.locks import Lock
Lock(sys.argv[1], "--workdir=w").acquire()
print("locked", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, capsys):
    path = tmp_path / "lock"
    words = [sys.executable, "-W", "ignore", "-c", CHILD, str(path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"is in use by process {child.pid} on host "):
            take_and_release(path)
        child.send_signal(signal.SIGKILL)
    take_and_release(path)
    assert f"process {child.pid} on host" in capsys.readouterr().err


def test_a_silent_owner_on_another_host_is_gone(tmp_path, capsys):
    path = tmp_path / "lock"
    write_owner(path)
    start = time.monotonic()
    take_and_release(path)
    assert time.monotonic() - start > locks.SILENT_SECONDS
    said = capsys.readouterr().err
    assert "was in use by process 7 on host elsewhere since " in said and "is gone" in said
    write_owner(path, renewed=time.time() - 2 * locks.OLD_SECONDS)
    take_and_release(path)
    assert "waiting" not in capsys.readouterr().err


def test_an_owner_on_another_host_that_still_renews_is_refused(tmp_path):
    path = tmp_path / "lock"
    write_owner(path)
    timer = threading.Timer(0.1, lambda: write_owner(path, started=1.0))
    timer.start()
    with pytest.raises(UserError, match="is in use by process 7 on host elsewhere since 1970"):
        take_and_release(path)
    timer.join()
    assert Owner(**json.loads(path.read_text())).host == "elsewhere"


@pytest.mark.usefixtures("without_flock")
def test_without_flock_the_process_itself_is_looked_for(tmp_path):
    path = tmp_path / "lock"
    take_and_release(path)
    assert not path.exists()
    here = os.uname().nodename
    parent = os.getppid()
    write_owner(path, host=here, pid=parent, birth=locks.read_birth(parent))
    with pytest.raises(UserError, match=f"is in use by process {parent} on host {here}"):
        take_and_release(path)
    write_owner(path, host=here, pid=parent, birth="another process of this number")
    take_and_release(path)
    write_owner(path, host=here, pid=2**22 + 1)  # there is none
    take_and_release(path)


@pytest.mark.usefixtures("without_flock")
def test_of_two_that_start_at_once_one_goes_on(tmp_path):
    path = tmp_path / "lock"
    timer = threading.Timer(0.02, lambda: write_owner(path))
    timer.start()
    with pytest.raises(UserError, match="is in use by process 7 on host elsewhere"):
        take_and_release(path)
    timer.join()


@pytest.mark.usefixtures("without_flock")
def test_a_process_that_was_taken_for_gone_leaves_at_once(tmp_path, monkeypatch, capfd):
    path, left = tmp_path / "lock", threading.Event()

    def leave(code):
        left.set()
        raise RuntimeError  # renews nothing either

    monkeypatch.setattr(os, "_exit", leave)
    with locks.hold_lock(path, "--workdir=w"):
        other = write_owner(path)
        assert left.wait(10)
    assert "error: --workdir=w: was taken over by process 7" in capfd.readouterr().err
    assert Owner(**json.loads(path.read_text())) == other  # its lock stays


def test_two_runs_in_one_directory_are_refused(tmp_path):
    c = config([tiny_model(tmp_path / str(seed), seed) for seed in range(2)])
    workdir = tmp_path / "run"
    with (
        locks.hold_lock(workdir / "lock", "--workdir"),
        pytest.raises(UserError, match=r"--workdir=\S+/run: is in use by process"),
    ):
        loop.run(c, workdir)
    assert not workdir.exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--workdir=w: is a file, not a folder"):
        take_and_release(tmp_path / "file" / "lock")
