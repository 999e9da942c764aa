"""One checkpoint: a directory that Orbax writes and reads, verified.

It holds an Orbax item for each top-level entry of the state, so that a reader can load some of them
alone (the parameters without the optimiser, say); an item `about`, which is JSON with the caller's
`meta` and each leaf's shape, dtype and checksum; and a list of all these files (integrity.py).
"""

import functools
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from distill.runtime import distributed, integrity
from distill.runtime.integrity import DamagedError
from models.errors import UserError

Meta = dict[str, Any]


def make_items(state: Any, meta: Meta) -> ocp.args.Composite:
    """Returns what Orbax is to save for a state, a pytree of arrays."""
    leaves = _flatten_tree(state)
    # One checksum by one: on several CPU devices XLA deadlocks, and then aborts, when programs with
    # collectives queue up on few cores.
    about = {
        "meta": meta,
        "leaves": {
            path: [list(x.shape), x.dtype.name, _fetch(integrity.compute_checksum(x))]
            for path, x in leaves.items()
        },
        "has_file_list": True,  # checkpoints of earlier versions have none
    }
    items = {name: ocp.args.StandardSave(item) for name, item in _split_items(leaves).items()}
    items["about"] = ocp.args.JsonSave({**about, "crc32": integrity.compute_crc32(about)})
    return ocp.args.Composite(**items)


def read_about(step_dir: epath.Path, items: Collection[str] | None = None) -> dict[str, Any]:
    """Returns `about`, after a check of the files of these items, or of all; raises
    DamagedError."""
    has_file_list = (step_dir / integrity.LIST_NAME).exists()
    if has_file_list:
        integrity.check_files(step_dir, items if items is None else {*items, "about"})
    about = _read_item(step_dir / "about", ocp.args.JsonRestore())
    if about.pop("crc32", None) != integrity.compute_crc32(about):
        raise DamagedError("the checksum of about does not match")
    if about.get("has_file_list") and not has_file_list:
        raise DamagedError(f"{integrity.LIST_NAME} is missing")
    return about


def load(
    step_dir: epath.Path,
    abstract_state: Any,
    convert: Callable[[tuple, jax.Array], Any] | None = None,
) -> tuple[Any, Meta]:
    """Returns (state, meta); see `Checkpoints.restore`. All processes must call it.

    Raises:
      DamagedError: in every process, if any finds damage.
      UserError: if the state has another shape or dtype than what was saved.
    """
    items = None if callable(abstract_state) else [*_split_items(_flatten_tree(abstract_state))]
    about, reason = distributed.broadcast_from_primary(lambda: _try_about(step_dir, items))
    if reason:
        raise DamagedError(reason)
    if callable(abstract_state):
        abstract_state = abstract_state(about["meta"])
    abstract = _flatten_tree(abstract_state)
    _check_leaves(about["leaves"], abstract, step_dir)
    leaves: dict[str, Any] = {}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
    key_paths = dict(zip(abstract, paths, strict=True))
    for part in [{path: x} for path, x in abstract.items()] if convert else [abstract]:
        read, reason = {}, ""
        try:
            for name, item in _split_items(part).items():
                read[name] = _read_item(step_dir / name, _make_restore_args(item))
        except DamagedError as error:
            reason = str(error)
        # Before the checksums, which all processes compute together.
        if reason := integrity.gather_reason(reason):
            raise DamagedError(reason)
        for path in part:
            name, _, rest = path.partition("/")
            x = read[name].pop(rest or name)  # at most one leaf exists twice
            # A copy: restored arrays may use the reader's memory, which cannot be donated, and the
            # next step would need room for a second state.
            copy = jax.jit(integrity.copy_with_checksum, out_shardings=(x.sharding, None))
            x, check = copy(x)
            if _fetch(check) != about["leaves"][path][2]:
                raise DamagedError(f"the checksum of {path} does not match")
            leaves[path] = convert(key_paths[path], x) if convert else x
            del x
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves.values())
    return state, about["meta"]


def _try_about(step_dir: epath.Path, items: Collection[str] | None) -> tuple[Any, str]:
    """Returns (about, ""), or (None, why it is damaged)."""
    try:
        return read_about(step_dir, items), ""
    except DamagedError as error:
        return None, str(error)


def _read_item(item: epath.Path, args: ocp.args.CheckpointArgs) -> Any:
    """Reads one item without Orbax's barriers between processes; raises DamagedError.

    If one process's part is damaged, that process alone fails, and `gather_reason` informs the
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
        reason = shorten(error)
    collect_quietly()
    raise DamagedError(f"{item.name}: {reason}")


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


def _fetch(scalar: jax.Array) -> int:
    """Waits for a number: see `save`."""
    return int(jax.device_get(scalar))


def shorten(error: BaseException) -> str:
    """Returns what the system says of an error, or else its first line: it may be pages long."""
    code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's
    if number := int(code[1]) if code else getattr(error, "errno", None):
        return os.strerror(number)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def collect_quietly() -> None:
    """Frees the tasks that a failed read or write leaves pending, each of which would log.

    Those that a thread still holds end with the process, and would warn then.
    """
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    gc.collect()
    sys.unraisablehook = hook


@functools.cache
def hide_noise() -> None:
    """Hides the pages that Orbax prints for each of its threads that fails, from now on.

    The first error is raised too, and reported in one line.
    """
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
