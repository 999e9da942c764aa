"""The one noun. A Batch travels from data to loss; a stage returns a new one with more fields.

Letters in names, here and everywhere: B sequences, T tokens, S cache slots, N query heads, K kv
heads, Q = N/K, H head dim, D model, F feed-forward, V vocabulary, L layers, P prompts, G samples
per prompt (P·G = B). Of teachers, N counts them and E is the model dimension of each.
"""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOutput:
    """The distributions of N teachers at every token, as the loss reads them.

    Not logits: the loss streams the heads over the hidden states, so the exact distribution over
    the whole vocabulary costs E numbers a token. The teachers' distributions are mixed:
    q = Σ weight·q_n. Never differentiated.
    """

    hidden_BTE: tuple[jax.Array, ...]  # final hidden states, in each teacher's dtype
    weight_BTN: jax.Array | None = None  # float32, summing to 1 at each token; None: one teacher
    heads_VE: tuple[jax.Array, ...]  # output heads; of a moving average, that of this update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences with what is known of each token. A row may hold several sequences.

    Never changed in place: a stage that knows more returns `dataclasses.replace(batch, ...)`.
    """

    tokens_BT: jax.Array  # int32
    positions_BT: jax.Array  # int32: counts real tokens from 0
    segments_BT: jax.Array  # int32: the number of the sequence in its row from 1, 0 on padding
    # bool: where a token is trained, i.e. response tokens and the stop token that ends them, never
    # the prompt, nothing after the stop
    mask_BT: jax.Array
    thinking_BT: jax.Array | None = None  # bool: the prompt asks for thinking mode
    sampler_logp_BT: jax.Array | None = None  # float32: log-probability as sampled
    finished_BT: jax.Array | None = None  # bool: the sequence ended with a stop token
    advantages_BT: jax.Array | None = None  # float32: from the response's reward; 0 elsewhere
    old_logp_BT: jax.Array | None = None  # float32: the trainer's own, before the step's updates
    reference_logp_BT: jax.Array | None = None  # float32
    teacher: TeacherOutput | None = None  # set by teachers.local.score
    teacher_weight_BTN: jax.Array | None = None  # float32: each teacher's weight, until it is set
    # the same responses after the prompts that teachers read, and the column there of each token
    teacher_inputs: "Batch | None" = None
    teacher_index_BT: jax.Array | None = None  # int32
    # stored with the response: int32 ids and float32 log-probabilities of the teacher's most likely
    # tokens in the place of each token
    teacher_top_BTK: tuple[jax.Array, jax.Array] | None = None
    # int16: the experts that the sampler chose, which the update chooses again; -1 where unknown
    experts_BTLA: jax.Array | None = None
