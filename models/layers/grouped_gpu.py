"""Products of rows grouped by expert, as Pallas kernels for NVIDIA GPUs (Triton).

There XLA turns jax.lax.ragged_dot into one dense product, with every row expanded over all experts.
Here the rows of each expert are cut into tiles, starting where its group starts, and a tile is
multiplied by its own expert's matrix only: less than one tile per group is padding.

Letters: M rows, E experts, K contracted dimension, N output columns, X tiles of rows.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# An output tile is at most _MAX_TILE x _MAX_TILE: in float32, 64 registers of each of 256 threads.
# _STEP_BYTES per row or column of each factor are in flight, in _NUM_STAGES stages: 96 KiB of
# shared memory, which all GPUs since Ampere have (up to 99 KiB on GeForce).
_MAX_TILE, _MIN_TILE, _STEP_BYTES, _NUM_STAGES = 128, 16, 128, 3


@functools.partial(jax.jit, static_argnames=("transposed", "dtype", "interpret"))
def multiply_groups(
    x_MK: jax.Array,
    kernel_EKN: jax.Array,
    sizes_E: jax.Array,
    transposed: bool = False,
    dtype: Any = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns [M, N] in `dtype`: the first sizes_E[0] rows times kernel_EKN[0], and so on.

    Rows after the last group are undefined. If `transposed`, the kernel is [E, N, K]. A kernel of
    another dtype (8 bits) is converted to x's while it is read. `interpret` runs on any platform,
    slowly.
    """
    (M, K), E = x_MK.shape, kernel_EKN.shape[0]
    N = kernel_EKN.shape[1 if transposed else 2]
    rows = _choose_tile(-(-M // E), _MAX_TILE)
    columns, inner = _choose_tile(N, _MAX_TILE), _choose_tile(K, _STEP_BYTES // x_MK.dtype.itemsize)
    # The maximum of Σ⌈size/rows⌉: each of min(E, M) groups may end with a single row in a tile.
    tiles = (M + min(E, M) * (rows - 1)) // rows
    tile_info_3X = _assign_tiles(sizes_E, rows, tiles)

    def multiply_tile(tile_info_3X: Any, x_MK: Any, kernel_EKN: Any, y_MN: Any) -> None:
        column, tile = _make_span(pl.program_id(0) * columns, columns, N), pl.program_id(1)
        start, stop, expert = (tile_info_3X[i, tile] for i in range(3))
        row = start, rows, stop

        @pl.when(start < stop)
        def _() -> None:
            def add_step(step: jax.Array, sum_RN: jax.Array) -> jax.Array:
                at = _make_span(step * inner, inner, K)
                x_RK = _load_tile(x_MK, row, at)
                kernel_tile = _load_tile(
                    kernel_EKN, *((column, at) if transposed else (at, column)), expert
                )
                return sum_RN + triton.dot(x_RK, kernel_tile.astype(x_RK.dtype), trans_b=transposed)

            sum_RN = jnp.zeros((rows, columns), jnp.float32)
            sum_RN = jax.lax.fori_loop(0, -(-K // inner), add_step, sum_RN)
            _store_tile(y_MN, sum_RN, row, column)

    return pl.pallas_call(
        multiply_tile,
        out_shape=jax.ShapeDtypeStruct((M, N), dtype or x_MK.dtype),
        grid=(-(-N // columns), tiles),
        compiler_params=_make_compiler_params(rows, columns),
        interpret=interpret,
        name="grouped_product",
    )(tile_info_3X, x_MK, kernel_EKN)


@functools.partial(jax.jit, static_argnames="interpret")
def compute_kernel_gradient(
    x_MK: jax.Array, dy_MN: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """Computes xᵀ dy of each group [E, K, N], in x's dtype; zeros for a group without rows.

    `interpret` runs it on any platform, slowly.
    """
    (M, K), N, E = x_MK.shape, dy_MN.shape[1], len(sizes_E)
    inners, columns = _choose_tile(K, _MAX_TILE), _choose_tile(N, _MAX_TILE)
    rows = _choose_tile(-(-M // E), _STEP_BYTES // x_MK.dtype.itemsize)
    ends_E = jnp.cumsum(sizes_E)
    bounds_2E = jnp.stack([ends_E - sizes_E, ends_E]).astype(jnp.int32)

    def reduce_group(bounds_2E: Any, x_MK: Any, dy_MN: Any, dkernel_EKN: Any) -> None:
        expert, column = pl.program_id(2), _make_span(pl.program_id(0) * columns, columns, N)
        inner = _make_span(pl.program_id(1) * inners, inners, K)
        start, stop = bounds_2E[0, expert], bounds_2E[1, expert]

        def add_step(step: jax.Array, sum_KN: jax.Array) -> jax.Array:
            row = start + step * rows, rows, stop
            x_RK, dy_RN = _load_tile(x_MK, row, inner), _load_tile(dy_MN, row, column)
            return sum_KN + triton.dot(x_RK, dy_RN, trans_a=True)

        sum_KN = jnp.zeros((inners, columns), jnp.float32)
        steps = jax.lax.div(stop - start + rows - 1, rows)
        sum_KN = jax.lax.fori_loop(0, steps, add_step, sum_KN)
        _store_tile(dkernel_EKN, sum_KN, inner, column, expert)

    return pl.pallas_call(
        reduce_group,
        out_shape=jax.ShapeDtypeStruct((E, K, N), x_MK.dtype),
        grid=(-(-N // columns), -(-K // inners), E),
        compiler_params=_make_compiler_params(inners, columns),
        interpret=interpret,
        name="grouped_by_kernel",
    )(bounds_2E, x_MK, dy_MN)


def _assign_tiles(sizes_E: jax.Array, rows: int, num_tiles: int) -> jax.Array:
    """Returns int32 [3, X]: the first row of each tile, the end of its group, and its expert.

    Unused tiles start and stop at 0.
    """
    ends_E, tile_ends_E = jnp.cumsum(sizes_E), jnp.cumsum(-(-sizes_E // rows))
    tile_X = jnp.arange(num_tiles)
    expert_X = jnp.searchsorted(tile_ends_E, tile_X, side="right", method="compare_all")
    used_X, expert_X = tile_X < tile_ends_E[-1], jnp.minimum(expert_X, len(sizes_E) - 1)
    first_X = (tile_ends_E - -(-sizes_E // rows))[expert_X]
    start_X = (ends_E - sizes_E)[expert_X] + (tile_X - first_X) * rows
    tile_info = (jnp.where(used_X, start_X, 0), jnp.where(used_X, ends_E[expert_X], 0), expert_X)
    return jnp.stack(tile_info).astype(jnp.int32)


def _choose_tile(length: int, max_tile: int) -> int:
    """Returns the power of two that covers `length`, from 16 (for tensor cores) to `max_tile`."""
    return min(max_tile, max(_MIN_TILE, 2 ** math.ceil(math.log2(length))))


# Of a tile along an axis: its start, its length and the end of valid data (None: all is valid).
Span = tuple[Any, int, Any]


def _make_span(start: Any, length: int, axis_length: int) -> Span:
    """Returns the span of a tile on an axis that is cut into tiles from its beginning."""
    return start, length, axis_length if axis_length % length else None


def _make_mask(first: Span, second: Span) -> jax.Array | None:
    first_mask, second_mask = (
        None if stop is None else start + jnp.arange(length) < stop
        for start, length, stop in (first, second)
    )
    if first_mask is None or second_mask is None:
        axis_mask = first_mask[:, None] if first_mask is not None else second_mask
        return None if axis_mask is None else jnp.broadcast_to(axis_mask, (first[1], second[1]))
    return first_mask[:, None] & second_mask[None, :]


def _load_tile(ref: Any, first: Span, second: Span, *expert: jax.Array) -> jax.Array:
    """Loads a tile, with zeros outside its valid data."""
    at, mask = (*expert, pl.ds(*first[:2]), pl.ds(*second[:2])), _make_mask(first, second)
    return triton.load(ref.at[at], mask=mask, other=None if mask is None else 0)


def _store_tile(ref: Any, value: jax.Array, first: Span, second: Span, *expert: jax.Array) -> None:
    at = (*expert, pl.ds(*first[:2]), pl.ds(*second[:2]))
    triton.store(ref.at[at], value.astype(ref.dtype), mask=_make_mask(first, second))


def _make_compiler_params(rows: int, columns: int) -> triton.CompilerParams:
    warps = 8 if rows * columns == _MAX_TILE**2 else 4
    return triton.CompilerParams(num_warps=warps, num_stages=_NUM_STAGES)
