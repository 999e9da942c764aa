"""Tiny mixtures of experts: shapes, batches, and gradients by transformers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill.batch import Batch
from distill.runtime import mesh as mesh_lib
from models import families, weights
from models.layers import moe
from models.transformer import Params, Transformer

T = 19


EXPERTS: dict[str, Any] = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}


SHAPES = {
    "renormalised": EXPERTS,
    "not renormalised, tied": EXPERTS | {"norm_topk_prob": False, "tie_word_embeddings": True},
    # Not renormalised: its weight would always be one and the router's gradient zero.
    "one expert a token": EXPERTS
    | {"num_experts": 5, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "all experts": EXPERTS | {"num_experts": 4, "num_experts_per_tok": 4, "head_dim": 14},
    "every second layer": EXPERTS | {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    "a dense layer by name": EXPERTS | {"mlp_only_layers": [1], "norm_topk_prob": False},
    "no sparse layer": EXPERTS | {"mlp_only_layers": [0, 1, 2]},
}


# Shapes that eight devices divide in several ways.
EVEN: dict[str, Any] = EXPERTS | {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_experts": 8,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def load(directory, sizes=(1, 1, 1)):
    config = families.read_config(directory)
    abstract = mesh_lib.make_abstract_params(config, mesh_lib.make_mesh(*sizes))
    shardings = jax.tree.map(lambda p: p.sharding, abstract)
    return config, weights.load(directory, config, abstract, shardings, jnp.dtype("float32"))


def tokens_of(config, rows=2, length=T, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length))


def batch_of(config, rows=8):
    lengths = np.array([T, 3, 9, T, 5, 14, 2, 11])[:rows]
    segments = (np.arange(T)[None] < lengths[:, None]).astype(np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (rows, 1))
    arrays: Any = (tokens_of(config, rows).astype(np.int32), positions, segments, segments > 0)
    return Batch(*arrays)


def torch_gradients(network):
    """Returns gradients by checkpoint name; transformers 5 computes with fused experts."""
    gradients = {}
    for name, parameter in network.named_parameters():
        grad = parameter.grad.numpy()
        if name.endswith("experts.gate_up_proj"):
            for i, both in enumerate(grad):
                halves = zip(("gate", "up"), np.split(both, 2), strict=True)
                stem = name.removesuffix("gate_up_proj")
                gradients |= {f"{stem}{i}.{half}_proj.weight": part for half, part in halves}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            gradients |= {f"{stem}{i}.down_proj.weight": part for i, part in enumerate(grad)}
        else:
            gradients[name] = grad
    return gradients


def compute_chosen_experts(model: Transformer, params: Params, batch: Batch) -> jax.Array:
    """Returns the experts that a forward pass chooses, int16 [B, T, L, A]: Batch.experts_BTLA."""
    applied: Any = model.apply(
        {"params": params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
        mutable=[moe.CHOSEN],
    )
    return moe.get_chosen_experts(applied[1][moe.CHOSEN])
