"""The one noun. A Batch travels from data to loss; a stage returns a new one with more fields.

Letters in names, here and everywhere: B sequences, T tokens, S cache slots, N query heads, K kv
heads, Q = N/K, H head dim, D model, F feed-forward, V vocabulary, L layers, P prompts, G samples
per prompt (P·G = B).
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences with what is known about each token, and nothing about rows: one may hold several.

    positions count real tokens from 0; segments are 0 on padding and number the sequences packed
    in a row from 1; mask is true where a token is trained: response tokens and the stop token that
    ends them, never the prompt, nothing after the stop.
    """

    tokens_BT: jax.Array  # int32
    positions_BT: jax.Array  # int32
    segments_BT: jax.Array  # int32
    mask_BT: jax.Array  # bool
    thinking_BT: jax.Array | None = None  # bool: asked in thinking mode
    sampler_logp_BT: jax.Array | None = None  # float32, of the distribution drawn from
    finished_BT: jax.Array | None = None  # bool: of a sequence that ended by a stop token
    advantages_BT: jax.Array | None = None  # float32, of each response's reward; 0 elsewhere
    old_logp_BT: jax.Array | None = None  # float32: the trainer's own, before the step's updates
    reference_logp_BT: jax.Array | None = None  # float32
    # final hidden states of the teacher, or of each of several
    teacher_hidden_BTD: jax.Array | tuple[jax.Array, ...] | None = None
    teacher_weight_BTN: jax.Array | None = None  # float32: of N teachers, what each says counts
    # the same responses behind the prompts that a teacher reads, and at which token of those rows
    # each token lies
    teacher_inputs: "Batch | None" = None
    teacher_index_BT: jax.Array | None = None
    # of the teacher's likeliest tokens in the place of each token: ids, int32, and float32
    # log-probabilities
    teacher_top_BTK: tuple[jax.Array, jax.Array] | None = None
    # int16: the sampler's, which the update then replays; -1 where they are not known
    experts_BTLA: jax.Array | None = None
