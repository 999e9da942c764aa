"""Tests products of grouped rows, and their gradients from every kernel, against a loop over
groups."""

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import grouped
from tests.support.paths import ROOT

HOPPER = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")

# rows, in, out, sizes: groups may be empty, end inside a tile of rows, and leave rows over.
CASES = {
    "even": (24, 16, 8, (8, 8, 8)),
    "uneven, rows left over": (37, 12, 20, (5, 0, 17, 1, 3)),
    "all in one": (300, 8, 8, (0, 300, 0)),
    "several tiles": (530, 24, 40, (200, 0, 129, 201)),
    "none": (16, 8, 8, (0, 0)),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "_"))
def case(request):
    M, D, F, sizes = CASES[request.param]
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(M, D)), rng.normal(size=(M, F))
    kernel = rng.normal(size=(len(sizes), D, F))
    return *(a.astype(np.float32) for a in (x, dy, kernel)), np.array(sizes, np.int32)


def groups(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def test_product_and_gradients_equal_a_loop_over_groups(case):
    """Rows beyond the last group have no gradient when masked as the experts mask them."""
    x, dy, kernel, sizes = case
    here = (np.arange(len(x)) < sizes.sum())[:, None]

    def product(x, kernel):
        return jnp.where(here, grouped.dot(jnp.where(here, x, 0), kernel, sizes), 0)

    y, transpose = jax.vjp(jax.jit(product), x, kernel)
    dx, dkernel = transpose(dy)
    expected = [np.zeros_like(dy), np.zeros_like(x), np.zeros_like(kernel)]
    for e, of_group in enumerate(groups(sizes)):
        expected[0][of_group] = x[of_group] @ kernel[e]
        expected[1][of_group] = dy[of_group] @ kernel[e].T
        expected[2][e] = x[of_group].T @ dy[of_group]
    for ours, theirs in zip((y, dx, dkernel), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_tpu_kernel_gradient_equals_a_loop_over_groups(case):
    x, dy, kernel, sizes = case
    gradient = grouped.compute_kernel_gradient(
        jnp.asarray(x), jnp.asarray(dy), jnp.asarray(sizes), interpret=True
    )
    assert gradient.shape == kernel.shape
    for e, of_group in enumerate(groups(sizes)):
        np.testing.assert_allclose(gradient[e], x[of_group].T @ dy[of_group], atol=1e-4)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A GPU with tokamax, whose ragged product JAX's own stands in for; returns the calls."""
    calls = []

    def multiply(lhs, rhs, sizes_E, ragged_dot_dimension_numbers, precision, **options):
        calls.append({"rhs": rhs.dtype, "precision": precision, **options})
        if precision is not None:
            rhs = rhs.astype(lhs.dtype)
        dtype = options["preferred_element_type"]
        product = jax.lax.ragged_dot_general(
            *(lhs, rhs, sizes_E, ragged_dot_dimension_numbers), preferred_element_type=dtype
        )
        if product.ndim == 3:
            return product
        # What the kernel leaves uninitialised.
        return jnp.where((jnp.arange(len(lhs)) < sizes_E.sum())[:, None], product, jnp.nan)

    config = types.SimpleNamespace(ignore_autotuning_cache=lambda _: contextlib.nullcontext())
    tokamax = types.SimpleNamespace(ragged_dot_general=multiply, config=config)
    monkeypatch.setitem(sys.modules, "tokamax", tokamax)
    monkeypatch.setattr(grouped, "_explain_missing_packages", lambda: "")
    monkeypatch.setattr(grouped.backend, "get_default_device", lambda: HOPPER)

    def choose_cuda(*args, default, cuda=None, **_):
        return (cuda or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", choose_cuda)
    return calls


def test_products_on_gpus_equal_a_loop_over_groups(gpu, case):
    """Rows after the last group, which tokamax leaves undefined, reach no gradient."""
    test_product_and_gradients_equal_a_loop_over_groups(case)
    assert {call["implementation"] for call in gpu} == {"triton"}


@pytest.mark.parametrize("capability", ["9.0", "8.0"])
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_gpu_kernel_reads_8_bit_weights(gpu, monkeypatch, kind, capability):
    """They are converted in advance only to float32, and float8 also below Hopper."""
    device = types.SimpleNamespace(**vars(HOPPER) | {"compute_capability": capability})
    monkeypatch.setattr(grouped.backend, "get_default_device", lambda: device)
    rng, sizes = np.random.default_rng(1), np.array([3, 0, 20, 9], np.int32)
    kernel = jnp.asarray(rng.integers(-8, 8, size=(4, 24, 10)), kind)
    wide = np.asarray(kernel.astype(jnp.float32))
    for dtype in ("bfloat16", "float32"):
        x = jnp.asarray(rng.normal(size=(32, 24)), dtype)
        y = grouped.multiply_groups(x, kernel, jnp.asarray(sizes), dtype=jnp.float32)
        assert y.dtype == jnp.float32
        for e, of_group in enumerate(groups(sizes)):
            expected = np.asarray(x.astype(jnp.float32))[of_group] @ wide[e]
            np.testing.assert_allclose(y[of_group], expected, rtol=1e-5, atol=1e-4)
    is_read = kind == "int8" or capability == "9.0"
    assert [call["rhs"] for call in gpu] == [kind if is_read else "bfloat16", "float32"]
    assert [bool(call["precision"]) for call in gpu] == [is_read, False]


def test_experts_need_no_tokamax_without_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)  # importing it fails
    monkeypatch.setattr(grouped, "_explain_missing_packages", lambda: "")
    x, kernel = jnp.ones((4, 8)), jnp.ones((2, 8, 3))
    np.testing.assert_array_equal(grouped.dot(x, kernel, jnp.array([1, 3])), np.full((4, 3), 8))


@pytest.mark.parametrize(
    ("python", "versions", "reason"),
    [
        ((3, 11), {}, "tokamax needs Python 3.12 or newer: take that, and"),
        ((3, 12), {}, "tokamax is not installed:"),
        ((3, 12), {"tokamax": "0.0.9"}, "tokamax 0.0.9 is older than 0.0.17:"),
        ((3, 12), {"tokamax": "0.0.17"}, "jax-triton is not installed:"),
        ((3, 13), {"tokamax": "0.1.0rc1", "jax-triton": "0.4.1"}, "tokamax cannot be imported ("),
    ],
)
def test_missing_gpu_kernels_are_explained(monkeypatch, python, versions, reason):
    def find_version(name):
        if name in versions:
            return versions[name]
        raise grouped.importlib.metadata.PackageNotFoundError(name)

    for module in ("jax_triton", "tokamax"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(grouped.importlib.metadata, "version", find_version)
    monkeypatch.setattr(grouped.sys, "version_info", python)
    explain = grouped._explain_missing_packages.__wrapped__
    line = explain()
    assert line.startswith(reason) and line.endswith("pip install -r requirements-gpu.txt")
    assert "\n" not in line
    turing = types.SimpleNamespace(device_kind="Tesla T4", compute_capability="7.5")
    assert grouped.explain_missing_gpu_kernels(turing).startswith("Tesla T4 is older than")


@pytest.mark.long
def test_tokamax_kernels_equal_a_loop_over_groups():
    """Runs them in Triton's interpreter, for all groups above and with rows left over that are not
    a number."""
    if reason := grouped._explain_missing_packages():
        pytest.skip(reason)
    settings = {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **settings}
    script = Path(__file__).parents[1] / "support" / "triton_interpreter.py"
    command = [sys.executable, str(script), json.dumps(list(CASES.values()))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-4
