"""Frozen models in 8 bits: the layers' kernels as 8-bit integers or floats, times a scale.

Weight-only and symmetric: each output channel of a kernel has one scale, its largest magnitude over
the largest number of the type. Activations keep their dtype. Norms, routers and the embedding (and
with it the head) are not quantised: the first two are small, and rounding in any row of the head
changes every token's distribution.

qwix is not used because its arrays import flax.nnx, its product of float activations and integer
weights first multiplies the whole kernel by its scale, and it quantises only what is in memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from models.layers import grouped

MAX_VALUES = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest value of each supported dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A kernel [..., in, out], approximated by values · scale."""

    values: Any  # int8 or float8 [..., in, out]
    scale: Any  # float32 [..., 1, out]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """Returns the dequantised kernel in `dtype`."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


Kernel = jax.Array | Quantised


def is_quantised(x: Any) -> bool:
    return isinstance(x, Quantised)


def quantise_kernel(kernel: jax.Array, dtype_name: str) -> Quantised:
    """Rounds kernel / scale to the nearest values of `dtype_name`, a key of MAX_VALUES."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / MAX_VALUES[dtype_name], 1)
    ratio = wide / scale
    ratio = jnp.round(ratio) if dtype_name == "int8" else ratio
    return Quantised(ratio.astype(dtype_name), scale)


def dot(x: jax.Array, kernel: Kernel) -> jax.Array:
    """Computes x [..., in] @ kernel [in, out], in x's dtype.

    The scale is applied to the output, so that the kernel is read in 8 bits: these values are exact
    in bfloat16, and their conversion is fused into the read.
    """
    if not isinstance(kernel, Quantised):
        return x @ kernel.astype(x.dtype)
    y = jnp.matmul(x, kernel.values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * kernel.scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


def ragged_dot(x: jax.Array, kernel: Kernel, sizes_E: jax.Array) -> jax.Array:
    """Multiplies rows [M, in], grouped by expert, by their kernel of [E, in, out]; in x's dtype."""
    if not isinstance(kernel, Quantised):
        return grouped.dot(x, kernel.astype(x.dtype), sizes_E)
    y = grouped.multiply_groups(x, kernel.values, sizes_E, dtype=jnp.float32)
    experts = jnp.arange(len(sizes_E))
    expert_M = jnp.repeat(experts, sizes_E, total_repeat_length=len(x))
    return (y * kernel.scale[expert_M, 0]).astype(x.dtype)


def cast_kernel(kernel: Kernel, dtype: jnp.dtype) -> Kernel:
    """Casts a float kernel to `dtype`; returns a quantised one unchanged."""
    return kernel if isinstance(kernel, Quantised) else kernel.astype(dtype)


def get_kernel_axes(kernel: Kernel, names: tuple[str | None, ...]) -> Any:
    """Returns the kernel's axis names, in its pytree structure: a scale has no input axis."""
    if not isinstance(kernel, Quantised):
        return names
    return Quantised(names, (*names[:-2], None, names[-1]))


def _is_kernel(path: tuple) -> bool:
    """Returns True for the path of a parameter that 8-bit models quantise."""
    names = [key.key for key in path]
    return names[-1] == "kernel" or (names[-2:-1] == ["moe"] and names[-1] != "router")


def quantise_shapes(params: Any, dtype_name: str | None) -> Any:
    """Returns ShapeDtypeStructs with NamedShardings of the quantised model, from those of the plain
    model; returns `params` unchanged if `dtype_name` is None."""
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
    """Returns (8-bit dtype of the kernels or None, dtype of the other parameters).

    If `param_dtype` has 8 bits, the other parameters get `compute_dtype`.
    """
    name = jnp.dtype(param_dtype).name
    kernel_dtype = name if name in MAX_VALUES else None
    return kernel_dtype, jnp.dtype(compute_dtype if kernel_dtype else param_dtype)


def quantise_params(params: Any, dtype_name: str | None, dtype: jnp.dtype) -> Any:
    """Casts parameters to `dtype` and, unless `dtype_name` is None, quantises kernels to it.

    Kernels that are already quantised are unchanged.
    """

    def quantise_leaf(path: tuple, x: Kernel) -> Kernel:
        if isinstance(x, Quantised):
            return x
        return (
            quantise_kernel(x, dtype_name) if dtype_name and _is_kernel(path) else x.astype(dtype)
        )

    return jax.tree_util.tree_map_with_path(quantise_leaf, params, is_leaf=is_quantised)


def quantise_onto(kernel: jax.Array, like: Quantised) -> Quantised:
    """Quantises a kernel with the dtypes and shardings of `like`, of ShapeDtypeStructs."""
    convert = jax.jit(quantise_kernel, static_argnums=1, out_shardings=_get_shardings(like))
    return convert(kernel, like.values.dtype.name)


def quantise_stack(kernels: Iterable[jax.Array], like: Quantised) -> Quantised:
    """Quantises kernels [..., in, out] one by one into a stack [L, ..., in, out]; see above."""
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
