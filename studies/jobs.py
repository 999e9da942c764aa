"""A queue of commands, one process on each core, that goes on where it stopped.

A job has a directory, ROOT/NAME, in which its commands write; `{NAME}` in a command stands for the
directory of another job, which runs before, and `{out}` for the job's own. A finished job leaves
done.json with what it ran and what all attempts at it cost. A job's fingerprint covers its commands
and those of all jobs before it, so a result is never used for a definition that has changed since;
a change of the code leaves it as it is, and done.json has the code's revision. Several processes
may run jobs of one ROOT: each job is locked by the one that runs it, and by its commands.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import contest
from distill.runtime import run_files
from distill.runtime.locks import Lock, LockedError
from models.errors import UserError

CODE = Path(__file__).resolve().parents[1]
# What results depend on; their revision is that of the last commit that changed it.
_CODE_PATHS = (
    *("models", "distill", "configs/miniature.py", "studies/worker.py", "studies/study.py"),
    *(
        f"studies/{task}.py"
        for task in ("tasks", "graphs", "facts", "instructions", "manual", "traces")
    ),
    *("studies/models.py", ":!distill/reporting"),
)
_PLACE = re.compile(r"\{([\w/.=-]+)\}")
_OUT = "out"
_GRACE_SECONDS = 60.0  # for a run to write its checkpoint
_POLL_SECONDS = 1.0  # between looks at a job that another process runs


@dataclasses.dataclass(frozen=True)
class Job:
    """Commands that run one after another, each a tuple of arguments of this interpreter:
    `("-m", "distill.train", "--workdir={out}")`. One that was stopped is run again."""

    name: str
    commands: tuple[tuple[str, ...], ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the jobs that run before."""
        found = _PLACE.findall(" ".join(word for command in self.commands for word in command))
        return tuple(dict.fromkeys(name for name in found if name != _OUT))


class Queue:
    """Jobs by name; what is done is in the file system.

    Args:
      root: directory of the jobs' directories.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.jobs: dict[str, Job] = {}
        self._failed: set[str] = set()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._changing = threading.Lock()  # held to add to `_running` or take from it
        self._is_stopping = threading.Event()

    def add(self, job: Job) -> str:
        """Adds a job and returns its name.

        Raises ValueError if another job has its name, or a job that it needs is missing.
        """
        if self.jobs.setdefault(job.name, job) != job:
            raise ValueError(f"two jobs are named {job.name}")
        if missing := [name for name in job.needs if name not in self.jobs]:
            raise ValueError(f"{job.name} needs {', '.join(missing)}, which no job makes")
        return job.name

    def compute_fingerprint(self, name: str) -> str:
        """Returns a hash of the job's commands and of all jobs before it."""
        job = self.jobs[name]
        parts = [job.commands, [self.compute_fingerprint(need) for need in job.needs]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def list_commands(self, name: str) -> list[list[str]]:
        """Returns the commands of a job with directories in place of names."""

        def fill(match: re.Match[str]) -> str:
            return str(self.root / (name if match[1] == _OUT else match[1]))

        return [
            [_PLACE.sub(fill, word) for word in command] for command in self.jobs[name].commands
        ]

    def read_done(self, name: str) -> dict[str, Any] | None:
        """Returns a finished job's record; None if it is not finished.

        Raises UserError naming its directory if another definition made it, finished or not, or
        naming a record that cannot be read.
        """
        directory = self.root / name
        done, begun = directory / "done.json", directory / "begun.json"
        found = next((path for path in (done, begun) if path.is_file()), None)
        if found is None:
            return None
        try:
            record = json.loads(found.read_text())
            fingerprint = record["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{found}: is damaged; delete {directory}, to run it again") from error
        if fingerprint != self.compute_fingerprint(name):
            raise UserError(
                f"{directory}: was made by another definition of this job, or of one before it; "
                "delete or move it, or give another --runs"
            )
        return record if found == done else None

    def run(
        self, names: Sequence[str], cores: int, on_done: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Runs jobs, and those that they need, on `cores` cores; returns the names that failed.

        They start in the order of `names`, each as soon as what it needs is done; `on_done` is
        called after each that succeeds. Those that need a failed one are not run and count as
        failed, and what has failed is not tried again. A job that another process runs is waited
        for. On an interrupt, running ones stop at a checkpoint.

        Raises:
          UserError: see `read_done`.
        """
        names = [name for name in self.sort(names) if self.read_done(name) is None]
        waiting = [name for name in names if name not in self._failed]
        self._is_stopping.clear()
        free = iter([*_list_cores(cores)] if cores > 1 else [None])
        pin: Callable[[], None] = lambda: _pin_thread(next(free))  # noqa: E731
        with futures.ThreadPoolExecutor(cores, initializer=pin) as pool:
            active: dict[futures.Future[bool], str] = {}
            try:
                while waiting or active:
                    for name in list(waiting):
                        needs = set(self.jobs[name].needs)
                        if needs & self._failed:
                            run_files.log_line(f"{name}: not run, as a job before it failed")
                            waiting.remove(name)
                            self._failed.add(name)
                        elif len(active) < cores and not needs & {*waiting, *active.values()}:
                            waiting.remove(name)
                            active[pool.submit(self._run_job, name, cores > 1)] = name
                    ended, _ = futures.wait(active, return_when=futures.FIRST_COMPLETED)
                    for future in ended:
                        name = active.pop(future)
                        if future.result():
                            on_done()
                        else:
                            self._failed.add(name)
            finally:
                self._stop()
        return [name for name in names if name in self._failed]

    def sort(self, names: Sequence[str]) -> list[str]:
        """Returns `names` and what they need, each after what it needs."""
        ordered: dict[str, None] = {}

        def visit(name: str) -> None:
            if name not in ordered:
                for need in self.jobs[name].needs:
                    visit(need)
                ordered[name] = None

        for name in names:
            visit(name)
        return list(ordered)

    def _run_job(self, name: str, is_pinned: bool) -> bool:
        """Runs a job, unless another process has; returns True if it succeeded."""
        if (lock := self._acquire_lock(name)) is None:
            return False
        try:
            if self.read_done(name):
                return True
            return self._run_commands(name, lock.descriptors, is_pinned)
        finally:
            lock.release()

    def _acquire_lock(self, name: str) -> Lock | None:
        """Takes a job's lock, and waits for one who has it; returns None if told to stop."""
        directory, is_waiting = self.root / name, False
        directory.mkdir(parents=True, exist_ok=True)
        while not self._is_stopping.is_set():
            lock = Lock(directory / "job.lock", str(directory))
            try:
                lock.acquire()
                return lock
            except LockedError as error:
                if not is_waiting:
                    owner = error.owner or "another process"
                    run_files.log_line(f"{name}: waits for {owner}, or what that started, to end")
                is_waiting = True
            self._is_stopping.wait(_POLL_SECONDS)
        return None

    def _run_commands(self, name: str, descriptors: tuple[int, ...], is_pinned: bool) -> bool:
        """Runs a job's commands, with the files of its lock; returns True if all succeeded."""
        directory, fingerprint = self.root / name, self.compute_fingerprint(name)
        log, commands = directory / "job.log", self.list_commands(name)
        begun: dict[str, Any] = {"fingerprint": fingerprint, "seconds": 0.0, "cpu_seconds": 0.0}
        with contextlib.suppress(FileNotFoundError):  # by an earlier process, which was stopped
            begun |= json.loads((directory / "begun.json").read_text())
        run_files.log_line(f"{name}: started")
        code = describe_code()
        for command in commands:
            start = time.time()
            run_files.write_json(directory / "begun.json", begun)
            status, cpu_seconds = self._run_command(command, log, descriptors, is_pinned)
            begun["seconds"] += time.time() - start
            begun["cpu_seconds"] += cpu_seconds
            if status:
                run_files.write_json(directory / "begun.json", begun)
                if not self._is_stopping.is_set():
                    run_files.log_line(f"{name}: ended with exit code {status}, see {log}")
                return False
        done = {
            "fingerprint": fingerprint,
            "commands": [shlex.join(["python", *command]) for command in commands],
            "seconds": round(begun["seconds"], 1),
            "cpu_seconds": round(begun["cpu_seconds"], 1),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **code,
            "machine": contest.describe_machine({}),
        }
        run_files.write_json(directory / "done.json", done)
        run_files.log_line(f"{name}: done in {done['seconds']:.0f} s")
        return True

    def _run_command(
        self, command: list[str], log: Path, descriptors: tuple[int, ...], is_pinned: bool
    ) -> tuple[int, float]:
        """Returns the exit code of a command and the CPU seconds that it took."""
        variables = dict(os.environ)
        if is_pinned:  # a thread for each core of the machine would only get in the way of others
            flags = f"{variables.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
            variables["XLA_FLAGS"] = flags.strip()
        # Memory of a step goes back to the system, and comes again page by page: a quarter of an
        # update's time. A process keeps it.
        variables |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
        variables["MALLOC_ARENA_MAX"] = "1"  # other arenas have no room for large arrays
        with log.open("ab") as file:
            with self._changing:
                if self._is_stopping.is_set():
                    return 1, 0.0
                process = subprocess.Popen(
                    [sys.executable, *command],
                    cwd=CODE,
                    env=variables,
                    stdout=file,
                    stderr=file,
                    pass_fds=descriptors,
                )
                self._running.add(process)
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            with self._changing:  # until here its number is its own, so no other is signalled
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                self._running.discard(process)
        return process.returncode, usage.ru_utime + usage.ru_stime

    def _stop(self) -> None:
        """Asks what still runs to stop, and kills what does not."""
        self._is_stopping.set()
        self._signal_running(signal.SIGTERM)
        end = time.time() + _GRACE_SECONDS
        while self._running and time.time() < end:
            time.sleep(0.1)
        self._signal_running(signal.SIGKILL)

    def _signal_running(self, number: signal.Signals) -> None:
        with self._changing:
            for process in self._running:
                os.kill(process.pid, number)


def describe_code() -> dict[str, Any]:
    """Returns the revision of the code that results depend on, and whether its files differ from
    it; both None outside a git checkout."""

    def run_git(*arguments: str) -> str:
        call = ("git", "-C", str(CODE), *arguments, "--", *_CODE_PATHS)
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        revision = run_git("log", "-1", "--format=%H")
        return {"revision": revision, "dirty": bool(run_git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"revision": None, "dirty": None}


def _list_cores(count: int) -> list[int]:
    """Returns a core for each of `count` processes."""
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i % len(cores)] for i in range(count)]


def _pin_thread(core: int | None) -> None:
    """Keeps this thread, and the processes that it starts, on a core."""
    if core is not None:
        os.sched_setaffinity(0, {core})
