"""Computes what each token's loss counts in the sum over a batch. Arrays are [B, T], shifted."""

import jax
import jax.numpy as jnp

from distill.objectives import advantages
from distill.objectives.fused_head import Stats
from distill.objectives.loss import Loss


def compute_token_weights(
    loss: Loss, mask_BT: jax.Array, segments_BT: jax.Array, limit: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the weight of each token's loss [B, T], and the count (scalar) that divides the sum.

    The loss of a batch is Σ weight·loss / Σ count over all micro-batches and devices, for every
    aggregation. `limit`: the maximum number of tokens of a response. With loss.entropy_weight the
    count is that of `complete_token_weights`, since entropies are not known here.
    """
    mask_BT = (mask_BT > 0).astype(jnp.float32)
    if loss.position_half_life:
        position_BT = advantages.compute_response_positions(mask_BT, segments_BT)
        mask_BT *= jnp.exp2(-position_BT.astype(jnp.float32) / loss.position_half_life)
    if loss.aggregation == "token":
        return mask_BT, jnp.sum(mask_BT)
    count = advantages.count_sequences(mask_BT, segments_BT)
    if loss.aggregation == "constant":
        return mask_BT / limit, count
    return mask_BT / jnp.maximum(advantages.sum_over_sequence(mask_BT, segments_BT), 1), count


def compute_entropy_weights(loss: Loss, stats: Stats) -> jax.Array:
    """Returns exp(α·H) for loss.entropy_weight α and the entropy H in nats, detached."""
    entropy_BT = stats["entropy" if loss.entropy_from == "student" else "teacher_entropy"]
    return jnp.exp(loss.entropy_weight * jax.lax.stop_gradient(entropy_BT))


def complete_token_weights(weight_BT: jax.Array, stats: Stats) -> tuple[jax.Array, jax.Array]:
    """Returns the weights of tokens [B, T] with those by entropy, if any, and their sum (scalar).

    Args:
      weight_BT: from `compute_token_weights`.
      stats: from losses.compute_token_losses, whose loss has the weights by entropy in it.
    """
    if "token_weight" in stats:
        weight_BT = weight_BT * stats["token_weight"]
    return weight_BT, jnp.sum(weight_BT)
