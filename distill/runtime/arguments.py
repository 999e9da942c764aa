"""Arguments of the Python API: checks whose messages name them as Python does, not as flags."""

import contextlib
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from distill.runtime import paths
from models.errors import UserError, suggest


@contextlib.contextmanager
def without_flags() -> Iterator[None]:
    """Context in which a UserError that begins with a flag, --data, names the argument: data."""
    try:
        yield
    except UserError as error:
        error.args = (str(error).removeprefix("--"),)
        raise


def require(value: Any, kind: type, name: str, what: str) -> None:
    """Raises UserError naming an argument that is not of a type, described as `what`."""
    if not isinstance(value, kind):
        raise UserError(f"{name}={reprlib.repr(value)}: must be {what}")


def read_path(path: Any, name: str) -> str:
    """Returns a path, given as str or Path, as str.

    Raises UserError naming the argument if it is something else, empty, or has a password.
    """
    text = path if isinstance(path, str | os.PathLike) else None
    text = None if text is None else os.fspath(text)
    if not isinstance(text, str):
        raise UserError(f"{name}={reprlib.repr(path)}: must be a path, as str or Path")
    if not text:
        raise UserError(f"{name}: is empty")
    paths.refuse_credentials(text, name)
    return text


def read_items(values: Any, name: str, what: str) -> list[Any]:
    """Returns the items of a list or another iterable.

    Raises UserError for anything else, and for a text, whose items would be its characters.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise UserError(f"{name}={reprlib.repr(values)}: must be a list of {what}")
    return list(values)


def read_options(options: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Returns options by name, NumPy's numbers as Python's. Raises UserError for an unknown one."""
    if unknown := sorted(options.keys() - known):
        names, hint = ", ".join(sorted(known)), suggest(unknown[0], sorted(known))
        raise UserError(f"{unknown[0]}: no such option; known are {names}{hint}")
    return {k: x.item() if isinstance(x, np.generic) else x for k, x in options.items()}
