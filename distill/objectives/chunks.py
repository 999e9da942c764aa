"""Tokens in chunks: those that are needed come first, and chunks without any are left out.

An array [B, T, ...] is cut into [A, R, C, ...]: A chunks, of C tokens of each of R groups of rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Stats = dict[str, jax.Array]
Joined = Callable[[Stats], Stats]

_MANY = 8  # chunks, so that about an eighth of them is the most that is computed for nothing
_LEAST = 256  # tokens of a chunk: with fewer, reading the head takes longer than the products


def cut(
    xs: Any, size: int, mask_BT: jax.Array | None, shards: tuple[int, int]
) -> tuple[Any, jax.Array | None, Joined]:
    """Chunks of at most `size` tokens, if not of one token a row.

    Args:
      xs: arrays [B, T, ...], through which gradients flow back without a scatter.
      mask_BT: which tokens are needed; None: all.
      shards: into how many parts rows, and the tokens of a row, are split over devices. A mask
        moves tokens within such a part alone, so that none leaves its device.

    Returns:
      The chunks; which of them hold tokens that are needed, [A], or None if all do; and what joins
      arrays of chunks to [B, T, ...] again, with 0 where a token is not needed.
    """
    B, T = jax.tree.leaves(xs)[0].shape[:2]
    if mask_BT is None:
        return _strided(xs, B, T, _number(T, -(-T // max(1, size // B))))
    R, S = shards
    L = B * T // (R * S)
    fewest = -(-L // max(1, size // (R * S)))
    chunks = _number(L, max(fewest, min(_MANY, B * T // _LEAST)))
    each = -(-L // chunks)  # tokens of a part in a chunk

    def grouped(x_BT: jax.Array) -> jax.Array:
        """[B, T, ...] as [R, S, L, ...]: the tokens that one device holds side by side."""
        parts = x_BT.reshape(R, B // R, S, T // S, *x_BT.shape[2:])
        return parts.swapaxes(1, 2).reshape(R, S, L, *x_BT.shape[2:])

    def chunked(x_BT: jax.Array) -> jax.Array:
        taken = _take(grouped(x_BT), from_RSL, to_RSL).reshape(R, S, chunks, each, *x_BT.shape[2:])
        return jnp.moveaxis(taken, 2, 0).reshape(chunks, R, S * each, *x_BT.shape[2:])

    def join(x_ARC: jax.Array) -> jax.Array:
        parts = x_ARC.reshape(chunks, R, S, each, *x_ARC.shape[3:])
        taken = jnp.moveaxis(parts, 0, 2).reshape(R, S, chunks * each, *x_ARC.shape[3:])
        x_RSL = _rows(taken, to_RSL).reshape(R, S, B // R, T // S, *x_ARC.shape[3:])
        x_BT = x_RSL.swapaxes(1, 2).reshape(B, T, *x_ARC.shape[3:])
        return jnp.where(needed_BT.reshape(B, T, *(1,) * (x_BT.ndim - 2)), x_BT, 0)

    needed_BT = mask_BT > 0
    needed_RSL = grouped(needed_BT)
    from_RSL = jnp.argsort(~needed_RSL, axis=-1, stable=True)
    to_RSL = jnp.argsort(from_RSL, axis=-1)
    from_RSL = jnp.pad(from_RSL, ((0, 0), (0, 0), (0, chunks * each - L)), constant_values=L)
    runs_A = each * jnp.arange(chunks) < jnp.max(jnp.sum(needed_RSL, axis=-1))
    return jax.tree.map(chunked, xs), runs_A, lambda stats: jax.tree.map(join, stats)


def _strided(xs: Any, B: int, T: int, chunks: int) -> tuple[Any, None, Joined]:
    each = -(-T // chunks)  # equal chunks pad least

    def chunked(x_BT: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, chunks * each - T)] + [(0, 0)] * (x_BT.ndim - 2)
        # A chunk takes every so manieth token: where tokens are split over devices, all have their
        # part of each chunk, and none has to fetch the others' hidden states.
        padded = jnp.pad(x_BT, padding).reshape(B, each, chunks, *x_BT.shape[2:])
        return jnp.moveaxis(padded, 2, 0)

    def join(x_ABC: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_ABC, 0, 2).reshape(B, chunks * each, *x_ABC.shape[3:])[:, :T]

    return jax.tree.map(chunked, xs), None, lambda stats: jax.tree.map(join, stats)


def _number(tokens: int, fewest: int) -> int:
    """Of chunks, at least `fewest`: what divides the tokens needs no padding, which moves them
    between the devices that split them."""
    fewest = max(1, min(tokens, fewest))
    return next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), fewest)


def _rows(x_RSL: jax.Array, from_RSL: jax.Array) -> jax.Array:
    index = from_RSL.reshape(*from_RSL.shape, *(1,) * (x_RSL.ndim - 3))
    return jnp.take_along_axis(x_RSL, index, axis=2, mode="fill", fill_value=0)


@jax.custom_vjp
def _take(x_RSL: jax.Array, from_RSL: jax.Array, to_RSL: jax.Array) -> jax.Array:
    """The tokens `from`, zeros where that is behind the last; `to` takes them back. The gradient is
    what takes back: what jax makes of that of a gather is a scatter, which is slow."""
    return _rows(x_RSL, from_RSL)


_take.defvjp(
    lambda x_RSL, from_RSL, to_RSL: (_rows(x_RSL, from_RSL), to_RSL),
    lambda to_RSL, g_RSL: (_rows(g_RSL, to_RSL), None, None),
)


def scan(step: Callable, carry: Any, xs: Any, runs_A: jax.Array | None) -> tuple[Any, Stats]:
    """jax.lax.scan of `step` over chunks, but for those that need not run: what they give is zeros,
    and the carry stays as it is."""
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        carry, stats = step(carry, jax.tree.map(lambda x: x[0], xs))
        return carry, jax.tree.map(lambda x: x[None], stats)
    if runs_A is None:
        return jax.lax.scan(step, carry, xs)

    def skip(carry: Any, x: Any) -> tuple[Any, Stats]:
        _, stats = jax.eval_shape(step, carry, x)
        return carry, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), stats)

    return jax.lax.scan(
        lambda carry, of: jax.lax.cond(of[0], step, skip, carry, of[1]), carry, (runs_A, xs)
    )
