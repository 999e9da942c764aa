"""A tiny random model to decode with, and rows for it."""

import functools
from typing import Any

import jax
import numpy as np

from distill import rollout
from distill.rollout import RolloutOptions, SamplingModel, Sequence
from distill.rollout.sampling import Sampling
from distill.runtime import mesh as mesh_lib
from models import families, transformer
from models.qwen3.config import Config

CONFIG = Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
)
QWEN3 = families.make_model(CONFIG)
STOPS = (3, 7)
P, R = 24, 40
SMALL = RolloutOptions(slots=8, max_length=P + R, segment=8, prefill_chunk=32)


@jax.jit
def _init_weights(key: jax.Array) -> transformer.Params:
    return families.init_params(CONFIG, key)


@functools.cache
def weights(seed: int, shape: tuple[int, ...]):
    mesh = mesh_lib.make_mesh(*shape)
    shardings = jax.tree.map(lambda p: p.sharding, mesh_lib.make_abstract_params(CONFIG, mesh))
    return mesh, jax.device_put(_init_weights(jax.random.key(seed)), shardings)


def make_rows(prompts: int, samples: int = 1, seed: int = 0, longest: int = R, first: int = 0):
    """Returns rows of random prompts and limits, which depend on the number of the prompt alone."""
    rows = []
    for p in range(first, first + prompts):
        rng = np.random.default_rng((seed, p))
        prompt = rng.integers(8, 64, rng.integers(1, P + 1)).tolist()
        keys = rollout.make_row_keys(jax.random.key(5), [p] * samples, range(samples))
        rows += [Sequence(prompt, key, int(rng.integers(1, longest + 1))) for key in keys]
    return rows


def sample_rows(
    rows: list[Sequence],
    options: RolloutOptions = SMALL,
    shape: tuple[int, ...] = (1, 1, 1),
    seed: int = 0,
    sampling: Sampling | None = None,
    **kwargs: Any,
) -> list[Sequence]:
    mesh, params = weights(seed, shape)
    with mesh_lib.use_mesh(mesh):
        return list(
            rollout.sample(
                SamplingModel(QWEN3, params, STOPS),
                rows,
                sampling=sampling or Sampling(),
                options=options,
                **kwargs,
            )
        )


def get_draws(rows: list[Sequence]):
    return [(row.tokens, row.finish_reason) for row in rows]
