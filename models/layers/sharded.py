"""Sharding of activations: the residual stream split over tokens, and an embedding lookup in which
no device holds the whole table.

Letters as in models/transformer.py. Without a mesh, or without rules for logical names, these
functions do the plain computation.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def get_mesh_axes(name: str) -> tuple[str, ...]:
    """Returns the mesh axes that a logical name maps to in the current context."""
    spec = nn.logical_to_mesh_axes((name,))
    if jax.sharding.get_abstract_mesh().empty or spec is None or spec[0] is None:
        return ()
    return (spec[0],) if isinstance(spec[0], str) else tuple(spec[0])


def _count_axis_shards(axes: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def count_shards(name: str) -> int:
    """Returns the number of parts that a logical name splits an axis into."""
    return _count_axis_shards(get_mesh_axes(name))


def get_dividing_axis(name: str, T: int) -> str | None:
    """Returns the logical axis if its mesh axes divide T tokens, else None."""
    return None if T % count_shards(name) else name


def constrain_residual(x_BTD: jax.Array) -> jax.Array:
    """Splits the residual stream's tokens over the axes that split heads.

    Activations kept for the backward pass are then not replicated (arXiv 2205.05198, section
    4.2.2). If those axes do not divide T, as in decoding, only rows are split.
    """
    return nn.with_logical_constraint(
        x_BTD, ("batch", get_dividing_axis("act_tokens", x_BTD.shape[1]), None)
    )


def constrain_activations(x: jax.Array, name: str | None) -> jax.Array:
    """Splits the inputs or outputs of weights, [B, T, heads or features, ...].

    The third axis is split by logical axis `name`, and tokens by context if it divides them.
    """
    spec = ("batch", get_dividing_axis("act_context", x.shape[1]), name, *[None] * (x.ndim - 3))
    return nn.with_logical_constraint(x, spec)


def gather_weights(kernel: jax.Array, names: tuple[str | None, ...], T: int) -> jax.Array:
    """Gathers weights along "embed" before they are applied to T tokens of a row.

    They are fetched at once, and their gradient is reduce-scattered. The partitioner would fetch
    them in pieces, each with a product that adds to all outputs, and would fetch all tokens for a
    gradient over context. If T is 1, tokens are smaller than weights, and the partitioner decides.
    """
    if T == 1 or count_shards("embed") == 1:
        return kernel
    kept = tuple(None if name == "embed" else name for name in names)
    return nn.with_logical_constraint(kernel, kept)


def split_by_heads(*q_k_v: jax.Array) -> tuple[jax.Array, ...]:
    """Splits queries [B, T, N, H], keys and values [B, T, K, H] by heads, as attention needs them.

    Each device then has all tokens of some heads (arXiv 2309.14509, section 3.1). Key/value heads
    are repeated if there are too few for the axes that split query heads.
    """
    count = count_shards("act_heads")

    def split_heads(x: jax.Array) -> jax.Array:
        times = count // math.gcd(x.shape[2], count)
        x = jnp.repeat(x, times, axis=2) if times > 1 else x
        return nn.with_logical_constraint(x, ("batch", None, "act_heads", None))

    return tuple(map(split_heads, q_k_v))


def embed_tokens(
    embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Computes embed_VD[tokens_BT], in `dtype`.

    The table is split over the vocabulary, as the head needs it, and the partitioner would fetch
    all of it on each device. Here the devices exchange it so that each holds some columns of all
    vocabulary entries, look these up for each other's rows, and exchange the results. A device
    transfers 1/n of the table and as many activations as it keeps.
    """
    rows, vocab, heads = get_mesh_axes("batch"), get_mesh_axes("vocab"), get_mesh_axes("act_tokens")
    others = tuple(axis for axis in vocab if axis not in heads)
    (B, T), D = tokens_BT.shape, embed_VD.shape[1]
    uneven = (
        B % _count_axis_shards(rows)
        or T % _count_axis_shards(heads)
        or D % _count_axis_shards(vocab)
    )
    if _count_axis_shards(vocab) == 1 or uneven:
        return embed_VD[tokens_BT].astype(dtype)

    def embed_local(embed_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        tokens_BT = jax.lax.all_gather(tokens_BT, others, tiled=True)
        for along in (heads, others):  # the split's last axes first, so that V stays in order
            embed_VD = jax.lax.all_to_all(embed_VD, along, split_axis=1, concat_axis=0, tiled=True)
        x_BTD = embed_VD[tokens_BT].astype(dtype)
        x_BTD = jax.lax.all_to_all(x_BTD, others, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.all_to_all(x_BTD, heads, split_axis=1, concat_axis=2, tiled=True)

    return jax.shard_map(
        embed_local,
        in_specs=(PartitionSpec(vocab, None), PartitionSpec(rows, None)),
        out_specs=PartitionSpec(rows, heads, None),
        check_vma=False,
    )(embed_VD, tokens_BT)
