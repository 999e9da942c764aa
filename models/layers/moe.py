"""The sparse feed-forward of Qwen3-MoE: a router and its experts (arXiv 2505.09388, section 2).

Dropless: tokens are sorted by expert and multiplied in groups of any size (models.layers.grouped),
so there is no capacity that could be exceeded.

Letters in addition to those of models/transformer.py: M tokens of all rows (B·T), E experts,
A experts of each token.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import Config
from models.layers import grouped, quantised, sharded
from models.layers.lora import Factors, LoRA, make_factors
from models.layers.quantised import Kernel, ragged_dot

Kernels = tuple[Kernel, Kernel, Kernel]  # gate and up [E, D, F], down [E, F, D]
# LoRA's a and b of each of these.
ExpertFactors = tuple[Factors | None, Factors | None, Factors | None]
ROUTER = "router"  # the Linen collection of the routers' statistics, as sums
CHOSEN = "chosen"  # the Linen collection of the chosen experts

_GATE_UP, _DOWN = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
_NO_FACTORS: ExpertFactors = (None, None, None)


def route_tokens(
    logits_BTE: jax.Array,
    experts_per_token: int,
    renormalise: bool,
    replay_BTA: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies a softmax in float32 over all experts and chooses each token's most likely ones.

    `replay_BTA` overrides the choice with the experts of another forward pass (routing replay,
    arXiv 2510.11370); their weights are still this router's probabilities, so gradients flow. For
    tokens whose experts are unknown, -1, the router chooses.

    Returns:
      p_BTE, weights_BTA and chosen_BTA (int32): all probabilities, and the weights and indices of
      each token's experts. With `renormalise` a token's weights sum to one.
    """
    p_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    if replay_BTA is None:
        weights_BTA, chosen_BTA = jax.lax.top_k(p_BTE, experts_per_token)
    else:
        _, own_BTA = jax.lax.top_k(p_BTE, experts_per_token)
        chosen_BTA = jnp.where(replay_BTA < 0, own_BTA, replay_BTA.astype(jnp.int32))
        weights_BTA = jnp.take_along_axis(p_BTE, chosen_BTA, axis=-1)
    if renormalise:
        weights_BTA = weights_BTA / jnp.sum(weights_BTA, axis=-1, keepdims=True)
    return p_BTE, weights_BTA, chosen_BTA


def compute_local_experts(
    x_MD: jax.Array,
    weights_MA: jax.Array,
    chosen_MA: jax.Array,
    kernels: Kernels,
    first_expert: jax.typing.ArrayLike = 0,
    lora_factors: ExpertFactors = _NO_FACTORS,
) -> tuple[jax.Array, jax.Array]:
    """Computes Σ weight · down(silu(gate(x)) · up(x)) over each token's local experts.

    The local experts, to which `kernels` and `lora_factors` belong, are numbered from
    `first_expert`. Returns [M, D], and the number of tokens that each of them computed [E].
    """
    (M, D), A, E = x_MD.shape, chosen_MA.shape[1], kernels[0].shape[0]
    local = chosen_MA.reshape(-1) - first_expert
    local = jnp.where((local >= 0) & (local < E), local, E)  # others sort after all groups
    order = jnp.argsort(local)
    sizes_E = jnp.bincount(local, length=E)
    # Rows after the last group are computed by no expert and are undefined. They are masked before
    # the products as well, for the gradient.
    is_local = (local < E)[order][:, None]
    sorted_x = jnp.where(is_local, x_MD[order // A], 0)
    gate, up, down = (
        functools.partial(_apply_grouped_kernel, sizes_E=sizes_E, kernel=kernel, lora_factors=pair)
        for kernel, pair in zip(kernels, lora_factors, strict=True)
    )
    sorted_y = jnp.where(is_local, down(nn.silu(gate(sorted_x)) * up(sorted_x)), 0)
    y_MAD = sorted_y[jnp.argsort(order)].reshape(M, A, D)
    return jnp.einsum("MAD,MA->MD", y_MAD, weights_MA.astype(x_MD.dtype)), sizes_E


def _apply_grouped_kernel(
    x: jax.Array, sizes_E: jax.Array, kernel: Kernel, lora_factors: Factors | None
) -> jax.Array:
    """Multiplies rows of x, grouped by expert, by their expert's kernel and low-rank term."""
    y = ragged_dot(x, kernel, sizes_E)
    if lora_factors is None:
        return y
    a, b = lora_factors
    return y + grouped.dot(grouped.dot(x, a, sizes_E), b, sizes_E)


def compute_experts(
    x_BTD: jax.Array,
    weights_BTA: jax.Array,
    chosen_BTA: jax.Array,
    kernels: Kernels,
    lora_factors: ExpertFactors = _NO_FACTORS,
) -> tuple[jax.Array, jax.Array]:
    """Runs `compute_local_experts` on the current mesh, with all tokens of the expert axis.

    Communication is explicit: kernels are gathered along the model dimension and tokens along the
    expert axis; each device computes the contribution of its own experts (and its slice of their F)
    to these tokens, and the sums are scattered back to the tokens' devices.
    """
    mesh, (B, T, D) = jax.sharding.get_abstract_mesh(), x_BTD.shape
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    (rows,), (expert, embed, mlp) = _make_partition_spec("batch"), _make_partition_spec(*_GATE_UP)
    if mesh.empty or rows is None:  # no mesh, or no rules for logical names
        flat_inputs = flat(x_BTD), flat(weights_BTA), flat(chosen_BTA)
        y_MD, sizes_E = compute_local_experts(*flat_inputs, kernels, lora_factors=lora_factors)
        return y_MD.reshape(B, T, D), sizes_E
    # The logical axes of each array, in the structure of (kernels, lora_factors).
    axes = (_GATE_UP, _GATE_UP, _DOWN)
    pairs = zip(kernels, axes, strict=True)
    names = (
        tuple(quantised.get_kernel_axes(kernel, kernel_axes) for kernel, kernel_axes in pairs),
        tuple(
            None if pair is None else ((lead, row, None), (lead, None, column))
            for pair, (lead, row, column) in zip(lora_factors, axes, strict=True)
        ),
    )
    is_names = lambda x: isinstance(x, tuple) and "expert" in x  # noqa: E731

    def gather_kernel(names: tuple[str | None, ...], x: jax.Array) -> jax.Array:
        if "embed" not in names:
            return x
        return jax.lax.all_gather(x, embed, axis=names.index("embed"), tiled=True)

    def compute_local(x_BTD, weights_BTA, chosen_BTA, sharded_weights):
        kernels, lora_factors = jax.tree.map(
            gather_kernel, names, sharded_weights, is_leaf=is_names
        )

        def gather_tokens(x: jax.Array) -> jax.Array:
            return jax.lax.all_gather(flat(x), expert, tiled=True)

        first = jax.lax.axis_index(expert) * kernels[0].shape[0]
        y_MD, sizes_E = compute_local_experts(
            gather_tokens(x_BTD),
            gather_tokens(weights_BTA),
            gather_tokens(chosen_BTA),
            kernels,
            first,
            lora_factors,
        )
        y_MD = jax.lax.psum_scatter(y_MD, expert, scatter_dimension=0, tiled=True)
        y_BTD = jax.lax.psum(y_MD, mlp).reshape(x_BTD.shape)
        return y_BTD, jax.lax.psum(sizes_E, [a for a in split if a != expert])

    tokens = sharded.get_dividing_axis("act_context", T)
    spec = _make_partition_spec("batch", tokens, None)
    split = [*rows, *(sharded.get_mesh_axes(tokens) if tokens else ())]
    # Pad to a multiple of the devices with tokens of an expert that does not exist.
    parts = math.prod(mesh.shape[axis] for axis in rows)
    pad = functools.partial(jnp.pad, pad_width=((0, -B % parts), (0, 0), (0, 0)))
    E = kernels[0].shape[0]
    padded = pad(x_BTD), pad(weights_BTA), pad(chosen_BTA, constant_values=E)
    y_BTD, sizes_E = jax.shard_map(
        compute_local,
        in_specs=(spec,) * 3
        + (jax.tree.map(lambda x: _make_partition_spec(*x), names, is_leaf=is_names),),
        out_specs=(spec, jax.sharding.PartitionSpec(expert)),
        check_vma=False,  # the Pallas kernel of the gradient does not say how its results vary
    )(*padded, (kernels, lora_factors))
    return y_BTD[:B], sizes_E


def _make_partition_spec(*names: str | None) -> jax.sharding.PartitionSpec:
    spec = nn.logical_to_mesh_axes(names)
    assert spec is not None
    return spec


class MoE(nn.Module):
    """The experts that the router chooses for each token, weighted by its probabilities.

    If the collection ROUTER is mutable, the module stores in it the statistics that
    `sum_router_stats` reads, summed over tokens that are not padding; in CHOSEN, each token's
    experts [B, T, A].
    """

    config: Config
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array, replay_BTA: jax.Array | None = None
    ) -> jax.Array:
        c = self.config
        D, F, E = c.hidden_size, c.moe_intermediate_size, c.num_experts
        fan_in = nn.initializers.variance_scaling(
            1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=(0,)
        )

        init = nn.with_logical_partitioning(nn.initializers.normal(D**-0.5), ("embed", None))
        router_DE: Any = self.param("router", init, (D, E), jnp.float32)

        def make_kernel(name: str, axes: Any, *shape: int) -> tuple[Kernel, Factors | None]:
            init = nn.with_logical_partitioning(fan_in, axes)
            param: Any = self.param(name, init, shape, jnp.float32)
            low = make_factors(self, self.lora, f"{name}_proj", name, shape, axes, x_BTD.dtype)
            return quantised.cast_kernel(param, x_BTD.dtype), low

        gate, gate_low = make_kernel("gate", _GATE_UP, E, D, F)
        up, up_low = make_kernel("up", _GATE_UP, E, D, F)
        down, down_low = make_kernel("down", _DOWN, E, F, D)
        x_BTD = sharded.constrain_activations(x_BTD, None)
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE", x_BTD, router_DE.astype(x_BTD.dtype), preferred_element_type=jnp.float32
        )
        p_BTE, weights_BTA, chosen_BTA = route_tokens(
            logits_BTE, c.num_experts_per_tok, c.norm_topk_prob, replay_BTA
        )
        y_BTD, sizes_E = compute_experts(
            x_BTD, weights_BTA, chosen_BTA, (gate, up, down), (gate_low, up_low, down_low)
        )
        last = {"init_fn": lambda: None, "reduce_fn": lambda _, new: new}
        self.sow(CHOSEN, "experts", chosen_BTA, **last)
        if self.is_mutable_collection(ROUTER):
            real_BT1 = (segments_BT[..., None] > 0).astype(jnp.float32)
            chosen_BTE = jax.nn.one_hot(chosen_BTA, E).sum(axis=2)
            stats = {
                "tokens": jnp.sum(real_BT1),
                "load_E": jnp.sum(chosen_BTE * real_BT1, axis=(0, 1)),
                "p_E": jnp.sum(p_BTE * real_BT1, axis=(0, 1)),
                "entropy": jnp.sum(jax.scipy.special.entr(p_BTE) * real_BT1),
                "sent": jnp.float32(chosen_BTA.size),
                "computed": jnp.sum(sizes_E).astype(jnp.float32),
            }
            for name, value in stats.items():
                self.sow(ROUTER, name, value, **last)
        return y_BTD


def sum_router_stats(collection: Mapping[str, Any]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns (sum, count) pairs from one forward pass's collection ROUTER; none if dense.

    They may be added over parts of a batch. Divided, they are: "router_entropy", of all experts'
    probabilities (nats; the mean over layers and tokens); "expert_dropped", the share of (token,
    expert) pairs that no expert computed, 0 by construction; and, for `summarise_load`, "load_LE",
    the share of tokens sent to an expert, and "p_LE", its mean probability.
    """
    layers = [dict(collection[name]["moe"]) for name in _sort_layer_names(collection)]
    if not layers:
        return {}

    def concat_layers(name: str) -> jax.Array:
        parts = [layer[name] for layer in layers]
        width = parts[0].shape[-1:] if name.endswith("_E") else ()
        return jnp.concatenate([part.reshape(-1, *width) for part in parts])

    tokens_L, sent_L = concat_layers("tokens"), concat_layers("sent")
    return {
        "router_entropy": (jnp.sum(concat_layers("entropy")), jnp.sum(tokens_L)),
        "expert_dropped": (jnp.sum(sent_L - concat_layers("computed")), jnp.sum(sent_L)),
        "load_LE": (concat_layers("load_E"), tokens_L[0]),
        "p_LE": (concat_layers("p_E"), tokens_L[0]),
    }


def _sort_layer_names(collection: Mapping[str, Any]) -> list[str]:
    """Returns block names, "layers" or "layers_0" and so on, in the order of the layers."""
    return sorted(collection, key=lambda name: int(name.removeprefix("layers").strip("_") or 0))


def get_chosen_experts(collection: Mapping[str, Any]) -> jax.Array:
    """Returns the experts of each token and sparse layer, int16 [B, T, L, A], from one forward
    pass's collection CHOSEN; pass them as replay_BTLA."""
    layers = [collection[name]["moe"]["experts"] for name in _sort_layer_names(collection)]
    parts = [x if x.ndim == 4 else x[None] for x in layers]
    return jnp.concatenate(parts).transpose(1, 2, 0, 3).astype(jnp.int16)


def summarise_load(load_LE: jax.Array, p_LE: jax.Array) -> dict[str, jax.Array]:
    """Measures how even the load is over a whole batch.

    "expert_load_max" and "expert_load_min" are the loads of the busiest and the least busy expert
    of any layer, relative to an even load; "load_balancing_loss" is E Σ_e load(e) p(e) over all
    layers' tokens (arXiv 2101.03961, eq. 4; transformers' load_balancing_loss_func): A if even.
    """
    E = load_LE.shape[-1]
    even = jnp.sum(load_LE, axis=-1, keepdims=True) / E
    return {
        "expert_load_max": jnp.max(load_LE / even),
        "expert_load_min": jnp.min(load_LE / even),
        "load_balancing_loss": E * jnp.sum(load_LE.mean(axis=0) * p_LE.mean(axis=0)),
    }
