"""What the mesh does to activations: the residual stream split over its tokens, and the embedding
looked up without any device holding all of it.

Letters as in model.py. Without a mesh, or without rules that give logical names a meaning, all of
this is the plain computation.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def get_mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that a logical name stands for here."""
    spec = nn.logical_to_mesh_axes((name,))
    if jax.sharding.get_abstract_mesh().empty or spec is None or spec[0] is None:
        return ()
    return (spec[0],) if isinstance(spec[0], str) else tuple(spec[0])


def _count_axis_shards(axes: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def count_shards(name: str) -> int:
    """In how many a logical name splits an axis here."""
    return _count_axis_shards(get_mesh_axes(name))


def get_dividing_axis(name: str, T: int) -> str | None:
    """The logical axis, if what it stands for here divides T tokens."""
    return None if T % count_shards(name) else name


def constrain_residual(x_BTD: jax.Array) -> jax.Array:
    """The residual stream, its tokens split by the axis that splits the heads: what is kept of each
    layer for the backward pass is then nowhere twice (arXiv 2205.05198, section 4.2.2). Where that
    does not divide T, as in decoding, it is split by rows alone."""
    return nn.with_logical_constraint(
        x_BTD, ("batch", get_dividing_axis("act_tokens", x_BTD.shape[1]), None)
    )


def constrain_activations(x: jax.Array, name: str | None) -> jax.Array:
    """Activations [B, T, heads or features, ...] where weights read or make them, along the third
    axis by what `name` stands for: a device has a part of the tokens, if context divides them."""
    spec = ("batch", get_dividing_axis("act_context", x.shape[1]), name, *[None] * (x.ndim - 3))
    return nn.with_logical_constraint(x, spec)


def gather_weights(kernel: jax.Array, names: tuple[str | None, ...], T: int) -> jax.Array:
    """Weights as T tokens of a row meet them, whole along "embed": fetched at once, their gradient
    summed into shards. Left to the partitioner they come in pieces, each a product of its own that
    adds to all outputs, and for a gradient over context all tokens are fetched. One token is less
    than the weights: there the partitioner may choose."""
    if T == 1 or count_shards("embed") == 1:
        return kernel
    kept = tuple(None if name == "embed" else name for name in names)
    return nn.with_logical_constraint(kernel, kept)


def split_by_heads(*q_k_v: jax.Array) -> tuple[jax.Array, ...]:
    """Queries [B, T, N, H], keys and values [B, T, K, H] as attention wants them: each device has
    all tokens, of some heads (arXiv 2309.14509, section 3.1). Keys' heads are repeated where there
    are too few of them for the axes that divide the queries'."""
    count = count_shards("act_heads")

    def split_heads(x: jax.Array) -> jax.Array:
        times = count // math.gcd(x.shape[2], count)
        x = jnp.repeat(x, times, axis=2) if times > 1 else x
        return nn.with_logical_constraint(x, ("batch", None, "act_heads", None))

    return tuple(map(split_heads, q_k_v))


def embed_tokens(
    embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """embed_VD[tokens_BT], in `dtype`.

    The table lies split over the vocabulary, as the head wants it. Left to the partitioner, each
    device fetches all of it; here the devices exchange it so that each holds some columns of all
    tokens, look these up for each other's rows, and exchange what they found: 1/n of the table and
    as many activations as a device keeps.
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
        for along in (heads, others):  # the last axes of the split first, so that V comes in order
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
