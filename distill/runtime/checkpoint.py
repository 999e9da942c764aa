"""Checkpoints: when to save one, which to keep, and which to resume from.

Orbax reports the newest step even if its files are truncated, and reads flipped bits silently. So
`restore` goes back from the newest step to the newest that verifies, logging those it skips. A
damaged checkpoint is removed only when a later save replaces it.

Orbax's AsyncCheckpointer writes the steps, in the background; saved_step.py says what is in one.
Its CheckpointManager is not used: it reports a failed save at the next save or never, and counts
damaged steps among the newest.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from distill.runtime import distributed, integrity, paths, run_files, saved_step
from distill.runtime.integrity import DamagedError
from models.errors import UserError

Meta = dict[str, Any]


class Checkpoints:
    """The checkpoints under `directory`. A context manager: leaving it waits for the last save.

    With `save_interval_steps` it is writable, and opening it removes what an earlier process left
    half-written. Without, it is read-only, which is safe while another process writes. All
    processes must make the same calls, but for `read_all`, `read_latest` and `check_step`.

    Args:
      save_interval_steps: `should_save` is true at its multiples,
      save_interval_minutes: and when the next step, if it takes as long as the last, would end
        later than this after the last save; 0: never.
      max_to_keep: the newest steps to keep; None: all.
      keep_every_steps: its multiples are kept as well; 0: none.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        save_interval_steps: int | None = None,
        max_to_keep: int | None = None,
        save_interval_minutes: float = 0.0,
        keep_every_steps: int = 0,
    ) -> None:
        self._directory = epath.Path(directory)
        if not paths.is_remote(directory):  # absolute() would treat it as relative
            self._directory = self._directory.absolute()
        self._every, self._minutes = save_interval_steps, save_interval_minutes
        self._keep, self._keep_every = max_to_keep, keep_every_steps
        self._steps: set[int] = set()  # those on disk, and the one being saved
        self._damaged: set[int] = set()
        self._saving: int | None = None  # the last step saved, until `_finish_save`
        self._nbytes = 0  # of its arrays
        self._replaces = False  # it replaces all others
        self._is_writing = False  # in process 0: it is not yet complete
        self._saved_time = self._step_time = time.monotonic()
        self._deletions: list[concurrent.futures.Future[None]] = []
        self._deleter = concurrent.futures.ThreadPoolExecutor(1)  # seconds for a step in a bucket
        self._writer: ocp.AsyncCheckpointer | None = None
        if save_interval_steps is not None:
            self._steps = set(distributed.broadcast_from_primary(self._init_directory))
            self._writer = self._make_writer()

    def _init_directory(self) -> list[int]:
        """Creates the directory, or removes what is half-written in it; returns its steps."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            steps = self._list_steps()
            # In a bucket an empty folder does not exist.
            for path in self._directory.iterdir() if self._directory.exists() else ():
                # In a bucket, a step is written in place, and is complete once it has a marker.
                if ocp.utils.TMP_DIR_SUFFIX in path.name or (
                    path.name.isdigit() and int(path.name) not in steps and path.is_dir()
                ):
                    run_files.log_line(f"{path}: an unfinished checkpoint, removed")
                    path.rmtree()
        except OSError as error:
            raise UserError(f"{self._directory}: {error.strerror or error}") from error
        return steps

    def _make_writer(self) -> ocp.AsyncCheckpointer:
        saved_step.hide_noise()
        # One prefix per directory, or saves of the same step to two directories share barriers.
        prefix = f"{zlib.crc32(str(self._directory).encode()):08x}"
        processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=prefix)
        options = ocp.options.AsyncOptions(post_finalization_callback=self._write_file_list)
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(
                multiprocessing_options=processes, async_options=options
            )
        )
        return ocp.AsyncCheckpointer(
            handler, multiprocessing_options=processes, async_options=options
        )

    def _write_file_list(self) -> None:
        """Runs in a thread of process 0, when all items are written, before the step is named."""
        assert self._writer is not None
        final = self._directory / str(self._saving)
        integrity.write_file_list(self._writer.get_temporary_path(final).get())

    def should_save(self, step: int) -> bool:
        """Returns True if it is time to save this step, by number or by process 0's clock.

        Call it once after each step. Raises UserError if the last save failed.
        """
        assert self._every is not None, "opened read-only"
        self.check_last_save()
        now = time.monotonic()
        step_seconds, self._step_time = now - self._step_time, now
        is_due = False
        if self._minutes:
            # A save waits for the one before it, so on slow storage training goes on instead.
            is_due = not self._is_writing and (
                now + step_seconds - self._saved_time > 60 * self._minutes
            )
            is_due = bool(distributed.max_over_processes(run_files.is_primary() and is_due))
        return is_due or step % self._every == 0

    def save(self, step: int, state: Any, meta: Meta, replace: bool = False) -> bool:
        """Starts saving a step; returns False if it is saved already, which is left alone.

        `state` (a pytree of arrays) has been copied when this returns, so it may be donated;
        writing continues in the background. With `replace`, all other checkpoints are deleted once
        this one is complete, later ones too.

        Raises:
          ValueError: without `replace`, if there is an undamaged checkpoint of a later step.
          UserError: if this or the previous save fails.
        """
        assert self._writer is not None, "opened read-only"
        self._finish_save()
        intact = self._steps - self._damaged
        if not replace and max(intact, default=0) > step:
            raise ValueError(f"step {step}: {self._directory} already holds {max(intact)}")
        if step in intact:
            return False
        for damaged in sorted(s for s in self._steps & self._damaged if s >= step):
            path = self._directory / str(damaged)
            run_files.log_line(f"{path}: damaged, so step {step} replaces it")
            self._delete(damaged)
        concurrent.futures.wait(self._deletions)  # one may be of this step's directory
        self._deletions.clear()
        items = saved_step.make_items(state, meta)
        self._saving, self._replaces, self._is_writing = step, replace, True
        self._saved_time = time.monotonic()
        self._nbytes = sum(x.nbytes for x in jax.tree.leaves(state))
        with self._explain_failure():
            self._writer.save(self._directory / str(step), args=items)
        self._steps.add(step)
        return True

    def check_last_save(self) -> None:
        """Raises UserError if the save in the background has failed; does not wait for it."""
        if self._writer is None or self._saving is None or not self._is_writing:
            return
        with self._explain_failure():
            self._writer.check_for_errors()
        if run_files.is_primary() and self._is_complete(self._saving):
            self._end_save(self._saving)

    def _finish_save(self) -> None:
        """Waits for the last save, and deletes the steps that are not kept."""
        assert self._writer is not None
        if self._saving is not None:
            with self._explain_failure():
                self._writer.wait_until_finished()
            self._end_save(self._saving)
            self._saving = None

    def _end_save(self, step: int) -> None:
        """Deletes the steps that are not kept, now that `step` is complete."""
        if run_files.is_primary() and self._is_writing:
            # A process that ends before this leaves those files unlisted, and an intact step.
            with contextlib.suppress(OSError, DamagedError):
                integrity.add_last_files(self._directory / str(step))
        self._is_writing = False
        self._delete_old()

    @contextlib.contextmanager
    def _explain_failure(self) -> Iterator[None]:
        """Turns a failure to write `_saving` into a UserError."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # another process is lost
            raise
        except Exception as error:  # Orbax, tensorstore and the system raise many types
            if isinstance(error, TimeoutError) and jax.process_count() > 1:  # or late
                raise
            reason = saved_step.shorten(error)
        else:
            return
        step, self._saving = self._saving, None
        assert step is not None and self._writer is not None
        with contextlib.suppress(Exception):  # of files that could not be written either
            self._writer.close()
        self._writer = None
        saved_step.collect_quietly()
        self._steps.discard(step)
        room = f"{self._nbytes / 2**20:,.1f} MiB of arrays to write"
        if not paths.is_remote(self._directory):
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(self._directory).free
                room += f", {free / 2**20:,.1f} MiB free there"
        where, left = self._directory / str(step), max(self._steps - self._damaged, default=0)
        raise UserError(
            f"{where}: the checkpoint could not be written: {reason} ({room}). "
            f"Once that is solved, the same command goes on from step {left}"
        )

    def _is_complete(self, step: int) -> bool:
        path = self._directory / str(step)
        return (path / "commit_success.txt" if paths.is_remote(path) else path).exists()

    def _delete_old(self) -> None:
        """Deletes all but the newest undamaged steps, multiples of `keep_every_steps` and, after a
        replacing save, all but its step."""
        intact = sorted(self._steps - self._damaged)
        kept = set(intact if self._keep is None else intact[-self._keep :])
        kept |= {s for s in intact if self._keep_every and s % self._keep_every == 0}
        if self._replaces and self._saving is not None:
            kept = {self._saving}
        for step in sorted(self._steps - kept):
            self._delete(step)

    def _delete(self, step: int) -> None:
        self._steps.discard(step)
        self._damaged.discard(step)
        if run_files.is_primary():
            self._deletions.append(self._deleter.submit(_delete_dir, self._directory / str(step)))

    def read_all(self) -> Iterator[tuple[int, Meta]]:
        """Yields (step, meta) from the newest, without damaged ones; reads no arrays."""
        for step, about in self._read_abouts(self._list_steps()):
            yield step, about["meta"]

    def read_latest(self) -> tuple[int, Meta] | None:
        """Returns the first of `read_all`, if any."""
        return next(self.read_all(), None)

    def describe_step(self, step: int | None = None) -> dict[str, Any]:
        """Returns {step, sha256} of a checkpoint, by default the newest: a hash of its arrays'
        checksums, none of which is read. {} if there is none that can be read.
        """
        for found, about in self._read_abouts([step] if step else self._list_steps()):
            text = json.dumps(about["leaves"], sort_keys=True).encode()
            return {"step": found, "sha256": hashlib.sha256(text).hexdigest()}
        return {}

    def _read_abouts(self, steps: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        for step in steps:
            try:
                yield step, saved_step.read_about(self._directory / str(step))
            except DamagedError as error:
                self._report_damage(step, error)

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        convert: Callable[[tuple, jax.Array], Any] | None = None,
    ) -> tuple[Any, Meta] | None:
        """Restores the newest checkpoint that verifies, or `step`, as (state, meta).

        Args:
          abstract_state: pytree of ShapeDtypeStructs with shardings: the whole state, or a dict of
            some of its top-level entries; or a function of a checkpoint's meta that makes it. The
            returned arrays may be donated.
          convert: (path, array) -> its replacement. Arrays are then read one by one, so that only
            one at a time exists in its saved form.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          UserError: if there are checkpoints but none can be read, if `step` does not exist, or if
            the state has another shape or dtype than what was saved.
        """
        first_reason = ""
        for candidate in distributed.broadcast_from_primary(lambda: self._choose_steps(step)):
            path = self._directory / str(candidate)
            try:
                restored = saved_step.load(path, abstract_state, convert)
            except DamagedError as error:
                self._damaged.add(candidate)
                reason = self._report_damage(candidate, error)
                first_reason = first_reason or reason
                continue
            if first_reason:
                run_files.log_line(f"{path}: the newest checkpoint that is intact")
            return restored
        if first_reason:
            raise UserError(
                f"no checkpoint could be read: {first_reason}; move {self._directory} away to "
                "start over"
            )
        return None

    def check_step(self, step: int | None) -> None:
        """Raises UserError if there is no checkpoint of `step`; None passes."""
        self._choose_steps(step)

    def _choose_steps(self, step: int | None) -> list[int]:
        """Returns the steps that `restore` tries, in order."""
        steps = self._list_steps()
        if step is not None and step not in steps:
            raise UserError(f"{self._directory}: no checkpoint of step {step}, only of {steps}")
        return steps if step is None else [step]

    def _list_steps(self) -> list[int]:
        """Steps on disk, newest first."""
        return sorted(ocp.utils.checkpoint_steps(self._directory), reverse=True)

    def _report_damage(self, step: int, error: DamagedError) -> str:
        reason = f"{self._directory / str(step)}: damaged ({error})"
        run_files.log_line(f"warning: {reason}")
        return reason

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._writer is not None:
                self._finish_save()
                self._writer.close()
        finally:
            self._deleter.shutdown()


def _delete_dir(path: epath.Path) -> None:
    try:
        if not paths.is_remote(path) and path.exists():
            # What is left of it, if this process is killed, is not taken for a checkpoint.
            path = path.rename(path.with_name(f"{path.name}{ocp.utils.TMP_DIR_SUFFIX}-deleted"))
        path.rmtree(missing_ok=True)
    except OSError as error:  # no reason to end a run
        run_files.log_line(f"warning: {path} could not be deleted: {saved_step.shorten(error)}")
