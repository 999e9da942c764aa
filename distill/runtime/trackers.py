"""Starts and ends the processes that send a run to experiment trackers (tracker_process.py).

The run's own files hold all that the trackers show, and TensorBoard's events are among them
(run_files.Writer). A tracker that fails is said in one line, and its process is started again now
and then; the training neither ends nor waits, except at its end, for a bounded time.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from etils import epath

from distill.runtime import environment, run_files, tracker_process
from distill.runtime.stop_signals import StopSignals
from models.errors import UserError, suggest

TENSORBOARD = "tensorboard"

RETRY_SECONDS, MAX_RETRY_SECONDS = 60.0, 900.0  # between two starts of a process that failed
FINISH_SECONDS = 60.0  # for the last rows, at the end of a run
STOP_SECONDS = 5.0  # and of one that is stopped: schedulers kill 30 s after SIGTERM
SILENT_SECONDS = 3.0  # of waiting, before it is said


def check_trackers(names: Sequence[str], must_be_installed: bool = True) -> None:
    """Raises UserError if `config.log.to` names a tracker that is unknown or not installed."""
    for name in names:
        if name == TENSORBOARD:
            continue
        if name not in tracker_process.TRACKERS:
            choices = (TENSORBOARD, *tracker_process.TRACKERS)
            example = '--config.log.to=\'("tensorboard", "wandb")\''
            raise UserError(
                f"config.log.to: {name!r} is none of {', '.join(choices)}"
                f"{suggest(name, choices)}; several: {example}"
            )
        spec = importlib.util.find_spec(name)
        # A folder of this name, such as the one that W&B makes, is found too, but has no origin.
        if must_be_installed and (spec is None or spec.origin is None):
            raise UserError(f"config.log.to: {name} is not installed: pip install {name}")


@contextlib.contextmanager
def open_writer(
    names: Sequence[str],
    workdir: epath.Path,
    resume_step: int,
    signals: StopSignals,
) -> Iterator[run_files.Writer]:
    """Yields the writer of a run's files. What it writes is sent to trackers by process 0.

    Args:
      names: of the trackers, as in `config.log.to`.
      resume_step: the first step that this process writes.
      signals: of the run. Once one has come, no tracker is waited for long.
    """
    with run_files.Writer(workdir, resume_step, TENSORBOARD in names) as writer:
        names = [name for name in tracker_process.TRACKERS if name in names]
        if not names or not run_files.is_primary():
            yield writer
            return
        run_id = _get_run_id(workdir)
        senders = [Sender(name, str(workdir), run_id, resume_step) for name in names]
        has_failed = True
        try:
            yield writer
            writer.flush()
            has_failed = False
        finally:
            _finish(senders, lambda: has_failed or bool(signals.received))


def _get_run_id(workdir: epath.Path) -> str:
    """Returns the id by which trackers know the run; a new one if it has none yet."""
    path = workdir / run_files.TRACKERS_FILE
    if path.exists():
        try:
            return str(json.loads(path.read_text())["run"])
        except (ValueError, LookupError, TypeError):
            run_files.log_line(f"{path}: damaged, so the run begins anew in its trackers")
    run_id = uuid.uuid4().hex[:8]
    run_files.write_json(path, {"run": run_id})
    return run_id


class Sender:
    """Keeps a process running that sends a run to the tracker `name`, and says what it says.

    Args:
      run_id: by which the trackers know the run.
      resume_step: the first step that this process of the run writes.
    """

    def __init__(self, name: str, workdir: str, run_id: str, resume_step: int) -> None:
        self.name, self.is_done = name, False
        self._workdir, self._run_id, self._resume_step = workdir, run_id, resume_step
        self._finishing, self._is_leaving = threading.Event(), False
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()  # of the two above, so that no process misses its end
        self._said: set[str] = set()
        self.thread = threading.Thread(target=self._keep_running, name=name, daemon=True)
        self.thread.start()

    def _keep_running(self) -> None:
        pause = RETRY_SECONDS
        while True:
            is_last, self.is_done, reason = self._run_once()
            if self._is_leaving or (self._finishing.is_set() and (is_last or self.is_done)):
                return
            if reason and pause == RETRY_SECONDS:
                self.say(
                    f"warning: {reason}; training goes on, and what is missing there is sent later"
                )
            self._finishing.wait(pause)
            pause = min(2 * pause, MAX_RETRY_SECONDS)

    def _run_once(self) -> tuple[bool, bool, str]:
        """Runs a process to its end.

        Returns:
          Whether it was started when all was written, whether all is sent, and why it failed.
        """
        with self._lock:
            if self._is_leaving:
                return True, False, ""
            is_last = self._finishing.is_set()
            call = [sys.executable, "-m", "distill.runtime.tracker_process", self.name]
            call += [self._workdir, self._run_id, str(self._resume_step)]
            self._resume_step = sys.maxsize  # a second process repeats nothing
            path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
            try:
                process = self._process = subprocess.Popen(
                    [*call, str(os.getpid()), str(is_last)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
                    text=True,
                    errors="replace",
                    start_new_session=True,  # Ctrl-C is for the run alone
                )
            except OSError as error:
                return is_last, False, str(error)
        reason = ""
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if line.startswith(tracker_process.FAILED):
                    reason = line.removeprefix(tracker_process.FAILED).strip()
                else:
                    self.say(line.strip())
        code = process.wait()
        if code not in (0, -signal.SIGTERM):  # which may come before it is heeded
            reason = reason or f"its process ended with code {code}"
        return is_last, code == 0, reason

    def say(self, line: str) -> None:
        """Says a line, the first time."""
        if line not in self._said:
            self._said.add(line)
            run_files.log_line(environment.hide_secrets(f"{self.name}: {line}"))

    def finish(self) -> None:
        """Asks the process to end once all is sent."""
        with self._lock:
            self._finishing.set()
            if self._process:
                self._process.terminate()

    def leave(self) -> None:
        """Asks the process to end as it is; `tracker_process.main` says when it does."""
        with self._lock:
            self._is_leaving = True
            if self._process:
                self._process.terminate()


def _finish(senders: Sequence[Sender], is_stopping: Callable[[], bool]) -> None:
    """Waits until all is sent; at most FINISH_SECONDS, or STOP_SECONDS if the run is stopped."""
    start, has_said = time.monotonic(), False
    for sender in senders:
        sender.finish()
    while waiting := [sender for sender in senders if sender.thread.is_alive()]:
        seconds, limit = time.monotonic() - start, STOP_SECONDS if is_stopping() else FINISH_SECONDS
        if seconds > limit:
            break
        if seconds > SILENT_SECONDS and not has_said:
            has_said = True
            names = ", ".join(sender.name for sender in waiting)
            run_files.log_line(f"waiting up to {limit:.0f} s for {names} to take the last rows")
        waiting[0].thread.join(0.1)
    for sender in senders:
        if not sender.is_done:
            sender.leave()
            sender.thread.join(1)
            sender.say("warning: does not have all rows; the same command sends the rest")
