"""Attention over pages, on one device's own rows and heads: one meaning, a row of TABLE for each
platform. Every implementation is tested equal to `plain`.

A token attends to its row's tokens up to its own. What comes back for padding is undefined.
Letters as in pages.py; M queries of one key/value head, S tokens of a block, C those of one line
that are looked at together.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

_QUERIES = 512  # tokens of a line that `plain` looks at together
_VMEM = 2**26  # bytes of a TPU's fast memory that the kernel may have

# (q [B, T, N, H], the arrays of a pool, table [R, N] with the layer's pages, length [R],
#  starts [R + 1], row [B, T], position [B, T]) -> [B, T, N, H]
Attend = Callable[..., jax.Array]


def stored(
    k_BTKH: jax.Array, v_BTKH: jax.Array, dtype: jnp.dtype, kind: str
) -> tuple[jax.Array, ...]:
    """Keys and values as a pool of this kind keeps them, [B, T, heads, H]; int8 ones with their
    scales [B, T, K]: x = int8 · scale, to half a scale."""
    if dtype == jnp.int8:
        (k_BTKH, k_BTK), (v_BTKH, v_BTK) = _quantise(k_BTKH), _quantise(v_BTKH)
        return k_BTKH, v_BTKH, k_BTK, v_BTK
    if dtype == jnp.float8_e4m3fn:  # what is too large for it would be NaN
        most = float(jnp.finfo(dtype).max)
        k_BTKH, v_BTKH = (jnp.clip(x, -most, most) for x in (k_BTKH, v_BTKH))
    k_BTKH, v_BTKH = k_BTKH.astype(dtype), v_BTKH.astype(dtype)
    if kind != "ragged":
        return k_BTKH, v_BTKH
    B, T, K, H = k_BTKH.shape
    return (jnp.stack([k_BTKH, v_BTKH], axis=3).reshape(B, T, 2 * K, H),)


def _quantise(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x_BTKH.astype(jnp.float32)
    scale_BTK = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1), 1e-12) / 127
    return jnp.round(wide / scale_BTK[..., None]).astype(jnp.int8), scale_BTK


def plain(
    q_BTNH: jax.Array,
    pools: tuple[jax.Array, ...],
    table_RN: jax.Array,
    length_R: jax.Array,
    starts_R: jax.Array,
    row_BT: jax.Array,
    position_BT: jax.Array,
) -> jax.Array:
    """What XLA makes of the formula, over some tokens of a row at a time, gathered from its pages.
    Keys and values [K, pages, page, H], and after them their scales, if they are int8."""
    position_BT = jnp.where(row_BT < 0, -1, position_BT)
    if q_BTNH.shape[1] == 1:
        return _over_pages(q_BTNH, pools, table_RN[jnp.maximum(row_BT[:, 0], 0)], position_BT)
    assert len(q_BTNH) == 1, "more than one line"
    T, C = q_BTNH.shape[1], min(q_BTNH.shape[1], _QUERIES)
    q_BTNH, row_BT, position_BT = (
        jnp.pad(x, ((0, 0), (0, -T % C)) + ((0, 0),) * (x.ndim - 2), constant_values=-1)
        for x in (q_BTNH, row_BT, position_BT)
    )

    def some(row: Any, block: Any, out_BTNH: jax.Array) -> jax.Array:
        q_BCNH, mine_BC, position_BC, old_BCNH = (
            jax.lax.dynamic_slice_in_dim(x, block * C, C, axis=1)
            for x in (q_BTNH, row_BT, position_BT, out_BTNH)
        )
        position_BC = jnp.where(mine_BC == row, position_BC, -1)
        new_BCNH = _over_pages(q_BCNH, pools, table_RN[row][None], position_BC)
        new_BCNH = jnp.where((mine_BC == row)[..., None, None], new_BCNH, old_BCNH)
        return jax.lax.dynamic_update_slice_in_dim(out_BTNH, new_BCNH, block * C, axis=1)

    def chunk(row: Any, out_BTNH: jax.Array) -> jax.Array:
        first, end = starts_R[row], starts_R[row + 1]
        blocks = (first // C, jnp.where(first < end, -(-end // C), 0))
        return jax.lax.fori_loop(*blocks, lambda block, out: some(row, block, out), out_BTNH)

    out_BTNH = jax.lax.fori_loop(0, len(table_RN), chunk, jnp.zeros_like(q_BTNH))
    return out_BTNH[:, :T]


def _over_pages(
    q_BTNH: jax.Array, pools: tuple[jax.Array, ...], table_BN: jax.Array, position_BT: jax.Array
) -> jax.Array:
    """T tokens of each row, the softmax put together from blocks of the row's tokens."""
    (B, T, N, H), (K, _, page, _) = q_BTNH.shape, pools[0].shape
    count = together("plain", page, table_BN.shape[1], decoding=T == 1)
    table_BN = jnp.pad(table_BN, ((0, 0), (0, -table_BN.shape[1] % count)))
    q_KBMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(2, 0, 3, 1, 4).reshape(K, B, -1, H)
    position_BM = jnp.tile(position_BT, (1, N // K))

    def block(i: Any, carry: Any) -> Any:
        top_KBM, sum_KBM, out_KBMH = carry
        ids = jax.lax.dynamic_slice_in_dim(table_BN, i * count, count, axis=1)
        k, v, *scales = (x[:, ids].reshape(K, B, count * page, *x.shape[3:]) for x in pools)
        scores = jnp.einsum(
            "KBMH,KBSH->KBMS", q_KBMH, k.astype(q_KBMH.dtype), preferred_element_type=jnp.float32
        )
        scores = scores * H**-0.5
        scores = scores * scales[0][:, :, None] if scales else scores
        at_S = i * count * page + jnp.arange(count * page)
        seen_BMS = at_S[None, None] <= position_BM[..., None]
        scores = jnp.where(seen_BMS[None], scores, jnp.finfo(scores.dtype).min)
        new_KBM = jnp.maximum(top_KBM, jnp.max(scores, axis=-1))
        weights, kept_KBM = jnp.exp(scores - new_KBM[..., None]), jnp.exp(top_KBM - new_KBM)
        sum_KBM = sum_KBM * kept_KBM + jnp.sum(weights, axis=-1)
        weights = weights * scales[1][:, :, None] if scales else weights
        added_KBMH = jnp.einsum(
            "KBMS,KBSH->KBMH",
            weights.astype(q_KBMH.dtype),
            v.astype(q_KBMH.dtype),
            preferred_element_type=jnp.float32,
        )
        return new_KBM, sum_KBM, out_KBMH * kept_KBM[..., None] + added_KBMH

    M = q_KBMH.shape[2]
    none = (jnp.full((K, B, M), -jnp.inf), jnp.zeros((K, B, M)), jnp.zeros((K, B, M, H)))
    blocks = -(-(jnp.max(position_BT) + 1) // (count * page))
    _, sum_KBM, out_KBMH = jax.lax.fori_loop(0, blocks, block, none)
    out_KBMH = (out_KBMH / sum_KBM[..., None]).astype(q_BTNH.dtype)
    return out_KBMH.reshape(K, B, N // K, T, H).transpose(1, 3, 0, 2, 4).reshape(B, T, N, H)


def together(kind: str, page: int, columns: int, decoding: bool) -> int:
    """Pages that are fetched at a time, of rows that may have `columns`.

    It is always so many, also at the end of a row: the more, the better a kernel hides how long
    memory takes to answer; the fewer, the less is fetched in vain. Decoding reads each row once.
    """
    tokens = {"gpu": 128, "ragged": 512 if decoding else 1024, "plain": 512}[kind]
    return min(columns, max(1, tokens // page))


def ragged(
    q_BTNH: jax.Array,
    pools: tuple[jax.Array, ...],
    table_RN: jax.Array,
    length_R: jax.Array,
    starts_R: jax.Array,
    row_BT: jax.Array,
    position_BT: jax.Array,
) -> jax.Array:
    """JAX's Pallas kernel for TPU, over one pool [pages, page, 2K, H].

    It begins to fetch the first row before it looks whether there is any, and the next row when it
    is done with one: each has at least a token, or it would go on without what it fetched.
    """
    (pool,), N = pools, q_BTNH.shape[2]
    R, columns = table_RN.shape
    decoding = q_BTNH.shape[1] == 1
    one_R = jnp.minimum(jnp.arange(R + 1, dtype=jnp.int32), 1)
    starts_R = jnp.where(starts_R[-1] == 0, one_R, starts_R)
    begun = jnp.sum(starts_R[1:] > starts_R[:-1], dtype=jnp.int32)
    scale = 1.0 if pool.dtype.itemsize == 1 else None
    out_TNH = ragged_paged_attention(
        q_BTNH.reshape(-1, *q_BTNH.shape[2:]),
        pool,
        jnp.maximum(length_R, 1),
        table_RN,
        starts_R,
        begun[None],
        sm_scale=q_BTNH.shape[3] ** -0.5,
        k_scale=scale,
        v_scale=scale,
        num_kv_pages_per_block=together("ragged", pool.shape[1], columns, decoding),
        # Products of a block of tokens with a row's that only one of them may see: in decoding few.
        num_queries_per_block=8 if decoding else min(128, max(32, 1024 // N)),
        vmem_limit_bytes=_VMEM,
    )
    return out_TNH.reshape(q_BTNH.shape)


def gpu(
    q_BTNH: jax.Array,
    pools: tuple[jax.Array, ...],
    table_RN: jax.Array,
    length_R: jax.Array,
    starts_R: jax.Array,
    row_BT: jax.Array,
    position_BT: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """JAX's Pallas kernel for GPU where each row has one token, `plain` for chunks. `interpret`
    runs the kernel anywhere, slowly."""
    if q_BTNH.shape[1] > 1:
        return plain(q_BTNH, pools, table_RN, length_R, starts_R, row_BT, position_BT)
    keys, values, *scales = pools
    row_B = row_BT[:, 0]
    table_BN = table_RN[jnp.maximum(row_B, 0)]
    count = together("gpu", keys.shape[2], table_BN.shape[1], decoding=True)
    # Of each split comes a sum, with 16 queries a head: no more splits than keep the device busy.
    splits = min(max(1, 2048 // (len(q_BTNH) * len(keys))), 16, -(-table_BN.shape[1] // count))
    table_BN = jnp.pad(table_BN, ((0, 0), (0, -table_BN.shape[1] % (splits * count))))
    out_BNH = paged_attention(
        q_BTNH[:, 0] * q_BTNH.shape[3] ** -0.5,
        keys,
        values,
        table_BN,
        jnp.where(row_B < 0, 0, position_BT[:, 0] + 1),
        *scales,
        pages_per_compute_block=count,
        k_splits=splits,
        interpret=interpret,
    )
    return out_BNH[:, None]


TABLE: dict[str, Attend] = {"plain": plain, "ragged": ragged, "gpu": gpu}
