"""Attention over blocks of slabs, in the layout of models/layers/slabs.py."""

import jax
import jax.numpy as jnp

from models.layers.attention import masked_softmax


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
