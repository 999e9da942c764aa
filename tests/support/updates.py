"""One update of the optimiser, by hand, and what it trains on."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from distill.runtime import mesh as mesh_lib
from models import families
from models.qwen3.config import Config

CONFIG = Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=64,
)


TEACHER = dataclasses.replace(CONFIG, hidden_size=64, tie_word_embeddings=False)


@functools.cache
def initial(config, seed):
    init = jax.jit(families.init_params, static_argnums=0)
    return jax.tree.map(np.asarray, init(config, jax.random.key(seed)))


def placed(config, seed, mesh):
    shardings = jax.tree.map(lambda p: p.sharding, mesh_lib.make_abstract_params(config, mesh))
    return jax.device_put(initial(config, seed), shardings)


def one_update(
    programs: Any,
    state: Any,
    batch: Any,
    heads: Any = None,
    frozen: Any = None,
    accumulate: int = 1,
):
    """An update by a whole batch in micro-batches, whose rows interleave: the state, the metrics,
    and the stats of the whole batch."""
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    hosted = jax.tree.map(np.asarray, batch)
    parts = [jax.tree.map(lambda x, k=k: x[k::accumulate], hosted) for k in range(accumulate)]
    micros = (jax.device_put(part, mesh_lib.make_row_sharding(mesh)) for part in parts)
    single = accumulate == 1
    state, measured, found = programs.once(state, micros, heads, frozen, single=single)
    each = [found[k] for k in range(accumulate)]
    stats = jax.tree.map(lambda *x: np.stack(x, 1).reshape(-1, *x[0].shape[1:]), *each)
    return state, measured, stats


def sequences_of(work: Any, made: Any = lambda micro: micro.make_batch()) -> list[Any]:
    """What a step trains on, sequence by sequence in the order that they are numbered: batches of
    arrays [tokens, ...]. `made` gives a micro-batch's arrays."""
    found = {}
    for micro in (micro for part in work for micro in part):
        batch = dataclasses.replace(made(micro), teacher_inputs=None)
        batch = jax.tree.map(np.asarray, batch)
        for row, numbers in enumerate(micro.rows):
            for segment, number in enumerate(numbers, start=1):
                own = batch.segments_BT[row] == segment
                found[number] = jax.tree.map(lambda x, row=row, own=own: x[row][own], batch)
    return [found[number] for number in sorted(found)]
