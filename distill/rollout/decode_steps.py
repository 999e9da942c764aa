"""A step of decoding: reads the newest token of each row, and drafts after it, and draws."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill.rollout import drafts
from distill.rollout import sampling as sampling_lib
from distill.rollout.decode_types import ERROR, LENGTH, STOP, UNFINISHED, Decoder, LoopState
from distill.rollout.sampling import RowSampling, Sampling
from distill.runtime import mesh as mesh_lib
from models.layers import moe
from models.layers.slab_attention import place_tokens
from models.transformer import Params


def run_model(
    decoder: Decoder,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: Any,
) -> tuple[jax.Array, Any, jax.Array | None]:
    mutable = [moe.CHOSEN] if decoder.routing else False
    applied: Any = decoder.model.apply(
        params, tokens_BT, positions_BT, segments_BT, cache, mutable=mutable
    )
    if not decoder.routing:
        return *applied, None
    (hidden_BTD, cache), variables = applied
    experts = mesh_lib.replicate_array(moe.get_chosen_experts(variables[moe.CHOSEN]))
    return hidden_BTD, cache, experts


def read_newest(
    decoder: Decoder, params: Params, table_BN: jax.Array, loop: LoopState
) -> tuple[jax.Array, jax.Array | None, LoopState]:
    """Reads the newest token of each live row into the cache. Returns hidden states [B, D], their
    experts and the state."""
    view = loop.cache.bind_next_tokens(table_BN, jnp.where(loop.done_B, 0, loop.length_B + 1))
    hidden_B1D, view, experts_B1LA = run_model(
        decoder,
        params,
        loop.token_B[:, None],
        loop.length_B[:, None],
        (~loop.done_B)[:, None].astype(jnp.int32),
        view,
    )
    length_B = loop.length_B + ~loop.done_B
    loop = dataclasses.replace(loop, cache=view.unbind_tokens(), length_B=length_B)
    return hidden_B1D[:, 0], experts_B1LA, loop


def draw_step(
    decoder: Decoder,
    head_VD: jax.Array,
    keys_B: jax.Array,
    sampling: Sampling | RowSampling,
    limit_B: jax.Array,
    hidden_BD: jax.Array,
    experts_B1LA: jax.Array | None,
    loop: LoopState,
) -> LoopState:
    """Draws one token for each live row, from the hidden state of its newest token."""
    logits_BV = jnp.einsum("BD,VD->BV", hidden_BD, head_VD, preferred_element_type=jnp.float32)
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, loop.drawn_B)
    tokens_B, logp_B = sampling_lib.draw_tokens(logits_BV, keys_B, sampling, loop.seen_BV)
    bad_B = ~loop.done_B & ~jnp.isfinite(logp_B)
    live_B = ~loop.done_B & ~bad_B
    tokens_B = jnp.where(live_B, tokens_B, 0)
    drawn_B = loop.drawn_B + live_B
    stops = jnp.array(decoder.stop_ids, jnp.int32)
    stop_B = live_B & jnp.any(tokens_B[:, None] == stops[None], axis=1)
    limit_B = live_B & (drawn_B >= limit_B)
    count_B, reason_B = loop.output.count_reason_2B
    reason_B = jnp.select([bad_B, stop_B, limit_B], [ERROR, STOP, LENGTH], reason_B)
    new: dict[str, jax.Array] = {"tokens_WB": tokens_B, "logp_WB": jnp.where(live_B, logp_B, 0.0)}
    if decoder.top_logprobs:
        new["model_logp_WB"] = sampling_lib.compute_model_logp(logits_BV, tokens_B)
        top = sampling_lib.find_model_top(logits_BV, decoder.top_logprobs)
        new["top_ids_WBk"], new["top_logp_WBk"] = top
    if experts_B1LA is not None:
        new["experts_WBLA"] = experts_B1LA[:, 0]
    written = {name: getattr(loop.output, name).at[loop.step].set(x) for name, x in new.items()}
    output = dataclasses.replace(
        loop.output, count_reason_2B=jnp.stack([count_B + live_B, reason_B]), **written
    )
    seen_BV = loop.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].max(live_B)
    return dataclasses.replace(
        loop,
        step=loop.step + 1,
        token_B=jnp.where(live_B, tokens_B, loop.token_B),
        drawn_B=drawn_B,
        done_B=loop.done_B | bad_B | stop_B | limit_B,
        seen_BV=seen_BV,
        output=output,
    )


def count_most_tokens(loop: LoopState) -> jax.Array:
    """Returns the most tokens that a live row has added in this segment."""
    count_B, _ = loop.output.count_reason_2B
    return jnp.max(jnp.where(loop.done_B, 0, count_B))


@dataclasses.dataclass(frozen=True)
class SegmentRows:
    """What does not change in the rows of a segment with drafts."""

    keys_B: jax.Array
    sampling: Sampling | RowSampling
    limit_B: jax.Array
    table_BN: jax.Array
    group_B: jax.Array
    most: jax.Array  # tokens that a row may add


def run_checked_step(
    decoder: Decoder, params: Params, head_VD: jax.Array, rows: SegmentRows, loop: LoopState
) -> LoopState:
    """Drafts tokens for each live row, reads them in one call of the model, and draws a token and
    those that the drafts were right about."""
    assert loop.drafts is not None and decoder.draft_tokens is not None
    V = decoder.model.config.vocab_size
    guess_Bk = drafts.find_drafts(loop.drafts, rows.group_B, loop.token_B, decoder.draft_tokens, V)
    # As many as may still be drawn, now and in all.
    room_B = jnp.minimum(rows.limit_B - loop.drawn_B, rows.most - loop.output.count_reason_2B[0])
    count_B = jnp.minimum(1 + jnp.sum(guess_Bk >= 0, axis=1, dtype=jnp.int32), room_B)
    count_B = jnp.where(loop.done_B, 0, count_B)
    hidden_BTD, cache, experts_BTLA = _read_drafts(
        decoder, params, rows.table_BN, guess_Bk, count_B, loop
    )
    loop = dataclasses.replace(loop, cache=cache)
    read = (hidden_BTD, experts_BTLA, guess_Bk, count_B)
    return _draw_checked_step(decoder, head_VD, rows, *read, loop)


def _read_drafts(
    decoder: Decoder,
    params: Params,
    table_BN: jax.Array,
    guess_Bk: jax.Array,
    count_B: jax.Array,
    loop: LoopState,
) -> tuple[jax.Array, Any, jax.Array | None]:
    """Reads count_B tokens of each row in one call: its newest, and guesses after it. Returns their
    hidden states [B, 1 + k, D], the cache and their experts, undefined after the last token."""
    T = guess_Bk.shape[1] + 1
    at_BT = jnp.arange(T, dtype=jnp.int32)[None] - (T - count_B[:, None])  # padding first: negative
    from_BT = jnp.maximum(at_BT, 0)
    tokens_BT = jnp.concatenate([loop.token_B[:, None], guess_Bk], axis=1)
    length_B = jnp.where(loop.done_B, 0, loop.length_B + count_B)
    hidden_BTD, view, experts_BTLA = run_model(
        decoder,
        params,
        jnp.take_along_axis(tokens_BT, from_BT, axis=1),
        loop.length_B[:, None] + from_BT,
        (at_BT >= 0).astype(jnp.int32),
        loop.cache.bind_drafts(table_BN, length_B, count_B, T),
    )
    back_BT = jnp.minimum(jnp.arange(T)[None] + T - count_B[:, None], T - 1)
    hidden_BTD = jnp.take_along_axis(hidden_BTD, back_BT[:, :, None], axis=1)
    if experts_BTLA is not None:
        experts_BTLA = jnp.take_along_axis(experts_BTLA, back_BT[:, :, None, None], axis=1)
    return hidden_BTD, view.unbind_tokens(), experts_BTLA


def _draw_checked_step(
    decoder: Decoder,
    head_VD: jax.Array,
    rows: SegmentRows,
    hidden_BTD: jax.Array,
    experts_BTLA: jax.Array | None,
    guess_Bk: jax.Array,
    count_B: jax.Array,
    loop: LoopState,
) -> LoopState:
    """Draws the token after each of count_B tokens of a row: the first draw counts, and each other
    one if the row goes on and the draw before it equals the guess that it was made after."""
    B, T, D = hidden_BTD.shape
    V, at_T = decoder.model.config.vocab_size, jnp.arange(T, dtype=jnp.int32)
    flat = (hidden_BTD.reshape(B * T, D), head_VD)
    logits_MV = jnp.einsum("MD,VD->MV", *flat, preferred_element_type=jnp.float32)
    number_BT = loop.drawn_B[:, None] + at_T[None]
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    keys_M = fold(rows.keys_B, number_BT).reshape(-1)
    sampling = rows.sampling
    if isinstance(sampling, RowSampling):
        sampling = jax.tree.map(lambda x: jnp.repeat(x, T), sampling)
    seen_MV = None if loop.seen_BV is None else _see_guesses(loop.seen_BV, guess_Bk)
    tokens_M, logp_M = sampling_lib.draw_tokens(logits_MV, keys_M, sampling, seen_MV)
    tokens_BT, logp_BT = tokens_M.reshape(B, T), logp_M.reshape(B, T)
    bad_BT = ~jnp.isfinite(logp_BT)
    stops = jnp.array(decoder.stop_ids, jnp.int32)
    stop_BT = jnp.any(tokens_BT[:, :, None] == stops[None, None], axis=2)
    limit_BT = number_BT + 1 >= rows.limit_B[:, None]
    ends_BT = bad_BT | stop_BT | limit_BT
    equal_Bk = (tokens_BT[:, :-1] == guess_Bk) & ~bad_BT[:, :-1]
    goes_on_BT = jnp.pad(equal_Bk & ~ends_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    reached_BT = (at_T[None] < count_B[:, None]) & (jnp.cumsum(~goes_on_BT, axis=1) == 0)
    counted_BT = reached_BT & ~bad_BT
    new_B = jnp.sum(counted_BT, axis=1, dtype=jnp.int32)
    reasons_BT = jnp.select([bad_BT, stop_BT, limit_BT], [ERROR, STOP, LENGTH], UNFINISHED)
    reason_B = jnp.max(jnp.where(reached_BT, reasons_BT, UNFINISHED), axis=1)
    old_B, old_reason_B = loop.output.count_reason_2B
    counts = jnp.stack([old_B + new_B, jnp.where(reason_B > 0, reason_B, old_reason_B)])

    new = {"tokens_WB": tokens_BT, "logp_WB": logp_BT}
    if decoder.top_logprobs:
        new["model_logp_WB"] = sampling_lib.compute_model_logp(logits_MV, tokens_M)
        top = sampling_lib.find_model_top(logits_MV, decoder.top_logprobs)
        new["top_ids_WBk"], new["top_logp_WBk"] = top
    if experts_BTLA is not None:
        new["experts_WBLA"] = experts_BTLA
    place_BT = jnp.where(counted_BT, old_B[:, None] + at_T[None], -1)
    written = {}
    for name, x in new.items():
        into_BW = getattr(loop.output, name).swapaxes(0, 1)
        x = x.reshape(B, T, *into_BW.shape[2:])
        written[name] = place_tokens(into_BW, x, place_BT, 1).swapaxes(0, 1)

    seen_BV, last_B1 = loop.seen_BV, jnp.maximum(new_B - 1, 0)[:, None]
    if seen_BV is not None:
        row_BT = jnp.broadcast_to(jnp.arange(B)[:, None], (B, T))
        seen_BV = seen_BV.at[row_BT, tokens_BT].max(counted_BT)
    # Not those that were left out, because the row could not take as many.
    had_room_Bk = (guess_Bk < 0) | (at_T[None, 1:] < count_B[:, None])
    compared_Bk = reached_BT[:, :-1] & ~ends_BT[:, :-1] & had_room_Bk
    drafted, accepted = jnp.sum(count_B) - jnp.sum(count_B > 0), jnp.sum(compared_Bk & equal_Bk)
    added = (1, jnp.sum(count_B > 0), drafted, jnp.sum(compared_Bk), accepted)
    assert loop.drafts is not None and loop.draft_counts_5 is not None
    return dataclasses.replace(
        loop,
        token_B=jnp.where(
            new_B > 0, jnp.take_along_axis(tokens_BT, last_B1, axis=1)[:, 0], loop.token_B
        ),
        length_B=loop.length_B + new_B,
        drawn_B=loop.drawn_B + new_B,
        done_B=loop.done_B | (reason_B > 0),
        seen_BV=seen_BV,
        output=dataclasses.replace(loop.output, count_reason_2B=counts, **written),
        drafts=drafts.add_drawn_tokens(
            loop.drafts, rows.group_B, loop.token_B, tokens_BT, new_B, V
        ),
        draft_counts_5=loop.draft_counts_5 + jnp.stack(added).astype(jnp.int32),
    )


def _see_guesses(seen_BV: jax.Array, guess_Bk: jax.Array) -> jax.Array:
    """Returns the tokens seen before each draw of a step [B (1 + k), V], as if all guesses before
    it were right."""
    B, V = seen_BV.shape
    seen = [seen_BV]
    for guess_B in guess_Bk.T:
        guess_B = jnp.where(guess_B < 0, V, guess_B)
        seen.append(seen[-1].at[jnp.arange(B), guess_B].set(True, mode="drop"))
    return jnp.stack(seen, axis=1).reshape(-1, V)
