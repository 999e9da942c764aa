"""What the machine lacks ends a verb in one line: memory, a device, its driver."""

import errno
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import jax
import numpy as np
import pytest

from distill.runtime import failures, host_memory
from tests.support.paths import ROOT

GIB = 2**30


def raise_in(file: str, function: str, error: BaseException) -> BaseException:
    """Returns `error` with a traceback through a function of a file."""

    def throw() -> None:
        raise error

    code: CodeType = throw.__code__.replace(co_filename=f"/x/{file}", co_name=function)
    throw.__code__ = code
    try:
        throw()
    except BaseException as raised:
        return raised
    raise AssertionError


@pytest.fixture
def free_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(host_memory, "measure_free_bytes", lambda: 3 * GIB)
    yield


EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 84934656000 bytes."
HBM = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 20.04G of 15.75G hbm. Exceeded hbm capacity by 4.29G.\n\nTotal hbm usage >= 20.5G"
)


@pytest.mark.parametrize(
    ("file", "function", "error", "words"),
    [
        (
            "distill/rollout/engine.py",
            "warm_up",
            jax.errors.JaxRuntimeError(EXHAUSTED),
            ["while sampling; 79.10 GiB were asked for; 3.00 GiB are free", "rollout.slots"],
        ),
        (
            "distill/training/update.py",
            "accumulate",
            jax.errors.JaxRuntimeError(HBM),
            ["while updating; the program takes 20.04G of 15.75G HBM", "STAGE.accumulate"],
        ),
        (
            "distill/training/update.py",
            "init_train_state",
            MemoryError("std::bad_alloc"),
            ["while making the optimiser's state; 3.00 GiB", "student.lora.rank"],
        ),
        (
            "distill/policy/policy.py",
            "load",
            OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "x"),
            ["while loading weights", "teacher.param_dtype"],
        ),
        (
            "distill/training/saving.py",
            "save",
            RuntimeError("std::bad_alloc"),
            ["while saving a checkpoint", "config.STAGE.optim.momentum_dtype"],
        ),
        (
            "distill/data/sources.py",
            "read",
            np._core._exceptions._ArrayMemoryError((5, 2**30), np.dtype("float32")),  # type: ignore[attr-defined]
            ["while reading data; 20.0 GiB were asked for for an array", "config.STAGE.accumulate"],
        ),
        ("x.py", "f", MemoryError(), ["out of memory; 3.00 GiB are free on the host; less is"]),
    ],
)
def test_out_of_memory_names_phase_size_and_knobs(
    free_memory: None, file: str, function: str, error: BaseException, words: list[str]
) -> None:
    message = failures.explain_failure(raise_in(file, function, error), ["config"])
    assert message is not None and "\n" not in message
    for word in words:
        assert word in message


def test_verbs_without_a_config_name_their_flags(free_memory: None) -> None:
    error = raise_in("distill/rollout/engine.py", "f", MemoryError())
    message = failures.explain_failure(error, ["model", "batch_size", "max_new_tokens"])
    assert message is not None and message.endswith("--batch_size, --max_new_tokens")


@pytest.mark.parametrize(
    "error",
    [
        AssertionError(),
        RuntimeError("Unable to initialize a thing"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: quota of requests"),
        jax.errors.JaxRuntimeError("INTERNAL: memory"),
        OSError(errno.EPIPE, "x"),
    ],
)
def test_other_errors_are_not_explained(error: BaseException) -> None:
    assert failures.explain_failure(raise_in("x.py", "f", error), []) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError(
                "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process "
                "with pid 7. (set JAX_PLATFORMS='' to automatically choose an available backend)"
            ),
            "used: ABORTED: The TPU is already in use by process with pid 7.",
        ),
        (AssertionError(), "no plugin of JAX for it is installed"),
    ],
)
def test_a_missing_device_is_one_line(
    error: BaseException, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    message = failures.explain_failure(raise_in("jax/_src/xla_bridge.py", "backends", error), [])
    assert message is not None and message.startswith("JAX_PLATFORMS=tpu: ")
    assert message.endswith(words) or words in message


def test_a_network_that_is_not_there_is_one_line() -> None:
    error = ConnectionError("Couldn't reach 'openai/gsm8k'\non the Hub")
    message = failures.explain_failure(error, [])
    assert message is not None and message.endswith("Couldn't reach 'openai/gsm8k' on the Hub")
    caused = RuntimeError("no set")
    caused.__cause__ = socket.gaierror(-2, "Name or service not known")
    assert "network" in (failures.explain_failure(caused, []) or "")


def test_a_verb_without_its_device_ends_in_one_line(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "distill.generate", "--model=assets/student")
    command += ("--prompts=assets/rows/gsm8k.jsonl", f"--out={tmp_path}/out.jsonl")
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: JAX_PLATFORMS=cuda: there is no such device")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_smallest_limit_of_the_host_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path / "cgroup")
    assert host_memory.measure_free_bytes() is None  # not Linux
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert host_memory.measure_free_bytes() == 8000 * 1024
    write(tmp_path / "cgroup/memory.stat", "anon 5\ninactive_file 1000\nfile 7\n")
    write(tmp_path / "cgroup/memory.current", "3000\n")
    write(tmp_path / "cgroup/memory.max", "max\n")
    assert host_memory.measure_free_bytes() == 8000 * 1024
    write(tmp_path / "cgroup/memory.max", "500000\n")
    assert host_memory.measure_free_bytes() == 500000 - 2000
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200_000, 200_000))
    write(tmp_path / "proc/self/statm", "10 5 1")
    expected: Any = 200_000 - 10 * resource.getpagesize()
    assert host_memory.measure_free_bytes() == expected
