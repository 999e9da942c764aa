"""Qwen3 in Flax Linen, used as a pure function of its parameters (arXiv 2505.09388, section 2).

    hidden_BTD, cache = Qwen3(config).apply({"params": p}, tokens_BT, positions_BT, segments_BT)

The model returns final hidden states, never logits: whoever needs logits streams `head(params)`
over them (distill/objectives/fused_head.py), so that [B, T, V] need not exist. Positions, segments
and the cache are arguments; nothing is inferred from padding ids.

Letters in names: B sequences, T tokens, S cache slots, N query heads, K key/value heads, Q = N/K,
H head dim, D model, F feed-forward, V vocabulary, L layers.

Segments: tokens attend to earlier tokens of their own segment. Segment 0 is padding; what padding
computes is never read.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.qwen3 import attention, quantised, sharded
from models.qwen3.config import Config
from models.qwen3.lora import LORA, LoRA, make_factors
from models.qwen3.moe import CHOSEN, ROUTER, MoE
from models.qwen3.pages import Pages
from models.qwen3.rope import apply_rotary, compute_rotary
from models.qwen3.slabs import Slabs

Cache = Pages | Slabs
Params = Any  # nested dict of arrays, one entry per module below


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis; the mean square is taken in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), (None,))
        scale: Any = self.param("scale", init, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        scale = scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return wide.astype(x.dtype) * scale


class Linear(nn.Module):
    """x @ kernel without bias; `axes` are the logical names of the kernel's two dimensions.

    The kernel of a frozen model may be Quantised (models.qwen3.quantised).
    """

    features: int
    axes: tuple[str | None, str | None]
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        init = nn.with_logical_partitioning(fan_in, self.axes)
        shape = (x.shape[-1], self.features)
        kernel: Any = self.param("kernel", init, shape, jnp.float32)
        fetched = functools.partial(sharded.gather_weights, T=x.shape[-2])
        kernel = quantised.cast_kernel(kernel, x.dtype)
        names = quantised.get_kernel_axes(kernel, self.axes)
        kernel = jax.tree.map(fetched, kernel, names)
        y = quantised.dot(x, kernel)
        low = make_factors(
            self, self.lora, f"{self.name}_proj", "kernel", shape, self.axes, x.dtype
        )
        if low is None:
            return y
        a, b = fetched(low[0], (self.axes[0], None)), fetched(low[1], (None, self.axes[1]))
        return y + (x @ a) @ b


class Attention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys, no biases."""

    config: Config
    kernel: str = "xla"
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rope: Any, segments_BT: jax.Array, cache: Cache | None, layer: Any
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        B, T, D = x_BTD.shape
        N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        def project_heads(name: str, count: int) -> jax.Array:
            linear = Linear(count * H, ("embed", "heads"), self.lora, name=name)
            return sharded.constrain_activations(linear(x_BTD).reshape(B, T, count, H), "heads")

        q_BTNH = apply_rotary(RMSNorm(c.rms_norm_eps, name="q_norm")(project_heads("q", N)), rope)
        k_BTKH = apply_rotary(RMSNorm(c.rms_norm_eps, name="k_norm")(project_heads("k", K)), rope)
        q_BTNH, k_BTKH, v_BTKH = sharded.split_by_heads(q_BTNH, k_BTKH, project_heads("v", K))
        if cache is not None:
            out_BTNH, cache = cache.write_and_attend(layer, q_BTNH, k_BTKH, v_BTKH)
        else:
            out_BTNH = attention.TABLE[self.kernel](q_BTNH, k_BTKH, v_BTKH, segments_BT)
        out_BTM = sharded.constrain_activations(out_BTNH, "heads").reshape(B, T, N * H)
        out = Linear(D, ("heads", "embed"), self.lora, name="o")(out_BTM)
        return out, cache


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: Config
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        F = self.config.intermediate_size
        gate_BTF = Linear(F, ("embed", "mlp"), self.lora, name="gate")(x_BTD)
        up_BTF = Linear(F, ("embed", "mlp"), self.lora, name="up")(x_BTD)
        h_BTF = sharded.constrain_activations(nn.silu(gate_BTF) * up_BTF, "mlp")
        return Linear(x_BTD.shape[-1], ("mlp", "embed"), self.lora, name="down")(h_BTF)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    sparse: the feed-forward is a mixture of experts.
    kernel: the row of models.qwen3.attention.TABLE that computes attention.
    """

    config: Config
    sparse: bool = False
    kernel: str = "xla"
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Cache | None],
        layer: Any,
        rope: Any,
        segments_BT: jax.Array,
        replay_BTA: jax.Array | None = None,
    ) -> tuple[tuple[jax.Array, Cache | None], None]:
        x_BTD, cache = carry
        normed = RMSNorm(self.config.rms_norm_eps, name="attention_norm")(x_BTD)
        mixed, cache = Attention(self.config, self.kernel, self.lora, name="attention")(
            normed, rope, segments_BT, cache, layer
        )
        x_BTD = sharded.constrain_residual(x_BTD + mixed)
        normed = RMSNorm(self.config.rms_norm_eps, name="mlp_norm")(x_BTD)
        if self.sparse:
            mixed = MoE(self.config, self.lora, name="moe")(normed, segments_BT, replay_BTA)
        else:
            mixed = MLP(self.config, self.lora, name="mlp")(normed)
        return (sharded.constrain_residual(x_BTD + mixed), cache), None


class Qwen3(nn.Module):
    """The whole model up to the final norm.

    scan: parameters of all layers stacked [L, ...] under "layers" and run by one scan (compact
      programs; what is trained, stored and sharded); otherwise one subtree per layer, "layers_0"
      on, as `unstack` makes it (what the CPU sampler reads). A model in which some layers are
      sparse and some dense (no released one is) always has this form.
    remat: recompute each block in the backward pass instead of storing its activations.
    kernel: how attention over many queries is computed, a row of models.qwen3.attention.TABLE.
    lora: what the collection LORA means, where it is given; without it the model is its base.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: bool = False
    kernel: str = "xla"
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        cache: Cache | None = None,
        replay_BTLA: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states [B, T, D] in `dtype`, and the cache with these tokens written.

        A cache says whose tokens these are and which they attend to (its `at` and `step`): the
        next one of each row, or pieces of prompts, one behind the other. With
        replay_BTLA (moe.chosen) the sparse layers compute with those experts.
        """
        c = self.config
        D, L = c.hidden_size, c.num_hidden_layers
        table = nn.with_logical_partitioning(nn.initializers.normal(D**-0.5), ("vocab", None))
        embed_VD: Any = self.param("embed", table, (c.vocab_size, D), jnp.float32)
        if not c.tie_word_embeddings:
            self.param("head", table, (c.vocab_size, D), jnp.float32)
        if cache is None:
            x_BTD = sharded.embed_tokens(embed_VD, tokens_BT, self.dtype)
        else:
            x_BTD = embed_VD[tokens_BT].astype(self.dtype)
        x_BTD = sharded.constrain_residual(x_BTD)
        rope = compute_rotary(positions_BT, c)
        lora = self.lora if self.is_initializing() or LORA in self.variables else None
        scan = self.scan and len(set(c.sparse_layers)) == 1
        block = nn.remat(Block, prevent_cse=not scan) if self.remat else Block
        carry = (x_BTD, cache)
        replay = None if replay_BTLA is None else replay_BTLA.transpose(2, 0, 1, 3)
        if scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0, LORA: 0, ROUTER: 0, CHOSEN: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=L,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            stack = layers(c, c.sparse_layers[0], self.kernel, lora, name="layers")
            carry, _ = stack(carry, jnp.arange(L), rope, segments_BT, replay)
        else:
            for layer, sparse in enumerate(c.sparse_layers):
                layer_block = block(c, sparse, self.kernel, lora, name=f"layers_{layer}")
                chosen = (
                    replay[sum(c.sparse_layers[:layer])] if sparse and replay is not None else None
                )
                carry, _ = layer_block(carry, layer, rope, segments_BT, chosen)
        x_BTD, cache = carry
        return RMSNorm(c.rms_norm_eps, name="final_norm")(x_BTD), cache


def get_output_head(params: Params) -> jax.Array:
    """The output head [V, D]: its own matrix, or the embedding where the two are tied."""
    return params["head"] if "head" in params else params["embed"]


def unstack_layers(params: Params, num_layers: int) -> Params:
    """Parameters as one subtree per layer, the form that Qwen3(scan=False) reads."""
    if "layers" not in params:
        return params
    layers = {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(num_layers)
    }
    return {**{k: v for k, v in params.items() if k != "layers"}, **layers}


def get_abstract_params(config: Config, lora: LoRA | None = None) -> tuple[Params, Params]:
    """(shapes, axes) of all parameters, or of what `lora` adds to them; allocates nothing.

    Shapes are ShapeDtypeStructs; axes are PartitionSpecs of logical axis names.
    """
    boxed = _eval_abstract_params(config, lora)
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    shapes = jax.tree.map(lambda box: box.value, boxed, is_leaf=is_box)
    return shapes, nn.get_partition_spec(boxed)


@functools.cache  # a start asks for the same model several times, on one mesh and another
def _eval_abstract_params(config: Config, lora: LoRA | None) -> Params:
    return jax.eval_shape(lambda: _init_boxed_params(config, lora, jax.random.key(0)))


def init_params(config: Config, key: jax.Array, lora: LoRA | None = None) -> Params:
    """Random float32 parameters: kernels N(0, 1/fan_in), embeddings N(0, 1/D), norms one.

    With `lora` only what it adds to them (models.qwen3.lora.factors).
    """
    return nn.unbox(_init_boxed_params(config, lora, key))


def _init_boxed_params(config: Config, lora: LoRA | None, key: jax.Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = Qwen3(config, lora=lora).init(key, tokens, tokens, tokens)
    return variables["params" if lora is None else LORA]
