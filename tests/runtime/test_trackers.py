"""Tests the processes that send a run to trackers, with a client that writes to a file."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from distill.runtime import stop_signals, trackers
from models.errors import UserError
from tests.support.paths import ROOT

CLIENT = '''
"""Stands in for trackio: a file for each run. FOLDER/behaviour says how to fail."""
import json, os, pathlib, time

FOLDER = pathlib.Path(os.environ["TRACKIO_DIR"])


class Table:
    def __init__(self, data):
        self.data = data


class Run:
    def __init__(self, name, config):
        self.path = FOLDER / f"{name}.jsonl"
        rows = self.path.read_text().splitlines() if self.path.exists() else []
        self._next_step = 1 + max((json.loads(row).get("step", -1) for row in rows), default=-1)
        self.write({"config": config})

    def write(self, row):
        with self.path.open("a") as file:
            file.write(json.dumps(row, default=lambda table: table.data) + "\\n")

    def log(self, values, step):
        behaviour = (FOLDER / "behaviour").read_text()
        if behaviour == "fail":
            raise ConnectionError("no network for 0123456789abcdef")
        if behaviour == "hang":
            time.sleep(1000)
        self.write({"step": step, **values})

    def finish(self):
        self.write({"finished": True})


def init(project, name, config, resume, embed):
    return Run(name, config)
'''


class Client:
    """The stand-in's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.set_behaviour("")

    def set_behaviour(self, name: str) -> None:
        (self.folder / "behaviour").write_text(name)

    def read(self, key: str) -> list[Any]:
        """Returns the values of `key` in what the run was sent; there is only one run."""
        paths = list(self.folder.glob("*.jsonl"))
        assert len(paths) <= 1
        rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        return [row[key] for row in rows if key in row]

    def wait_for(self, key: str, count: int) -> None:
        deadline = time.monotonic() + 30
        while len(self.read(key)) < count:
            assert time.monotonic() < deadline, self.read(key)
            time.sleep(0.05)


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    (tmp_path / "trackio.py").write_text(CLIENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setattr(trackers, "RETRY_SECONDS", 0.1)
    return Client(tmp_path)


def make_workdir(folder: Path, steps: int) -> epath.Path:
    (folder / "run").mkdir(exist_ok=True)
    config = {"stages": ["opd"], "opd": {"objective": "opd", "steps": steps}}
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return epath.Path(folder / "run")


def write_steps(
    workdir: epath.Path, first: int, end: int, wait: Callable[[], object] = lambda: None
) -> None:
    """Writes rows as a process of a run does that resumes at `first`."""
    signals = stop_signals.StopSignals()
    with trackers.open_writer(("trackio",), workdir, first, signals) as writer:
        wait()
        for step in range(first, end):
            writer.write_rollouts(step, [{"response": str(step)}])
            writer.write(step, "opd", {"x": step})


def test_a_resumed_run_is_one_run_with_one_row_a_step(client: Client, capsys: Any) -> None:
    workdir = make_workdir(client.folder, 6)
    write_steps(workdir, 0, 4)
    assert "trackio: run run-" in capsys.readouterr().err
    write_steps(workdir, 2, 6, lambda: client.wait_for("config", 2))  # steps 2 and 3 are repeated
    assert client.read("step") == client.read("x") == list(range(6))
    assert client.read("transcripts") == [[{"response": str(step)}] for step in range(6)]
    assert client.read("config")[0]["opd.steps"] == 6
    assert client.read("finished") == [True, True]
    assert "has the steps before 4 already" in capsys.readouterr().err
    assert not (workdir / "tensorboard").exists()


def test_what_a_failing_tracker_lacks_is_sent_later(
    client: Client, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails for a while, which is said once, without the secret in its message."""
    monkeypatch.setenv("TRACKIO_KEY", "0123456789abcdef")
    workdir = make_workdir(client.folder, 4)
    client.set_behaviour("fail")
    with trackers.open_writer(("trackio",), workdir, 0, stop_signals.StopSignals()) as writer:
        for step in range(3):
            writer.write(step, "opd", {"x": step})
        client.wait_for("config", 2)  # a second process has begun
        client.set_behaviour("")
        writer.write(3, "opd", {"x": 3})
        client.wait_for("step", 4)
    assert client.read("step") == [0, 1, 2, 3]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        "trackio: warning: ConnectionError: no network for ***; training goes on, and what is "
        "missing there is sent later"
    ]


@pytest.mark.parametrize("behaviour", ["fail", "hang"])
def test_the_end_of_a_run_waits_for_a_bounded_time(
    client: Client, capsys: Any, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 1.5)
    workdir = make_workdir(client.folder, 2)
    client.set_behaviour(behaviour)
    start = time.monotonic()
    write_steps(workdir, 0, 2)
    assert time.monotonic() - start < 8
    text = capsys.readouterr().err
    assert "trackio: warning: does not have all rows; the same command sends the rest" in text
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2
    client.set_behaviour("")
    write_steps(workdir, 2, 2)  # the same command
    assert client.read("step") == [0, 1]


def test_a_killed_run_leaves_no_process(client: Client) -> None:
    """Another process of the run may soon send the rest."""
    make_workdir(client.folder, 9)
    code = (
        "import time; from etils import epath; from distill.runtime import stop_signals, trackers\n"
        f"workdir = epath.Path({str(client.folder / 'run')!r})\n"
        "with trackers.open_writer(('trackio',), workdir, 0, stop_signals.StopSignals()) as writer:"
        "\n    writer.write(0, 'opd', {'x': 0})\n    time.sleep(1000)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, start_new_session=True)
    client.wait_for("step", 1)
    children = Path(f"/proc/{run.pid}/task").glob("*/children")
    (sender,) = {int(pid) for path in children for pid in path.read_text().split()}
    os.kill(sender, signal.SIGINT)  # ignored: Ctrl-C is for the run
    assert Path(f"/proc/{sender}").exists()
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{sender}").exists() and "Z" not in read_state(sender):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert client.read("finished") == []


def read_state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_without_trackers_nothing_is_started(tmp_path: Path) -> None:
    workdir = make_workdir(tmp_path, 1)
    signals = stop_signals.StopSignals()
    with trackers.open_writer(("tensorboard",), workdir, 0, signals) as writer:
        writer.write(0, "opd", {"x": 0})
    assert {path.name for path in workdir.iterdir()} == {
        *("config.json", "metrics.jsonl", "tensorboard")
    }


def test_a_damaged_id_begins_another_run(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "trackers.json"
    first = trackers._get_run_id(epath.Path(tmp_path))
    assert trackers._get_run_id(epath.Path(tmp_path)) == first
    path.write_text("{")
    assert trackers._get_run_id(epath.Path(tmp_path)) != first
    assert "trackers.json: damaged" in capsys.readouterr().err


def test_a_tracker_that_is_unknown_or_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers.check_trackers(())
    trackers.check_trackers(("tensorboard",))
    with pytest.raises(UserError, match=r"^config.log.to: 'wandb,mlflow' is none of tensorboard, "):
        trackers.check_trackers(("wandb,mlflow",))
    # Where a run of W&B has been, there is a folder of its name.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"^config.log.to: wandb is not installed: pip install wan"):
        trackers.check_trackers(("tensorboard", "wandb"))
