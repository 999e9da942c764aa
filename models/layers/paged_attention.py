"""Attention over pages on one device's own rows and heads; TABLE has an entry for each platform.

A token attends to its row's tokens up to itself. Results for padding are undefined. All
implementations are tested to agree with `attend_plain`.
Letters as in pages.py; M queries of one key/value head, S tokens of pages and C tokens of a line
that are processed together.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

_MAX_QUERIES = 512  # tokens of a line that are processed together where there is no kernel
_VMEM_LIMIT = 2**26  # bytes of a TPU's fast memory that the kernel may use

# (q [B, T, N, H], the arrays of a pool, table [R, N] with the layer's pages, length [R],
#  starts [R + 1], row [B, T], position [B, T]) -> [B, T, N, H]
Attend = Callable[..., jax.Array]


def to_pool_format(
    k_BTKH: jax.Array, v_BTKH: jax.Array, dtype: jnp.dtype, backend: str
) -> tuple[jax.Array, ...]:
    """Converts keys and values to the layout of a pool of this backend, [B, T, heads, H].

    For int8 the arrays are followed by their scales [B, T, K]; see `quantise_int8`.
    """
    if dtype == jnp.int8:
        (k_BTKH, k_BTK), (v_BTKH, v_BTK) = quantise_int8(k_BTKH), quantise_int8(v_BTKH)
        return k_BTKH, v_BTKH, k_BTK, v_BTK
    if dtype == jnp.float8_e4m3fn:  # larger values would become NaN
        most = float(jnp.finfo(dtype).max)
        k_BTKH, v_BTKH = (jnp.clip(x, -most, most) for x in (k_BTKH, v_BTKH))
    k_BTKH, v_BTKH = k_BTKH.astype(dtype), v_BTKH.astype(dtype)
    if backend != "ragged":
        return k_BTKH, v_BTKH
    B, T, K, H = k_BTKH.shape
    return (jnp.stack([k_BTKH, v_BTKH], axis=3).reshape(B, T, 2 * K, H),)


def quantise_int8(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns int8 [B, T, K, H] and float32 scales [B, T, K]: x ≈ int8 · scale, to half a scale."""
    wide = x_BTKH.astype(jnp.float32)
    scale_BTK = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-12) / 127
    return jnp.round(wide / scale_BTK[..., None]).astype(jnp.int8), scale_BTK


def attend_plain(
    q_BTNH: jax.Array,
    pools: tuple[jax.Array, ...],
    table_RN: jax.Array,
    length_R: jax.Array,
    starts_R: jax.Array,
    row_BT: jax.Array,
    position_BT: jax.Array,
) -> jax.Array:
    """Computes attention without a kernel, row by row and page by page, up to each row's length.

    `pools` are keys [K, pages, H, page], a layout that CPUs multiply several times faster, values
    [K, pages, page, H] and, if these are int8, their scales.
    """
    return _attend_by_row(
        q_BTNH, pools, table_RN, starts_R, row_BT, position_BT, 1, keys_transposed=True
    )


def _attend_by_row(
    q_BTNH: jax.Array,
    pools: tuple[jax.Array, ...],
    table_RN: jax.Array,
    starts_R: jax.Array,
    row_BT: jax.Array,
    position_BT: jax.Array,
    pages_per_step: int,
    keys_transposed: bool,
) -> jax.Array:
    """`attend_plain`, `pages_per_step` pages at a time, with keys in either layout."""
    q_TNH = q_BTNH.reshape(-1, *q_BTNH.shape[2:])
    T, C = len(q_TNH), min(q_BTNH.shape[1], _MAX_QUERIES)
    row_T, position_T = row_BT.reshape(-1), position_BT.reshape(-1)
    q_TNH = jnp.pad(q_TNH, ((0, -T % C), (0, 0), (0, 0)))
    row_T, position_T = (jnp.pad(x, (0, -T % C), constant_values=-1) for x in (row_T, position_T))

    def attend_block(row: Any, block: Any, out_TNH: jax.Array) -> jax.Array:
        q_CNH, row_C, position_C, old_CNH = (
            jax.lax.dynamic_slice_in_dim(x, block * C, C)
            for x in (q_TNH, row_T, position_T, out_TNH)
        )
        position_C = jnp.where(row_C == row, position_C, -1)
        new_CNH = _attend_pages(
            q_CNH, pools, table_RN[row], position_C, pages_per_step, keys_transposed
        )
        new_CNH = jnp.where((row_C == row)[:, None, None], new_CNH, old_CNH)
        return jax.lax.dynamic_update_slice_in_dim(out_TNH, new_CNH, block * C, axis=0)

    def attend_chunk(row: Any, out_TNH: jax.Array) -> jax.Array:
        first, end = starts_R[row], starts_R[row + 1]
        blocks = (first // C, jnp.where(first < end, -(-end // C), 0))
        return jax.lax.fori_loop(*blocks, lambda block, out: attend_block(row, block, out), out_TNH)

    out_TNH = jax.lax.fori_loop(0, len(table_RN), attend_chunk, jnp.zeros_like(q_TNH))
    return out_TNH[:T].reshape(q_BTNH.shape)


def _attend_pages(
    q_TNH: jax.Array,
    pools: tuple[jax.Array, ...],
    table_N: jax.Array,
    position_T: jax.Array,
    pages_per_step: int,
    keys_transposed: bool,
) -> jax.Array:
    """Attends T tokens of one row, with an online softmax over blocks of its pages."""
    (T, N, H), K, page = q_TNH.shape, len(pools[1]), pools[1].shape[2]
    S = pages_per_step * page
    table_N = jnp.pad(table_N, (0, -len(table_N) % pages_per_step))
    q_KMH = q_TNH.reshape(T, K, N // K, H).transpose(1, 2, 0, 3).reshape(K, -1, H)
    position_M = jnp.tile(position_T, N // K)

    def fetch_pages(x: jax.Array, i: Any) -> jax.Array:
        if pages_per_step == 1:
            return jax.lax.dynamic_slice_in_dim(x, table_N[i], 1, axis=1)[:, 0]
        x = x[:, jax.lax.dynamic_slice_in_dim(table_N, i * pages_per_step, pages_per_step)]
        return x.reshape(K, S, *x.shape[3:])

    def add_block(i: Any, carry: Any) -> Any:
        top_KM, sum_KM, out_KMH = carry
        k, v, *scales = (fetch_pages(x, i).astype(q_TNH.dtype) for x in pools)
        k_KHS = k if keys_transposed else k.swapaxes(1, 2)
        scores = jnp.einsum("KMH,KHS->KMS", q_KMH, k_KHS, preferred_element_type=jnp.float32)
        scores = scores * H**-0.5
        scores = scores * scales[0][:, None] if scales else scores
        seen_MS = i * S + jnp.arange(S)[None] <= position_M[:, None]
        scores = jnp.where(seen_MS[None], scores, jnp.finfo(scores.dtype).min)
        new_KM = jnp.maximum(top_KM, jnp.max(scores, axis=-1))
        weights, kept_KM = jnp.exp(scores - new_KM[..., None]), jnp.exp(top_KM - new_KM)
        sum_KM = sum_KM * kept_KM + jnp.sum(weights, axis=-1)
        weights = (weights * scales[1][:, None] if scales else weights).astype(q_TNH.dtype)
        added_KMH = jnp.einsum("KMS,KSH->KMH", weights, v, preferred_element_type=jnp.float32)
        return new_KM, sum_KM, out_KMH * kept_KM[..., None] + added_KMH

    M = q_KMH.shape[1]
    none = (jnp.full((K, M), -jnp.inf), jnp.zeros((K, M)), jnp.zeros((K, M, H)))
    blocks = -(-(jnp.max(position_T) + 1) // S)
    _, sum_KM, out_KMH = jax.lax.fori_loop(0, blocks, add_block, none)
    out_KMH = (out_KMH / sum_KM[..., None]).astype(q_TNH.dtype)
    return out_KMH.reshape(K, N // K, T, H).transpose(2, 0, 1, 3).reshape(T, N, H)


def count_pages_per_fetch(backend: str, page_size: int, columns: int, decoding: bool) -> int:
    """Returns the number of pages fetched at a time, for rows of up to `columns` pages.

    That many are fetched even at the end of a row: larger numbers hide memory latency better,
    smaller ones fetch less in vain. Decoding reads each row once.
    """
    if backend == "plain":
        return 1
    tokens = (128 if backend == "gpu" else 512) if decoding else 1024
    return min(columns, max(1, tokens // page_size))


def attend_ragged(
    q_BTNH: jax.Array,
    pools: tuple[jax.Array, ...],
    table_RN: jax.Array,
    length_R: jax.Array,
    starts_R: jax.Array,
    row_BT: jax.Array,
    position_BT: jax.Array,
) -> jax.Array:
    """Runs JAX's Pallas kernel for TPU on one pool [pages, page, 2K, H].

    The kernel prefetches the first row before checking that there is one, and each next row when it
    finishes one, so every row must have at least one token for its prefetch to be used.
    """
    (pool,), N = pools, q_BTNH.shape[2]
    R, columns = table_RN.shape
    decoding = q_BTNH.shape[1] == 1 or len(q_BTNH) == R > 1
    one_R = jnp.minimum(jnp.arange(R + 1, dtype=jnp.int32), 1)
    starts_R = jnp.where(starts_R[-1] == 0, one_R, starts_R)
    num_rows = jnp.sum(starts_R[1:] > starts_R[:-1], dtype=jnp.int32)
    scale = 1.0 if pool.dtype.itemsize == 1 else None
    out_TNH = ragged_paged_attention(
        q_BTNH.reshape(-1, *q_BTNH.shape[2:]),
        pool,
        jnp.maximum(length_R, 1),
        table_RN,
        starts_R,
        num_rows[None],
        sm_scale=q_BTNH.shape[3] ** -0.5,
        k_scale=scale,
        v_scale=scale,
        num_kv_pages_per_block=count_pages_per_fetch("ragged", pool.shape[1], columns, decoding),
        # In decoding a row has one token or a few: products of longer blocks would be wasted.
        num_queries_per_block=8 if decoding else min(128, max(32, 1024 // N)),
        vmem_limit_bytes=_VMEM_LIMIT,
    )
    return out_TNH.reshape(q_BTNH.shape)


def attend_gpu(
    q_BTNH: jax.Array,
    pools: tuple[jax.Array, ...],
    table_RN: jax.Array,
    length_R: jax.Array,
    starts_R: jax.Array,
    row_BT: jax.Array,
    position_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """Runs JAX's Pallas kernel for GPU on the next tokens of rows, and plain XLA for chunks.

    The kernel takes one query a row: each of several tokens is a row of its own for it.
    `interpret` runs the kernel on any platform, slowly.
    """
    keys, values, *scales = pools
    # Pallas chooses 32-bit offsets by the size in bytes; with this many elements they overflow.
    too_far = keys.dtype.itemsize == 1 and 2**31 < keys.size <= 2**32
    are_next = len(q_BTNH) == len(table_RN)  # of each row; a line has a shard for itself
    if (q_BTNH.shape[1] > 1 and not are_next) or too_far:
        count = count_pages_per_fetch("gpu", keys.shape[2], table_RN.shape[1], decoding=False)
        return _attend_by_row(
            q_BTNH, pools, table_RN, starts_R, row_BT, position_BT, count, keys_transposed=False
        )
    shape = q_BTNH.shape
    row_B, position_B, q_BNH = row_BT[:, 0], position_BT[:, 0], q_BTNH[:, 0]
    if shape[1] > 1:
        row_B, position_B = row_BT.reshape(-1), position_BT.reshape(-1)
        q_BNH = q_BTNH.reshape(-1, *shape[2:])
    table_BN = table_RN[jnp.maximum(row_B, 0)]
    count = count_pages_per_fetch("gpu", keys.shape[2], table_BN.shape[1], decoding=True)
    # Each split writes a partial sum of 16 queries a head: use just enough to keep the device busy.
    splits = min(max(1, 2048 // (len(q_BNH) * len(keys))), 16, -(-table_BN.shape[1] // count))
    table_BN = jnp.pad(table_BN, ((0, 0), (0, -table_BN.shape[1] % (splits * count))))
    out_BNH = paged_attention(
        q_BNH * shape[3] ** -0.5,
        keys,
        values,
        table_BN,
        jnp.where(row_B < 0, 0, position_B + 1),
        *scales,
        pages_per_compute_block=count,
        k_splits=splits,
        interpret=interpret,
    )
    return out_BNH[:, None] if shape[1] == 1 else out_BNH.reshape(shape)


TABLE: dict[str, Attend] = {"plain": attend_plain, "ragged": attend_ragged, "gpu": attend_gpu}
