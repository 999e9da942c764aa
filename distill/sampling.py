"""The distribution that tokens are drawn from, and the draw."""

import dataclasses

import jax
import jax.numpy as jnp

from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: softmax(logits / temperature), truncated.

    temperature 0 is greedy; top_k 0 and top_p 1 truncate nothing (what training uses).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1 (off)")


def truncate(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Tempered logits with -inf outside the top_k most likely and outside the nucleus top_p.

    The nucleus (arXiv 1904.09751) is the smallest set of most likely tokens whose probability,
    taken after top_k as Hugging Face does, reaches top_p.
    """
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # mass of the tokens ahead of this one
        kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
        logits_BV = jnp.where(
            logits_BV < jnp.min(kept_BV, axis=-1, keepdims=True), -jnp.inf, logits_BV
        )
    return logits_BV


def draw(
    logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """One token a row, and its log-probability under the distribution it was drawn from, [B].

    Greedy is a point mass, whose log-probability would always be 0; there the model's own
    log-probability (temperature 1) is recorded instead.
    """
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=-1)
    else:
        logits_BV = truncate(logits_BV, sampling)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return tokens_B.astype(jnp.int32), jnp.take_along_axis(logp_BV, tokens_B[:, None], axis=1)[:, 0]
