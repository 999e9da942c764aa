"""The programs that sampling runs on the device: an empty state, prompts, a segment.

A fixed number of rows decodes together. The host decides which sequence each row decodes and in
which pages its tokens lie (distill/rollout/scheduler.py), and passes that in with each call. The
device keeps the cache and the newest token of each row, which the next step starts from. The token
at response position i is drawn with fold_in(row key, i), so a row's draws depend on no other row.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from distill.rollout import drafts as drafts_lib
from distill.rollout.decode_steps import (
    SegmentRows,
    count_most_tokens,
    draw_step,
    read_newest,
    run_checked_step,
    run_model,
)
from distill.rollout.decode_types import (
    DRAFT_COUNTS,
    ROW_FIELDS,
    CacheShape,
    DecodeOutput,
    Decoder,
    DecodeState,
    LoopState,
    init_output,
)
from distill.rollout.drafts import DraftTable
from distill.rollout.sampling import RowSampling
from distill.runtime import mesh as mesh_lib
from models import transformer
from models.layers.pages import init_pages
from models.layers.slabs import Slabs, init_slabs
from models.transformer import Params


@functools.partial(jax.jit, static_argnames="decoder")
def init_state(decoder: Decoder) -> DecodeState:
    """Returns an empty cache."""
    config, c, seen_BV = decoder.model.config, decoder.cache, None
    if c.backend == "slabs":
        cache = init_slabs(config, c.rows, c.page_size, jnp.dtype(c.dtype))
    else:
        cache = init_pages(config, c.shards, c.pages, c.page_size, jnp.dtype(c.dtype), c.backend)
    if decoder.by_row or decoder.sampling.presence_penalty:
        seen_BV = mesh_lib.split_rows(jnp.zeros((c.rows, config.vocab_size), bool))
    state = DecodeState(cache, mesh_lib.split_rows(jnp.zeros(c.rows, jnp.int32)), seen_BV)
    if decoder.draft_tokens is None:
        return state
    table = drafts_lib.init_table(c.shards, c.rows // c.shards, c.page_size * c.max_pages_per_row)
    return dataclasses.replace(state, drafts=table)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def prefill(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    line_3XT: jax.Array,
    table_RN: jax.Array,
    length_R: jax.Array,
    starts_XR: jax.Array,
    group_R: jax.Array | None = None,
) -> tuple[DecodeState, jax.Array | None]:
    """Reads a line of T tokens for each shard into the cache: pieces of prompts, one after another.

    Args:
      line_3XT: int32: tokens, positions, and rows of their shard's table (-1: padding).
      table_RN: int32, pages of R prompts.
      length_R: int32, tokens of each in the cache afterwards.
      starts_XR: int32 [X, R / X + 1], where the pieces begin in the line.
      group_R: int32, drafts.hash_prompt of each prompt; with Decoder.draft_tokens.

    Returns:
      The state, and the experts [X, T, L, A] with Decoder.routing.
    """
    tokens_XT, position_XT, row_XT = map(mesh_lib.split_rows, line_3XT)
    table_RN, length_R, starts_XR = map(mesh_lib.split_rows, (table_RN, length_R, starts_XR))
    cache = state.cache.bind_tokens(table_RN, length_R, starts_XR, row_XT, position_XT)
    own_XT = (row_XT >= 0).astype(jnp.int32)
    _, cache, experts = run_model(decoder, params, tokens_XT, position_XT, own_XT, cache)
    state = dataclasses.replace(state, cache=cache.unbind_tokens())
    if state.drafts is not None and group_R is not None:
        line = (mesh_lib.split_rows(group_R), tokens_XT, row_XT)
        V = decoder.model.config.vocab_size
        table = drafts_lib.add_prompt_tokens(state.drafts, *line, V)
        state = dataclasses.replace(state, drafts=table)
    return state, experts


@functools.partial(jax.jit, donate_argnums=0)
def mark_seen_tokens(
    state: DecodeState, fresh_B: jax.Array, row_token_2T: jax.Array
) -> DecodeState:
    """Clears the rows in fresh_B, then marks (row, token) pairs as seen; row -1: none."""
    assert state.seen_BV is not None
    row_T, token_T = row_token_2T
    into_T = jnp.where(row_T < 0, state.seen_BV.shape[0], row_T)
    seen_BV = (state.seen_BV & ~fresh_B[:, None]).at[into_T, token_T].set(True, mode="drop")
    return dataclasses.replace(state, seen_BV=mesh_lib.split_rows(seen_BV))


@jax.jit
def resize(state: DecodeState, rows_XR: jax.Array) -> DecodeState:
    """Returns slabs of fewer rows: row i of shard x is its old row rows_XR[x, i]; -1: none."""
    assert isinstance(state.cache, Slabs)
    rows_XR = mesh_lib.split_rows(rows_XR)
    X = rows_XR.shape[0]

    def take_rows(x: jax.Array) -> jax.Array:
        x = x.reshape(X, -1, *x.shape[1:])
        x = jax.vmap(lambda x, rows: x[jnp.maximum(rows, 0)])(x, rows_XR)
        return mesh_lib.split_rows(x.reshape(-1, *x.shape[2:]))

    seen_BV = None if state.seen_BV is None else take_rows(state.seen_BV)
    small = DecodeState(state.cache.gather_rows(rows_XR), take_rows(state.token_B), seen_BV)
    if state.drafts is None:
        return small
    recent_BC = take_rows(state.drafts.recent_BC)
    table = dataclasses.replace(state.drafts, recent_BC=recent_BC)
    return dataclasses.replace(small, drafts=table)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def decode(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    steps_bound_2: jax.Array,
    row_fields_FB: jax.Array,
    table_BN: jax.Array,
    copies_2XC: jax.Array,
    sampling_B5: jax.Array | None = None,
) -> tuple[DecodeState, DecodeOutput]:
    """Draws up to `steps` tokens for each live row, until it or `bound` rows have ended.

    Without drafts each step draws one; with them, a row that has drawn so many ends the segment.

    Args:
      steps_bound_2: int32.
      row_fields_FB: int32, see ROW_FIELDS and DRAFT_FIELDS.
      table_BN: int32, pages of each row.
      copies_2XC: int32, pages of each shard to copy first (source, target); -1: none.
      sampling_B5: float32, fields of each row's Sampling; with Decoder.by_row.
    """
    head_VD = transformer.get_output_head(params["params"])
    steps, bound = steps_bound_2
    live = ROW_FIELDS.index("live")
    order_XR = _order_live_first(row_fields_FB[live], decoder.cache)
    recent_BC = state.drafts and state.drafts.recent_BC
    rows = (row_fields_FB.T, table_BN, state.token_B, state.seen_BV, sampling_B5, recent_BC)
    row_fields_BF, table_BN, newest_B, seen_BV, sampling_B5, recent_BC = _reorder_rows(
        rows, order_XR
    )
    sampling = decoder.sampling if sampling_B5 is None else RowSampling(*sampling_B5.T)
    token_B, length_B, drawn_B, limit_B, *_, live_B = row_fields_BF.T[: live + 1]
    key_data_B2 = jax.lax.bitcast_convert_type(row_fields_BF[:, 4:6], jnp.uint32)
    keys_B = jax.random.wrap_key_data(key_data_B2)
    drafts = state.drafts and _take_fresh_context(state.drafts, recent_BC, row_fields_BF)
    token_B = jnp.where(token_B < 0, newest_B, token_B)
    cache = state.cache.copy_pages(*map(mesh_lib.split_rows, copies_2XC))
    cache = cache.begin_segment(length_B, decoder.segment)
    start = LoopState(
        *(jnp.int32(0), cache, token_B, length_B, drawn_B, live_B == 0, seen_BV),
        init_output(decoder, token_B.shape[0]),
        drafts,
        None if drafts is None else jnp.zeros(len(DRAFT_COUNTS), jnp.int32),
    )

    def is_running(loop: LoopState) -> jax.Array:
        step = loop.step if decoder.draft_tokens is None else count_most_tokens(loop)
        return (step < steps) & (jnp.sum(loop.done_B) < bound)

    def body(loop: LoopState) -> LoopState:
        if decoder.draft_tokens is not None:
            group_B = row_fields_BF[:, live + 1]
            rows = SegmentRows(keys_B, sampling, limit_B, table_BN, group_B, steps)
            return run_checked_step(decoder, params, head_VD, rows, loop)
        read = read_newest(decoder, params, table_BN, loop)
        return draw_step(decoder, head_VD, keys_B, sampling, limit_B, *read)

    end = jax.lax.while_loop(is_running, body, start)
    cache = end.cache.end_segment(end.length_B - length_B)
    back_XR = None if order_XR is None else jnp.argsort(order_XR, axis=1)
    drawn = jax.tree.map(lambda x: x.swapaxes(0, 1), end.output)
    recent_BC = end.drafts and end.drafts.recent_BC
    token_B, seen_BV, drawn, recent_BC = _reorder_rows(
        (end.token_B, end.seen_BV, drawn, recent_BC), back_XR
    )
    output = jax.tree.map(lambda x: mesh_lib.replicate_array(x.swapaxes(0, 1)), drawn)
    if end.drafts is not None and end.draft_counts_5 is not None:
        drafts = dataclasses.replace(end.drafts, recent_BC=recent_BC)
        counts_5 = mesh_lib.replicate_array(end.draft_counts_5)
        output = dataclasses.replace(output, draft_counts_5=counts_5)
    return DecodeState(cache, token_B, seen_BV, drafts), output


def _take_fresh_context(
    table: DraftTable, recent_BC: jax.Array, row_fields_BF: jax.Array
) -> DraftTable:
    """Returns the table with the last tokens of each row, which the host has for new ones."""
    fresh_BC = row_fields_BF[:, -(drafts_lib.MAX_ORDER - 1) :]
    recent_BC = jnp.where(row_fields_BF[:, :1] < 0, recent_BC, fresh_BC)
    return dataclasses.replace(table, recent_BC=recent_BC)


def _order_live_first(live_B: jax.Array, shape: CacheShape) -> jax.Array | None:
    """Returns the rows of each shard [X, R], live ones first: kernels then read no pages of the
    others. None for slabs, whose rows lie as in the cache."""
    if shape.backend == "slabs":
        return None
    return jnp.argsort(live_B.reshape(shape.shards, -1) == 0, axis=1, stable=True)


def _reorder_rows(tree: Any, order_XR: jax.Array | None) -> Any:
    """Reorders the rows of each shard in arrays [B, ...] that are split by rows."""
    if order_XR is None:
        return jax.tree.map(mesh_lib.split_rows, tree)

    def reorder_array(x: jax.Array) -> jax.Array:
        x_XR = mesh_lib.split_rows(x.reshape(*order_XR.shape, *x.shape[1:]))
        index_XR = order_XR.reshape(*order_XR.shape, *(1,) * (x.ndim - 1))
        return mesh_lib.split_rows(jnp.take_along_axis(x_XR, index_XR, axis=1).reshape(x.shape))

    return jax.tree.map(reorder_array, tree)
