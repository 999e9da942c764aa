"""LoRA: a low-rank term beside a frozen kernel, y = x @ kernel + scale · (x @ a) @ b.

arXiv 2106.09685; the rank-stabilised scale (rsLoRA) is that of arXiv 2312.03732. The trained
factors are a separate Linen collection beside the parameters: at the path of each adapted kernel it
holds `a` [..., in, R] and `b` [..., R, out] in float32. Without the collection the model is
bit-identical to its base, which is the reference policy.
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
    """The kernels that have a low-rank term, and its scale.

    targets: Hugging Face's names of projections, in all layers; in layers with experts, those of
      the MLP are the experts'.
    rslora: the scale is alpha / √rank, so that the term does not shrink with the rank; otherwise
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
        """The factor on the term: in the forward pass, merged, exported and imported."""
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
    """Returns `module`'s factors for its parameter `kernel`, in `dtype`; None if it is no target.

    `shape` and `axes` (logical names) are the kernel's: [..., in, out]. Initially a is
    U(-1/√in, 1/√in), as in PEFT, and b is zero, so that the model equals its base.
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
    """Returns the factors as a forward pass in `dtype` uses them, and the LoRA they then represent.

    With unmerged factors a sampler agrees with the scorer as closely as in full fine-tuning; a
    merged kernel is rounded where the scorer's base and factors are not.
    """

    def fold_leaf(path: tuple, x: jax.Array) -> jax.Array:
        return (lora.scale * x if path[-1].key == "b" else x).astype(dtype)

    return jax.tree_util.tree_map_with_path(fold_leaf, adapter), with_unit_scale(lora)


def with_unit_scale(lora: LoRA) -> LoRA:
    """Returns a LoRA of the same shape with a scale of 1."""
    return dataclasses.replace(lora, alpha=float(lora.rank), rslora=False)


def merge_adapter(params: Any, adapter: Any, lora: LoRA, dtype: jnp.dtype) -> Any:
    """Returns `params` with scale · a @ b added to each kernel that has factors in `adapter`.

    Computed in float32, then cast to `dtype`. A model without LoRA uses the result directly.
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
