"""Detects damage in a checkpoint: a list of its files, and a checksum of each array.

Storage may truncate, lose or alter files, and Orbax reads altered ones silently. When all arrays of
a step are written, `write_file_list` adds one more file: the size of each file and the CRC-32 of
each that is at most DIGEST_BYTES long, so that any altered byte in one of them is found. Once Orbax
has named the step, which adds files, `add_last_files` lists those too. Longer files
hold nothing but parts of arrays. To read those back after each save, and twice at each restore,
would cost minutes with a large model; instead, the devices compute a checksum of every array as it
is saved and again as it is restored. It finds every altered value, and what it does not find (an
altered byte that no array depends on) changes nothing. So the list costs a request and at most
DIGEST_BYTES of reading per file, whatever the size of the model.
"""

import concurrent.futures
import json
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from distill.runtime import run_files

DIGEST_BYTES = 4 * 2**20
LIST_NAME = "files.json"
_THREADS = 16  # a request to a bucket takes tens of milliseconds
_REASON_BYTES = 400

Entries = dict[str, list[int | None]]
"""Path of a file in a step's directory → [size, CRC-32], or [size, None] for a long one."""


class DamagedError(Exception):
    """A checkpoint that is incomplete or altered; the message is one line."""


def write_file_list(step_dir: epath.Path) -> None:
    """Writes the list of the files in the items of a step, after all of them."""
    files = [file for item in step_dir.iterdir() if item.is_dir() for file in _list_files(item)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        described = pool.map(_describe_file, files)
        entries = {
            file.relative_to(step_dir).as_posix(): entry
            for file, entry in zip(files, described, strict=True)
        }
    (step_dir / LIST_NAME).write_text(_format_list(entries))


def add_last_files(step_dir: epath.Path) -> None:
    """Adds the files beside a complete step's items to its list; raises DamagedError."""
    entries = _read_list(step_dir)
    last = [file for file in step_dir.iterdir() if not file.is_dir() and file.name != LIST_NAME]
    run_files.write_text(
        step_dir / LIST_NAME, _format_list(entries | {f.name: _describe_file(f) for f in last})
    )


def _format_list(entries: Entries) -> str:
    return json.dumps({"files": entries, "crc32": compute_crc32(entries)})


def _read_list(step_dir: epath.Path) -> Entries:
    try:
        listed = json.loads((step_dir / LIST_NAME).read_bytes())
        entries = listed["files"]
        intact = listed["crc32"] == compute_crc32(entries)
    except FileNotFoundError:
        raise DamagedError(f"{LIST_NAME} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        intact, entries = False, {}
    if not intact:
        raise DamagedError(f"{LIST_NAME} was altered")
    return entries


def check_files(step_dir: epath.Path, items: Collection[str] | None = None) -> None:
    """Compares the files of these items, or of all, with the list, and those beside the items.

    Raises:
      DamagedError: naming the first file that is missing, truncated or altered.
    """
    entries = _read_list(step_dir)
    names = [
        name
        for name in sorted(entries)
        if items is None or "/" not in name or name.partition("/")[0] in items
    ]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _find_file(step_dir / name), names)
        for name, actual in zip(names, found, strict=True):
            expected = entries[name]
            if actual is None:
                raise DamagedError(f"{name} is missing or cannot be read")
            if actual[0] != expected[0]:
                raise DamagedError(f"{name} has {actual[0]} bytes, {expected[0]} were written")
            if actual[1] != expected[1]:
                raise DamagedError(f"{name} was altered")


def _list_files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _list_files(path)
        else:
            yield path


def _describe_file(path: epath.Path) -> list[int | None]:
    """Returns [size, CRC-32], or [size, None] for a long file."""
    size = path.stat().length
    if size > DIGEST_BYTES:
        return [size, None]
    data = path.read_bytes()
    return [len(data), zlib.crc32(data)]


def _find_file(path: epath.Path) -> list[int | None] | None:
    try:
        return _describe_file(path)
    except OSError:
        return None


def compute_crc32(obj: Any) -> int:
    """Returns the CRC-32 of JSON, whatever its spacing and the order of its keys."""
    return zlib.crc32(json.dumps(obj, sort_keys=True).encode())


def gather_reason(reason: str) -> str:
    """Returns the first reason that is not empty, over all processes; each reads its own shards."""
    if jax.process_count() == 1:
        return reason
    text = np.frombuffer(reason.encode()[:_REASON_BYTES], np.uint8)
    padded = np.pad(text, (0, _REASON_BYTES - len(text)))
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, _REASON_BYTES)
    reasons = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
    return next(filter(None, reasons), "")


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


def copy_with_checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.copy(x), compute_checksum(x)
