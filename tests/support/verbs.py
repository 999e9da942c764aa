"""Calls verbs in this process, and writes and reads their rows."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import jax

from distill.runtime import cli


def verb_module(name: str) -> ModuleType:
    """Returns the module of `python -m distill.NAME`; `distill.train` may be a function instead."""
    return importlib.import_module(f"distill.{name}")


def call(verb: ModuleType, *arguments: str) -> int:
    """Runs a verb in this process and returns its exit code."""
    verb.OPTIONS.unparse_flags()
    for key in [name for name in verb.OPTIONS if "." in name]:  # keys of an earlier call's config
        delattr(verb.OPTIONS, key)
    before, sys.argv = sys.argv, [verb.__name__, *map(str, arguments)]
    caches = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with mock.patch.object(cli, "_end_process", sys.exit):
            cli.run(verb.main, verb.OPTIONS, getattr(verb, "ARGUMENTS", None))
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code
    finally:
        sys.argv = before
        jax.config.update("jax_enable_compilation_cache", caches)  # `plan` switches it off
    return 0


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
