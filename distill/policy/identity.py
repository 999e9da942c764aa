"""Identity of files and models: what must be equal for a resumed job to go on with them.

It consists of sizes and hashes of content, not of paths or times: a file may move, and a touch
changes nothing. Files are hashed whole, at the speed of SHA-256 (a GB takes one to two seconds).
Of safetensors files above WHOLE_BYTES the header is hashed and, of each tensor, SAMPLE_BYTES from
its middle: training changes most values of a tensor, and a model of hundreds of GB is not read
twice.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath

from distill.data import chat
from distill.policy import hub
from distill.runtime.checkpoint import Checkpoints
from models import adapter
from models.errors import UserError

Part = dict[str, Any]  # of a file: bytes, sha256 and, of jsonl, rows; of a checkpoint: step, sha256

WHOLE_BYTES, SAMPLE_BYTES = 2**28, 2**14
_BLOCK = 2**20

# Files of a model directory that are read, beside its weights and chat.TOKENIZER_FILES.
_CONFIG_FILES = (
    *("config.json", "generation_config.json", "model.safetensors.index.json"),
    adapter.CONFIG_FILE,
)


def describe_file(path: str | Path) -> Part:
    """Returns the size and hash of a file and, of jsonl, its number of lines as `rows`.

    Raises UserError if it cannot be read.
    """
    path = Path(path)
    digest, size, rows, end = hashlib.sha256(), 0, 0, b"\n"
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors" and path.stat().st_size > WHOLE_BYTES:
                return {"bytes": path.stat().st_size, "sha256": _hash_samples(file)}
            while block := file.read(_BLOCK):
                digest.update(block)
                size, rows, end = size + len(block), rows + block.count(b"\n"), block[-1:]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    part: Part = {"bytes": size, "sha256": digest.hexdigest()}
    return part | {"rows": rows + (end != b"\n")} if path.suffix == ".jsonl" else part


def _hash_samples(file: BinaryIO) -> str:
    """Hashes a safetensors file's header and the middle of each tensor, in the order of the file.

    A file with another header than safetensors' is left to its reader, which refuses it.
    """
    digest = hashlib.sha256()
    size = int.from_bytes(file.read(8), "little")
    header = file.read(min(size, 100 * 2**20))  # the format's limit
    digest.update(header)
    try:
        tensors = json.loads(header)
        spans = sorted(t["data_offsets"] for name, t in tensors.items() if name != "__metadata__")
        for begin, end in spans:
            file.seek(8 + size + max(begin, (begin + end - SAMPLE_BYTES) // 2))
            digest.update(file.read(max(0, min(SAMPLE_BYTES, end - begin))))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        pass
    return digest.hexdigest()


def describe_tokenizer(directory: str | Path) -> dict[str, Part]:
    """Describes the files of a tokenizer and its chat template, by name."""
    return dict(_describe_files(Path(directory), chat.TOKENIZER_FILES))


def describe_model(path: str, step: int | None = None, weights: bool = True) -> dict[str, Part]:
    """Describes the files that a model's name stands for, by their names.

    A run counts as the checkpoint of `step` (None: the newest), an adapter as its own files, both
    beside the model that they are based on. With weights=False only config and tokenizer count.

    Raises:
      UserError: if the name stands for no model, or a file cannot be read.
    """
    base, parts = hub.resolve_model_dir(path), {}
    directories = {base: ""}
    if hub.is_run(path):
        with Checkpoints(epath.Path(path) / "checkpoints") as checkpoints:
            parts["checkpoint"] = checkpoints.describe_step(step)
        # Without a LoRA all weights are in the checkpoint.
        weights = weights and hub.read_run_lora(path) is not None
    elif (own := hub.to_local_dir(path)) != base:
        directories = {own: "", base: "base/"}
    directories.setdefault(hub.resolve_tokenizer_dir(path), "tokenizer/")
    for directory, prefix in directories.items():
        names = [*_CONFIG_FILES, *chat.TOKENIZER_FILES]
        if weights:
            names += sorted(file.name for file in directory.glob("*.safetensors"))
        parts |= {prefix + name: part for name, part in _describe_files(directory, names)}
    return parts


def hash_parts(parts: dict[str, Part]) -> str:
    """Returns one hash of all parts, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _describe_files(directory: Path, names: Iterable[str]) -> Iterator[tuple[str, Part]]:
    for name in names:
        if (directory / name).is_file():
            yield name, describe_file(directory / name)
