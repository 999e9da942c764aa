"""Flags for GPUs: where they are set, what they leave alone, and that XLA knows them in time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from distill import gpu


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the CUDA plugin is installed."""
    (tmp_path / "jax_cuda13_plugin").mkdir()
    (tmp_path / "jax_cuda13_plugin" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")


def test_flags(plugin: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.set_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=true"
    gpu.set_flags(deterministic=True)
    twice = os.environ["XLA_FLAGS"].split()
    assert twice[1:] == ["--xla_gpu_deterministic_ops=true"]
    gpu.set_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"].split() == twice
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false --xla_x=1")
    gpu.set_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=false --xla_x=1"


@pytest.mark.parametrize(
    ("platforms", "there"),
    [("", True), ("cuda", True), ("cuda,cpu", True), ("cpu", False), ("tpu", False)],
)
def test_only_where_a_gpu_is_expected(
    plugin: None, monkeypatch: pytest.MonkeyPatch, platforms: str, there: bool
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    gpu.set_flags()
    assert bool(os.environ["XLA_FLAGS"]) == there


def test_no_plugin_no_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(gpu, "PLUGINS", ("no_such_plugin",))
    monkeypatch.setenv("XLA_FLAGS", "")
    gpu.set_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"] == ""


def test_xla_knows_them_and_reads_them_in_time() -> None:
    """Set after `train` is imported, before it looks for devices: XLA, which ends a process whose
    flags it does not know, takes these and refuses another."""
    code = (
        "import os, sys; from distill import gpu, train; gpu.expected = lambda: True;"
        "gpu.ALWAYS |= dict(a.split('=') for a in sys.argv[1:]); gpu.set_flags(True);"
        "import jax; jax.devices(); print('deterministic' in os.environ['XLA_FLAGS'])"
    )
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for extra in ([], ["xla_no_such_flag=1"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *extra],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
        )
        if extra:
            assert done.returncode and "xla_no_such_flag" in done.stderr
        else:
            assert done.stdout.strip() == "True", done.stderr
