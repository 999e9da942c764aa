"""A frozen model reads what the student wrote: the teacher, a judge, a reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from distill import head, losses, policy
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.policy import Policy
from models.qwen3 import model
from models.qwen3.model import Params, Qwen3


@functools.partial(jax.jit, static_argnums=0)
def hidden(qwen3: Qwen3, params: Params, batch: Batch) -> jax.Array:
    """Final hidden states [B, T, D], which lie split as the batch's rows do."""
    return mesh_lib.split_rows(policy.hidden(qwen3, params, batch))


def score(teacher: Policy, batch: Batch) -> Batch:
    """Fills teacher_hidden_BTD, [B, T, D of the teacher] in the teacher's dtype.

    Not logits: the loss streams the teacher's head over these, so the exact distribution over the
    whole vocabulary is at hand at the price of D numbers a token. Temperature 1, no gradient.
    """
    return dataclasses.replace(
        batch, teacher_hidden_BTD=hidden(teacher.model, teacher.params, batch)
    )


def logp(reader: Policy, batch: Batch, logits_mib: float) -> jax.Array:
    """[B, T] float32: the log-probability that a model gives each token, 0 for the first."""
    return logps(reader.model, logits_mib, reader.params, batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def logps(qwen3: Qwen3, logits_mib: float, params: Params, batch: Batch) -> jax.Array:
    """See `logp`."""
    stats = head.token_stats(
        policy.hidden(qwen3, params, batch),
        model.head(params),
        losses.shift(batch.tokens_BT),
        logits_mib=logits_mib,
        split=mesh_lib.split_vocabulary,
    )
    return losses.unshift(stats["logp"])


def judge(teacher: Policy, batch: Batch, logits_mib: float) -> jax.Array:
    """[B] float32: the mean log-probability that the teacher gives the tokens of each response."""
    logp_BT = logp(teacher, batch, logits_mib)
    return _response_mean(logp_BT, batch)


@jax.jit
def _response_mean(logp_BT: jax.Array, batch: Batch) -> jax.Array:
    mask_BT = batch.mask_BT.astype(logp_BT.dtype)
    return jnp.sum(logp_BT * mask_BT, axis=1) / jnp.maximum(jnp.sum(mask_BT, axis=1), 1)
