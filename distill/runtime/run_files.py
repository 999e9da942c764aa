"""The files of a run: metrics, JSON and transcripts; and lines on the terminal.

A metric is carried as (sum, count) and divided once, at the end, so that micro-batches, shards and
processes of unequal size are weighted correctly. Only process 0 writes or logs. Paths go through
etils.epath: a run directory may be local or, if gcsfs is installed, gs://…
"""

import base64
import contextlib
import errno
import json
import math
import os
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from distill.runtime import paths, tensorboard
from distill.runtime.paths import is_remote, write_text
from models.errors import UserError

MetricSums = dict[str, tuple[jax.Array, jax.Array]]
"""Flat metric name → (sum, count), float32 scalars."""

TRACKERS_FILE = "trackers.json"  # the id of the run in trackers
MAX_SAID_SKIPS = 5  # rows that are skipped, of which each is named
BUCKET_FLUSH_SECONDS = 30.0  # between two writes of a file in a bucket


def compute_means(sums: MetricSums) -> dict[str, jax.Array]:
    """Divides sums by counts. A count of 0 gives NaN (null in files): not measured is not zero."""
    return {
        name: jnp.where(count == 0, jnp.nan, total / jnp.where(count == 0, 1, count))
        for name, (total, count) in sums.items()
    }


def is_primary() -> bool:
    """Returns True in process 0. Does not initialise a backend in a run of one process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def log_line(message: str, colours: Collection[str] = ()) -> None:
    """Writes one line to stderr from process 0, above a progress bar if there is one.

    Control characters are escaped, but for the codes `colours`.
    """
    if is_primary():
        parts = (
            re.split(f"({'|'.join(map(re.escape, colours))})", message) if colours else [message]
        )
        parts = [part if part in colours else paths.escape_controls(part) for part in parts]
        tqdm.write("".join(parts), file=sys.stderr)


def log_skipped(reason: object, number: int) -> None:
    """Says why a row is skipped, the `number`-th so far; after a few, only that more are."""
    if number <= MAX_SAID_SKIPS:
        log_line(f"skipped: {reason}")
    elif number == MAX_SAID_SKIPS + 1:
        log_line("skipped: more rows, which from here on are only counted")


def _to_finite(x: Any) -> Any:
    """Converts `x` for JSON: arrays become lists, numbers that are not finite None, and bytes
    base64."""
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        x = np.asarray(x).tolist()
    if isinstance(x, bytes):
        return base64.b64encode(x).decode()
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, Mapping):
        return {key: _to_finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_to_finite(value) for value in x]
    return x


def to_json(row: Any, indent: int | None = None) -> str:
    """Returns `row` as JSON; numbers that are not finite become null, arrays lists, bytes base64.

    All in ASCII: half a surrogate pair in a text that nobody reads is written as it was read."""
    return json.dumps(_to_finite(row), allow_nan=False, indent=indent)


def write_json(path: epath.PathLike, obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically; numbers that are not finite become null."""
    write_text(path, to_json(obj, indent=2) + "\n")


def write_jsonl(path: epath.PathLike, rows: Iterable[Any]) -> None:
    """Writes `rows` as they come, one JSON object per line; atomic, and null where not finite."""
    with paths.open_atomic(path) as file:
        for row in rows:
            file.write(to_json(row) + "\n")


class Appender:
    """A file that process 0 appends to.

    Objects in a bucket cannot be appended to: there the whole file is rewritten every
    BUCKET_FLUSH_SECONDS, by `flush` and at the end.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self._path = epath.Path(path)
        self._whole = None  # in a bucket: the whole file
        if is_remote(path):
            self._whole = [self._path.read_bytes() if self._path.exists() else b""]
        self._written = time.monotonic()
        self._changed = False

    def append(self, data: bytes) -> None:
        if not is_primary():
            return
        self._changed = True
        if self._whole is None:
            with self._path.open("ab") as file:  # closing it hands all to the system
                file.write(data)
            return
        self._whole.append(data)
        if time.monotonic() - self._written >= BUCKET_FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes all that was appended, to the disk itself, before it returns."""
        if not self._changed:
            return
        if self._whole is not None:
            self._path.write_bytes(b"".join(self._whole))
        else:
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        self._written, self._changed = time.monotonic(), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


class JsonlAppender(Appender):
    """A jsonl file that process 0 appends to row by row."""

    def append_rows(self, rows: Iterable[Any]) -> None:
        self.append("".join(to_json(row) + "\n" for row in rows).encode())


@contextlib.contextmanager
def explain_write_errors(path: epath.PathLike, flag: str) -> Iterator[None]:
    """Context in which a disk that is full, read-only or gone is a UserError of one line.

    Args:
      path: the file or directory that is written.
      flag: what the message names, such as --workdir=runs/x.
    """
    try:
        yield
    except OSError as error:
        name = os.path.abspath(str(error.filename)) if error.filename else ""
        is_inside = name.startswith(os.path.abspath(str(path)))
        if not is_inside and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f": {error.filename}" if error.filename else ""
        raise UserError(
            f"{flag}: {error.strerror or error}{where}; what was complete before is intact, and "
            "the same command goes on once this is mended"
        ) from error


def resume_jsonl(path: epath.PathLike, about: Mapping[str, Any]) -> int:
    """Returns the number of rows that an interrupted `extend_jsonl` wrote for `path`.

    The job that `about` describes continues from there. A half-written last row is cut off.

    Raises:
      UserError: if the rows come from another job; it names the setting that differs.
    """
    partial, about_path = _get_partial_paths(path)
    now = json.loads(to_json(about))
    if partial.exists() and about_path.exists():
        try:
            before = dict(json.loads(about_path.read_bytes()))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{about_path}: damaged ({error}); delete it and {partial} to start over"
            ) from None
        # Settings that an earlier version did not record are passed over.
        changed = next((k for k in before if before[k] != now.get(k)), None)
        if changed is not None:
            raise UserError(
                f"{partial} is of another work: {changed} was {before.get(changed)!r}, now "
                f"{now.get(changed)!r}; delete it to start over"
            )
        count = end = size = 0
        with partial.open("rb") as file:
            for line in file:
                size += len(line)
                if line.endswith(b"\n"):
                    count, end = count + 1, size
        if end < size:
            paths.truncate_file(partial, end)
        return count
    write_json(about_path, now)
    partial.write_text("")
    return 0


def extend_jsonl(path: epath.PathLike, rows: Iterable[Any]) -> None:
    """Appends `rows` to those counted by `resume_jsonl`; `path` exists once all are written."""
    partial, about_path = _get_partial_paths(path)
    with JsonlAppender(partial) as lines:
        for row in rows:
            lines.append_rows([row])
    if is_primary():
        partial.replace(epath.Path(path))
        about_path.unlink()


def _get_partial_paths(path: epath.PathLike) -> tuple[epath.Path, epath.Path]:
    path = epath.Path(path)
    return path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.about")


class Writer:
    """Writes metrics.jsonl, rollouts/ and tensorboard/. Every process may call its methods.

    `resume_step` is the first step that this process writes. What an earlier process wrote of that
    step or later is deleted, and so is what it wrote by half. Steps are numbered across all stages
    of a run. Without `has_board` tensorboard/ is left as it is.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int, has_board: bool = True) -> None:
        self._workdir = epath.Path(workdir)
        if not is_primary():
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / "metrics.jsonl"
        if path.exists():
            with path.open("rb") as rows, paths.open_atomic(path) as kept:
                lines = (row.decode(errors="replace") for row in rows)
                kept.writelines(row for row in lines if _is_before(row, resume_step))
        for folder in ("rollouts", "skipped"):
            for old in (self._workdir / folder).glob("*.jsonl"):
                if old.stem.isdigit() and int(old.stem) >= resume_step:
                    old.unlink()
        self._lines = JsonlAppender(path)
        if not is_remote(workdir):
            path.touch()
        self._board = None
        if has_board:
            self._board = Appender(
                tensorboard.make_file(self._workdir / "tensorboard", resume_step)
            )
            config = self._workdir / "config.json"
            settings = json.loads(config.read_text()) if config.exists() else {}
            self._board.append(tensorboard.make_start(resume_step, settings))

    def write(self, step: int, stage: str, numbers: Mapping[str, Any]) -> None:
        """Appends one row; `numbers` maps flat names to scalars (host or device) or None."""
        if not is_primary():
            return
        self._require_directory()
        values = _to_finite(jax.device_get(dict(numbers)))
        self._lines.append_rows([{"step": step, "stage": stage, **values}])
        if self._board:
            scalars = {name: value for name, value in values.items() if value is not None}
            self._board.append(tensorboard.make_scalars(scalars, step))

    def _require_directory(self) -> None:
        """Raises FileNotFoundError if the directory is gone; nothing may make a new, empty one."""
        path = self._workdir / "metrics.jsonl"
        if not is_remote(path) and not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rollouts/{step}.jsonl, one transcript per row, and shows it in tensorboard/."""
        if is_primary():
            self._require_directory()
            rows = [_to_finite(row) for row in rows]
            write_jsonl(self._workdir / "rollouts" / f"{step:06d}.jsonl", rows)
            if self._board:
                self._board.append(tensorboard.make_transcripts(rows, step))

    def write_skipped(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes skipped/{step}.jsonl, the sequences of an update that was not finite."""
        if is_primary():
            self._require_directory()
            path = self._workdir / "skipped" / f"{step:06d}.jsonl"
            write_jsonl(path, rows)
            log_line(f"warning: step {step}: loss or gradient not finite, not trained: see {path}")

    def flush(self) -> None:
        """Writes all rows and events before it returns."""
        if is_primary():
            self._lines.flush()
            if self._board:
                self._board.flush()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


def _is_before(row: str, step: int) -> bool:
    """Returns True for a complete row of metrics.jsonl whose step is before `step`."""
    try:
        return json.loads(row)["step"] < step
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def describe_finished(out: epath.Path) -> str:
    """Says where the rows are of a call that ended before it wrote all of `out`, if any was
    finished, and how to go on."""
    partial = out.with_name(f"{out.name}.partial")
    if not partial.exists() or not partial.stat().length:
        return "no row was finished yet; the same command begins anew"
    return f"the rows that were finished are in {partial}, and the same command goes on"
