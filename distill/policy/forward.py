"""A forward pass over a batch: hidden states, router statistics, chosen experts."""

from typing import Any

import jax

from distill.batch import Batch
from models.layers import moe
from models.layers.lora import LORA
from models.transformer import Params, Transformer


def compute_hidden(
    model: Transformer, params: Params, batch: Batch, lora_params: Params | None = None
) -> jax.Array:
    """Returns final hidden states [B, T, D] in the model's dtype; lora_params: a LoRA's."""
    out_BTD, _ = model.apply(
        {"params": params} if lora_params is None else {"params": params, LORA: lora_params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
    )
    return out_BTD


def compute_hidden_and_router_stats(
    model: Transformer, params: Params, batch: Batch, lora_params: Params | None = None
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Returns the hidden states, and (sum, count) pairs of models.layers.moe.sum_router_stats.

    Where the batch holds the experts that its sampler chose, they are replayed.
    """
    applied: Any = model.apply(
        {"params": params} if lora_params is None else {"params": params, LORA: lora_params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
        replay_BTLA=batch.experts_BTLA,
        mutable=[moe.ROUTER],
    )
    (out_BTD, _), noted = applied
    return out_BTD, moe.sum_router_stats(noted.get(moe.ROUTER, {}))


def compute_chosen_experts(model: Transformer, params: Params, batch: Batch) -> jax.Array:
    """Returns the experts that a forward pass chooses, int16 as Batch.experts_BTLA."""
    applied: Any = model.apply(
        {"params": params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
        mutable=[moe.CHOSEN],
    )
    return moe.get_chosen_experts(applied[1][moe.CHOSEN])
