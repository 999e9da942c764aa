"""Checkpoints: Orbax, with checksums.

Orbax reports the newest step even if its files are truncated, and reads flipped bits silently. So
each checkpoint carries a checksum of every leaf, and `restore` goes back from the newest step to
the newest that verifies, logging those it skips. A damaged checkpoint is removed only when a later
save replaces it.

A step's directory holds one Orbax item for each top-level entry of the state, so that a reader can
load some of them alone (the parameters without the optimiser, say), and an item `about`: JSON with
the caller's `meta` and each leaf's shape, dtype and checksum.
"""

import gc
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from distill.runtime import paths, run_files
from models.errors import UserError

Meta = dict[str, Any]


class _Damaged(Exception):
    """A checkpoint that cannot be read or does not match its checksums; the message is one line."""


class Checkpoints:
    """The checkpoints under `directory`. A context manager: leaving it waits for the last save.

    With `save_interval_steps` it is writable: `save` saves at multiples of the interval and keeps
    the newest `max_to_keep` of them, and opening removes what an earlier process left half-written.
    Without, it is read-only, which is safe while another process writes. All processes must make
    the same calls.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        save_interval_steps: int | None = None,
        max_to_keep: int | None = None,
    ) -> None:
        self._directory = epath.Path(directory)
        if not paths.is_remote(directory):  # absolute() would treat it as relative
            self._directory = self._directory.absolute()
        self._every = save_interval_steps
        self._damaged: set[int] = set()
        self._manager: ocp.CheckpointManager | None = None
        if save_interval_steps is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            # One prefix per directory, or saves of the same step to two directories share barriers.
            name = f"{zlib.crc32(str(self._directory).encode()):08x}"
            options = ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep,
                cleanup_tmp_directories=True,
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    barrier_sync_key_prefix=name
                ),
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def should_save(self, step: int, force: bool = False) -> bool:
        """Returns True if `save` would save this step."""
        return force or (self._every is not None and step % self._every == 0)

    def save(self, step: int, state: Any, meta: Meta, force: bool = False) -> bool:
        """Starts saving if the interval divides `step`, or with `force`; returns True if it did.

        `state` (a pytree of arrays) has been copied when this returns, so it may be donated;
        writing continues in the background. A step that is already saved is left alone. Raises
        ValueError if an undamaged newer checkpoint exists, and any error of the previous save.
        """
        assert self._manager is not None and self._every is not None, "opened read-only"
        if not self.should_save(step, force):
            return False
        later_steps = {s for s in self._manager.all_steps() if s >= step}
        whole = later_steps - self._damaged
        if whole - {step}:
            raise ValueError(f"step {step}: {self._directory} already holds {max(whole)}")
        if whole:
            return False
        for damaged in sorted(later_steps):
            run_files.log_line(
                f"{self._directory / str(damaged)}: damaged, so step {step} replaces it"
            )
            self._manager.delete(damaged)
            self._damaged.discard(damaged)
        leaves = _flatten_tree(state)
        # One by one: on several CPU devices XLA deadlocks, and then aborts, when programs with
        # collectives queue up on few cores.
        checks = {path: int(jax.device_get(compute_checksum(x))) for path, x in leaves.items()}
        about = {
            "meta": meta,
            "leaves": {
                path: [list(x.shape), x.dtype.name, checks[path]] for path, x in leaves.items()
            },
        }
        items = {name: ocp.args.StandardSave(item) for name, item in _split_items(leaves).items()}
        items["about"] = ocp.args.JsonSave({**about, "crc32": _compute_crc32(about)})
        # force: the manager's own rules would skip steps silently.
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        return True

    def read_latest(self) -> tuple[int, Meta] | None:
        """Returns the newest step whose `about` verifies, and its meta; reads no arrays."""
        for step in self._list_steps():
            try:
                return step, self._read_about(step)["meta"]
            except _Damaged as error:
                self._skip_damaged(step, error)
        return None

    def describe_step(self, step: int | None = None) -> dict[str, Any]:
        """Returns {step, sha256} of a checkpoint, by default the newest: a hash of its arrays'
        checksums, none of which is read. {} if there is none that can be read.
        """
        step = step or next(iter(self._list_steps()), None)
        try:
            leaves = self._read_about(step)["leaves"] if step else None
        except _Damaged:
            leaves = None
        if leaves is None:
            return {}
        text = json.dumps(leaves, sort_keys=True).encode()
        return {"step": step, "sha256": hashlib.sha256(text).hexdigest()}

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        convert: Callable[[tuple, jax.Array], Any] | None = None,
    ) -> tuple[Any, Meta] | None:
        """Restores the newest checkpoint that verifies, or `step`, as (state, meta).

        Args:
          abstract_state: pytree of ShapeDtypeStructs with shardings: the whole state, or a dict of
            some of its top-level entries. The returned arrays may be donated.
          convert: (path, array) -> its replacement. Arrays are then read one by one, so that only
            one at a time exists in its saved form.

        Returns:
          None if there is no checkpoint at all.

        Raises:
          UserError: if there are checkpoints but none can be read, if `step` does not exist, or if
            the state has another shape or dtype than what was saved.
        """
        self.check_step(step)
        steps, reasons = self._list_steps(), []
        for candidate in steps if step is None else [step]:
            try:
                return self._load_step(candidate, abstract_state, convert)
            except _Damaged as error:
                reasons.append(self._skip_damaged(candidate, error))
        if reasons:
            raise UserError(f"no checkpoint could be read: {reasons[0]}")
        return None

    def check_step(self, step: int | None) -> None:
        """Raises UserError if there is no checkpoint of `step`; None passes."""
        steps = self._list_steps()
        if step is not None and step not in steps:
            raise UserError(f"{self._directory}: no checkpoint of step {step}, only of {steps}")

    def _list_steps(self) -> list[int]:
        """Steps on disk, newest first."""
        return sorted(ocp.utils.checkpoint_steps(self._directory), reverse=True)

    def _skip_damaged(self, step: int, error: _Damaged) -> str:
        self._damaged.add(step)
        reason = f"{self._directory / str(step)}: damaged ({error})"
        run_files.log_line(f"warning: {reason}")
        return reason

    def _read_about(self, step: int) -> dict[str, Any]:
        about = _read_item(self._directory / str(step) / "about", ocp.args.JsonRestore())
        if about.pop("crc32", None) != _compute_crc32(about):
            raise _Damaged("the checksum of about does not match")
        return about

    def _load_step(
        self,
        step: int,
        abstract_state: Any,
        convert: Callable[[tuple, jax.Array], Any] | None = None,
    ) -> tuple[Any, Meta]:
        abstract, where = _flatten_tree(abstract_state), self._directory / str(step)
        about, error = {}, None
        try:
            about = self._read_about(step)
            _check_leaves(about["leaves"], abstract, where)
        except _Damaged as problem:
            error = problem
        leaves: dict[str, Any] = {}
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
        key_paths = dict(zip(abstract, paths, strict=True))
        parts = [{path: x} for path, x in abstract.items()] if convert else [abstract]
        for part in parts:
            items = {}
            try:
                for name, item in _split_items(part).items() if error is None else ():
                    items[name] = _read_item(where / name, _make_restore_args(item))
            except _Damaged as problem:
                error = problem
            # Before the checksums, which all processes compute together.
            if not _is_ok_everywhere(error is None):
                raise error or _Damaged("another process could not read its part")
            for path in part:
                name, _, rest = path.partition("/")
                x = items[name].pop(rest or name)  # at most one leaf exists twice
                # A copy: restored arrays may use the reader's memory, which cannot be donated,
                # and the next step would need room for a second state.
                copy = jax.jit(_copy_with_checksum, out_shardings=(x.sharding, None))
                x, check = copy(x)
                if int(jax.device_get(check)) != about["leaves"][path][2]:  # waits, as in `save`
                    raise _Damaged(f"the checksum of {path} does not match")
                leaves[path] = convert(key_paths[path], x) if convert else x
                del x
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves.values())
        return state, about["meta"]

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        # The only place where a failure of the last save is raised.
        if self._manager is not None:
            self._manager.close()


def _read_item(item: epath.Path, args: ocp.args.CheckpointArgs) -> Any:
    """Reads one item without Orbax's barriers between processes; raises _Damaged.

    If one process's part is damaged, that process alone fails, and `_is_ok_everywhere` informs the
    others; in a barrier they would hang or crash.
    """
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    handler = (
        ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        if isinstance(args, ocp.args.JsonRestore)
        else ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    )
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore(item, args=args)
    except Exception as error:  # Orbax, tensorstore and json raise many types, some pages long
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    # The failed read leaves sibling tasks pending, each of which would log when collected.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook
    raise _Damaged(f"{item.name}: {reason}")


def _make_restore_args(leaves: dict[str, Any]) -> ocp.args.PyTreeRestore:
    """Returns arguments that read only these arrays of an item, with their shardings."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(leaves)
    return ocp.args.PyTreeRestore(leaves, restore_args, partial_restore=True)


def _flatten_tree(tree: Any) -> dict[str, Any]:
    """Maps paths, such as params/layers/q/kernel, to leaves, in the order of the tree."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in paths}


def _split_items(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups leaves by the first component of their path, keyed by the rest of it."""
    items: dict[str, dict[str, Any]] = {}
    for path, x in leaves.items():
        name, _, rest = path.partition("/")
        items.setdefault(name, {})[rest or name] = x
    return items


def _check_leaves(saved: Mapping[str, Any], expected: Mapping[str, Any], where: epath.Path) -> None:
    """Raises UserError if a leaf's shape or dtype differs: Orbax would cast silently, and its
    message about a shape names no leaf."""
    entries = _split_items(expected)
    wanted = {path: [list(x.shape), x.dtype.name] for path, x in expected.items()}
    present = {path: x[:2] for path, x in saved.items() if path.partition("/")[0] in entries}
    for path in sorted(wanted.keys() | present.keys()):
        if present.get(path) != wanted.get(path):
            raise UserError(
                f"{where}: {path} is {_describe_leaf(present.get(path))} there, "
                f"but {_describe_leaf(wanted.get(path))} in this run's config"
            )


def _describe_leaf(leaf: list[Any] | None) -> str:
    return f"{leaf[1]}{leaf[0]}" if leaf else "absent"


def _compute_crc32(about: Meta) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _is_ok_everywhere(ok: bool) -> bool:
    """Returns True if `ok` in every process; each reads only its own shards."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


@jax.jit
def compute_checksum(x: jax.Array) -> jax.Array:
    """Returns uint32 Σ bits(x_i) · (2i + 1) mod 2³², which does not depend on x's sharding.

    The weights are odd, so a change of any one element is detected; they differ, so most swaps are
    too.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def _copy_with_checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.copy(x), compute_checksum(x)
