"""One update of the optimiser on given batches, and the sequences of a step."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from distill.batch import TeacherOutput
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


def scored_by(batch: Any, hidden_BTE: Any, head_VE: Any) -> Any:
    """Returns the batch with the output of one teacher."""
    output = TeacherOutput(hidden_BTE=(hidden_BTE,), heads_VE=(head_VE,))
    return dataclasses.replace(batch, teacher=output)


def one_update(
    programs: Any, state: Any, batch: Any, frozen: Any = None, accumulate: int = 1
) -> tuple[Any, Any, Any]:
    """Runs one update on a batch split into micro-batches of interleaved rows. Returns the state,
    the metrics, and the stats of the whole batch."""
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    heads = batch.teacher and batch.teacher.heads_VE

    def without_heads(batch: Any, heads_VE: Any = ()) -> Any:
        """Removes the heads, which are not split by rows."""
        if not batch.teacher:
            return batch
        teacher = dataclasses.replace(batch.teacher, heads_VE=heads_VE)
        return dataclasses.replace(batch, teacher=teacher)

    hosted = jax.tree.map(np.asarray, without_heads(batch))
    parts = [jax.tree.map(lambda x, k=k: x[k::accumulate], hosted) for k in range(accumulate)]
    micros = (
        without_heads(jax.device_put(part, mesh_lib.make_row_sharding(mesh)), heads)
        for part in parts
    )
    state, metrics, kept_stats = programs.run_update(
        state, micros, frozen, single_microbatch=accumulate == 1
    )
    stats = jax.tree.map(
        lambda *x: np.stack(x, 1).reshape(-1, *x[0].shape[1:]),
        *(kept_stats[k] for k in range(accumulate)),
    )
    return state, metrics, stats


def sequences_of(minibatches: Any, load: Any = lambda micro: micro.make_batch()) -> list[Any]:
    """Returns the sequences that a step trains on, in order of their numbers, as batches of arrays
    [tokens, ...]. `load` returns the arrays of a micro-batch."""
    sequences = {}
    for micro in (micro for part in minibatches for micro in part):
        batch = dataclasses.replace(load(micro), teacher_inputs=None)
        if batch.teacher:
            teacher = dataclasses.replace(batch.teacher, heads_VE=())
            batch = dataclasses.replace(batch, teacher=teacher)
        batch = jax.tree.map(np.asarray, batch)
        for row, numbers in enumerate(micro.rows):
            for segment, number in enumerate(numbers, start=1):
                own = batch.segments_BT[row] == segment
                sequences[number] = jax.tree.map(lambda x, row=row, own=own: x[row][own], batch)
    return [sequences[number] for number in sorted(sequences)]
