"""Rotary position embeddings (RoPE, arXiv 2104.09864), with linear and YaRN scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from models.config import Config, RopeScaling
from models.layers import sharded


def compute_frequencies(c: Config) -> tuple[np.ndarray, float]:
    """Returns radians per position of each pair of dimensions, float64 [H/2], and the factor on cos
    and sin.

    Linear scaling divides every frequency by the factor (arXiv 2306.15595). YaRN (arXiv 2309.00071,
    sections 3.2 to 3.4) keeps those that turn more than beta_fast times within the positions of
    pretraining, divides those that turn less than beta_slow times, and interpolates between;
    queries and keys are both scaled by the attention factor, 0.1 ln(factor) + 1.
    """
    pairs = c.head_dim // 2
    plain = c.rope_theta ** (-np.arange(pairs) / pairs)
    s = c.rope_scaling
    if s is None:
        return plain, 1.0
    if s.rope_type == "linear":
        return plain / s.factor, 1.0

    def find_correction_dim(num_turns: float) -> float:
        wavelength = s.original_max_position_embeddings / num_turns
        return pairs * math.log(wavelength / (2 * math.pi)) / math.log(c.rope_theta)

    low, high = find_correction_dim(s.beta_fast), find_correction_dim(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    high += 0.001 if low == high else 0
    divided = np.clip((np.arange(pairs) - low) / (high - low), 0, 1)
    return plain * (1 - divided) + plain / s.factor * divided, _compute_attention_factor(s)


def _compute_attention_factor(s: RopeScaling) -> float:
    def get_mscale(mscale: float) -> float:
        return 0.1 * mscale * math.log(s.factor) + 1

    if s.attention_factor is not None:
        return s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return get_mscale(s.mscale) / get_mscale(s.mscale_all_dim)
    return get_mscale(1)


def compute_rotary(positions_BT: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines [B, T, 1, H/2] in float32.

    Angles are products in float32, as in the code that these models were trained with: at position
    p they are accurate to p · 2⁻²³ radians, 0.016 at 131,072.
    """
    exact, factor = compute_frequencies(config)
    turns_H = jnp.asarray(exact, jnp.float32)[None, None, None]
    angles = positions_BT[..., None, None].astype(jnp.float32) * turns_H
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rotary(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (i, i + H/2), Hugging Face's order of a head's dimensions.

    The halves are stacked along a new axis, because with a concatenation the TPU compiler failed an
    internal check at some numbers of tokens. If heads are split over devices it does not fail, and
    stacking would make the gradient fetch more, so there they are concatenated.
    """
    cos, sin = (r.astype(x_BTNH.dtype) for r in rope)
    low, high = jnp.split(x_BTNH, 2, axis=-1)
    halves = (low * cos - high * sin, high * cos + low * sin)
    if sharded.count_shards("act_heads") > 1:
        return jnp.concatenate(halves, axis=-1)
    return jnp.stack(halves, axis=-2).reshape(x_BTNH.shape)
