"""A watchdog: says where a step hangs, with the stacks of all threads.

A thread adds up about once a second how long a step takes. Compiling does not count, nor does the
time in which the process is suspended. Stacks are read when a step hangs and not before.
"""

import collections
import contextlib
import dataclasses
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from distill.runtime import compiling, phases

POLL_SECONDS = 1.0
FACTOR = 10  # times the median: what is longer hangs
NUM_REMEMBERED = 32  # durations in a median
HUNG_EXIT_CODE = 1  # a launcher starts the run again


@dataclasses.dataclass
class _Task:
    kind: str
    name: str
    seconds: float = 0.0
    is_reported: bool = False


class Watchdog:
    """Watches the thread that makes it. Use as a context.

    Args:
      min_seconds: a step or an evaluation may take so long, or FACTOR times the median of those
        before it if that is longer; 0: nothing is watched.
      exits: what takes longer ends the process, without a checkpoint; else it is only reported,
        once.
    """

    def __init__(self, min_seconds: float, exits: bool) -> None:
        self._min_seconds, self._exits = min_seconds, exits
        self._watched_thread = threading.get_ident()
        if min_seconds:
            compiling.start_watching(jax.monitoring)
        self._tasks: list[_Task] = []  # the last one runs, and the time of the others stands still
        self._durations: dict[str, collections.deque[float]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start_step(self, step: int) -> None:
        """Ends the step before, if any, and starts this one."""
        self.stop_step()
        self._tasks = [_Task("step", f"step {step}")]

    def stop_step(self) -> None:
        for task in self._tasks:
            self._remember(task)
        self._tasks = []

    @contextlib.contextmanager
    def watch_evaluation(self, step: int) -> Iterator[None]:
        """Context in which an evaluation runs, whose time is not the step's."""
        task = _Task("evaluation", f"the evaluation after step {step}")
        self._tasks = [*self._tasks, task]
        try:
            yield
        finally:
            self._tasks = self._tasks[:-1]
            self._remember(task)

    def _remember(self, task: _Task) -> None:
        kept = self._durations.setdefault(task.kind, collections.deque(maxlen=NUM_REMEMBERED))
        kept.append(task.seconds)

    def _watch(self) -> None:
        interval = min(POLL_SECONDS, self._min_seconds / 10)
        before = time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            passed, before = min(now - before, 2 * interval), now
            tasks = self._tasks
            if not tasks or compiling.is_compiling(self._watched_thread):
                continue
            task = tasks[-1]
            task.seconds += passed
            usual = statistics.median(self._durations.get(task.kind) or [0.0])
            if task.seconds > max(self._min_seconds, FACTOR * usual) and not task.is_reported:
                task.is_reported = True
                files = list_files_on_stack(self._watched_thread)
                self._report(task, phases.find_phase(files), usual)

    def _report(self, task: _Task, phase: str, usual: float) -> None:
        usually = f", where {usual:.0f} s are usual" if usual else ""
        line = f"warning: {task.name} hangs {phase}: it has taken {task.seconds:.0f} s{usually} "
        # To the descriptor: every process says where it hangs itself, and no lock is waited for.
        os.write(2, f"{line}(config.alerts.hang_seconds); the stacks of all threads:\n".encode())
        os.write(2, format_stacks().encode(errors="replace"))
        if self._exits:
            os.write(2, b"error: the step hangs, see above; the same command resumes the run\n")
            os._exit(HUNG_EXIT_CODE)

    def __enter__(self) -> "Watchdog":
        if self._min_seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()


def list_files_on_stack(thread: int) -> list[str]:
    """Returns the files of the functions that a thread is in, the innermost first. It should stand
    still, as one that hangs does: see compiling.py."""
    frame = sys._current_frames().get(thread)
    return [each.f_code.co_filename for each, _ in traceback.walk_stack(frame)] if frame else []


def format_stacks() -> str:
    """Returns what all threads that run Python are in, the innermost function first.

    faulthandler would read the list of threads without its lock, and end the process when a thread
    of XLA's or tensorstore's is just being added.
    """
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"Thread 0x{ident:016x} (most recent call first):")
        for each, number in traceback.walk_stack(frame):
            code = each.f_code
            lines.append(f'  File "{code.co_filename}", line {number} in {code.co_name}')
    return "\n".join(lines) + "\n"
