"""Files that verbs write: none replaces what the same command did not make.

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
        it with the same flags and nobody has changed it since.
    """
    command: dict[str, Any] = {"verb": verb, "arguments": arguments}
    for name in options:
        if config_flags.is_config_flag(options[name]):
            command[name] = config_flags.get_config_filename(options[name])
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
    found, reason = {}, "was not made by this command"
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        found = dict(json.loads(about.read_bytes()))
    before = found.get("command")
    if isinstance(before, dict) and before:
        # Flags that an earlier version did not have are passed over.
        changed = next((name for name in before if before[name] != command.get(name)), None)
        if changed == "verb":
            reason = f"was made by {before['verb']}"
        elif changed:
            name = changed if changed == "arguments" else f"--{changed}"
            was, now = before[changed], command.get(changed)
            reason = f"was made by another command: {name} was {was!r}, now {now!r}"
        elif found.get("sha256") == _hash_file(path):
            return
        else:
            reason = "was changed after this command had made it"
    raise UserError(f"{flag}={path}: {reason}; name another file, or move this one away")


def _hash_file(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
