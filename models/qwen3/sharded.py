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


def axes(name: str) -> tuple[str, ...]:
    """The mesh axes that a logical name stands for here."""
    spec = nn.logical_to_mesh_axes((name,))
    if jax.sharding.get_abstract_mesh().empty or spec is None or spec[0] is None:
        return ()
    return (spec[0],) if isinstance(spec[0], str) else tuple(spec[0])


def _parts(axes: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def parts(name: str) -> int:
    """In how many a logical name splits an axis here."""
    return _parts(axes(name))


def dividing(name: str, T: int) -> str | None:
    """The logical axis, if what it stands for here divides T tokens."""
    return None if T % parts(name) else name


def stream(x_BTD: jax.Array) -> jax.Array:
    """The residual stream, its tokens split by the axis that splits the heads: what is kept of each
    layer for the backward pass is then nowhere twice (arXiv 2205.05198, section 4.2.2). Where that
    does not divide T, as in decoding, it is split by rows alone."""
    return nn.with_logical_constraint(
        x_BTD, ("batch", dividing("act_tokens", x_BTD.shape[1]), None)
    )


def by_tokens(x: jax.Array, name: str | None) -> jax.Array:
    """Activations [B, T, heads or features, ...] where weights read or make them, along the third
    axis by what `name` stands for: a device has a part of the tokens, if context divides them."""
    spec = ("batch", dividing("act_context", x.shape[1]), name, *[None] * (x.ndim - 3))
    return nn.with_logical_constraint(x, spec)


def fetched(kernel: jax.Array, names: tuple[str | None, ...], T: int) -> jax.Array:
    """Weights as T tokens of a row meet them, whole along "embed": fetched at once, their gradient
    summed into shards. Left to the partitioner they come in pieces, each a product of its own that
    adds to all outputs, and for a gradient over context all tokens are fetched. One token is less
    than the weights: there the partitioner may choose."""
    if T == 1 or parts("embed") == 1:
        return kernel
    kept = tuple(None if name == "embed" else name for name in names)
    return nn.with_logical_constraint(kernel, kept)


def by_heads(*q_k_v: jax.Array) -> tuple[jax.Array, ...]:
    """Queries [B, T, N, H], keys and values [B, T, K, H] as attention wants them: each device has
    all tokens, of some heads (arXiv 2309.14509, section 3.1). Keys' heads are repeated where there
    are too few of them for the axes that divide the queries'."""
    count = parts("act_heads")

    def one(x: jax.Array) -> jax.Array:
        times = count // math.gcd(x.shape[2], count)
        x = jnp.repeat(x, times, axis=2) if times > 1 else x
        return nn.with_logical_constraint(x, ("batch", None, "act_heads", None))

    return tuple(map(one, q_k_v))


def embed(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """embed_VD[tokens_BT], in `dtype`.

    The table lies split over the vocabulary, as the head wants it. Left to the partitioner, each
    device fetches all of it; here the devices exchange it so that each holds some columns of all
    tokens, look these up for each other's rows, and exchange what they found: 1/n of the table and
    as many activations as a device keeps.
    """
    rows, vocab, heads = axes("batch"), axes("vocab"), axes("act_tokens")
    others = tuple(axis for axis in vocab if axis not in heads)
    (B, T), D = tokens_BT.shape, embed_VD.shape[1]
    uneven = B % _parts(rows) or T % _parts(heads) or D % _parts(vocab)
    if _parts(vocab) == 1 or uneven:
        return embed_VD[tokens_BT].astype(dtype)

    def local(embed_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        tokens_BT = jax.lax.all_gather(tokens_BT, others, tiled=True)
        for along in (heads, others):  # the last axes of the split first, so that V comes in order
            embed_VD = jax.lax.all_to_all(embed_VD, along, split_axis=1, concat_axis=0, tiled=True)
        x_BTD = embed_VD[tokens_BT].astype(dtype)
        x_BTD = jax.lax.all_to_all(x_BTD, others, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.all_to_all(x_BTD, heads, split_axis=1, concat_axis=2, tiled=True)

    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(vocab, None), PartitionSpec(rows, None)),
        out_specs=PartitionSpec(rows, heads, None),
        check_vma=False,
    )(embed_VD, tokens_BT)
