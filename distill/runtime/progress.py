"""Progress of a long task: one live line on a terminal, elsewhere plain lines now and then.

Time left is the pace so far times what is left. Compiling is no part of the pace: a task compiles
when it begins, and a pace that counts it would foretell hours for a task of seconds. A thread
watches whether the main thread compiles, and says so.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import jax
from tqdm import tqdm

from distill.runtime import compiling, console, run_files

POLL_SECONDS = 0.5
PRINT_SECONDS = 10.0  # between two plain lines
COMPILING_SECONDS = 30.0  # between two that say only that it compiles
SHORT_SECONDS = 2.0  # what takes less is not said: reading a small model, a short compilation
_BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar:14}| {unit}"  # unit: what `_describe` says


class Progress:
    """Progress of `total` items, of which `initial` were done by an earlier process.

    Args:
      concurrent: items that are worked on together. They end together too, so nothing is said of
        the time left before as many are done.
      is_minor: is not worth a line that stays: shown only while it takes long.
    """

    def __init__(
        self, total: int, initial: int, label: str, concurrent: int = 1, is_minor: bool = False
    ) -> None:
        self._total, self._initial, self._label = total, initial, label
        self._concurrent, self._is_minor = concurrent, is_minor
        self._done, self._figures = initial, ""
        self._start_time = self._update_time = self._poll_time = time.monotonic()
        self._paced_items, self._paced_seconds = 0, 0.0  # of the pace
        self._compile_seconds = 0.0  # since the last update
        self._compiling_since: float | None = None
        self._said_compiling: float | None = None  # when last
        self._print_time = self._start_time
        self._has_printed = False
        self._watched_thread = threading.get_ident()
        compiling.start_watching(jax.monitoring)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._bar = None
        if not run_files.is_primary():
            return
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=label,
                bar_format=_BAR_FORMAT,
                unit="",
                dynamic_ncols=True,
                leave=None if not is_minor else False,
                delay=SHORT_SECONDS if is_minor else 0,
            )
        self._thread.start()

    def update(self, done: int, figures: str = "") -> None:
        """Shows that `done` items are done, with some figures, such as "loss 0.32, length 40"."""
        now = time.monotonic()
        interval, self._update_time = now - self._update_time, now
        compiled, self._compile_seconds = min(self._compile_seconds, interval), 0.0
        # Where items follow one another, one that compiled does more than those that follow it.
        if self._concurrent > 1 or not compiled:
            self._paced_items += done - self._done
            self._paced_seconds += interval - compiled
        self._done, self._figures, self._compiling_since = done, figures, None
        if self._bar is not None:
            self._bar.unit = self._describe(now)
            self._bar.update(done - self._bar.n)
        elif run_files.is_primary():
            self._print(now)

    def _print(self, now: float) -> None:
        """Prints a plain line if it is time: at the end too, and as soon as there are figures."""
        is_end = self._done >= self._total and (self._has_printed or not self._is_minor)
        is_first = bool(self._figures) and not (self._has_printed or self._is_minor)
        if is_first or is_end or now - self._print_time >= PRINT_SECONDS:
            self._print_time, self._has_printed = now, True
            text = self._describe(now)
            self._write(f": {text}" if text else "")

    def _write(self, text: str) -> None:
        line = f"{self._label} {self._done:,}/{self._total:,}{text}"
        print(line, file=sys.stderr, flush=True)

    def _describe(self, now: float) -> str:
        parts = [self._describe_compiling(now) or self._describe_time_left(), self._figures]
        return ", ".join(part for part in parts if part)

    def _describe_compiling(self, now: float) -> str:
        since = self._compiling_since
        if since is None or now - since < SHORT_SECONDS:
            return ""
        return f"compiling for {console.format_duration(round(now - since))}"

    def _describe_time_left(self) -> str:
        left = self._total - self._done
        needed = min(self._concurrent, self._total - self._initial)
        if not left or self._paced_items < max(1, needed):
            return ""
        seconds = self._paced_seconds / self._paced_items * left
        return f"{console.format_duration(seconds)} left"

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            now = time.monotonic()
            passed, self._poll_time = now - self._poll_time, now
            if compiling.is_compiling(self._watched_thread):
                self._compile_seconds += passed
                self._compiling_since = self._compiling_since or now
            else:
                self._compiling_since = None
            if self._bar is not None:
                self._bar.unit = self._describe(now)
                if not self._is_minor or now - self._start_time > SHORT_SECONDS:
                    self._bar.refresh()
            elif text := self._describe_compiling(now):
                self._print_compiling(text, now)

    def _print_compiling(self, text: str, now: float) -> None:
        """Prints a plain line that it compiles, and again now and then, as long as it does."""
        said = self._said_compiling
        if said is None or now - said >= COMPILING_SECONDS:
            self._said_compiling = now
            self._write(f": {'compiling' if said is None else text}")

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._bar is not None:
            self._compiling_since = None
            self._bar.unit = self._describe(time.monotonic())
            self._bar.close()


@contextlib.contextmanager
def show_progress(
    total: int, initial: int, label: str, concurrent: int = 1, is_minor: bool = False
) -> Iterator[Progress]:
    """Shows the progress of what is done in this context; for the arguments see `Progress`."""
    progress = Progress(total, initial, label, concurrent, is_minor)
    try:
        yield progress
    finally:
        progress.close()
