"""Products of rows grouped by expert with each expert's matrix, and their gradients.

On TPU, jax.lax.ragged_dot is a grouped kernel that runs at the roofline, and so is its gradient
with respect to the rows. Its gradient with respect to the matrices is compiled densely, every
expert over all rows: E times the work. A Pallas kernel replaces it. On GPUs all three are compiled
densely, and rows are expanded to E times the memory as well: there tokamax's Triton kernels compute
all three, where it is installed (requirements-gpu.txt). On CPUs jax.lax.ragged_dot does.
"""

import functools
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.extend import backend

# One step of the kernel holds this many rows, inputs and bytes of outputs, and the outputs' float32
# sums, in 16 MiB of VMEM. Fewer rows waste less where a group ends within a tile.
_TILE_ROWS, _TILE_INPUTS, _TILE_OUTPUT_BYTES = 256, 1024, 2048

# What the kernels for GPUs need: the oldest versions that they were compiled with.
_GPU_PACKAGES = {"tokamax": (0, 0, 17), "jax-triton": (0, 4, 1)}
_MIN_PYTHON, _MIN_CAPABILITY = (3, 12), 8.0  # capability 8.0: NVIDIA's Ampere

_DOT = jax.lax.RaggedDotDimensionNumbers((([1], [1]), ([], [])), [0], [0])
_DOT_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])
_KERNEL_GRADIENT = jax.lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], [])


@jax.custom_vjp
def dot(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Multiplies rows [M, in] by kernels [E, in, out]: sizes_E[0] rows by kernel[0], …

    The result for rows after the last group is undefined.
    """
    return multiply_groups(x, kernel, sizes_E)


def multiply_groups(
    x: jax.Array,
    kernel: jax.Array,
    sizes_E: jax.Array,
    transposed: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`dot` without a gradient, with output in `dtype`; with `transposed` kernel is [E, out, in].

    An 8-bit kernel is converted to x's dtype; on GPUs while it is read.
    """

    def multiply_plain(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> jax.Array:
        kernel = (kernel.swapaxes(1, 2) if transposed else kernel).astype(x.dtype)
        return jax.lax.ragged_dot(x, kernel, sizes_E, preferred_element_type=dtype)

    dims, dtype_out = _DOT_TRANSPOSED if transposed else _DOT, jnp.dtype(dtype or x.dtype)
    gpu = _make_gpu_product(dims, dtype_out)
    return jax.lax.platform_dependent(x, kernel, sizes_E, **gpu, default=multiply_plain)


def _forward(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array):
    return dot(x, kernel, sizes_E), (x, kernel, sizes_E)


def _backward(residuals: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array):
    x, kernel, sizes_E = residuals
    dx = multiply_groups(dy, kernel, sizes_E, transposed=True)
    dkernel = jax.lax.platform_dependent(
        x,
        dy,
        sizes_E,
        tpu=compute_kernel_gradient,
        **_make_gpu_product(_KERNEL_GRADIENT, x.dtype),
        default=_compute_kernel_gradient_plain,
    )
    return dx, dkernel, None


dot.defvjp(_forward, _backward)


def _compute_kernel_gradient_plain(x: jax.Array, dy: jax.Array, sizes_E: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct((len(sizes_E), x.shape[1], dy.shape[1]), x.dtype)
    transpose = jax.linear_transpose(lambda kernel: jax.lax.ragged_dot(x, kernel, sizes_E), like)
    return transpose(dy)[0]


def compute_kernel_gradient(
    x: jax.Array, dy: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """Computes xᵀ dy of each group [E, in, out], in x's dtype, with the kernel for TPU.

    `interpret` runs it on any platform, slowly.
    """
    (M, D), F = x.shape, dy.shape[1]
    rows = min(_TILE_ROWS, -(-M // 8) * 8)
    x, dy = (jnp.pad(a, ((0, -M % rows), (0, 0))) for a in (x, dy))
    tiles = (rows, min(_TILE_INPUTS, D), min(_TILE_OUTPUT_BYTES // x.dtype.itemsize, F))
    return tgmm(x.swapaxes(0, 1), dy, sizes_E, x.dtype, tiles, interpret=interpret)


def explain_missing_gpu_kernels(device: Any) -> str:
    """Returns why tokamax's kernels cannot be used on a GPU, and what to do; "" if they can."""
    if float(device.compute_capability) < _MIN_CAPABILITY:
        return (
            f"{device.device_kind} is older than tokamax's kernels need (Ampere, such as an A100)"
        )
    return _explain_missing_packages()


@functools.cache
def _explain_missing_packages() -> str:
    install = "pip install -r requirements-gpu.txt"
    if sys.version_info < _MIN_PYTHON:
        return f"tokamax needs Python 3.12 or newer: take that, and {install}"
    for name, oldest in _GPU_PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed: {install}"
        if tuple(int(n) for n in re.findall(r"\d+", version)[:3]) < oldest:
            needed = ".".join(map(str, oldest))
            return f"{name} {version} is older than {needed}: {install}"
    try:
        importlib.import_module("jax_triton")
        importlib.import_module("tokamax")
    except Exception as error:  # of versions that do not fit each other, of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"tokamax cannot be imported ({reason}): {install}"
    return ""


def _make_gpu_product(
    dims: jax.lax.RaggedDotDimensionNumbers, dtype: jnp.dtype
) -> dict[str, Callable[..., jax.Array]]:
    """Returns {"cuda": the product by tokamax}, with output in `dtype`; {} without a GPU for it.

    Only while a program for a GPU is traced is tokamax imported: it takes seconds.
    """
    device = backend.get_default_device()
    if device.platform != "gpu" or explain_missing_gpu_kernels(device):
        return {}
    import tokamax  # pyright: ignore[reportMissingImports]

    def multiply(lhs: jax.Array, rhs: jax.Array, sizes_E: jax.Array) -> jax.Array:
        precision = None
        # Below Hopper the kernel cannot read float8.
        is_read = rhs.dtype == jnp.int8 or float(device.compute_capability) >= 9
        if lhs.dtype == jnp.bfloat16 and rhs.dtype.itemsize == 1 and is_read:
            precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
        else:
            rhs = rhs.astype(lhs.dtype)
        if dims == _DOT_TRANSPOSED:
            # tokamax transposes these kernels; left alone, XLA would copy the stack of all layers
            # into that layout instead of one layer's kernels.
            rhs = with_layout_constraint(rhs, Layout((0, 1, 2)))
        # The default tiles, not those that tokamax has stored for some shapes of some GPUs: they
        # are the fastest for most of them, and a run's bits do not depend on its device's name.
        with tokamax.config.ignore_autotuning_cache(True):
            return tokamax.ragged_dot_general(
                lhs,
                rhs,
                sizes_E,
                ragged_dot_dimension_numbers=dims,
                precision=precision,
                preferred_element_type=dtype,
                implementation="triton",
            )

    return {"cuda": multiply}
