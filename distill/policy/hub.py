"""Resolves the name of a model, a hub id, a run or a PEFT adapter to a directory."""

import contextlib
import contextvars
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from etils import epath

from distill.runtime import network, paths
from models import adapter, tensor_files
from models.errors import UserError
from models.layers.lora import LoRA


def is_run(path: str | Path) -> bool:
    """True if `path` is the directory of a training run."""
    return _read_student_config(path) is not None


def is_adapter(path: str | Path) -> bool:
    """True if `path` names a PEFT adapter."""
    return not is_run(path) and adapter.is_adapter(to_local_dir(path))


def read_run_lora(path: str | Path) -> LoRA | None:
    """Returns the LoRA that the run directory `path` trains; None if it trains all parameters."""
    fields: dict[str, Any] = (_read_student_config(path) or {}).get("lora") or {}
    if not fields.get("rank"):
        return None
    return LoRA(fields["rank"], fields["alpha"], fields["rslora"], tuple(fields["targets"]))


def require_same_lora(path: str, actual: LoRA, expected: LoRA) -> None:
    """Raises UserError unless the adapter `path` has the shape and scale that training expects."""
    for name, theirs, ours in (
        ("rank", actual.rank, expected.rank),
        ("scale", f"{actual.scale:g}", f"{expected.scale:g}"),
        ("targets", sorted(actual.targets), sorted(set(expected.targets))),
    ):
        if theirs != ours:
            raise UserError(
                f"{path}: an adapter of {name} {theirs}, config.student.lora's is {ours}; it takes "
                f"rank={actual.rank}, alpha={actual.alpha:g}, rslora={actual.rslora}, "
                f"targets={actual.targets}"
            )


def has_moving_average(path: str | Path) -> bool:
    """True if the run directory `path` keeps a moving average of its parameters."""
    return bool((_read_student_config(path) or {}).get("ema_decay"))


def find_initial_model(path: str | Path) -> str:
    """Returns the model that the student of the run directory `path` was at first; "" if it is no
    run."""
    return (_read_student_config(path) or {}).get("path", "") if path else ""


def _read_student_config(path: str | Path) -> dict[str, Any] | None:
    """Reads the student's config of the run directory `path`; None if it is not a run."""
    try:
        fields = json.loads((epath.Path(path) / "config.json").read_text())
        student = fields["student"] if "stages" in fields else {}
        if "path" not in student:
            return None
        for key in ("path", "tokenizer"):
            if isinstance(student.get(key), str):
                student[key] = _find_input(student[key], path)
        return student
    except (OSError, ValueError, LookupError, TypeError):
        return None  # reading it as a model directory will raise the error


def _find_input(name: str, run: str | Path) -> str:
    """Returns the path of a model that a run's config names: relative to the working directory, to
    that in which the run was started, or to the project."""
    if name and not Path(name).exists():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            environment = json.loads((epath.Path(run) / "environment.json").read_text())
            if (Path(environment["directory"]) / name).is_dir():
                return str(Path(environment["directory"]) / name)
    return paths.find_project_file(name)


def resolve_model_dir(path: str | Path) -> Path:
    """Returns the local directory in Hugging Face format for a name; downloads a hub id.

    For a run this is the student's directory, for an adapter its base's: they hold architecture and
    tokenizer, but not the trained parameters.

    Raises:
      UserError: if the name exists neither locally nor on the hub.
    """
    return to_local_dir(find_base_model(path))


def find_base_model(path: str | Path) -> str:
    """Returns the path or hub id of the model that a run or an adapter is based on, else `path`.

    The base of an adapter is relative to the working directory, as in peft, or to the adapter's.
    """
    student = _read_student_config(path)
    if student is not None:
        try:
            return find_base_model(student["path"])
        except UserError as error:
            raise UserError(f"{path}/config.json: student.path: {error}") from None
    directory = to_local_dir(path)
    if not adapter.is_adapter(directory):
        return str(path)
    for file in (tensor_files.WHOLE_FILE, tensor_files.INDEX_FILE):
        if (directory / file).exists():
            raise UserError(
                f"{directory}: holds an adapter ({adapter.CONFIG_FILE}) and a model ({file}); "
                "move one of them to a directory of its own"
            )
    name = adapter.read_base_name(directory)
    try:
        name = paths.expand_home(name)
        base = directory / name if (directory / name).is_dir() and not Path(name).is_dir() else name
        if adapter.is_adapter(to_local_dir(base)) or is_run(base):
            raise UserError(f"{base}: is an adapter or a run, not a model directory")
    except (UserError, OSError) as error:  # OSError: no name of a file can be so long
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{directory}/{adapter.CONFIG_FILE}: base_model_name_or_path: {reason}; set it to "
            "where the base is"
        ) from None
    return str(base)


def resolve_tokenizer_dir(path: str | Path) -> Path:
    """Returns the directory of the tokenizer of a model or of a run's student.

    An adapter's own tokenizer and chat template come before its base's: training used them.

    Raises:
      UserError: if an adapter has a part of a tokenizer only.
    """
    student = _read_student_config(path)
    if student is not None:
        return resolve_tokenizer_dir(student.get("tokenizer") or student["path"])
    directory = to_local_dir(path)
    if not adapter.is_adapter(directory):
        return directory
    if any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return directory
    for name in ("tokenizer_config.json", "chat_template.jinja", "chat_template.json"):
        if (directory / name).is_file():
            raise UserError(
                f"{directory}: has {name}, but no tokenizer.json; copy the base's there, or remove "
                f"{name} to use the base's tokenizer and template"
            )
    return resolve_model_dir(path)


def to_local_dir(path: str | Path) -> Path:
    """Returns the directory of this name, or downloads a hub id."""
    # A name within an existing folder is a path, even if it looks like a hub id.
    if Path(path).exists() or Path(path).parent.is_dir():
        if not Path(path).is_dir():
            raise UserError(f"{path}: no model directory{paths.suggest_path(path)}")
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise UserError(f"{path}: no model directory{paths.suggest_path(path)}")
    return _download_repository(str(path))


_leaves_weights = contextvars.ContextVar("leaves_weights", default=False)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Context in which models of the hub are downloaded without their weights."""
    token = _leaves_weights.set(True)
    try:
        yield
    finally:
        _leaves_weights.reset(token)


def has_weights(path: str | Path) -> bool:
    """False for a model of the hub in `without_weights`: its weights are not here, or not all."""
    return not _leaves_weights.get() or Path(path).exists()


def _download_repository(repository: str) -> Path:
    return _download_files(repository, not _leaves_weights.get())


@functools.cache
def _download_files(repository: str, weights: bool) -> Path:
    # Weights in safetensors only: unpickling can execute code.
    patterns = ["*.json", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    network.find_hub()
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many types of errors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repository}: no model directory, and the hub does not give it: {reason}"
            f"{paths.suggest_path(repository)}"
        ) from error
