"""Attention in blocks of queries, compiled by XLA: each block reads only the keys from the start of
its first segment to its own end.

The number of blocks of keys is known only at run time: the smallest sufficient one of a few widths
is used. It is the same for all rows of a batch, so that nothing here depends on their sharding.
Scores exist for one block of queries at a time, forward and backward (as in arXiv 2205.14135).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_BLOCK = 64  # queries: longer blocks waste computation, shorter ones make products too small


def attend(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Computes attention, as specified by models.layers.attention.Attend."""
    T = q_BTNH.shape[1]
    block = min(T, _BLOCK)
    q_BTNH, k_BTKH, v_BTKH = (
        jnp.pad(x, ((0, 0), (0, -T % block), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, -T % block)), constant_values=-1)
    out_BTNH: Any = _attend_blocks(block, q_BTNH, k_BTKH, v_BTKH, segments_BT)
    return out_BTNH[:, :T]


def count_score_bytes(N: int, T: int) -> int:
    """Counts the bytes of a row's scores of T tokens and N heads while a block is differentiated:
    float32 of probabilities, their gradient and that of the scores."""
    return 3 * 4 * N * min(T, _BLOCK) * T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_blocks(block: int, q_BTNH, k_BTKH, v_BTKH, segments_BT) -> jax.Array:
    return _forward(block, q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _forward(block: int, q_BTNH, k_BTKH, v_BTKH, segments_BT) -> tuple[jax.Array, Any]:
    N, K = q_BTNH.shape[2], k_BTKH.shape[2]
    keys = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), segments_BT

    def attend_block(width: int, i: jax.Array, q_BKMH: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, (k_BKSH, v_BKSH, mask_BCS) = _slice_visible_keys(width, block, i, *keys)
        scores_BKMS = _compute_scores(q_BKMH, k_BKSH, mask_BCS)
        top_BKM1 = jnp.max(scores_BKMS, axis=-1, keepdims=True)
        p_BKMS = jnp.exp(scores_BKMS - top_BKM1)
        sum_BKM1 = jnp.sum(p_BKMS, axis=-1, keepdims=True)
        out_BKMH = _einsum_wide("BKMS,BKSH->BKMH", p_BKMS.astype(q_BKMH.dtype), v_BKSH) / sum_BKM1
        return out_BKMH.astype(q_BKMH.dtype), top_BKM1 + jnp.log(sum_BKM1)

    q_ABKMH = _split_blocks(q_BTNH, block, K)
    blocks, widths = _choose_widths(block, segments_BT)

    def step(_: None, x: Any) -> tuple[None, Any]:
        return None, _switch_on_width(attend_block, blocks, *x)

    inputs = widths, jnp.arange(len(q_ABKMH)), q_ABKMH
    _, (out_ABKMH, norm_ABKM1) = jax.lax.scan(step, None, inputs)
    return _merge_blocks(out_ABKMH, block, N), (q_ABKMH, keys, out_ABKMH, norm_ABKM1)


def _backward(block: int, residuals: Any, dout_BTNH: jax.Array) -> tuple:
    q_ABKMH, keys, out_ABKMH, norm_ABKM1 = residuals
    N, K = dout_BTNH.shape[2], q_ABKMH.shape[2]
    H = dout_BTNH.shape[3]
    dout_ABKMH = _split_blocks(dout_BTNH, block, K)
    mean_ABKM1 = jnp.sum((dout_ABKMH * out_ABKMH).astype(norm_ABKM1.dtype), -1, keepdims=True)

    def differentiate_block(width: int, i, sums, q_BKMH, norm_BKM1, dout_BKMH, mean_BKM1):
        start, (k_BKSH, v_BKSH, mask_BCS) = _slice_visible_keys(width, block, i, *keys)
        p_BKMS = jnp.exp(_compute_scores(q_BKMH, k_BKSH, mask_BCS) - norm_BKM1)
        dp_BKMS = _einsum_wide("BKMH,BKSH->BKMS", dout_BKMH, v_BKSH)
        dscores_BKMS = (p_BKMS * (dp_BKMS - mean_BKM1) * H**-0.5).astype(q_BKMH.dtype)
        dk_BKSH = _einsum_wide("BKMS,BKMH->BKSH", dscores_BKMS, q_BKMH)
        dv_BKSH = _einsum_wide("BKMS,BKMH->BKSH", p_BKMS.astype(q_BKMH.dtype), dout_BKMH)

        def accumulate_slice(sum_BKTH: jax.Array, part_BKSH: jax.Array) -> jax.Array:
            own = jax.lax.dynamic_slice_in_dim(sum_BKTH, start, width * block, axis=2)
            return jax.lax.dynamic_update_slice_in_dim(sum_BKTH, own + part_BKSH, start, axis=2)

        sums = accumulate_slice(sums[0], dk_BKSH), accumulate_slice(sums[1], dv_BKSH)
        return sums, jnp.einsum("BKMS,BKSH->BKMH", dscores_BKMS, k_BKSH)

    blocks, widths = _choose_widths(block, keys[2])

    def step(sums: Any, x: Any) -> tuple[Any, jax.Array]:
        width, i, *rest = x
        return _switch_on_width(differentiate_block, blocks, width, i, sums, *rest)

    zeros = tuple(jnp.zeros(x.shape, norm_ABKM1.dtype) for x in keys[:2])
    inputs = q_ABKMH, norm_ABKM1, dout_ABKMH, mean_ABKM1
    sums, dq_ABKMH = jax.lax.scan(step, zeros, (widths, jnp.arange(len(q_ABKMH)), *inputs))
    dk, dv = (x.swapaxes(1, 2).astype(k.dtype) for x, k in zip(sums, keys, strict=False))
    return _merge_blocks(dq_ABKMH, block, N), dk, dv, None


_attend_blocks.defvjp(_forward, _backward)


def _split_blocks(x_BTNH: jax.Array, block: int, K: int) -> jax.Array:
    """Returns [A, B, K, M, H]: A blocks, each with M = N/K · block queries per key/value head."""
    B, T, N, H = x_BTNH.shape
    x_BACKQH = x_BTNH.reshape(B, T // block, block, K, N // K, H)
    return x_BACKQH.transpose(1, 0, 3, 4, 2, 5).reshape(T // block, B, K, -1, H)


def _merge_blocks(x_ABKMH: jax.Array, block: int, N: int) -> jax.Array:
    A, B, K, _, H = x_ABKMH.shape
    x_ABKQCH = x_ABKMH.reshape(A, B, K, N // K, block, H)
    return x_ABKQCH.transpose(1, 0, 4, 2, 3, 5).reshape(B, A * block, N, H)


def _choose_widths(block: int, segments_BT: jax.Array) -> tuple[list[int], jax.Array]:
    """Returns widths, in blocks of keys, and the index of the width used by each block of queries.

    Each width is a half or a third larger than the one before.
    """
    T = segments_BT.shape[1]
    blocks = T // block
    steps = {w for n in range(blocks.bit_length()) for w in (2**n, 3 * 2**n)}
    widths = sorted({w for w in steps if w < blocks} | {blocks})
    starts_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
    began_BT = jax.lax.cummax(jnp.where(starts_BT, jnp.arange(T)[None], 0), axis=1)
    first_A = jnp.min(began_BT[:, ::block], axis=0) // block
    needed_A = jnp.arange(blocks) + 1 - first_A
    return widths, jnp.searchsorted(jnp.array(widths), needed_A)


def _switch_on_width(
    function: Callable, widths: list[int], width_index: jax.Array, *args: Any
) -> Any:
    return jax.lax.switch(width_index, [functools.partial(function, w) for w in widths], *args)


def _slice_visible_keys(
    width: int, block: int, i: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segments_BT: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Slices the `width` blocks of keys and values that end with block i.

    Returns their first position, and keys, values and the mask [B, C, S] of those that each query
    of block i sees.
    """
    start = jnp.maximum(i + 1 - width, 0) * block
    cut = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=width * block
    )
    own_BC = jax.lax.dynamic_slice_in_dim(segments_BT, i * block, block, axis=1)
    before_CS = (i * block + jnp.arange(block))[:, None] >= (start + jnp.arange(width * block))[
        None
    ]
    mask_BCS = (own_BC[:, :, None] == cut(segments_BT, axis=1)[:, None]) & before_CS[None]
    return start, (cut(k_BKTH, axis=2), cut(v_BKTH, axis=2), mask_BCS)


def _compute_scores(q_BKMH: jax.Array, k_BKSH: jax.Array, mask_BCS: jax.Array) -> jax.Array:
    scores = _einsum_wide("BKMH,BKSH->BKMS", q_BKMH, k_BKSH) * q_BKMH.shape[-1] ** -0.5
    B, K, M, S = scores.shape
    scores_BKQCS = scores.reshape(B, K, -1, mask_BCS.shape[1], S)
    masked = jnp.where(mask_BCS[:, None, None], scores_BKQCS, jnp.finfo(scores.dtype).min)
    return masked.reshape(B, K, M, S)


def _einsum_wide(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes an einsum that accumulates in float32, or float64 if the inputs are."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(equation, x, y, preferred_element_type=dtype)
