"""Files that verbs write: none replaces what the same verb did not make.

Beside OUT stands OUT.about, with the command that made it and a hash of what it wrote.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from etils import epath
from ml_collections.config_flags import config_flags

from distill.runtime import distributed, run_files
from models.errors import UserError

# Flags that change nothing in a file: where it is, and how the work is shared out.
_UNRECORDED = ("out", "report", "batch_size")
_UNRECORDED += ("coordinator_address", "num_processes", "process_id")


@contextlib.contextmanager
def own_output(
    path: epath.Path,
    verb: str,
    options: flags.FlagValues,
    flag: str = "--out",
    arguments: Sequence[str] = (),
) -> Iterator[None]:
    """Context in which a verb writes the file `path`, in process 0.

    Args:
      arguments: of the verb, beside its options.

    Raises:
      UserError: in every process, if there is a file already, unless it is empty, or this verb made
        it and nobody has changed it since. That it was made with other flags is said.
    """
    command: dict[str, Any] = {"verb": verb, "arguments": arguments}
    for name in options:
        if config_flags.is_config_flag(options[name]):
            is_given = options[name].value is not None  # a verb may do without
            command[name] = config_flags.get_config_filename(options[name]) if is_given else None
        elif name not in _UNRECORDED:
            command[name] = options[name].value
    command = json.loads(run_files.to_json(command))
    about = path.with_name(path.name + ".about")
    distributed.broadcast_from_primary(lambda: _require_own(path, about, command, flag))
    yield
    if run_files.is_primary():
        run_files.write_json(about, {"command": command, "sha256": _hash_file(path)})


def _require_own(path: epath.Path, about: epath.Path, command: dict, flag: str) -> None:
    if not path.exists() or not path.stat().length:
        return
    found, reason = {}, f"was not made by {command['verb']}"
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        found = dict(json.loads(about.read_bytes()))
    before = found.get("command")
    if isinstance(before, dict) and before:
        if before.get("verb") != command["verb"]:
            reason = f"was made by {before.get('verb')}"
        elif found.get("sha256") != _hash_file(path):
            reason = f"was changed after {command['verb']} had made it"
        else:
            _say_replaced(path, before, command, flag)
            return
    raise UserError(f"{flag}={path}: {reason}; name another file, or move this one away")


def _say_replaced(path: epath.Path, before: dict, command: dict, flag: str) -> None:
    """Names the first flag that differs, of those that an earlier version had too."""
    for name in before:
        if before[name] != command.get(name):
            shown = name if name == "arguments" else f"--{name}"
            run_files.log_line(
                f"{flag}={path}: replaces what was made with {shown}={before[name]!r}, which is "
                f"{command.get(name)!r} now"
            )
            return


def _hash_file(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
