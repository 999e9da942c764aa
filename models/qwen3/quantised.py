"""Frozen models in 8 bits: the layers' kernels as integers or floats of 8 bits, times a scale.

Weight-only and symmetric: each output channel of a kernel has one scale, its largest magnitude over
the largest number of the type. Activations keep their dtype. Norms, routers and the embedding (and
with it the head) stay as they are: the first two are small, and every token's distribution depends
on the rounding of all rows of the head.

This is not qwix, whose arrays need flax.nnx at import, whose product of float activations and
integer weights multiplies the whole kernel by its scale first, and which quantises what is in
memory already.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from models.qwen3 import grouped

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # of the types that there are


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A kernel [..., in, out] that is about values · scale."""

    values: Any  # int8 or float8 [..., in, out]
    scale: Any  # float32 [..., 1, out]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel in floats."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


Kernel = jax.Array | Quantised


def is_quantised(x: Any) -> bool:
    return isinstance(x, Quantised)


def quantise(kernel: jax.Array, kind: str) -> Quantised:
    """The nearest numbers of dtype `kind` (a key of LARGEST) to kernel / scale."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST[kind], 1)
    ratio = wide / scale
    ratio = jnp.round(ratio) if kind == "int8" else ratio
    return Quantised(ratio.astype(kind), scale)


def dot(x: jax.Array, kernel: Kernel) -> jax.Array:
    """x [..., in] @ kernel [in, out], in x's dtype.

    A scale multiplies what comes out, so that the kernel is read as it is stored: numbers of 8 bits
    are exact in bfloat16, and their conversion is part of reading them.
    """
    if not isinstance(kernel, Quantised):
        return x @ kernel.astype(x.dtype)
    y = jnp.matmul(x, kernel.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * kernel.scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


def ragged_dot(x: jax.Array, kernel: Kernel, sizes_E: jax.Array) -> jax.Array:
    """Rows [M, in], grouped by expert, times their expert's kernel [in, out], in x's dtype."""
    if not isinstance(kernel, Quantised):
        return grouped.dot(x, kernel.astype(x.dtype), sizes_E)
    y = grouped.product(x, kernel.values, sizes_E, dtype=jnp.float32)
    experts = jnp.arange(len(sizes_E))
    expert_M = jnp.repeat(experts, sizes_E, total_repeat_length=len(x))
    return (y * kernel.scale[expert_M, 0]).astype(x.dtype)


def cast(kernel: Kernel, dtype: jnp.dtype) -> Kernel:
    """A float kernel in `dtype`; a quantised one as it is."""
    return kernel if isinstance(kernel, Quantised) else kernel.astype(dtype)


def axes(kernel: Kernel, names: tuple[str | None, ...]) -> Any:
    """The names of a kernel's axes in the structure of the kernel: a scale has no input axis."""
    if not isinstance(kernel, Quantised):
        return names
    return Quantised(names, (*names[:-2], None, names[-1]))


def _is_kernel(path: tuple) -> bool:
    names = [key.key for key in path]
    return names[-1] == "kernel" or (names[-2:-1] == ["moe"] and names[-1] != "router")


def abstract(params: Any, kind: str) -> Any:
    """Of parameters' ShapeDtypeStructs, with NamedShardings: those of the quantised model."""

    def one(path: tuple, leaf: Any) -> Any:
        if not _is_kernel(path):
            return leaf
        spec = (*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec)))
        across = NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec[:-2], None, spec[-1]))
        shape = (*leaf.shape[:-2], 1, leaf.shape[-1])
        return Quantised(
            jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(kind), sharding=leaf.sharding),
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=across),
        )

    return jax.tree_util.tree_map_with_path(one, params)


def split(param_dtype: Any, computed: jnp.dtype) -> tuple[str | None, jnp.dtype]:
    """(8-bit type of the kernels, if `param_dtype` is one; dtype of the other parameters, which is
    then that which the model computes in)."""
    name = jnp.dtype(param_dtype).name
    kind = name if name in LARGEST else None
    return kind, jnp.dtype(computed if kind else param_dtype)


def tree(params: Any, kind: str | None, dtype: jnp.dtype) -> Any:
    """Parameters in `dtype`, their kernels quantised to `kind` if there is one; those that are
    already stay as they are."""

    def one(path: tuple, x: Kernel) -> Kernel:
        if isinstance(x, Quantised):
            return x
        return quantise(x, kind) if kind and _is_kernel(path) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantised)


def put(kernel: jax.Array, like: Quantised) -> Quantised:
    """Quantises a kernel as `like`, ShapeDtypeStructs that say the dtypes and the shardings."""
    convert = jax.jit(quantise, static_argnums=1, out_shardings=_shardings(like))
    return convert(kernel, like.values.dtype.name)


def stack(kernels: Iterable[jax.Array], like: Quantised) -> Quantised:
    """`put` of kernels [..., in, out] as they come, into one stack of them [L, ..., in, out]."""
    put_at = _put_at(like.values.dtype.name, _shardings(like))
    found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), like)
    for layer, kernel in enumerate(kernels):
        found = put_at(jnp.int32(layer), found, kernel)
    return found


def _shardings(like: Quantised) -> Quantised:
    return jax.tree.map(lambda x: x.sharding, like)


@functools.cache  # so that kernels of one shape share a compilation
def _put_at(kind: str, shardings: Quantised) -> Callable[..., Quantised]:
    def put_at(layer: jax.Array, stack: Quantised, kernel: jax.Array) -> Quantised:
        return jax.tree.map(lambda whole, x: whole.at[layer].set(x), stack, quantise(kernel, kind))

    return jax.jit(put_at, donate_argnums=1, out_shardings=shardings)
