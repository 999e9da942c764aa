"""The ways to set a process apart: bubblewrap, or namespaces of our own.

Both show a program Python's own files and the libraries of the system, read-only, and an empty
folder in memory; both give it a network without a way out, and processes that see no others.
"""

import dataclasses
import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from distill.rewards import system_calls


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use. Its folder, and each of its files, has at most `folder_bytes`."""

    seconds: int = 6  # of computing; twice that and 2 s more until the end
    memory_bytes: int = 4 * 2**30
    output_bytes: int = 16 * 2**20
    folder_bytes: int = 64 * 2**20
    processes: int = 64  # threads count too

    @property
    def wall_seconds(self) -> float:
        return 2.0 * self.seconds + 2


class LimitError(Exception):
    """A program reached a limit: time, memory, output or processes."""


class SandboxError(Exception):
    """The sandbox itself failed."""


@dataclasses.dataclass(frozen=True)
class Isolation:
    """A way to set a process apart.

    make_command: (command in the sandbox, user id or -1, limits, filter's descriptor or -1) ->
      command that runs it.
    changes_user: a program gets a user id of its own, which takes root.
    missing: what it does not limit.
    """

    name: str
    make_command: Callable[[list[str], int, Limits, int], list[str]]
    changes_user: bool = False
    missing: tuple[str, ...] = ()


@functools.cache
def list_shown_paths() -> tuple[str, ...]:
    """Lists the files and folders that a program can read: Python and the libraries of the system.

    NumPy is among them, which tests of EvalPlus need.
    """
    base, version = Path(sys.base_prefix), f"python{sys.version_info[0]}.{sys.version_info[1]}"
    paths = [Path(p) for p in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")]
    paths += [find_python(), base / "lib" / version, *(base / "lib").glob("libpython*")]
    if numpy := importlib.util.find_spec("numpy"):
        folder = Path(str(numpy.origin)).parent
        paths += [folder, folder.parent / "numpy.libs"]
    shown: list[Path] = []
    for path in paths:
        if path.exists() and not any(path.is_relative_to(other) for other in shown):
            shown.append(path)
    return tuple(map(str, shown))


def find_python() -> Path:
    """Returns the interpreter itself, not that of a virtual environment."""
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return Path(os.path.realpath(Path(sys.base_prefix) / "bin" / name))


def _wrap_in_bubblewrap(command: list[str], user: int, limits: Limits, filter_fd: int) -> list[str]:
    wrapped = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session"]
    wrapped += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    wrapped += ["--hostname", "sandbox", "--cap-drop", "ALL"]
    if user >= 0:
        wrapped += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        wrapped += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    if filter_fd >= 0:
        wrapped += ["--seccomp", str(filter_fd)]
    # Before the files that are shown: a virtual environment may lie in /tmp.
    wrapped += ["--size", str(limits.folder_bytes), "--tmpfs", "/tmp"]
    folders = {"/dev": None}  # else some would be for their owner alone
    for path in list_shown_paths():
        folders |= dict.fromkeys(map(str, reversed(Path(path).parents[:-1])))
    for folder in folders:
        wrapped += ["--dir", folder]
    for path in list_shown_paths():
        wrapped += ["--ro-bind", path, path]
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        wrapped += ["--dev-bind", device, device]
    return [*wrapped, "--remount-ro", "/", "--chdir", "/tmp", "--", *command]


def _wrap_in_namespaces(command: list[str], user: int, limits: Limits, filter_fd: int) -> list[str]:
    script = str(Path(__file__).with_name("sandbox_namespaces.py"))
    options = [str(user), str(limits.folder_bytes), str(filter_fd)]
    python = [str(find_python()), "-I", "-S", "-B"]
    return [*python, script, *options, *list_shown_paths(), "--", *command]


def list_isolations() -> list[Isolation]:
    """Lists the ways of isolation to try here, the best first."""
    missing = () if system_calls.make_filter() else ("system calls",)
    kinds = [("user namespaces", _wrap_in_namespaces)]
    if shutil.which("bwrap"):
        kinds.insert(0, ("bubblewrap", _wrap_in_bubblewrap))
    # The kernel does not count root's processes, so programs get another user. The root of a
    # container may have no other user, and is counted.
    changes = (False,) if os.geteuid() else (True, False)
    return [Isolation(name, wrap, c, missing) for name, wrap in kinds for c in changes]


@functools.cache
def make_environment() -> dict[str, str]:
    numpy = importlib.util.find_spec("numpy")
    return {
        "PATH": os.defpath,
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": str(Path(sys.base_prefix) / "lib"),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # the order of a set is the same each time
        "PYTHONPATH": str(Path(str(numpy.origin)).parents[1]) if numpy else "",
    }


NO_ISOLATION = Isolation(
    "none",
    lambda command, user, limits, filter_fd: command,
    missing=("network", "files", "signals", "what a program leaves running"),
)
