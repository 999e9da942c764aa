"""A forward pass over a batch: hidden states, and what the routers did."""

from typing import Any

import jax

from distill.batch import Batch
from models.qwen3 import moe
from models.qwen3.lora import LORA
from models.qwen3.model import Params, Qwen3


def compute_hidden(
    qwen3: Qwen3, params: Params, batch: Batch, lora_params: Params | None = None
) -> jax.Array:
    """Final hidden states [B, T, D] of a batch, in the model's dtype; `trained` as in `routed`."""
    out_BTD, _ = qwen3.apply(
        {"params": params} if lora_params is None else {"params": params, LORA: lora_params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
    )
    return out_BTD


def compute_hidden_and_router_stats(
    qwen3: Qwen3, params: Params, batch: Batch, lora_params: Params | None = None
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """`hidden`, and (sum, count) pairs of what the routers did (models.qwen3.moe.sums).

    With `trained`, a LoRA, beside the parameters. Where the batch says which experts its sampler
    chose, they are chosen again.
    """
    applied: Any = qwen3.apply(
        {"params": params} if lora_params is None else {"params": params, LORA: lora_params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
        replay_BTLA=batch.experts_BTLA,
        mutable=[moe.ROUTER],
    )
    (out_BTD, _), noted = applied
    return out_BTD, moe.sum_router_stats(noted.get(moe.ROUTER, {}))


def compute_chosen_experts(qwen3: Qwen3, params: Params, batch: Batch) -> jax.Array:
    """Which experts a forward pass chooses, [B, T, L, A] int16: what Batch.experts_BTLA holds."""
    applied: Any = qwen3.apply(
        {"params": params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
        mutable=[moe.CHOSEN],
    )
    return moe.get_chosen_experts(applied[1][moe.CHOSEN])
