"""Describes what a run runs on, for environment.json and the costs of an evaluation."""

import contextlib
import functools
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint", "numpy"),
    *("transformers", "tokenizers", "safetensors", "datasets", "tensorflow-datasets"),
    *("ml-collections", "math-verify"),
)
_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")  # ends of names of variables
_MIN_SECRET = 8  # characters; shorter values are also words


def measure_memory() -> dict[str, float]:
    """Returns peak memory in GiB of this process and, where known, of the first device."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30}
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        peak["device_gib"] = stats["peak_bytes_in_use"] / 2**30
    return peak


def describe_packages() -> dict[str, str]:
    """Returns the versions of the packages that results may depend on. Starts no backend."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def describe_environment() -> dict[str, Any]:
    """Describes the versions, devices, git revision, command and time of a run.

    `git` is None outside a git checkout, or without git.
    """
    devices = jax.devices()
    return {
        "command": hide_secrets(shlex.join(sys.orig_argv)),
        "directory": os.getcwd(),  # to which paths are relative
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": describe_packages(),
        "devices": {
            "backend": jax.default_backend(),
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "git": describe_git(),
    }


def read_environment(path: epath.Path) -> dict[str, Any]:
    """Reads an environment.json: its devices, packages and models, each a dict; {} for one that is
    missing, damaged or of another version."""
    try:
        about = dict(json.loads(path.read_bytes()))
        return {name: dict(about.get(name, {})) for name in ("devices", "packages", "models")}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def list_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Says which devices and packages differ between what `read_environment` found and now."""
    return [
        f"{part}.{name} was {before[part].get(name)}, now {now[part].get(name)}"
        for part in ("devices", "packages")
        if before.get(part)
        for name in sorted(before[part].keys() | now[part].keys())
        if before[part].get(name) != now[part].get(name)
    ]


def hide_secrets(text: str) -> str:
    """Returns a text with *** in place of passwords in addresses, of tokens of the hub, and of the
    values of environment variables whose names say that they are secret."""
    for name, value in os.environ.items():
        if len(value) >= _MIN_SECRET and name.endswith(_SECRETS):
            text = text.replace(value, "***")
    text = re.sub(r"(://[^/\s@:]*:)[^/\s@]*@", r"\1***@", text)
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}", "***", text)


@functools.cache
def describe_git() -> dict[str, Any] | None:
    """Returns the revision of this code and whether files differ from it; None if unknown."""

    def run_git(*arguments: str) -> str:
        root = Path(__file__).parents[2]
        call = ("git", "-C", str(root), *arguments)
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "revision": run_git("rev-parse", "HEAD"),
            "dirty": bool(run_git("status", "--porcelain")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None
