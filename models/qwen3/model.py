"""A block of Qwen3 (arXiv 2505.09388, section 2). Letters as in models/transformer.py."""

from typing import Any

import flax.linen as nn
import jax

from models.config import Config
from models.layers import attention, sharded
from models.layers.dense import MLP, Linear, RMSNorm
from models.layers.lora import LoRA
from models.layers.moe import MoE
from models.layers.rope import apply_rotary
from models.transformer import Cache


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


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    sparse: the feed-forward is a mixture of experts.
    kernel: the implementation of attention, a key of models.layers.attention.TABLE.
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
