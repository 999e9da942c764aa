"""Finds and opens the safetensors files of a model or an adapter."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.errors import UserError

WHOLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def list_files(directory: Path) -> dict[Path, list[str]]:
    """Returns a model's files, each with the tensors that an index places in it.

    A file of the whole model comes before an index, as in transformers. Raises UserError if the
    index is none, or names a file elsewhere than in `directory`.
    """
    whole, index = directory / WHOLE_FILE, directory / INDEX_FILE
    if whole.is_file() or not index.is_file():
        return {whole: []}
    files: dict[Path, list[str]] = {}
    try:
        for name, file in sorted(json.loads(index.read_text("utf-8"))["weight_map"].items()):
            if (
                file in ("", "..")
                or file != Path(file).name
                or not file.isprintable()
                or len(file.encode()) > 255
            ):
                raise UserError(f"{index}: {file!r} is no name of a file beside it")
            files.setdefault(directory / file, []).append(name)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of safetensors files ({error!r})") from None
    return files


def find_unread_index(directory: str | Path) -> Path | None:
    """Returns the index in a model's directory that is not read because one file has it all."""
    whole, index = Path(directory) / WHOLE_FILE, Path(directory) / INDEX_FILE
    return index if whole.is_file() and index.is_file() else None


def _explain_missing_file(file: Path) -> str:
    """Returns a message that names the weights beside a missing file, which are not read."""
    beside = sorted(
        path.name
        for pattern in ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "*.gguf")
        for path in file.parent.glob(pattern)
    )
    if not beside:
        return f"{file}: no such file"
    return (
        f"{file}: no such file; {beside[0]} is not read: load it in the library that wrote it, "
        f"whose save_pretrained writes {file.name}"
    )


@contextlib.contextmanager
def open_tensors(files: dict[Path, list[str]]) -> Iterator[dict[str, Any]]:
    """Yields tensor name -> handle with .get_shape(), .get_dtype() and slicing.

    `files` maps each file to the tensors that it must contain; others in it are included. Raises
    UserError for a missing or unreadable file or tensor.
    """
    with contextlib.ExitStack() as stack:
        slices = {}
        for file, placed in files.items():
            if not file.is_file():
                missing = f"{file}: no such file, which the index names"
                raise UserError(missing if placed else _explain_missing_file(file))
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from None
            file_slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            absent = [name for name in placed if name not in file_slices]
            if absent:
                raise UserError(
                    f"{file}: tensor {absent[0]} is missing, which the index says it has"
                )
            for twice in sorted(slices.keys() & file_slices.keys()):
                raise UserError(f"{file}: tensor {twice} is also in another file of the index")
            slices |= file_slices
        yield slices
