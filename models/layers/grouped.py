"""Rows grouped by expert, each group times its own matrix, and the gradient of that.

jax.lax.ragged_dot is a grouped kernel on TPU, as fast as the numbers of its operations and bytes
allow, and so is its gradient by the rows. The gradient by the matrices is compiled densely there,
every expert over the rows of all: E times the work. A Pallas kernel takes its place. On GPUs all
three are compiled densely, and rows spread out over E times the memory besides: there each has a
kernel of its own (models.layers.grouped_gpu). On CPUs all are jax.lax.ragged_dot's.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

from models.layers import grouped_gpu

# One step of the kernel holds so many rows, in and bytes of out, and the float32 sums of these, in
# 16 MiB of VMEM. Fewer rows waste less where groups end within a tile.
_TILE_ROWS, _TILE_INPUTS, _TILE_OUTPUT_BYTES = 256, 1024, 2048


@jax.custom_vjp
def dot(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Rows [M, in] times [E, in, out]: the first sizes_E[0] rows times kernel[0], and so on.

    Rows behind the last group may come out as anything.
    """
    return multiply_groups(x, kernel, sizes_E)


def multiply_groups(
    x: jax.Array,
    kernel: jax.Array,
    sizes_E: jax.Array,
    transposed: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`dot` without a gradient, in `dtype`; `transposed`, times [E, out, in]. The kernel may be of
    8 bits: it is converted to x's dtype, on GPUs as it is read."""

    def multiply_plain(x: jax.Array, kernel: jax.Array, sizes_E: jax.Array) -> jax.Array:
        kernel = (kernel.swapaxes(1, 2) if transposed else kernel).astype(x.dtype)
        return jax.lax.ragged_dot(x, kernel, sizes_E, preferred_element_type=dtype)

    multiply_gpu = functools.partial(
        grouped_gpu.multiply_groups, transposed=transposed, dtype=jnp.dtype(dtype or x.dtype)
    )
    return jax.lax.platform_dependent(x, kernel, sizes_E, cuda=multiply_gpu, default=multiply_plain)


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
        cuda=grouped_gpu.compute_kernel_gradient,
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
    """xᵀ dy of each group [E, in, out], in x's dtype, by the kernel for TPU.

    `interpret` runs it anywhere, slowly.
    """
    (M, D), F = x.shape, dy.shape[1]
    rows = min(_TILE_ROWS, -(-M // 8) * 8)
    x, dy = (jnp.pad(a, ((0, -M % rows), (0, 0))) for a in (x, dy))
    tiles = (rows, min(_TILE_INPUTS, D), min(_TILE_OUTPUT_BYTES // x.dtype.itemsize, F))
    return tgmm(x.swapaxes(0, 1), dy, sizes_E, x.dtype, tiles, interpret=interpret)
