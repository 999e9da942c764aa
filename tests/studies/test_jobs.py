"""The queue: order, two cores, what failed, what was interrupted, and two processes at once."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distill.runtime import run_files
from models.errors import UserError
from studies import jobs
from studies.jobs import Job, Queue
from tests.support.paths import ROOT
from tests.support.processes import wait_for
from tests.support.queues import make_chain, make_job, make_queue, read_events

CHAIN = [(word, name) for name in ("first", "middle", "last") for word in ("begin", "end")]


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What the queue says."""
    said: list[str] = []
    monkeypatch.setattr(run_files, "log_line", said.append)
    return said


def test_jobs_run_in_order_each_after_what_it_needs(tmp_path, lines):
    queue = make_queue(
        tmp_path / "q", [make_job("a"), make_job("b", "a"), make_job("c", "a"), make_job("x")]
    )
    calls: list[int] = []
    assert queue.run(["c", "b"], 1, lambda: calls.append(len(read_events(queue.root)))) == []
    wanted = [(word, name) for name in "acb" for word in ("begin", "end")]
    assert read_events(queue.root) == wanted
    assert calls == [2, 4, 6]
    assert queue.run(["c", "b"], 1) == []
    assert read_events(queue.root) == wanted, "what is done runs again"
    record = queue.read_done("c")
    assert record is not None and record["machine"]["cores"] >= 1
    assert "python -c " in record["commands"][0] and f"{queue.root}/a" in record["commands"][0]


def test_two_jobs_run_at_once_on_a_core_each(tmp_path, lines):
    code = (
        "import os, sys, json, pathlib, time; out, other = map(pathlib.Path, sys.argv[1:])\n"
        "text = json.dumps([sorted(os.sched_getaffinity(0)), os.environ['XLA_FLAGS']])\n"
        "(out.parent / out.name).with_suffix('.json').write_text(text); end = time.time() + 300\n"
        "while not other.exists(): time.sleep(0.02); assert time.time() < end"
    )
    root = tmp_path / "q"
    pair = [
        Job(name, (("-c", code, "{out}", str(root / f"{other}.json")),))
        for name, other in (("a", "b"), ("b", "a"))
    ]
    assert make_queue(root, pair).run(["a", "b"], 2) == []
    (first, flags), (second, _) = (json.loads((root / f"{x}.json").read_text()) for x in "ab")
    assert len(first) == len(second) == 1 and "multi_thread_eigen=false" in flags
    assert {*first, *second} == {*jobs._list_cores(2)}


def test_those_after_a_failed_job_are_not_run_and_the_others_are(tmp_path, lines):
    made = [make_job("a", status=3), make_job("b", "a"), make_job("c", "b"), make_job("d")]
    queue = make_queue(tmp_path / "q", made)
    assert queue.run(["c", "d"], 1) == ["a", "b", "c"]
    assert read_events(queue.root) == [("begin", "a"), ("begin", "d"), ("end", "d")]
    assert f"a: ended with exit code 3, see {queue.root / 'a' / 'job.log'}" in lines
    for name in "bc":
        assert f"{name}: not run, as a job before it failed" in lines
    assert queue.run(["c"], 1) == ["a", "b", "c"]
    assert len(read_events(queue.root)) == 3, "a job that has failed was tried again"
    assert make_queue(queue.root, made).run(["a"], 1) == ["a"]  # by the next command
    assert len(read_events(queue.root)) == 4


@pytest.fixture
def start_runner():
    """Starts a process that runs the chain of jobs of a directory."""
    with contextlib.ExitStack() as stack:

        def start(root: Path) -> subprocess.Popen:
            command = [sys.executable, "-m", "tests.support.queues", str(root)]
            runner = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
            stack.callback(runner.wait)
            stack.callback(runner.kill)
            return runner

        yield start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_runner_that_is_stopped_goes_on(tmp_path, start_runner, number, monkeypatch):
    """After SIGKILL the runner's child lives on: it is waited for, and then its job runs again."""
    root = tmp_path / "q"
    runner = start_runner(root)
    wait_for(lambda: len(read_events(root)) == 3, [runner])
    runner.send_signal(number)
    assert runner.wait(300) == (-9 if number == signal.SIGKILL else 128 + number)
    assert read_events(root) == CHAIN[:3]
    queue = make_chain(root)
    assert queue.read_done("first") and not queue.read_done("middle")
    said = let_go_when_one_waits(root, monkeypatch)
    if number != signal.SIGKILL:
        (root / "go").touch()
    assert queue.run(["last"], 1) == []
    orphan = [("end", "middle")] if number == signal.SIGKILL else []
    assert read_events(root) == [*CHAIN[:3], *orphan, *CHAIN[2:]]
    waits = [line for line in said if "waits" in line]
    wanted = f"middle: waits for process {runner.pid} on host "
    assert len(waits) == len(orphan) and all(line.startswith(wanted) for line in waits)


def test_two_runners_of_one_directory_share_its_jobs(tmp_path, start_runner, monkeypatch):
    root = tmp_path / "q"
    runner = start_runner(root)
    wait_for(lambda: len(read_events(root)) == 3, [runner])
    said = let_go_when_one_waits(root, monkeypatch)
    assert make_chain(root).run(["last"], 1) == []
    assert runner.wait(300) == 0
    assert read_events(root) == CHAIN, "a job ran twice"
    assert f"middle: waits for process {runner.pid} on host " in "\n".join(said)
    assert not [*root.rglob("job.lock")]


def let_go_when_one_waits(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the middle job end once the queue says that it waits, or in any case after a while, so
    that a test fails rather than hangs. Returns what the queue says."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if "waits" in line:
            (root / "go").touch()

    monkeypatch.setattr(run_files, "log_line", say)
    late = threading.Timer(200, (root / "go").touch)
    late.daemon = True
    late.start()
    return said


@pytest.mark.parametrize("changed", ["a", "b"])
def test_a_changed_definition_is_refused_and_loses_nothing(tmp_path, changed, lines):
    queue = make_queue(tmp_path / "q", [make_job("a"), make_job("b", "a")])
    assert queue.run(["b"], 1) == []
    before = read_files(queue.root)
    other = {"a": make_job("a"), "b": make_job("b", "a")}
    other[changed] = Job(changed, (*other[changed].commands, ("-c", "pass")))
    again = make_queue(queue.root, list(other.values()))
    with pytest.raises(UserError, match=rf"{queue.root / changed}: was made by another def") as e:
        again.run(["b"], 1)
    assert "\n" not in str(e.value) and "or give another --runs" in str(e.value)
    with pytest.raises(UserError, match=f"{queue.root / 'b'}: was made"):
        again.read_done("b")  # whichever of the two has changed
    assert read_files(queue.root) == before


def test_a_changed_definition_of_an_unfinished_job_is_refused(tmp_path, lines):
    queue = make_queue(tmp_path / "q", [make_job("a", status=1)])
    assert queue.run(["a"], 1) == ["a"]
    with pytest.raises(UserError, match="was made by another definition"):
        make_queue(queue.root, [make_job("a")]).run(["a"], 1)


@pytest.mark.parametrize("text", ["", "[]", '{"commands": []}'])
def test_a_damaged_record_is_named(tmp_path, text):
    queue = make_queue(tmp_path / "q", [make_job("a")])
    (queue.root / "a").mkdir()
    (queue.root / "a" / "done.json").write_text(text)
    with pytest.raises(UserError, match=f"{queue.root / 'a' / 'done.json'}: is damaged"):
        queue.run(["a"], 1)


def read_files(root: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_cpu_seconds_are_those_of_the_child(tmp_path, lines):
    burn = "import time\nwhile time.process_time() < 0.6: pass"
    made = [Job("burn", (("-c", burn), ("-c", burn))), Job("rest", (("-c", "pass"),))]
    queue = make_queue(tmp_path / "q", made)
    assert queue.run(["burn", "rest"], 1) == []
    burnt, rested = queue.read_done("burn"), queue.read_done("rest")
    assert burnt and 1.2 <= burnt["cpu_seconds"] < 1.9, "of two commands"
    assert rested and rested["cpu_seconds"] < 0.5


def test_all_attempts_at_a_job_count(tmp_path, lines):
    code = (
        "import pathlib, sys, time; mark = pathlib.Path(sys.argv[1]) / 'tried'\n"
        "end = time.process_time() + 0.6\n"
        "while time.process_time() < end: pass\n"
        "sys.exit(0 if mark.exists() else mark.touch() or 1)"
    )
    job = Job("a", (("-c", code, "{out}"),))
    assert make_queue(tmp_path, [job]).run(["a"], 1) == ["a"]
    assert make_queue(tmp_path, [job]).run(["a"], 1) == []
    record = make_queue(tmp_path, [job]).read_done("a")
    assert record and record["seconds"] > 1.1 and 1.2 <= record["cpu_seconds"] < 1.9


def test_jobs_that_do_not_fit_are_refused(tmp_path):
    queue = Queue(tmp_path)
    queue.add(make_job("a"))
    assert queue.add(make_job("a")) == "a"
    with pytest.raises(ValueError, match="two jobs are named a"):
        queue.add(make_job("a", status=1))
    with pytest.raises(ValueError, match="b needs c, which no job makes"):
        queue.add(make_job("b", "a", "c"))
