"""Computes advantages of tokens from rewards of whole responses, and sums over sequences.

Functions of arrays only. A row may hold several sequences (packing): `segments_BT` numbers them in
each row from 1, and 0 is padding. Nothing here is differentiated.
"""

import jax
import jax.numpy as jnp


def _sum_by_segment(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """[B, T + 1]: column s is the sum of x over segment s of the row; column 0 is padding."""
    T = x_BT.shape[1]
    return jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, T + 1))(x_BT, segments_BT)


def sum_over_sequence(x_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns [B, T]: at each token the sum of x over its sequence."""
    return jnp.take_along_axis(_sum_by_segment(x_BT, segments_BT), segments_BT, axis=1)


def mean_over_sequence(x_BT: jax.Array, mask_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns [B, T]: at each token the mean of x over the trained tokens of its sequence, or 0 if
    it has none."""
    mask_BT = mask_BT.astype(x_BT.dtype)
    length_BT = jnp.maximum(sum_over_sequence(mask_BT, segments_BT), 1)
    return sum_over_sequence(jnp.where(mask_BT > 0, x_BT, 0), segments_BT) / length_BT


def count_sequences(mask_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Counts the sequences that have a trained token: a float32 scalar, exact."""
    lengths_BS = _sum_by_segment(mask_BT.astype(jnp.float32), segments_BT)
    return jnp.sum(lengths_BS[:, 1:] > 0, dtype=jnp.float32)


def sum_discounted_future(x_BT: jax.Array, segments_BT: jax.Array, discount: float) -> jax.Array:
    """Returns [B, T]: Σ_{i>0} discount^i x_{t+i} within the sequence, excluding the token itself.

    x must be 0 at tokens that do not count. Takes log T parallel steps.
    """

    def combine_suffixes(right, left):  # the scan runs from the last token to the first
        return right[0] * left[0], left[1] + left[0] * right[1]

    same_BT = segments_BT[:, 1:] == segments_BT[:, :-1]
    goes_on_BT = jnp.concatenate([same_BT, jnp.zeros_like(same_BT[:, :1])], axis=1)
    keep_BT = discount * goes_on_BT.astype(x_BT.dtype)
    _, from_here_BT = jax.lax.associative_scan(
        combine_suffixes, (keep_BT, x_BT), reverse=True, axis=1
    )
    return from_here_BT - x_BT


def compute_response_positions(mask_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Counts the trained tokens before each token in its sequence: int32 [B, T].

    Only the counts at trained tokens are meaningful.
    """
    trained_BT = mask_BT.astype(jnp.int32)
    before_BT = jnp.cumsum(trained_BT, axis=1) - trained_BT
    start_BT = jnp.concatenate(
        [jnp.ones_like(segments_BT[:, :1], bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1
    )
    # Counts never fall along a row, so the running maximum is the count at the last start.
    return before_BT - jax.lax.cummax(jnp.where(start_BT, before_BT, 0), axis=1)


def sum_by_position(
    x_BT: jax.Array, mask_BT: jax.Array, segments_BT: jax.Array, edges: tuple[int, ...]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns (sum, count) of x over trained tokens in each interval of response positions.

    Keys are the lower edges of the intervals; the last one is unbounded.
    """
    position_BT = compute_response_positions(mask_BT, segments_BT)
    sums = {}
    for low, high in zip(edges, (*edges[1:], 2**31 - 1), strict=True):
        inside_BT = (mask_BT > 0) & (position_BT >= low) & (position_BT < high)
        total = jnp.sum(jnp.where(inside_BT, x_BT, 0))
        sums[f"{low}"] = (total, jnp.sum(inside_BT, dtype=jnp.float32))
    return sums


ADVANTAGE_NORMS = ("std", "mean", "leave_one_out")


def compute_group_advantages(
    rewards_PG: jax.Array, advantage_norm: str
) -> tuple[jax.Array, jax.Array]:
    """Returns advantages [P, G] of G >= 2 responses per prompt, and zero-variance flags, bool [P].

    Args:
      advantage_norm:
        "std": (r - mean) / (std + 1e-4), GRPO (arXiv 2402.03300, section 4.1.2), with the sample
          deviation (divisor G - 1) and the constant of TRL.
        "mean": r - mean, Dr. GRPO (arXiv 2503.20783). Dividing by std would give more weight to
          prompts that are almost always or almost never solved.
        "leave_one_out": r minus the mean of the others, RLOO (arXiv 2402.14740), which is
          G / (G - 1) times "mean".

    A group of zero variance has advantages of exactly 0.
    """
    assert advantage_norm in ADVANTAGE_NORMS and rewards_PG.shape[1] > 1
    rewards_PG = rewards_PG.astype(jnp.float32)
    zero_variance_P = jnp.all(rewards_PG == rewards_PG[:, :1], axis=1)
    centred_PG = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
    centred_PG = jnp.where(zero_variance_P[:, None], 0, centred_PG)  # means may round
    G = rewards_PG.shape[1]
    if advantage_norm == "std":
        centred_PG /= jnp.std(rewards_PG, axis=1, ddof=1, keepdims=True) + 1e-4
    elif advantage_norm == "leave_one_out":
        centred_PG *= G / (G - 1)
    return centred_PG, zero_variance_P
