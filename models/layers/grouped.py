"""Products of rows grouped by expert with each expert's matrix, and their gradients.

On TPU, jax.lax.ragged_dot is a grouped kernel that runs at the roofline, and so is its gradient
with respect to the rows. Its gradient with respect to the matrices is compiled densely, every
expert over all rows: E times the work. A Pallas kernel replaces it. On GPUs all three are compiled
densely, and rows are expanded to E times the memory as well: there each has its own kernel
(models.layers.grouped_gpu). On CPUs jax.lax.ragged_dot computes all three.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

from models.layers import grouped_gpu

# One step of the kernel holds this many rows, inputs and bytes of outputs, and the outputs' float32
# sums, in 16 MiB of VMEM. Fewer rows waste less where a group ends within a tile.
_TILE_ROWS, _TILE_INPUTS, _TILE_OUTPUT_BYTES = 256, 1024, 2048


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
    """Computes xᵀ dy of each group [E, in, out], in x's dtype, with the kernel for TPU.

    `interpret` runs it on any platform, slowly.
    """
    (M, D), F = x.shape, dy.shape[1]
    rows = min(_TILE_ROWS, -(-M // 8) * 8)
    x, dy = (jnp.pad(a, ((0, -M % rows), (0, 0))) for a in (x, dy))
    tiles = (rows, min(_TILE_INPUTS, D), min(_TILE_OUTPUT_BYTES // x.dtype.itemsize, F))
    return tgmm(x.swapaxes(0, 1), dy, sizes_E, x.dtype, tiles, interpret=interpret)
