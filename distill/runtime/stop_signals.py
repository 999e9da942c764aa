"""SIGTERM and SIGINT: answered at once, and obeyed at the next moment at which nothing is lost.

Python calls its signal handlers in the main thread, which may be compiling for minutes. So the
numbers of signals also go to a pipe that a thread reads. It answers at once, leaves at the second
SIGINT, and ends the process if the main thread does not stop in time after a SIGTERM.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from distill.runtime.compiling import is_compiling
from models.errors import Interrupted

# Seconds after SIGTERM. Nothing interrupts a compiler, and schedulers and clouds kill a process
# 30 s after the signal. Most of what a run compiles, it compiles in its first step, when
# all that it has done is saved. What else takes long, such as an update, is waited for.
COMPILE_SECONDS = 8.0
MAX_SECONDS = 240.0
POLL_SECONDS = 0.5

# Written to the pipe, where no signal has this number: Interrupted was raised in vain.
LOST = 0
LOST_SECONDS = 0.05  # before it is raised again


class Stopped(Exception):
    """Raised where work is left off because a signal asked for it."""


class StopSignals:
    """Catches SIGTERM and SIGINT, also where the shell that started this process ignores SIGINT. A
    context, to be entered by the main thread; in others it does nothing.

    Within `interrupt`, a signal raises Interrupted. Elsewhere it is only recorded in `received`.

    Args:
      answer: what is printed at once when the signal is only recorded.
    """

    def __init__(self, answer: str = "stopping") -> None:
        self.received = 0  # number of the last signal, or 0
        self._answer = answer
        self._interrupts = self._has_raised = self._is_saving = self._has_ended = False
        self._main_thread = threading.get_ident()
        self._num_repeated = 0  # signals on their way that the thread sent
        self._handlers: dict[signal.Signals, Any] = {}  # those before
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._pipe = os.pipe()
            os.set_blocking(self._pipe, False)
            self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._record)
            self._hook_before, sys.unraisablehook = sys.unraisablehook, self._catch_lost
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        self._has_ended = True
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        sys.unraisablehook = self._hook_before
        signal.set_wakeup_fd(self._pipe_before, warn_on_full_buffer=False)
        os.close(self._pipe)  # ends the thread
        self._thread.join()
        os.close(self._reader)

    def _record(self, number: int, _: object) -> None:
        self.received = number
        if self._interrupts:
            self._raise_once()

    def _raise_once(self) -> None:
        """Raises Interrupted, but not from what is then cleaned up on the way out."""
        if self.received and not self._has_raised:
            self._has_raised = True
            raise Interrupted(self.received)

    def _catch_lost(self, unraisable: Any) -> None:
        """Has Interrupted raised again if it was raised in a finalizer or in a callback of the
        garbage collector, such as JAX has, from which no exception comes out."""
        if isinstance(unraisable.exc_value, Interrupted):
            self._has_raised = False
            os.write(self._pipe, bytes([LOST]))
        else:
            self._hook_before(unraisable)

    @contextlib.contextmanager
    def interrupt(self) -> Iterator[None]:
        """Context in which signals raise Interrupted, at once, and one that came before too.

        For work that the same command repeats or continues.
        """
        self._interrupts = True
        try:
            self._raise_once()
            yield
            self._raise_once()
        finally:
            self._interrupts = False

    def start_saving(self) -> None:
        """Gives the main thread all the time that it takes to save."""
        self._is_saving = True

    def _watch(self) -> None:
        interrupts, terminated = 0, 0.0
        while True:
            timeout = POLL_SECONDS if terminated else None
            if select.select([self._reader], [], [], timeout)[0]:
                numbers = os.read(self._reader, 64)
                if not numbers:
                    return
                for number in numbers:
                    if number == LOST:
                        self._repeat_signal()
                        continue
                    if self._num_repeated and number == self.received:
                        self._num_repeated -= 1
                        continue
                    interrupts += number == signal.SIGINT
                    if number == signal.SIGTERM and not terminated:
                        terminated = time.monotonic()
                        self._say(f"SIGTERM: {self._describe()}")
                    elif number == signal.SIGINT and interrupts == 1:
                        self._say(f"{self._describe()}; again to leave at once")
                if interrupts > 1:
                    self._say("interrupted")
                    os._exit(128 + signal.SIGINT)
            elif not self._is_saving:
                seconds = time.monotonic() - terminated
                limit = COMPILE_SECONDS if is_compiling(self._main_thread) else MAX_SECONDS
                if seconds > limit:
                    self._say(
                        f"stopped {seconds:.0f} s after SIGTERM, without waiting for the work in "
                        "progress; the same command goes on from what was saved before"
                    )
                    os._exit(128 + signal.SIGTERM)

    def _repeat_signal(self) -> None:
        time.sleep(LOST_SECONDS)
        if not self._has_ended:
            self._num_repeated += 1
            signal.pthread_kill(self._main_thread, self.received)

    def _describe(self) -> str:
        return "stopping" if self._interrupts else self._answer

    def _say(self, line: str) -> None:
        # To the descriptor: no lock is waited for. A terminal has a live line, and echoes ^C.
        start = "\n" if os.isatty(2) else ""
        os.write(2, f"{start}{line}\n".encode())


@contextlib.contextmanager
def advise_interrupted(advice: str | Callable[[], str]) -> Iterator[None]:
    """Context that adds to an interruption how to go on, which `cli.run` prints; the innermost
    context knows best. A function is asked when it comes, for what is there by then."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not getattr(error, "__notes__", None):
            error.add_note(advice if isinstance(advice, str) else advice())
        raise
