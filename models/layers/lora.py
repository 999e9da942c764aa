"""LoRA: a low-rank term beside a frozen kernel, y = x @ kernel + scale · (x @ a) @ b.

arXiv 2106.09685; its rank-stabilised scale (rsLoRA) is that of arXiv 2312.03732. What is trained
is a Linen collection of its own beside the parameters: at the path of each kernel that it adapts
it holds `a` [..., in, R] and `b` [..., R, out], float32. Without the collection the model is its
base, bit by bit: the reference policy.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.errors import UserError

LORA = "lora"  # the Linen collection
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", *MLP_TARGETS)

Factors = tuple[jax.Array, jax.Array]  # a [..., in, R] and scale · b [..., R, out]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which kernels have a low-rank term, and how it counts.

    targets: Hugging Face's names of projections, of all layers; those of MLP are the experts',
      where a layer has experts.
    rslora: the term counts alpha / √rank, so that its size does not fall with the rank; otherwise
      alpha / rank.
    """

    rank: int
    alpha: float
    rslora: bool
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank={self.rank}: must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha={self.alpha}: must be above 0")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise UserError(f"lora.targets={self.targets}: must be some of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """What the term counts for, in the forward pass, merged, exported and imported."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def make_factors(
    module: nn.Module,
    lora: LoRA | None,
    target: str,
    kernel: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: jnp.dtype,
) -> Factors | None:
    """`module`'s factors for its parameter `kernel`, in `dtype`; None where it has no such term.

    `shape` and `axes` (logical names) are the kernel's: [..., in, out]. At first a is
    U(-1/√in, 1/√in), as PEFT draws it, and b zero, so that the model is still its base.
    """
    if lora is None or target not in lora.targets:
        return None
    *stack, fan_in, fan_out = shape
    *lead, row, column = axes
    uniform = nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform", in_axis=-2, out_axis=-1, batch_axis=tuple(range(len(stack)))
    )
    first_a = nn.with_logical_partitioning(uniform, (*lead, row, None))
    first_b = nn.with_logical_partitioning(nn.initializers.zeros_init(), (*lead, None, column))

    def init_factors() -> dict[str, Any]:
        key = module.make_rng("params")
        return {
            "a": first_a(key, (*stack, fan_in, lora.rank), jnp.float32),
            "b": first_b(key, (*stack, lora.rank, fan_out), jnp.float32),
        }

    values: Any = module.variable(LORA, kernel, init_factors).value
    assert values["a"].shape[-1] == lora.rank, "factors of another rank"
    return values["a"].astype(dtype), (lora.scale * values["b"]).astype(dtype)


def fold_scale(adapter: Any, lora: LoRA, dtype: jnp.dtype) -> tuple[Any, LoRA]:
    """The factors as a forward pass in `dtype` multiplies by them, and the LoRA that they then are.

    A sampler that keeps them apart from their base is as near to the scorer as one of a model that
    is trained whole; a merged kernel is rounded where the scorer's base and factors are not.
    """

    def fold_leaf(path: tuple, x: jax.Array) -> jax.Array:
        return (lora.scale * x if path[-1].key == "b" else x).astype(dtype)

    return jax.tree_util.tree_map_with_path(fold_leaf, adapter), with_unit_scale(lora)


def with_unit_scale(lora: LoRA) -> LoRA:
    """Of the same shape, with a scale of 1."""
    return dataclasses.replace(lora, alpha=float(lora.rank), rslora=False)


def merge_adapter(params: Any, adapter: Any, lora: LoRA, dtype: jnp.dtype) -> Any:
    """`params` with scale · a @ b added to each kernel that has factors in `adapter`.

    Added in float32, then all cast to `dtype`: what a model without LoRA computes the same from.
    """

    def merge_kernel(kernel: jax.Array, kernel_factors: Mapping[str, jax.Array]) -> jax.Array:
        wide = kernel.astype(jnp.float32)
        if kernel_factors:
            update = jnp.matmul(
                kernel_factors["a"], kernel_factors["b"], precision=jax.lax.Precision.HIGHEST
            )
            wide = wide + lora.scale * update
        return wide.astype(dtype)

    def merge_node(node: Any, adapter_node: Mapping[str, Any]) -> Any:
        if isinstance(node, Mapping):
            return {
                name: merge_node(child, adapter_node.get(name, {})) for name, child in node.items()
            }
        return merge_kernel(node, adapter_node)

    return merge_node(params, adapter)
