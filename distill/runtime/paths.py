"""Paths as users give them: home directories, buckets, and files that a verb will write.

JAX is not imported here, so that verbs that only read files start quickly.
"""

import contextlib
import difflib
import importlib.util
import io
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from models.errors import UserError

FLAGS = ("model", "judge", "teacher", "tokenizer", "run", "workdir", "out", "report", "include")
FLAGS += ("data", "prompts", "tokens", "responses", "against", "runs")
OUTPUTS = ("workdir", "out", "report")
KEYS = ("path", "tokenizer", "source", "mixture", "text", "difficulty", "data", "compilation_cache")


PROJECT = Path(__file__).parents[2]  # a checkout, or where the package is installed
PROJECT_FOLDERS = (("assets",), ("configs",))


def escape_controls(text: str) -> str:
    """Returns a text as a terminal may show it: its control and format characters, which can move
    the cursor, change colours or reverse the direction, are written as Python escapes them. Line
    ends and tabs stay."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else ascii(c)[1:-1]
        for c in text
    )


def refuse_credentials(text: str, where: str) -> None:
    """Raises UserError if an address has a password: what configs and flags say is written to the
    files of a run. The message does not show it."""
    if re.search(r"://[^/\s@]*:[^/\s@]*@", text):
        raise UserError(f"{where}: has a password in its address, which would be written to files")


def expand_home(path: str) -> str:
    """Returns `path` with the home directory in place of a leading ~ or ~USER, also after hf: and
    tfds:. Shells leave both as they are in --flag=~/file.

    Raises:
      UserError: if there is no such user.
    """
    scheme = re.match(r"(?:hf|tfds):|", path)[0]  # pyright: ignore[reportOptionalSubscript]
    expanded = os.path.expanduser(path.removeprefix(scheme))
    if expanded.startswith("~"):
        raise UserError(f"{path}: no user has this home directory; a file of that name is ./~...")
    return scheme + expanded


def find_project_file(path: str) -> str:
    """Returns where the project keeps a file or folder of assets/ or configs/ that the working
    directory does not have; any other path as it is. So verbs and recipes work in any directory."""
    is_own = Path(path).parts[:1] in PROJECT_FOLDERS
    is_missing = is_own and not os.path.exists(path) and (PROJECT / path).exists()
    return str(PROJECT / path) if is_missing else path


def suggest_path(path: str | Path) -> str:
    """Returns "; did you mean 'PATH'?" with what exists most like `path`; "" if nothing is near."""
    missing = Path(path)
    with contextlib.suppress(OSError, ValueError):
        if missing.exists():
            return ""
        while not missing.parent.exists():
            missing = missing.parent
        nearest = difflib.get_close_matches(missing.name, os.listdir(missing.parent), 5)
        for name in nearest:
            # An ending in common does not make two names alike.
            stems = (missing.stem.lower(), Path(name).stem.lower())
            if difflib.SequenceMatcher(None, *stems).ratio() < 0.6:
                continue
            found = missing.with_name(name) / Path(path).relative_to(missing)
            return f"; did you mean '{found}'?" if found.exists() else ""
    return ""


def expand_input(path: str) -> str:
    """Expands the path of something to read: its home directory, and the project's own folders.

    Raises:
      UserError: if there is no such home directory.
    """
    return find_project_file(expand_home(path))


def expand_flags(options: flags.FlagValues) -> None:
    """Expands the paths in flags, wherever a verb declares them.

    Raises UserError naming the flag, also if it needs a value and has an empty one.
    """
    for name in FLAGS:
        if name in options and options[name].value == "" and options[name].default != "":
            raise UserError(f"--{name}=: is empty")
        if name in options and options[name].value:
            expand = expand_home if name in OUTPUTS else expand_input
            options[name].value = _expand_value(options[name].value, f"--{name}", expand)


def expand_config(config: ConfigDict, where: str = "config") -> None:
    """Expands the paths in a config, at any depth, in place.

    Raises UserError naming the key.
    """
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            expand_config(value, f"{where}.{key}")
        elif key in KEYS:
            expanded = _expand_value(value, f"{where}.{key}", expand_input)
            if expanded != value:
                config[key] = expanded


def _expand_value(value: Any, where: str, expand: Callable[[str], str]) -> Any:
    if isinstance(value, list | tuple):  # of paths, or of pairs of a path and a weight
        return type(value)(_expand_value(inner, where, expand) for inner in value)
    if not isinstance(value, str):
        return value
    refuse_credentials(value, where)
    try:
        return expand(value)
    except UserError as error:
        raise UserError(f"{where}={error}") from None


def is_remote(path: epath.PathLike) -> bool:
    """Returns True for a path in a bucket: gs://…"""
    return "://" in str(path)


def truncate_file(path: epath.Path, size: int) -> None:
    """Keeps the first `size` bytes of a file, also of one in a bucket."""
    if is_remote(path):
        path.write_bytes(path.read_bytes()[:size])
    else:
        os.truncate(path, size)


def require_reachable(path: str, flag: str) -> None:
    """Raises UserError if `path` is in a bucket that this installation cannot read."""
    scheme = re.match(r"(\w+):/", path)
    if scheme is None:
        return
    if scheme[1] != "gs" or not path.startswith("gs://"):
        raise UserError(f"{flag}={path}: is neither a local path nor gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{flag}={path}: needs gcsfs: pip install gcsfs")


def check_output(
    path: str, *inputs: str, flag: str = "--out", creates_folder: bool = True
) -> epath.Path:
    """Returns the path of a file to write, and creates its folder; a bucket's path as it is.

    Args:
      inputs: what else the verb reads or writes, which must not be replaced; any source of rows.
      creates_folder: False leaves a missing folder to the writer, so that a call that is refused
        later leaves nothing behind.

    Raises:
      UserError: if the file cannot be written, before the work starts rather than after it.
    """
    where = f"{flag}={path}"
    require_reachable(path, flag)
    if is_remote(path):
        return epath.Path(path)
    try:
        file = Path(path).resolve()  # a rename must not replace a symbolic link like /dev/stdout
        if path.endswith("/") or (file.exists() and not file.is_file()):
            raise UserError(f"{where}: is not a regular file")
        if any(file == Path(name).resolve() for name in inputs):
            raise UserError(f"{where}: is also read or written, and would be lost")
        folder = next(parent for parent in file.parents if parent.exists())
        if not folder.is_dir():
            raise UserError(f"{where}: {folder} is a file, not a folder")
        if creates_folder:
            file.parent.mkdir(parents=True, exist_ok=True)
            folder = file.parent
        # As long a name as the longest that is written beside it, and each process's own.
        probe = folder / f"{file.name}.probe-{os.getpid():011}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason, at = getattr(error, "strerror", error), str(getattr(error, "filename", path))
        at = re.sub(r"\.probe-\d+$", "", at)
        raise UserError(f"{where}: {reason}{'' if at == path else f': {at}'}") from error
    return epath.Path(file)


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes `path` atomically, so that readers never see half a file. Creates its folder."""
    with open_atomic(path) as file:
        file.write(text)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Writes `path` atomically and, on a local disk, to the disk itself. Creates its folder."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def open_atomic(path: epath.PathLike) -> Iterator[IO[str]]:
    """Yields a file that replaces `path` once it is completely written."""
    path = epath.Path(path)
    if is_remote(path):  # an object appears only once it is complete
        text = io.StringIO()
        yield text
        path.write_text(text.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
