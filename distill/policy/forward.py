"""A forward pass over a batch: hidden states, and what the routers did."""

from typing import Any

import jax

from distill.batch import Batch
from models.layers import moe
from models.layers.lora import LORA
from models.transformer import Params, Transformer


def compute_hidden(
    model: Transformer, params: Params, batch: Batch, lora_params: Params | None = None
) -> jax.Array:
    """Final hidden states [B, T, D] of a batch, in the model's dtype; `trained` as in `routed`."""
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
    """`hidden`, and (sum, count) pairs of what the routers did (models.layers.moe.sums).

    With `trained`, a LoRA, beside the parameters. Where the batch says which experts its sampler
    chose, they are chosen again.
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
    """Which experts a forward pass chooses, [B, T, L, A] int16: what Batch.experts_BTLA holds."""
    applied: Any = model.apply(
        {"params": params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
        mutable=[moe.CHOSEN],
    )
    return moe.get_chosen_experts(applied[1][moe.CHOSEN])
