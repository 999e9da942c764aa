"""The Batch that passes from data to loss; each step returns a new one with more fields.

Letters in names, here and everywhere: B sequences, T tokens, S cache slots, N query heads, K kv
heads, Q = N/K, H head dim, D model, F feed-forward, V vocabulary, L layers, P prompts, G samples
per prompt (P·G = B). N teachers, each with model dimension E.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOutput:
    """The distributions of N teachers at every token, as the loss reads them.

    Holds hidden states instead of logits: the loss streams them through the heads, so the exact
    distribution over the whole vocabulary takes only E numbers per token. The teachers'
    distributions are mixed: q = Σ weight·q_n. Never differentiated.
    """

    hidden_BTE: tuple[jax.Array, ...]  # final hidden states, in each teacher's dtype
    weight_BTN: jax.Array | None = None  # float32, summing to 1 at each token; None: one teacher
    heads_VE: tuple[jax.Array, ...]  # output heads; a moving average's is the current one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences with data about each token. A row may hold several sequences.

    Never modified in place: fields are added with `dataclasses.replace(batch, ...)`.
    """

    tokens_BT: jax.Array  # int32
    positions_BT: jax.Array  # int32: counts real tokens from 0
    segments_BT: jax.Array  # int32: the number of the sequence in its row from 1, 0 on padding
    # bool: True at trained tokens, the response and its stop token; False at the prompt and after
    # the stop
    mask_BT: jax.Array
    thinking_BT: jax.Array | None = None  # bool: the prompt asks for thinking mode
    sampler_logp_BT: jax.Array | None = None  # float32: log-probability as sampled
    finished_BT: jax.Array | None = None  # bool: the sequence ended with a stop token
    advantages_BT: jax.Array | None = None  # float32: from the response's reward; 0 elsewhere
    old_logp_BT: jax.Array | None = None  # float32: the trainer's own, before the step's updates
    reference_logp_BT: jax.Array | None = None  # float32
    teacher: TeacherOutput | None = None  # set by teachers.local.score
    teacher_weight_BTN: jax.Array | None = None  # float32: for `teacher`, until that is set
    # the same responses after the teachers' own prompts, and each token's column there
    teacher_inputs: "Batch | None" = None
    teacher_index_BT: jax.Array | None = None  # int32
    # from teachers that are not run here: the hidden states of each, until `teacher` has them, ...
    teacher_hidden_BTE: tuple[jax.Array, ...] | None = None
    teacher_logp_BT: jax.Array | None = None  # float32: ... the log-probability of each token, ...
    # ... or, also if stored with the response, int32 ids and float32 log-probabilities of the most
    # likely tokens at each position
    teacher_top_BTK: tuple[jax.Array, jax.Array] | None = None
    # int16: experts that the sampler chose, replayed by the update; -1 if unknown
    experts_BTLA: jax.Array | None = None
