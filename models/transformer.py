"""A decoder-only transformer in Flax Linen, used as a pure function of its parameters.

    hidden_BTD, cache = make_model(config).apply(
        {"params": p}, tokens_BT, positions_BT, segments_BT)

The model returns final hidden states, never logits: callers that need logits stream the output head
over them (distill/objectives/fused_head.py), so that [B, T, V] is never materialised. Positions,
segments and the cache are arguments; nothing is inferred from padding ids.

Letters in names: B sequences, T tokens, S cache slots, N query heads, K key/value heads, Q = N/K,
H head dim, D model, F feed-forward, V vocabulary, L layers.

Segments: tokens attend to themselves and to earlier tokens of their own segment. Segment 0 is
padding, whose outputs are never read.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import Config
from models.layers import sharded
from models.layers.dense import RMSNorm
from models.layers.lora import LORA, LoRA
from models.layers.moe import CHOSEN, ROUTER
from models.layers.pages import Pages
from models.layers.rope import compute_rotary
from models.layers.slabs import Slabs

Cache = Pages | Slabs
Params = Any  # nested dict of arrays, one entry per module below


class Transformer(nn.Module):
    """The whole model up to the final norm.

    scan: parameters of all layers are stacked [L, ...] under "layers" and run by one scan (compact
      programs; this form is trained, stored and sharded). Otherwise there is one subtree per layer,
      "layers_0" and so on, as made by `unstack_layers` (for the CPU sampler). A model that mixes
      sparse and dense layers (no released one does) always has the latter form.
    remat: recompute each block in the backward pass instead of storing its activations.
    kernel: the implementation of attention over many queries, a key of
      models.layers.attention.TABLE.
    lora: describes the factors in the collection LORA; without that collection the model is its
      base.
    """

    config: Config
    block: type[nn.Module]
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
        """Returns final hidden states [B, T, D] in `dtype`, and the cache with these tokens added.

        A cache says which rows the tokens belong to and what they attend to (see its `bind_tokens`
        and `bind_next_tokens`): the next token of each row, or concatenated pieces of prompts.
        With replay_BTLA (moe.get_chosen_experts) the sparse layers use those experts.
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
        block = nn.remat(self.block, prevent_cse=not scan) if self.remat else self.block
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
    """Returns the output head [V, D]: its own matrix, or the embedding if the two are tied."""
    return params["head"] if "head" in params else params["embed"]


def unstack_layers(params: Params, num_layers: int) -> Params:
    """Returns parameters with one subtree per layer, the form used by Transformer(scan=False)."""
    if "layers" not in params:
        return params
    layers = {
        f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"])
        for i in range(num_layers)
    }
    return {**{k: v for k, v in params.items() if k != "layers"}, **layers}
