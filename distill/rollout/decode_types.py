"""What the programs of sampling are compiled for, keep on the device, and return."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill.rollout.drafts import MAX_ORDER, DraftTable
from distill.rollout.sampling import Sampling
from models.layers.pages import Pages
from models.layers.slabs import Slabs
from models.transformer import Transformer

# The host's int32 fields for each row: its newest token (-1: the device has it), its tokens in the
# cache, the tokens drawn so far and at most, its key, and 1 where it decodes a sequence.
ROW_FIELDS = ("token", "length", "drawn", "limit", "key0", "key1", "live")
# With Decoder.draft_tokens also drafts.hash_prompt, and the tokens before the newest.
DRAFT_FIELDS = ("group", *(f"before{i}" for i in range(MAX_ORDER - 1, 0, -1)))

# Why a row ended: a stop token, its limit, or NaN logits.
UNFINISHED, STOP, LENGTH, ERROR = range(4)
FINISH_REASONS = {
    UNFINISHED: "",
    STOP: "stop",
    LENGTH: "length",
    ERROR: "error",
}


# Of a segment with drafts: its steps, the rows of all of them, the drafts, those that were compared
# with a draw or missing where a draw was made, and those that equalled theirs.
DRAFT_COUNTS = ("steps", "row_steps", "drafted", "compared", "accepted")


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Size and kind of the key-value cache."""

    backend: str  # slabs, or a backend of models.layers.pages
    dtype: str
    rows: int  # that decode together
    shards: int  # that the mesh splits the rows into
    pages: int  # of each shard; for slabs its rows
    page_size: int  # tokens
    max_pages_per_row: int


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Everything that the programs are compiled for."""

    model: Transformer  # from decode_weights.prepare_weights
    sampling: Sampling
    stop_ids: tuple[int, ...]
    cache: CacheShape
    segment: int  # tokens that a row may add in one call of `decode`
    top_logprobs: int = 0  # likeliest tokens to record at each step
    routing: bool = False  # record the experts of each token
    by_row: bool = False  # each row brings its own sampling, and `sampling` is not read
    # Tokens that each step drafts and checks for a row (distill/rollout/drafts.py). 0: none, but
    # what is drawn is remembered; None: neither.
    draft_tokens: int | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """State that stays on the device between calls."""

    cache: Pages | Slabs
    token_B: jax.Array  # int32: the newest token of each row, not in the cache yet
    seen_BV: jax.Array | None  # bool: tokens of the response so far, for a presence penalty
    drafts: DraftTable | None = None  # with Decoder.draft_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOutput:
    """Draws of one call of `decode`: row b's tokens are tokens_WB[:count_B[b], b]."""

    tokens_WB: jax.Array  # int32
    logp_WB: jax.Array  # float32, under the distribution drawn from
    count_reason_2B: jax.Array  # int32: token counts, and UNFINISHED, STOP, LENGTH or ERROR
    model_logp_WB: jax.Array | None = None  # float32, at temperature 1; with top_logprobs
    top_ids_WBk: jax.Array | None = None  # int32, the likeliest tokens
    top_logp_WBk: jax.Array | None = None  # float32
    experts_WBLA: jax.Array | None = None  # int16, of the token that each step read
    draft_counts_5: jax.Array | None = None  # int32, see DRAFT_COUNTS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """State that one decoding step passes to the next."""

    step: jax.Array
    cache: Any
    token_B: jax.Array
    length_B: jax.Array
    drawn_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None
    output: DecodeOutput
    drafts: DraftTable | None = None
    draft_counts_5: jax.Array | None = None


def init_output(decoder: Decoder, B: int) -> DecodeOutput:
    W, k = decoder.segment, decoder.top_logprobs
    tokens_WB, logp_WB = jnp.zeros((W, B), jnp.int32), jnp.zeros((W, B), jnp.float32)
    output = DecodeOutput(tokens_WB, logp_WB, jnp.zeros((2, B), jnp.int32))
    if decoder.routing:
        experts_WBLA = jnp.zeros((W, B, *decoder.model.config.routing_shape), jnp.int16)
        output = dataclasses.replace(output, experts_WBLA=experts_WBLA)
    if k:
        ids_WBk, logp_WBk = jnp.zeros((W, B, k), jnp.int32), jnp.zeros((W, B, k), jnp.float32)
        output = dataclasses.replace(
            output, model_logp_WB=logp_WB, top_ids_WBk=ids_WBk, top_logp_WBk=logp_WBk
        )
    return output
