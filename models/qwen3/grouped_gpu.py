"""Products of rows that are grouped by expert, by Pallas kernels for NVIDIA GPUs (Triton).

XLA turns jax.lax.ragged_dot into one dense product there, with every row spread out over all
experts. Here the rows of each expert are cut into tiles, from where its group begins, and a tile
is multiplied by its expert's matrix alone: no more than a tile of each group is padding.

Letters: M rows, E experts, K summed over, N columns of what comes out, X tiles of rows.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# A tile of what comes out is at most _WIDE x _WIDE: float32 fills 64 registers of each of 256
# threads. Of the two factors _STEP bytes a row or column are in flight, three times:
# 96 KiB of shared memory, which all GPUs since Ampere have (up to 99 KiB on GeForce).
_WIDE, _LEAST, _STEP, _STAGES = 128, 16, 128, 3


@functools.partial(jax.jit, static_argnames=("transposed", "dtype", "interpret"))
def product(
    x_MK: jax.Array,
    kernel_EKN: jax.Array,
    sizes_E: jax.Array,
    transposed: bool = False,
    dtype: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """[M, N] in `dtype`: the first sizes_E[0] rows times kernel_EKN[0], and so on; rows behind the
    last group hold anything. `transposed`, the kernel is [E, N, K].

    The kernel may be of another dtype, of 8 bits: it is converted to x's as it is read.
    `interpret` runs it anywhere, slowly.
    """
    (M, K), E = x_MK.shape, kernel_EKN.shape[0]
    N = kernel_EKN.shape[1 if transposed else 2]
    rows = _tile(-(-M // E), _WIDE)
    columns, inner = _tile(N, _WIDE), _tile(K, _STEP // x_MK.dtype.itemsize)
    # Σ⌈size/rows⌉, at most: of min(E, M) groups each may have one row in a tile of its own.
    tiles = (M + min(E, M) * (rows - 1)) // rows
    about_3X = _tiles(sizes_E, rows, tiles)

    def multiply(about_3X: Any, x_MK: Any, kernel_EKN: Any, y_MN: Any) -> None:
        column, tile = _span(pl.program_id(0) * columns, columns, N), pl.program_id(1)
        start, stop, expert = (about_3X[i, tile] for i in range(3))
        row = start, rows, stop

        @pl.when(start < stop)
        def _() -> None:
            def add(step: jax.Array, sum_RN: jax.Array) -> jax.Array:
                at = _span(step * inner, inner, K)
                x_RK = _load(x_MK, row, at)
                held = _load(kernel_EKN, *((column, at) if transposed else (at, column)), expert)
                return sum_RN + triton.dot(x_RK, held.astype(x_RK.dtype), trans_b=transposed)

            sum_RN = jnp.zeros((rows, columns), jnp.float32)
            sum_RN = jax.lax.fori_loop(0, -(-K // inner), add, sum_RN)
            _store(y_MN, sum_RN, row, column)

    return pl.pallas_call(
        multiply,
        out_shape=jax.ShapeDtypeStruct((M, N), dtype or x_MK.dtype),
        grid=(-(-N // columns), tiles),
        compiler_params=_params(rows, columns),
        interpret=interpret,
        name="grouped_product",
    )(about_3X, x_MK, kernel_EKN)


@functools.partial(jax.jit, static_argnames="interpret")
def by_kernel(
    x_MK: jax.Array, dy_MN: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """xᵀ dy of each group [E, K, N], in x's dtype; zeros of a group without rows.

    `interpret` runs it anywhere, slowly.
    """
    (M, K), N, E = x_MK.shape, dy_MN.shape[1], len(sizes_E)
    inners, columns = _tile(K, _WIDE), _tile(N, _WIDE)
    rows = _tile(-(-M // E), _STEP // x_MK.dtype.itemsize)
    ends_E = jnp.cumsum(sizes_E)
    about_2E = jnp.stack([ends_E - sizes_E, ends_E]).astype(jnp.int32)

    def multiply(about_2E: Any, x_MK: Any, dy_MN: Any, dkernel_EKN: Any) -> None:
        expert, column = pl.program_id(2), _span(pl.program_id(0) * columns, columns, N)
        inner = _span(pl.program_id(1) * inners, inners, K)
        start, stop = about_2E[0, expert], about_2E[1, expert]

        def add(step: jax.Array, sum_KN: jax.Array) -> jax.Array:
            row = start + step * rows, rows, stop
            x_RK, dy_RN = _load(x_MK, row, inner), _load(dy_MN, row, column)
            return sum_KN + triton.dot(x_RK, dy_RN, trans_a=True)

        sum_KN = jnp.zeros((inners, columns), jnp.float32)
        steps = jax.lax.div(stop - start + rows - 1, rows)
        sum_KN = jax.lax.fori_loop(0, steps, add, sum_KN)
        _store(dkernel_EKN, sum_KN, inner, column, expert)

    return pl.pallas_call(
        multiply,
        out_shape=jax.ShapeDtypeStruct((E, K, N), x_MK.dtype),
        grid=(-(-N // columns), -(-K // inners), E),
        compiler_params=_params(inners, columns),
        interpret=interpret,
        name="grouped_by_kernel",
    )(about_2E, x_MK, dy_MN)


def _tiles(sizes_E: jax.Array, rows: int, tiles: int) -> jax.Array:
    """int32 [3, X]: where each tile of rows starts, where its group stops, whose group it is. Tiles
    that are left over start and stop at 0."""
    ends_E, tile_ends_E = jnp.cumsum(sizes_E), jnp.cumsum(-(-sizes_E // rows))
    tile_X = jnp.arange(tiles)
    expert_X = jnp.searchsorted(tile_ends_E, tile_X, side="right", method="compare_all")
    used_X, expert_X = tile_X < tile_ends_E[-1], jnp.minimum(expert_X, len(sizes_E) - 1)
    first_X = (tile_ends_E - -(-sizes_E // rows))[expert_X]
    start_X = (ends_E - sizes_E)[expert_X] + (tile_X - first_X) * rows
    about = (jnp.where(used_X, start_X, 0), jnp.where(used_X, ends_E[expert_X], 0), expert_X)
    return jnp.stack(about).astype(jnp.int32)


def _tile(length: int, most: int) -> int:
    """A power of two that covers the length, of 16 (the least that tensor cores take) to `most`."""
    return min(most, max(_LEAST, 2 ** math.ceil(math.log2(length))))


# Of an axis: where a tile starts, how long it is, where what belongs to it stops (None: behind it).
Span = tuple[Any, int, Any]


def _span(at: Any, length: int, whole: int) -> Span:
    """Of an axis that is cut into tiles from its beginning."""
    return at, length, whole if whole % length else None


def _within(first: Span, second: Span) -> jax.Array | None:
    here, there = (
        None if stop is None else start + jnp.arange(length) < stop
        for start, length, stop in (first, second)
    )
    if here is None or there is None:
        one = here[:, None] if here is not None else there
        return None if one is None else jnp.broadcast_to(one, (first[1], second[1]))
    return here[:, None] & there[None, :]


def _load(ref: Any, first: Span, second: Span, *expert: jax.Array) -> jax.Array:
    """The tile, and zeros where it goes beyond what belongs to it."""
    at, mask = (*expert, pl.ds(*first[:2]), pl.ds(*second[:2])), _within(first, second)
    return triton.load(ref.at[at], mask=mask, other=None if mask is None else 0)


def _store(ref: Any, value: jax.Array, first: Span, second: Span, *expert: jax.Array) -> None:
    at = (*expert, pl.ds(*first[:2]), pl.ds(*second[:2]))
    triton.store(ref.at[at], value.astype(ref.dtype), mask=_within(first, second))


def _params(rows: int, columns: int) -> triton.CompilerParams:
    warps = 8 if rows * columns == _WIDE**2 else 4
    return triton.CompilerParams(num_warps=warps, num_stages=_STAGES)
