"""Forward passes over a batch: hidden states, router statistics, and log-probabilities."""

from typing import Any

import jax

from distill.batch import Batch
from distill.objectives import fused_head, losses
from distill.runtime import mesh as mesh_lib
from models import transformer
from models.layers import moe
from models.layers.lora import LORA
from models.transformer import Params, Transformer


def _join_lora(params: Params, lora_params: Params | None) -> Any:
    return {"params": params} if lora_params is None else {"params": params, LORA: lora_params}


def compute_hidden(
    model: Transformer, params: Params, batch: Batch, lora_params: Params | None = None
) -> jax.Array:
    """Computes the final hidden states [B, T, D] of a batch, in the model's dtype.

    lora_params: a LoRA to apply beside the parameters.
    """
    variables = _join_lora(params, lora_params)
    out_BTD, _ = model.apply(variables, batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    return out_BTD


def compute_hidden_and_router_stats(
    model: Transformer, params: Params, batch: Batch, lora_params: Params | None = None
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Like `compute_hidden`, and returns (sum, count) pairs of the routers (models.layers.moe).

    Routes tokens to the experts that the batch records (experts_BTLA), if any.
    """
    applied: Any = model.apply(
        _join_lora(params, lora_params),
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
        replay_BTLA=batch.experts_BTLA,
        mutable=[moe.ROUTER],
    )
    (out_BTD, _), collections = applied
    return out_BTD, moe.sum_router_stats(collections.get(moe.ROUTER, {}))


def compute_logp(
    hidden_BTD: jax.Array, params: Params, batch: Batch, loss_chunk_mib: float, temperature: float
) -> jax.Array:
    """Computes log-probabilities [B, T], float32, of the batch's trained tokens; 0 elsewhere.

    hidden_BTD: final hidden states of the batch under `params`.
    """
    inputs = fused_head.HeadInputs(
        hidden_BTD,
        transformer.get_output_head(params),
        losses.shift(batch.tokens_BT),
        losses.shift(batch.mask_BT),
    )
    options = fused_head.StatsOptions(
        loss_chunk_mib,
        split=mesh_lib.split_vocabulary,
        temperature=temperature,
        shards=mesh_lib.count_shards(*batch.tokens_BT.shape),
    )
    return losses.unshift(fused_head.compute_token_stats(inputs, options)["logp"])
