"""Draws one token from each row of logits, from a tempered and truncated distribution.

Each row has its own key, and nothing computed for a row depends on the others: its draws are the
same alone, in any batch, in any order and on any mesh.

Nothing here sorts a vocabulary. A truncation is a floor: a token is kept if its tempered logit
reaches it. So the set of kept tokens depends on the logits alone, not on the order of equal ones:
tokens that tie with the last one kept are kept too.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.checks import Range, check_fields
from models.errors import UserError

NUCLEUS_CANDIDATES = 128  # likeliest tokens in which a top_p nucleus is searched first
MAX_BLOCKS = 128  # blocks that a vocabulary is cut into, or tokens of a block; a divisor is taken


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: softmax(logits / temperature), truncated.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 truncate nothing, as in training.
    presence_penalty is subtracted once from the logit of each token that the response (not the
    prompt) contains, as in OpenAI's API and vLLM.

    Raises:
      UserError: naming the field that is out of bounds, and its value.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        # Logits divided by less than 1e-6 could overflow.
        if self.temperature != 0 and self.temperature not in Range(1e-6):
            raise UserError(
                f"temperature={self.temperature}: must be 0 (greedy) or at least 1e-06, and finite"
            )
        check_fields(
            self,
            {
                "top_k": Range(off="off", whole=True),
                "top_p": Range(0, 1, above=True),
                "min_p": Range(0, 1, off="off"),
            },
        )
        if self.presence_penalty not in Range(-math.inf):
            raise UserError(f"presence_penalty={self.presence_penalty}: must be a finite number")

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raises UserError if top_k exceeds the vocabulary."""
        if self.top_k > vocab_size:
            raise UserError(f"top_k={self.top_k}: the vocabulary has {vocab_size} tokens")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling:
    """A Sampling for each row, float32 [B] each, so that no other values need another program."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    presence_penalty_B: jax.Array


def pack_samplings(samplings: Sequence[Sampling]) -> np.ndarray:
    """Returns the fields of RowSampling for these rows, float32 [B, 5]."""
    return np.array([dataclasses.astuple(sampling) for sampling in samplings], np.float32)


def find_top_k(x_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest values of each row and their indices, [B, k], the largest first.

    They lie in the k blocks with the largest maxima: only those are searched.
    """
    B, V = x_BV.shape
    width = math.gcd(V, MAX_BLOCKS)
    if 2 * k * width >= V:
        return jax.lax.top_k(x_BV, k)
    blocks = x_BV.reshape(B, V // width, width)
    _, chosen_Bk = jax.lax.top_k(jnp.max(blocks, axis=-1), k)
    chosen_Bk = jnp.sort(chosen_Bk, axis=-1)  # ties go to the first index, as in a plain top_k
    candidates = jnp.take_along_axis(blocks, chosen_Bk[:, :, None], axis=1)
    indices = chosen_Bk[:, :, None] * width + jnp.arange(width, dtype=jnp.int32)[None, None]
    values_Bk, best_Bk = jax.lax.top_k(candidates.reshape(B, -1), k)
    return values_Bk, jnp.take_along_axis(indices.reshape(B, -1), best_Bk, axis=1)


def _to_ordered_bits(bits: jax.Array) -> jax.Array:
    """Maps float32 bit patterns to int32 in the order of the floats, and back: those of negative
    floats run backwards."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _compute_weights(z_BV: jax.Array, floor_B1: jax.Array) -> jax.Array:
    """Returns the probabilities of tokens that reach the floor, relative to the likeliest."""
    highest_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
    # `where` inside exp: outside it, a CPU computes one token at a time.
    return jnp.exp(jnp.where(z_BV >= floor_B1, z_BV - highest_B1, -jnp.inf))


def _find_nucleus_floor(
    z_BV: jax.Array, floor_B1: jax.Array, top_p: float | jax.Array
) -> jax.Array:
    """Returns the floor [B, 1] of the top_p nucleus, of any size, by bisection over its 32 bits.

    A sort of 152k logits takes a CPU ten times as long, and a mesh would have to gather them.
    """
    weights_BV = _compute_weights(z_BV, floor_B1)
    target_B1 = top_p * jnp.sum(weights_BV, axis=-1, keepdims=True)
    return _bisect_floor(z_BV, weights_BV, target_B1)


def _bisect_floor(z_BV: jax.Array, weights_BV: jax.Array, target_B1: jax.Array) -> jax.Array:
    """Returns the largest z [B, 1] that tokens of this total weight reach."""
    images_BV = _to_ordered_bits(jax.lax.bitcast_convert_type(z_BV, jnp.int32))

    def narrow_floor(i, low_B1):
        trial_B1 = low_B1 + jnp.left_shift(jnp.int32(1), 31 - i)
        above_BV = jnp.where(images_BV >= trial_B1, weights_BV, 0)
        enough_B1 = jnp.sum(above_BV, axis=-1, keepdims=True) >= target_B1
        return jnp.where(enough_B1, trial_B1, low_B1)

    low_B1 = jnp.full(target_B1.shape, jnp.iinfo(jnp.int32).min)
    low_B1 = jax.lax.fori_loop(0, 32, narrow_floor, low_B1)
    return jax.lax.bitcast_convert_type(_to_ordered_bits(low_B1), jnp.float32)


def _find_floor(z_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the least tempered logit that is kept, [B, 1]."""
    V = z_BV.shape[-1]
    highest_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
    floor_B1 = jnp.full_like(highest_B1, -jnp.inf)
    k, top_p = sampling.top_k, sampling.top_p
    if k or top_p < 1:
        top_Bk, _ = find_top_k(z_BV, k or min(NUCLEUS_CANDIDATES, V))
        if k:
            # Not the last column: XLA turns such a slice into a sort of the vocabulary.
            floor_B1 = jnp.min(top_Bk, axis=-1, keepdims=True)
        if top_p < 1:
            target_B1 = top_p * jnp.sum(_compute_weights(z_BV, floor_B1), axis=-1, keepdims=True)
            reached_Bk = jnp.cumsum(jnp.exp(top_Bk - highest_B1), axis=-1) >= target_B1
            near_B1 = jnp.max(jnp.where(reached_Bk, top_Bk, -jnp.inf), axis=-1, keepdims=True)
            # Rows that fit keep their result when others do not; NaN rows have none.
            fits_B1 = reached_Bk[:, -1:] | jnp.isnan(target_B1)
            floor_B1 = jax.lax.cond(
                jnp.all(fits_B1),
                lambda: near_B1,
                lambda: jnp.where(fits_B1, near_B1, _find_nucleus_floor(z_BV, floor_B1, top_p)),
            )
    if sampling.min_p > 0:
        floor_B1 = jnp.maximum(floor_B1, highest_B1 + math.log(sampling.min_p))
    return floor_B1


def _find_row_floors(z_BV: jax.Array, sampling: RowSampling) -> jax.Array:
    """Returns the floors [B, 1] that `_find_floor` finds for each row's own sampling."""
    k_B1, top_p_B1 = sampling.top_k_B[:, None], sampling.top_p_B[:, None]
    highest_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
    top_Bk, _ = find_top_k(z_BV, min(NUCLEUS_CANDIDATES, z_BV.shape[-1]))
    num_found = top_Bk.shape[-1]
    among_Bk = jnp.arange(num_found)[None] < k_B1
    near_B1 = jnp.min(jnp.where(among_Bk, top_Bk, jnp.inf), axis=-1, keepdims=True)
    near_B1 = jnp.where(k_B1 > 0, near_B1, -jnp.inf)
    is_deep_B1 = k_B1 > num_found
    floor_B1 = jax.lax.cond(
        jnp.any(is_deep_B1),
        lambda: jnp.where(is_deep_B1, _bisect_floor(z_BV, jnp.ones_like(z_BV), k_B1), near_B1),
        lambda: near_B1,
    )
    target_B1 = top_p_B1 * jnp.sum(_compute_weights(z_BV, floor_B1), axis=-1, keepdims=True)
    # `where` again inside exp. Ties with the last of the top k may lie beyond it, as in the target.
    weights_Bk = jnp.exp(jnp.where(top_Bk >= floor_B1, top_Bk - highest_B1, -jnp.inf))
    reached_Bk = jnp.cumsum(weights_Bk, axis=-1) >= target_B1
    near_B1 = jnp.max(jnp.where(reached_Bk, top_Bk, -jnp.inf), axis=-1, keepdims=True)
    is_near_B1 = reached_Bk[:, -1:] | jnp.isnan(target_B1) | (top_p_B1 >= 1)
    nucleus_B1 = jax.lax.cond(
        jnp.all(is_near_B1),
        lambda: near_B1,
        lambda: jnp.where(is_near_B1, near_B1, _find_nucleus_floor(z_BV, floor_B1, top_p_B1)),
    )
    floor_B1 = jnp.where(top_p_B1 < 1, jnp.maximum(floor_B1, nucleus_B1), floor_B1)
    return jnp.maximum(floor_B1, highest_B1 + jnp.log(sampling.min_p_B)[:, None])


def _draw_by_row(
    z_BV: jax.Array, logits_BV: jax.Array, keys_B: jax.Array, sampling: RowSampling
) -> tuple[jax.Array, jax.Array]:
    """Draws as `draw_tokens` does with each row's own sampling; z_BV: logits after penalties."""
    is_greedy_B = sampling.temperature_B == 0
    z_BV = z_BV / jnp.where(is_greedy_B, 1, sampling.temperature_B)[:, None]
    is_cut_B = (sampling.top_k_B > 0) | (sampling.top_p_B < 1) | (sampling.min_p_B > 0)
    floor_B1 = jax.lax.cond(
        jnp.any(is_cut_B & ~is_greedy_B),
        lambda: _find_row_floors(z_BV, sampling),
        lambda: jnp.full_like(z_BV[:, :1], -jnp.inf),
    )
    greedy_B = _draw_greedy(z_BV)
    drawn_B, logp_B = _draw_gumbel(jnp.where(z_BV >= floor_B1, z_BV, -jnp.inf), keys_B)
    model_logp_B = compute_model_logp(logits_BV, greedy_B)
    return jnp.where(is_greedy_B, greedy_B, drawn_B), jnp.where(is_greedy_B, model_logp_B, logp_B)


def truncate_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns tempered logits with -inf for the tokens that are not kept; temperature above 0.

    Keeps the top_k likeliest; of these the nucleus (arXiv 1904.09751), the smallest set of the
    likeliest whose probability, taken after top_k as in Hugging Face, reaches top_p; and of these
    the tokens at least min_p times as likely as the likeliest (arXiv 2407.01082).
    """
    sampling.check_vocab_size(logits_BV.shape[-1])
    z_BV = logits_BV / sampling.temperature
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
        return z_BV
    return jnp.where(z_BV >= _find_floor(z_BV, sampling), z_BV, -jnp.inf)


def _split_blocks(z_BV: jax.Array) -> jax.Array:
    """Returns [B, C, W]: blocks of consecutive tokens, which a mesh may split."""
    B, V = z_BV.shape
    return z_BV.reshape(B, math.gcd(V, MAX_BLOCKS), -1)


def _pick_best(
    score_BC: jax.Array, z_BCW: jax.Array, noise_BW: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the best token, with noise, of the block with the best score, and its z: [B] each."""
    block_B1 = jnp.argmax(score_BC, axis=-1, keepdims=True)
    z_BW = jnp.take_along_axis(z_BCW, block_B1[:, :, None], axis=1)[:, 0]
    best_B1 = jnp.argmax(z_BW + noise_BW, axis=-1, keepdims=True)
    token_B1 = block_B1 * z_BCW.shape[-1] + best_B1
    return token_B1[:, 0], jnp.take_along_axis(z_BW, best_B1, axis=1)[:, 0]


def _draw_gumbel(z_BV: jax.Array, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws a token of softmax(z) for each row; returns it and its log-probability, [B] each.

    Takes two Gumbel maxima: a block of the vocabulary by its total probability, then a token of the
    block. Has the distribution of one maximum over all tokens, from 1% of the random numbers.
    """
    z_BCW = _split_blocks(z_BV)
    C, W = z_BCW.shape[1:]
    highest_B1 = jnp.max(z_BV, axis=-1, keepdims=True)
    mass_BC = jnp.log(jnp.sum(jnp.exp(z_BCW - highest_B1[:, :, None]), axis=-1))
    # "high" precision: a token of probability 1e-9 is drawn that rarely.
    noise_BX = jax.vmap(lambda key: jax.random.gumbel(key, (C + W,), mode="high"))(keys_B)
    tokens_B, z_B = _pick_best(mass_BC + noise_BX[:, :C], z_BCW, noise_BX[:, C:])
    return tokens_B, z_B - highest_B1[:, 0] - jax.nn.logsumexp(mass_BC, axis=-1)


def _draw_greedy(z_BV: jax.Array) -> jax.Array:
    """Returns the first of the likeliest tokens, [B].

    Searches by blocks: one argmax over 152k takes a CPU 20 times as long.
    """
    z_BCW = _split_blocks(z_BV)
    tokens_B, _ = _pick_best(jnp.max(z_BCW, axis=-1), z_BCW, jnp.zeros_like(z_BCW[:, 0]))
    return tokens_B


def draw_tokens(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    sampling: Sampling | RowSampling,
    seen_BV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token for each row, with its log-probability under the distribution drawn from.

    Greedy draws have the model's own log-probability (temperature 1, no penalty) instead: that of a
    point mass would always be 0.

    Args:
      logits_BV: float32.
      keys_B: a random key for each row.
      sampling: one for all rows, or one for each.
      seen_BV: bool, the tokens of each response so far; needed for a presence penalty.

    Returns:
      Tokens [B] int32 and log-probabilities [B] float32. A row whose logits are no distribution
      (NaN among them, or an infinite maximum) gets token -1 and NaN; other rows are unaffected.
    """
    z_BV = logits_BV
    if isinstance(sampling, RowSampling):
        assert seen_BV is not None
        z_BV = z_BV - sampling.presence_penalty_B[:, None] * seen_BV
        tokens_B, logp_B = _draw_by_row(z_BV, logits_BV, keys_B, sampling)
        return _mark_unsound(logits_BV, tokens_B, logp_B)
    if sampling.presence_penalty:
        assert seen_BV is not None
        z_BV = z_BV - sampling.presence_penalty * seen_BV
    if sampling.temperature == 0:
        tokens_B = _draw_greedy(z_BV)
        logp_B = compute_model_logp(logits_BV, tokens_B)
    else:
        tokens_B, logp_B = _draw_gumbel(truncate_logits(z_BV, sampling), keys_B)
    return _mark_unsound(logits_BV, tokens_B, logp_B)


def _mark_unsound(
    logits_BV: jax.Array, tokens_B: jax.Array, logp_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Replaces the draws of rows whose logits are no distribution, as `draw_tokens` says."""
    # The maximum alone does not show it: XLA's on CPU may skip a NaN.
    highest_B, any_nan_B = jnp.max(logits_BV, axis=-1), jnp.any(jnp.isnan(logits_BV), axis=-1)
    sound_B = jnp.isfinite(highest_B) & ~any_nan_B
    return jnp.where(sound_B, tokens_B, -1).astype(jnp.int32), jnp.where(sound_B, logp_B, jnp.nan)


def compute_model_logp(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """Returns log-probabilities [B] under the model's distribution at temperature 1."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def find_model_top(logits_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the model's k likeliest tokens, likeliest first: ids and log-probabilities [B, k]."""
    values_Bk, ids_Bk = find_top_k(logits_BV, k)
    return ids_Bk, values_Bk - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
