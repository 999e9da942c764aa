"""Qwen3 in Flax Linen, used as a pure function of its parameters (arXiv 2505.09388, section 2).

    hidden_BTD, cache = Qwen3(config).apply({"params": p}, tokens_BT, positions_BT, segments_BT)

The model returns final hidden states, never logits: whoever needs logits streams `head(params)`
over them (distill/losses.py), so that [B, T, V] need not exist. Positions, segments and the cache
are arguments; nothing is inferred from padding ids.

Letters in names: B sequences, T tokens, S cache slots, N query heads, K key/value heads, Q = N/K,
H head dim, D model, F feed-forward, V vocabulary, L layers.

Segments: tokens attend to earlier tokens of their own segment. Segment 0 is padding; what padding
computes is never read.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.qwen3 import quantised
from models.qwen3.config import Config
from models.qwen3.moe import CHOSEN, ROUTER, MoE
from models.qwen3.rope import rotary, rotate

Params = Any  # nested dict of arrays, one entry per module below


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the slots written so far, in one of two layouts.

    Stacked: arrays [L, S, B, K, H], what TPU compilers update in place inside a scan over layers
    (other axis orders cost a copy of the cache). Per layer: tuples of L arrays, keys [B, K, H, S]
    and values [B, K, S, H], 1.5 to 3 times faster on CPU. Only this file knows which.
    """

    keys: Any
    values: Any
    valid_BS: jax.Array  # bool: the slot holds a real token
    slot: jax.Array  # int32 scalar: where the next token goes, the same for every row

    def write(self, layer: Any, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Cache":
        """Stores T new tokens of one layer from `slot` on (the slot itself does not move)."""
        if isinstance(self.keys, tuple):
            k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.transpose(0, 2, 1, 3)
            keys, values = list(self.keys), list(self.values)
            update = jax.lax.dynamic_update_slice_in_dim
            keys[layer] = update(keys[layer], k_BKHT, self.slot, axis=3)
            values[layer] = update(values[layer], v_BKTH, self.slot, axis=2)
            return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))
        at = (layer, self.slot, 0, 0, 0)
        k_1TBKH, v_1TBKH = k_BTKH.swapaxes(0, 1)[None], v_BTKH.swapaxes(0, 1)[None]
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, k_1TBKH, at),
            values=jax.lax.dynamic_update_slice(self.values, v_1TBKH, at),
        )

    def attend(self, layer: Any, q_BNH: jax.Array) -> jax.Array:
        """One query a row over all valid slots of one layer: [B, N, H]."""
        B, N, H = q_BNH.shape
        if isinstance(self.keys, tuple):
            k_BKHS, v_BKSH = self.keys[layer], self.values[layer]
        else:
            k_BKHS = self.keys[layer].transpose(1, 2, 3, 0)
            v_BKSH = self.values[layer].transpose(1, 2, 0, 3)
        q_BKQH = q_BNH.reshape(B, k_BKHS.shape[1], -1, H)
        scores = jnp.einsum("BKQH,BKHS->BKQS", q_BKQH, k_BKHS, preferred_element_type=jnp.float32)
        weights = _softmax(scores * H**-0.5, self.valid_BS[:, None, None, :]).astype(q_BNH.dtype)
        return jnp.einsum("BKQS,BKSH->BKQH", weights, v_BKSH).reshape(B, N, H)


def init_cache(config: Config, rows: int, slots: int, dtype: jnp.dtype, stacked: bool) -> Cache:
    """An empty cache for `rows` sequences of at most `slots` tokens, in the layout asked for."""
    L, K, H = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    if stacked:
        names = (None, None, "batch", "act_heads", None)
        keys = nn.with_logical_constraint(jnp.zeros((L, slots, rows, K, H), dtype), names)
        values = keys
    else:
        names = ("batch", "act_heads", None, None)
        constrain = nn.with_logical_constraint
        keys = tuple(constrain(jnp.zeros((rows, K, H, slots), dtype), names) for _ in range(L))
        values = tuple(constrain(jnp.zeros((rows, K, slots, H), dtype), names) for _ in range(L))
    return Cache(keys, values, jnp.zeros((rows, slots), bool), jnp.zeros((), jnp.int32))


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)


def attention(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Causal grouped-query attention within segments, softmax in float32: [B, T, N, H]."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKMH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKTH, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, N // K, T, T) * H**-0.5
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    mask_BTS = same_BTS & jnp.tril(jnp.ones((T, T), bool))[None]
    weights = _softmax(scores, mask_BTS[:, None, None]).astype(q_BTNH.dtype)
    out_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights.reshape(B, K, -1, T), v_BKTH)
    return out_BKMH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        init = nn.with_logical_partitioning(fan_in, self.axes)
        kernel: Any = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        return quantised.dot(x, kernel)


class Attention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys, no biases."""

    config: Config

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rope: Any, segments_BT: jax.Array, cache: Cache | None, layer: Any
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        B, T, D = x_BTD.shape
        N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim

        def heads(name: str, count: int) -> jax.Array:
            y = Linear(count * H, ("embed", "heads"), name=name)(x_BTD).reshape(B, T, count, H)
            return nn.with_logical_constraint(y, ("batch", None, "act_heads", None))

        q_BTNH = rotate(RMSNorm(c.rms_norm_eps, name="q_norm")(heads("q", N)), rope)
        k_BTKH = rotate(RMSNorm(c.rms_norm_eps, name="k_norm")(heads("k", K)), rope)
        v_BTKH = heads("v", K)
        if cache is not None:
            cache = cache.write(layer, k_BTKH, v_BTKH)
        if cache is not None and T == 1:
            out_BTNH = cache.attend(layer, q_BTNH[:, 0])[:, None]
        else:  # training, scoring, or the prefill of an empty cache: all keys are at hand
            out_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, segments_BT)
        out = Linear(D, ("heads", "embed"), name="o")(out_BTNH.reshape(B, T, N * H))
        return out, cache


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        F = self.config.intermediate_size
        gate_BTF = Linear(F, ("embed", "mlp"), name="gate")(x_BTD)
        up_BTF = Linear(F, ("embed", "mlp"), name="up")(x_BTD)
        h_BTF = nn.with_logical_constraint(nn.silu(gate_BTF) * up_BTF, ("batch", None, "act_mlp"))
        return Linear(x_BTD.shape[-1], ("mlp", "embed"), name="down")(h_BTF)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    sparse: the feed-forward is a mixture of experts.
    """

    config: Config
    sparse: bool = False

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
        mixed, cache = Attention(self.config, name="attention")(
            normed, rope, segments_BT, cache, layer
        )
        x_BTD = x_BTD + mixed
        normed = RMSNorm(self.config.rms_norm_eps, name="mlp_norm")(x_BTD)
        if self.sparse:
            x_BTD = x_BTD + MoE(self.config, name="moe")(normed, segments_BT, replay_BTA)
        else:
            x_BTD = x_BTD + MLP(self.config, name="mlp")(normed)
        return (nn.with_logical_constraint(x_BTD, ("batch", None, None)), cache), None


class Qwen3(nn.Module):
    """The whole model up to the final norm.

    scan: parameters of all layers stacked [L, ...] under "layers" and run by one scan (compact
      programs; what is trained, stored and sharded); otherwise one subtree per layer, "layers_0"
      on, as `unstack` makes it (what the CPU sampler reads). A model in which some layers are
      sparse and some dense (no released one is) always has this form.
    remat: recompute each block in the backward pass instead of storing its activations.
    """

    config: Config
    dtype: jnp.dtype = jnp.float32
    scan: bool = True
    remat: bool = False

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

        With a cache, T > 1 means the prefill of an empty one, T == 1 one decoding step. With
        replay_BTLA (moe.chosen) the sparse layers compute with those experts.
        """
        c = self.config
        D, L = c.hidden_size, c.num_hidden_layers
        table = nn.with_logical_partitioning(nn.initializers.normal(D**-0.5), ("vocab", None))
        embed_VD: Any = self.param("embed", table, (c.vocab_size, D), jnp.float32)
        if not c.tie_word_embeddings:
            self.param("head", table, (c.vocab_size, D), jnp.float32)
        x_BTD = embed_VD[tokens_BT].astype(self.dtype)
        x_BTD = nn.with_logical_constraint(x_BTD, ("batch", None, None))
        rope = rotary(positions_BT, c)
        if cache is not None:
            filled = (segments_BT > 0).astype(bool)
            valid = jax.lax.dynamic_update_slice_in_dim(cache.valid_BS, filled, cache.slot, axis=1)
            cache = dataclasses.replace(cache, valid_BS=valid)

        scan = self.scan and len(set(c.sparse_layers)) == 1
        block = nn.remat(Block, prevent_cse=not scan) if self.remat else Block
        carry = (x_BTD, cache)
        replay = None if replay_BTLA is None else replay_BTLA.transpose(2, 0, 1, 3)
        if scan:
            layers = nn.scan(
                block,
                variable_axes={"params": 0, ROUTER: 0, CHOSEN: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=L,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            stack = layers(c, c.sparse_layers[0], name="layers")
            carry, _ = stack(carry, jnp.arange(L), rope, segments_BT, replay)
        else:
            for layer, sparse in enumerate(c.sparse_layers):
                one = block(c, sparse, name=f"layers_{layer}")
                chosen = (
                    replay[sum(c.sparse_layers[:layer])] if sparse and replay is not None else None
                )
                carry, _ = one(carry, layer, rope, segments_BT, chosen)
        x_BTD, cache = carry
        if cache is not None:
            cache = dataclasses.replace(cache, slot=cache.slot + tokens_BT.shape[1])
        return RMSNorm(c.rms_norm_eps, name="final_norm")(x_BTD), cache


def head(params: Params) -> jax.Array:
    """The output head [V, D]: its own matrix, or the embedding where the two are tied."""
    return params["head"] if "head" in params else params["embed"]


def unstack(params: Params, num_layers: int) -> Params:
    """Parameters as one subtree per layer, the form that Qwen3(scan=False) reads."""
    if "layers" not in params:
        return params
    layers = {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(num_layers)
    }
    return {**{k: v for k, v in params.items() if k != "layers"}, **layers}


def abstract(config: Config) -> tuple[Params, Params]:
    """(shapes, axes) of all parameters; allocates nothing.

    Shapes are ShapeDtypeStructs; axes are PartitionSpecs of logical axis names.
    """
    boxed = jax.eval_shape(lambda: _init(config, jax.random.key(0)))
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    shapes = jax.tree.map(lambda box: box.value, boxed, is_leaf=is_box)
    return shapes, nn.get_partition_spec(boxed)


def init(config: Config, key: jax.Array) -> Params:
    """Random float32 parameters: kernels N(0, 1/fan_in), embeddings N(0, 1/D), norms one."""
    return nn.unbox(_init(config, key))


def _init(config: Config, key: jax.Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Qwen3(config).init(key, tokens, tokens, tokens)["params"]
