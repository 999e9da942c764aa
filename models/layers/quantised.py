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

from models.layers import grouped

MAX_VALUES = {"int8": 127.0, "float8_e4m3fn": 448.0}  # of the types that there are


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


def quantise_kernel(kernel: jax.Array, dtype_name: str) -> Quantised:
    """The nearest numbers of dtype `kind` (a key of LARGEST) to kernel / scale."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / MAX_VALUES[dtype_name], 1)
    ratio = wide / scale
    ratio = jnp.round(ratio) if dtype_name == "int8" else ratio
    return Quantised(ratio.astype(dtype_name), scale)


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
    y = grouped.multiply_groups(x, kernel.values, sizes_E, dtype=jnp.float32)
    experts = jnp.arange(len(sizes_E))
    expert_M = jnp.repeat(experts, sizes_E, total_repeat_length=len(x))
    return (y * kernel.scale[expert_M, 0]).astype(x.dtype)


def cast_kernel(kernel: Kernel, dtype: jnp.dtype) -> Kernel:
    """A float kernel in `dtype`; a quantised one as it is."""
    return kernel if isinstance(kernel, Quantised) else kernel.astype(dtype)


def get_kernel_axes(kernel: Kernel, names: tuple[str | None, ...]) -> Any:
    """The names of a kernel's axes in the structure of the kernel: a scale has no input axis."""
    if not isinstance(kernel, Quantised):
        return names
    return Quantised(names, (*names[:-2], None, names[-1]))


def _is_kernel(path: tuple) -> bool:
    """True for the path of a parameter that 8-bit models quantise."""
    names = [key.key for key in path]
    return names[-1] == "kernel" or (names[-2:-1] == ["moe"] and names[-1] != "router")


def quantise_shapes(params: Any, dtype_name: str | None) -> Any:
    """Returns ShapeDtypeStructs, with NamedShardings, of the quantised model; `params` are those
    of the plain one, and are returned as they are where `dtype_name` is None."""
    if dtype_name is None:
        return params

    def quantise_leaf(path: tuple, leaf: Any) -> Any:
        if not _is_kernel(path):
            return leaf
        spec = (*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec)))
        across = NamedSharding(leaf.sharding.mesh, PartitionSpec(*spec[:-2], None, spec[-1]))
        shape = (*leaf.shape[:-2], 1, leaf.shape[-1])
        return Quantised(
            jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype_name), sharding=leaf.sharding),
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=across),
        )

    return jax.tree_util.tree_map_with_path(quantise_leaf, params)


def split_dtypes(param_dtype: Any, compute_dtype: jnp.dtype) -> tuple[str | None, jnp.dtype]:
    """(8-bit type of the kernels, if `param_dtype` is one; dtype of the other parameters, which is
    then that which the model computes in)."""
    name = jnp.dtype(param_dtype).name
    kernel_dtype = name if name in MAX_VALUES else None
    return kernel_dtype, jnp.dtype(compute_dtype if kernel_dtype else param_dtype)


def quantise_params(params: Any, dtype_name: str | None, dtype: jnp.dtype) -> Any:
    """Parameters in `dtype`, their kernels quantised to `kind` if there is one; those that are
    already stay as they are."""

    def quantise_leaf(path: tuple, x: Kernel) -> Kernel:
        if isinstance(x, Quantised):
            return x
        return (
            quantise_kernel(x, dtype_name) if dtype_name and _is_kernel(path) else x.astype(dtype)
        )

    return jax.tree_util.tree_map_with_path(quantise_leaf, params, is_leaf=is_quantised)


def quantise_onto(kernel: jax.Array, like: Quantised) -> Quantised:
    """Quantises a kernel as `like`, ShapeDtypeStructs that say the dtypes and the shardings."""
    convert = jax.jit(quantise_kernel, static_argnums=1, out_shardings=_get_shardings(like))
    return convert(kernel, like.values.dtype.name)


def quantise_stack(kernels: Iterable[jax.Array], like: Quantised) -> Quantised:
    """`put` of kernels [..., in, out] as they come, into one stack of them [L, ..., in, out]."""
    write_layer = _make_layer_writer(like.values.dtype.name, _get_shardings(like))
    stacked = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), like)
    for layer, kernel in enumerate(kernels):
        stacked = write_layer(jnp.int32(layer), stacked, kernel)
    return stacked


def _get_shardings(like: Quantised) -> Quantised:
    return jax.tree.map(lambda x: x.sharding, like)


@functools.cache  # so that kernels of one shape share a compilation
def _make_layer_writer(dtype_name: str, shardings: Quantised) -> Callable[..., Quantised]:
    def write_layer(layer: jax.Array, stack: Quantised, kernel: jax.Array) -> Quantised:
        return jax.tree.map(
            lambda whole, x: whole.at[layer].set(x), stack, quantise_kernel(kernel, dtype_name)
        )

    return jax.jit(write_layer, donate_argnums=1, out_shardings=shardings)
