"""The directory behind a name: of a model, a hub id, a run, or a PEFT adapter."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from etils import epath

from models.errors import UserError
from models.qwen3 import adapter
from models.qwen3.lora import LoRA


def is_run(path: str | Path) -> bool:
    """Whether `path` is the directory of a training run."""
    return _student(path) is not None


def lora_of(path: str | Path) -> LoRA | None:
    """The LoRA that the run directory `path` trains; None of a run that trains all parameters."""
    fields: dict[str, Any] = (_student(path) or {}).get("lora") or {}
    if not fields.get("rank"):
        return None
    return LoRA(fields["rank"], fields["alpha"], fields["rslora"], tuple(fields["targets"]))


def keeps_average(path: str | Path) -> bool:
    """Whether the run directory `path` keeps a moving average of what it trains."""
    return bool((_student(path) or {}).get("ema"))


def _student(path: str | Path) -> dict[str, Any] | None:
    """The config of the run directory `path` about its student; None if it is no run directory."""
    try:
        fields = json.loads((epath.Path(path) / "config.json").read_text())
        return fields["student"] if "stages" in fields and "path" in fields["student"] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # whoever reads it as a model directory says what is wrong with it


def resolve(path: str | Path) -> Path:
    """The local directory in Hugging Face format behind a name; a hub id is fetched.

    Of a run it is its student's, of an adapter its base's: architecture and tokenizer, but not the
    trained parameters.

    Raises:
      UserError: if there is nothing of this name, here or on the hub.
    """
    return local(origin(path))


def origin(path: str | Path) -> str:
    """The model, a path or a hub id, that a run or an adapter began with; of a model its own name.

    A base is looked for as peft does, from the working directory, and then from the adapter's.
    """
    student = _student(path)
    if student is not None:
        try:
            return origin(student["path"])
        except UserError as error:
            raise UserError(f"{path}/config.json: student.path: {error}") from None
    directory = local(path)
    if not adapter.is_adapter(directory):
        return str(path)
    name = adapter.base(directory)
    base = directory / name if (directory / name).is_dir() and not Path(name).is_dir() else name
    try:
        if adapter.is_adapter(local(base)) or is_run(base):
            raise UserError(f"{base}: no model directory, but an adapter or a run")
    except UserError as error:
        raise UserError(f"{directory}/{adapter.CONFIG}: base_model_name_or_path: {error}") from None
    return str(base)


def tokenizer_directory(path: str | Path) -> Path:
    """Where the tokenizer of a model, or of a run's student, is."""
    taken = (_student(path) or {}).get("tokenizer")
    return tokenizer_directory(taken) if taken else resolve(path)


def local(path: str | Path) -> Path:
    """The directory of this name, or that of a hub id, which is fetched."""
    # What lies in a folder that is there is meant as a path, though it may look like a hub id.
    if Path(path).exists() or Path(path).parent.is_dir():
        if not Path(path).is_dir():
            raise UserError(f"{path}: no model directory")
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise UserError(f"{path}: no model directory")
    return _fetch(str(path))


@functools.cache
def _fetch(repository: str) -> Path:
    # Weights in safetensors only: a pickle would be code.
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub's client and those under it raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repository}: no model directory, and the hub does not give it: {reason}"
        ) from error
