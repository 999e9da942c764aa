"""The teacher reads what the student wrote and hands over its final hidden states."""

import dataclasses
import functools

import jax

from distill import policy
from distill.batch import Batch
from distill.policy import Policy
from models.qwen3.model import Params, Qwen3


@functools.partial(jax.jit, static_argnums=0)
def _hidden(qwen3: Qwen3, params: Params, batch: Batch) -> jax.Array:
    return policy.hidden(qwen3, params, batch)


def score(teacher: Policy, batch: Batch) -> Batch:
    """Fills teacher_hidden_BTD, [B, T, D of the teacher] in the teacher's dtype.

    Not logits: the loss streams the teacher's head over these, so the exact distribution over the
    whole vocabulary is at hand at the price of D numbers a token. Temperature 1, no gradient.
    """
    return dataclasses.replace(
        batch, teacher_hidden_BTD=_hidden(teacher.model, teacher.params, batch)
    )
