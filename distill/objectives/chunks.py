"""Splits tokens into chunks with the needed tokens first, and skips chunks without any.

An array [B, T, ...] becomes [A, R, C, ...]: A chunks of C tokens from each of R groups of rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Stats = dict[str, jax.Array]
JoinFn = Callable[[Stats], Stats]

_TARGET_CHUNKS = 8  # so at most about an eighth of the tokens is computed needlessly
_MIN_CHUNK_TOKENS = 256  # below this, reading the head takes longer than the products


def split_into_chunks(
    xs: Any, max_tokens: int, mask_BT: jax.Array | None, shards: tuple[int, int]
) -> tuple[Any, jax.Array | None, JoinFn]:
    """Splits arrays into chunks of at most `max_tokens` tokens, but at least one per row.

    Args:
      xs: arrays [B, T, ...]. Their gradients are computed without a scatter.
      mask_BT: True at the needed tokens; None: all.
      shards: numbers of parts that rows, and the tokens of a row, are split into over devices.
        With a mask, tokens move only within a part, so that none leaves its device.

    Returns:
      The chunks; bool [A], True for those with a needed token, or None if all run; and the function
      that joins arrays of chunks to [B, T, ...], with 0 at tokens that are not needed.
    """
    B, T = jax.tree.leaves(xs)[0].shape[:2]
    if mask_BT is None:
        return _split_strided(xs, B, T, _choose_num_chunks(T, -(-T // max(1, max_tokens // B))))
    R, S = shards
    L = B * T // (R * S)
    fewest = -(-L // max(1, max_tokens // (R * S)))
    num_chunks = _choose_num_chunks(L, max(fewest, min(_TARGET_CHUNKS, B * T // _MIN_CHUNK_TOKENS)))
    chunk_tokens = -(-L // num_chunks)  # of one part

    def group_by_device(x_BT: jax.Array) -> jax.Array:
        """[B, T, ...] as [R, S, L, ...], with the tokens of one device side by side."""
        parts = x_BT.reshape(R, B // R, S, T // S, *x_BT.shape[2:])
        return parts.swapaxes(1, 2).reshape(R, S, L, *x_BT.shape[2:])

    def to_chunks(x_BT: jax.Array) -> jax.Array:
        taken = _permute_tokens(group_by_device(x_BT), from_RSL, to_RSL).reshape(
            R, S, num_chunks, chunk_tokens, *x_BT.shape[2:]
        )
        return jnp.moveaxis(taken, 2, 0).reshape(num_chunks, R, S * chunk_tokens, *x_BT.shape[2:])

    def join_chunks(x_ARC: jax.Array) -> jax.Array:
        parts = x_ARC.reshape(num_chunks, R, S, chunk_tokens, *x_ARC.shape[3:])
        taken = jnp.moveaxis(parts, 0, 2).reshape(R, S, num_chunks * chunk_tokens, *x_ARC.shape[3:])
        x_RSL = _gather_tokens(taken, to_RSL).reshape(R, S, B // R, T // S, *x_ARC.shape[3:])
        x_BT = x_RSL.swapaxes(1, 2).reshape(B, T, *x_ARC.shape[3:])
        return jnp.where(needed_BT.reshape(B, T, *(1,) * (x_BT.ndim - 2)), x_BT, 0)

    needed_BT = mask_BT > 0
    needed_RSL = group_by_device(needed_BT)
    from_RSL = jnp.argsort(~needed_RSL, axis=-1, stable=True)
    to_RSL = jnp.argsort(from_RSL, axis=-1)
    from_RSL = jnp.pad(
        from_RSL, ((0, 0), (0, 0), (0, num_chunks * chunk_tokens - L)), constant_values=L
    )
    runs_A = chunk_tokens * jnp.arange(num_chunks) < jnp.max(jnp.sum(needed_RSL, axis=-1))
    return jax.tree.map(to_chunks, xs), runs_A, lambda stats: jax.tree.map(join_chunks, stats)


def _split_strided(xs: Any, B: int, T: int, num_chunks: int) -> tuple[Any, None, JoinFn]:
    chunk_tokens = -(-T // num_chunks)  # equal chunks need the least padding

    def to_chunks(x_BT: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, num_chunks * chunk_tokens - T)] + [(0, 0)] * (x_BT.ndim - 2)
        # A chunk takes every num_chunks-th token: if tokens are split over devices, each device
        # holds a part of each chunk, and none fetches hidden states from the others.
        padded = jnp.pad(x_BT, padding).reshape(B, chunk_tokens, num_chunks, *x_BT.shape[2:])
        return jnp.moveaxis(padded, 2, 0)

    def join_chunks(x_ABC: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_ABC, 0, 2).reshape(B, num_chunks * chunk_tokens, *x_ABC.shape[3:])[
            :, :T
        ]

    return jax.tree.map(to_chunks, xs), None, lambda stats: jax.tree.map(join_chunks, stats)


def _choose_num_chunks(num_tokens: int, min_chunks: int) -> int:
    """Returns the number of chunks, at least `min_chunks`.

    Prefers one that divides the tokens, since padding would move them between devices.
    """
    min_chunks = max(1, min(num_tokens, min_chunks))
    return next((n for n in range(min_chunks, 2 * min_chunks) if num_tokens % n == 0), min_chunks)


def _gather_tokens(x_RSL: jax.Array, from_RSL: jax.Array) -> jax.Array:
    index = from_RSL.reshape(*from_RSL.shape, *(1,) * (x_RSL.ndim - 3))
    return jnp.take_along_axis(x_RSL, index, axis=2, mode="fill", fill_value=0)


@jax.custom_vjp
def _permute_tokens(x_RSL: jax.Array, from_RSL: jax.Array, to_RSL: jax.Array) -> jax.Array:
    """Gathers the tokens `from_RSL`, with zeros for indices beyond the last token.

    The gradient gathers too, by the inverse `to_RSL`: JAX's own rule is a scatter, which is slow.
    """
    return _gather_tokens(x_RSL, from_RSL)


_permute_tokens.defvjp(
    lambda x_RSL, from_RSL, to_RSL: (_gather_tokens(x_RSL, from_RSL), to_RSL),
    lambda to_RSL, g_RSL: (_gather_tokens(g_RSL, to_RSL), None, None),
)


def scan_chunks(step: Callable, carry: Any, xs: Any, runs_A: jax.Array | None) -> tuple[Any, Stats]:
    """Scans `step` over chunks. Skipped chunks return zeros and leave the carry unchanged."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        carry, stats = step(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda x: x[None], stats)
    if runs_A is None:
        return jax.lax.scan(step, carry, xs)

    def skip_chunk(carry: Any, x: Any) -> tuple[Any, Stats]:
        _, stats = jax.eval_shape(step, carry, x)
        return carry, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)

    return jax.lax.scan(
        lambda carry, x: jax.lax.cond(x[0], step, skip_chunk, carry, x[1]), carry, (runs_A, xs)
    )
