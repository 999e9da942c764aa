"""Runs programs that a model wrote, each in a fresh process without network, home or project.

Where bubblewrap is installed it sets the process apart, else `sandbox_namespaces` does. A program
sees Python's own files and an empty folder in memory. Its time, memory, output, files and processes
are limited: by the kernel, and for all its processes together by looking at them from here. When
the program ends, or reaches a limit, all its processes are killed.

Nothing of a sandboxed run lies on a disk, so that nothing remains. Only Linux has what this takes.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from distill.rewards import system_calls
from distill.rewards.isolation import (
    NO_ISOLATION,
    Isolation,
    LimitError,
    Limits,
    SandboxError,
    find_python,
    list_isolations,
    make_environment,
)
from models.errors import UserError

UNSAFE_VARIABLE = "DISTILL_UNSAFE_CODE"  # environment variable by which a verb tells its workers

_POLL_SECONDS = 0.05  # between two looks at memory and processes
_USERS = 1_879_048_192  # the first of the user ids that root gives to programs; nobody has them
_counter = itertools.count()


# Starts few processes, so that it does no harm where they are not limited.
_PROBE = """
import os, sys
try:
    for _ in range(8):
        if not os.fork():
            os.read(0, 1)
            os._exit(0)
    sys.stdout.write("processes are not limited")
except BlockingIOError:
    print("limited")
"""


@functools.cache
def find_isolation() -> Isolation:
    """Returns the best way of isolation that works here.

    Raises UserError if there is none, and `allow_unsafe_code` was not called.
    """
    if sys.platform != "linux":
        raise UserError("programs that a model wrote run only on Linux, which has sandboxes")
    reasons = []
    for isolation in list_isolations():
        try:
            result = run_script(_PROBE, b"", Limits(processes=4), isolation)
            if result.stdout == b"limited\n":
                return isolation
            reasons.append(f"{isolation.name}: {result.stdout.decode() or 'a program fails'}")
        except (SandboxError, LimitError, OSError) as error:
            reasons.append(f"{isolation.name}: {error}")
    if os.environ.get(UNSAFE_VARIABLE) == "1":
        return NO_ISOLATION
    raise UserError(
        "programs that a model wrote run in a sandbox, and there is none here "
        f"({'; '.join(dict.fromkeys(reasons))}). Install bubblewrap (apt-get install bubblewrap) "
        "and allow user namespaces, or let programs run with your rights: --unsafe_code, "
        "config.unsafe_code=True"
    )


def allow_unsafe_code() -> None:
    """Lets programs run without isolation, in this process and its workers, where there is none."""
    os.environ[UNSAFE_VARIABLE] = "1"


def require_isolation() -> None:
    """Raises UserError like `find_isolation`."""
    find_isolation()


def describe_isolation() -> str:
    """Returns one line on how programs are set apart here.

    Raises UserError like `find_isolation`.
    """
    isolation = find_isolation()
    missing = f"; not limited: {', '.join(isolation.missing)}" if isolation.missing else ""
    return f"sandbox: {isolation.name}{missing}"


class Run:
    """A program that runs in a sandbox. A context manager, which kills all its processes.

    `mode` is one of `sandbox_driver`'s. Of the descriptors, `channel` and `stdin` belong to the
    caller. `stdout` is the reading end of what the program prints if `captures`.
    """

    def __init__(
        self,
        mode: str,
        channel: int,
        limits: Limits,
        isolation: Isolation,
        *,
        stdin: int = subprocess.DEVNULL,
        captures: bool = False,
        cpu_seconds: int = 0,
    ) -> None:
        self.limits, self._isolation = limits, isolation
        self._stack = contextlib.ExitStack()
        self.started = time.monotonic()
        user = _USERS + os.getpid() % 2**20 * 64 + next(_counter) % 64
        user = user if isolation.changes_user else -1
        status_read, status_write = os.pipe()
        self.status = self._stack.enter_context(os.fdopen(status_read, "rb", buffering=0))
        folder = None if isolation is not NO_ISOLATION else tempfile.TemporaryDirectory()
        folder_path = self._stack.enter_context(folder) if folder else None
        with contextlib.ExitStack() as ours:
            ours.push(lambda error, *_: self._stack.close() if error else None)
            ours.callback(os.close, status_write)
            filter_fd = -1
            if folder is None and (code := system_calls.make_filter()):
                filter_fd = ours.enter_context(_store(code)).fileno()
            numbers = [channel, status_write, user, cpu_seconds or limits.seconds]
            numbers += [limits.memory_bytes, limits.folder_bytes, limits.processes]
            inner = [str(find_python()), "-S", "-s", "-B", "-c", _read_driver(), mode]
            command = isolation.make_command([*inner, *map(str, numbers)], user, limits, filter_fd)
            self._process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE if captures else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=make_environment(),
                cwd=folder_path or "/",
                pass_fds=[fd for fd in (channel, status_write, filter_fd) if fd >= 0],
                start_new_session=True,
            )
        self.stdout = self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._isolation is NO_ISOLATION:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()
        self._stack.close()

    def wait(self, deadline: float) -> int:
        """Waits for the end of the program, and returns its exit code. Raises LimitError."""
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                raise LimitError("time")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_POLL_SECONDS)
            self.check()
        return self._process.returncode

    def check(self) -> None:
        """Raises LimitError if all processes together use more than they may."""
        memory, processes = _measure_tree(self._process.pid)
        if memory > self.limits.memory_bytes:
            raise LimitError("memory")
        if processes > self.limits.processes + 4:  # those of the sandbox itself
            raise LimitError("processes")

    def require_started(self, line: bytes) -> None:
        """Raises SandboxError unless `line`, the first of `status`, says that a program began."""
        if line != b"started\n":
            self._process.kill()
            assert self._process.stderr is not None
            reason = self._process.stderr.read(2000).decode(errors="replace").strip()
            raise SandboxError(reason.splitlines()[-1] if reason else "it did not start")


def read_lines(runs: Sequence[Run], descriptor: int, max_bytes: int, deadline: float) -> Iterator:
    """Yields what can be read from a descriptor, until its end, while watching the runs.

    Raises LimitError at `deadline` (of time.monotonic), after `max_bytes`, or if `check` does.
    """
    total, checked = 0, time.monotonic()
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLHUP)
    while True:
        ready = poller.poll(1000 * _POLL_SECONDS)
        now = time.monotonic()
        if now - checked > _POLL_SECONDS:
            for run in runs:
                run.check()
            checked = time.monotonic()
        if now > deadline:
            raise LimitError("time")
        if not ready:
            continue
        try:
            chunk = os.read(descriptor, 1 << 16)
        except ConnectionResetError:
            return
        if not chunk:
            return
        total += len(chunk)
        if total > max_bytes:
            raise LimitError("output")
        yield chunk


@dataclasses.dataclass(frozen=True)
class ScriptResult:
    """What a script printed, and its exit code: 128 + n if signal n ended it."""

    stdout: bytes
    code: int


def run_script(
    program: str, stdin: bytes, limits: Limits, isolation: Isolation | None = None
) -> ScriptResult:
    """Runs a program as a script with this standard input.

    Raises:
      LimitError: it reached a limit.
      SandboxError: the sandbox did not start it.
    """
    with (
        _store(program.encode("utf-8", "surrogatepass")) as source,
        _store(stdin) as given,
        Run(
            "script",
            source.fileno(),
            limits,
            isolation or find_isolation(),
            stdin=given.fileno(),
            captures=True,
        ) as run,
    ):
        assert run.stdout is not None
        deadline = run.started + limits.wall_seconds
        output = b"".join(read_lines([run], run.stdout.fileno(), limits.output_bytes, deadline))
        code = run.wait(deadline)
        run.require_started(run.status.read())
        # The kernel kills what computed too long, and that shows as signal 9.
        if code in (-9, 137) and time.monotonic() - run.started > limits.seconds:
            raise LimitError("time")
        return ScriptResult(output, code if code >= 0 else 128 - code)


class Channel:
    """The worker's end of a connection to a program, in lines."""

    def __init__(self, run: Run, connection: socket.socket) -> None:
        self._run, self._connection = run, connection
        self._rest = b""

    def send(self, line: bytes, seconds: float) -> None:
        """Sends a line. Raises LimitError if the program does not read it in time."""
        self._connection.settimeout(seconds)
        try:
            self._connection.sendall(line + b"\n")
        except TimeoutError:
            raise LimitError("time") from None
        except OSError:  # it ended; `receive` finds that too
            return

    def receive(self, seconds: float) -> bytes | None:
        """Receives a line; None if the program ended. Raises LimitError."""
        deadline, limit = time.monotonic() + seconds, self._run.limits.output_bytes
        parts = [self._rest]
        if b"\n" not in self._rest:
            fileno = self._connection.fileno()
            for chunk in read_lines([self._run], fileno, limit, deadline):
                parts.append(chunk)
                if b"\n" in chunk:
                    break
            else:
                return None
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line


@contextlib.contextmanager
def open_program(limits: Limits, calls: int) -> Iterator[Channel]:
    """Context with a program that answers calls (`sandbox_driver.answer_calls`)."""
    ours, theirs = socket.socketpair()
    seconds, isolation = limits.seconds * max(1, calls), find_isolation()
    with (
        ours,
        theirs,
        Run("calls", theirs.fileno(), limits, isolation, cpu_seconds=seconds) as run,
    ):
        theirs.close()
        deadline = run.started + limits.wall_seconds
        run.require_started(next(read_lines([run], run.status.fileno(), 100, deadline), b""))
        yield Channel(run, ours)


def run_checks(task: bytes, limits: Limits) -> bytes:
    """Runs assertions in one sandbox and the program under test in another.

    `task` is what `sandbox_driver.run_checks` reads; returns the line that it writes.

    Raises:
      LimitError: the program or the assertions reached a limit.
      SandboxError: a sandbox failed.
    """
    isolation = find_isolation()
    ends = socket.socketpair()
    with (
        ends[0],
        ends[1],
        _store(task) as given,
        Run("calls", ends[0].fileno(), limits, isolation) as program,
        Run("checks", ends[1].fileno(), limits, isolation, stdin=given.fileno()) as checks,
    ):
        for end in ends:
            end.close()
        deadline = checks.started + limits.wall_seconds
        runs, status = [program, checks], checks.status.fileno()
        written = b"".join(read_lines(runs, status, limits.output_bytes, deadline))
        first, _, report = written.partition(b"\n")
        checks.require_started(first + b"\n")
        program.require_started(program.status.read(100))
        if not report and checks.wait(deadline) in (-9, 137):  # the kernel's limit of time
            raise LimitError("time")
        if not report:
            raise SandboxError("the tests ended their own process")
        return report


def _store(content: bytes):
    """Returns an open file in memory, at its start."""
    file = open(os.memfd_create("sandbox"), "w+b")  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


@functools.cache
def _read_driver() -> str:
    return Path(__file__).with_name("sandbox_driver.py").read_text()


def _measure_tree(root: int) -> tuple[int, int]:
    """Returns the resident bytes of a process with all it started, and how many they are."""
    parents: dict[int, int] = {}
    pages: dict[int, int] = {}
    threads: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                number = int(name)
                parents[number], pages[number] = int(fields[1]), int(fields[21])
                threads[number] = int(fields[17])
    found, memory, count = [root], 0, 0
    children: dict[int, list[int]] = {}
    for number, parent in parents.items():
        children.setdefault(parent, []).append(number)
    while found:
        number = found.pop()
        memory += pages.get(number, 0)
        count += threads.get(number, 0)
        found += children.get(number, [])
    return memory * os.sysconf("SC_PAGE_SIZE"), count
