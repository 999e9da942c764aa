"""Attention over blocks of slabs, and writing to them, in the layout of models/layers/slabs.py."""

import jax
import jax.numpy as jnp

from models.layers.attention import masked_softmax


def write_tokens(
    blocks: tuple[jax.Array, ...],
    sizes: list[int],
    axis: int,
    source: jax.Array,
    slab: jax.Array,
    start: jax.Array,
    count: jax.Array,
    position: jax.Array,
) -> tuple[jax.Array, ...]:
    """Writes tokens [start, start + count) of `source`, along `axis`, to `position` of a slab, in a
    window of each block that keeps its other tokens."""
    tokens, written, first = source.shape[axis], [], 0
    for block, size in zip(blocks, sizes, strict=True):
        width = min(tokens, size)
        padding = [(0, 0)] * source.ndim
        padding[axis] = (width, width)
        begin = jnp.clip(position - first, 0, size - width)  # the window's start in the block
        offset = first + begin - position  # the window's start relative to the piece's
        piece = jnp.pad(source, padding)
        shift = jnp.clip(start + offset + width, 0, tokens + width)
        piece = jax.lax.dynamic_slice_in_dim(piece, shift, width, axis)
        index = offset + jnp.arange(width)
        in_piece = (index >= 0) & (index < count)
        in_piece = in_piece.reshape([-1 if i == axis else 1 for i in range(source.ndim)])
        at = [slab, *[jnp.int32(0)] * source.ndim]
        at[axis + 1] = begin
        shape = [1, *source.shape]
        shape[axis + 1] = width
        old = jax.lax.dynamic_slice(block, at, shape)
        new = jnp.where(in_piece[None], piece[None], old)
        written.append(jax.lax.dynamic_update_slice(block, new, at))
        first += size
    return tuple(written)


def place_tokens(into: jax.Array, new: jax.Array, place_BT: jax.Array, axis: int) -> jax.Array:
    """Writes token t of row b, at t of `axis` of `new`, to place_BT[b, t] of that axis of `into`;
    -1: nowhere. Axis 0 of both is rows.

    One pass over all of `into`: a scatter goes through the rows one by one.
    """

    def spread(x_B: jax.Array) -> jax.Array:
        return x_B.reshape(-1, *[1] * (into.ndim - 1))

    shape = [1] * into.ndim
    shape[axis] = into.shape[axis]
    index = jnp.arange(into.shape[axis], dtype=jnp.int32).reshape(shape)
    for t in range(place_BT.shape[1]):
        token = jax.lax.slice_in_dim(new, t, t + 1, axis=axis)
        into = jnp.where(index == spread(place_BT[:, t]), token, into)
    return into


def attend_blocks(q_BKMH: jax.Array, parts: list[dict], mask: jax.Array) -> jax.Array:
    """Attends to the tokens of all parts.

    Args:
      parts: each has keys [B, K, H, S] and values [B, K, S, H]; if they are int8, also float32
        key_scales and value_scales [B, K, S].
      mask: bool, broadcastable to [B, K, M, all tokens of all parts].

    Returns:
      [B, K, M, H] in the queries' dtype; the softmax is computed in float32.
    """
    dtype, scores, H = q_BKMH.dtype, [], q_BKMH.shape[-1]
    for part in parts:
        part_scores = jnp.einsum(
            "BKMH,BKHS->BKMS",
            q_BKMH,
            part["keys"].astype(dtype),
            preferred_element_type=jnp.float32,
        )
        part_scores = part_scores * H**-0.5
        scores.append(
            part_scores * part["key_scales"][:, :, None] if "key_scales" in part else part_scores
        )
    weights = masked_softmax(jnp.concatenate(scores, axis=-1), mask)
    out, first = jnp.float32(0), 0
    for part in parts:
        size = part["keys"].shape[3]
        part_scores = weights[..., first : first + size]
        if "value_scales" in part:
            part_scores = part_scores * part["value_scales"][:, :, None]
        values = part["values"].astype(dtype)
        added = jnp.einsum(
            "BKMS,BKSH->BKMH", part_scores.astype(dtype), values, preferred_element_type=jnp.float32
        )
        out, first = out + added, first + size
    return out.astype(dtype)


def group_queries(q_BTNH: jax.Array, K: int) -> jax.Array:
    """Returns [B, K, M, H]: the queries of each key/value head, head by head."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def ungroup_queries(out_BKMH: jax.Array, T: int) -> jax.Array:
    """Undoes `group_queries`."""
    B, K, M, H = out_BKMH.shape
    return out_BKMH.reshape(B, K, M // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)
