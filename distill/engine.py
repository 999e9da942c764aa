"""The programs that sampling runs on the device: read prompts, admit rows, decode, change shape.

A fixed number of rows decodes together. What a row is and when it comes is the host's affair
(distill/rollout.py); here it has keys and values in the cache, the hidden state that its next token
is drawn from, and a few numbers. The token at response position i of a row is drawn with
fold_in(row key, i), so that a row's draws depend on nothing beside it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill import mesh as mesh_lib
from distill.sampling import Sampling, draw, model_logp, model_top
from models.qwen3 import model, moe, quantised
from models.qwen3.cache import Cache, init_cache, take_rows
from models.qwen3.model import Params, Qwen3

GOING, STOP, LENGTH, BAD = range(4)  # why a row ended: a stop token, its limit, logits of NaN


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What the programs are compiled for."""

    qwen3: Qwen3  # as `weights` returns it
    sampling: Sampling
    stop_ids: tuple[int, ...]
    cache_dtype: str
    segment: int  # decoding steps at most in one call of `decode`
    top_logprobs: int = 0  # report so many of the likeliest tokens at each step
    routing: bool = False  # report the experts that each token went to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The rows that decode together."""

    cache: Cache
    hidden_BD: jax.Array  # of the newest token: what the next one is drawn from
    length_B: jax.Array  # int32: tokens in the cache, the position of the next one
    drawn_B: jax.Array  # int32: response tokens so far
    limit_B: jax.Array  # int32: response tokens at most
    key_B2: jax.Array  # uint32: the data of each row's key
    done_B: jax.Array  # bool: ended, or never begun
    seen_BV: jax.Array | None  # bool: tokens of the response so far, for a presence penalty


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a call of `decode` drew: row b's tokens are tokens_WB[:count_B[b], b]."""

    tokens_WB: jax.Array  # int32
    logp_WB: jax.Array  # float32, of the distribution drawn from
    count_reason_2B: jax.Array  # int32: how many tokens, and GOING, STOP, LENGTH or BAD
    # On demand, of the model's own distribution:
    model_logp_WB: jax.Array | None  # float32, of the tokens
    top_ids_WBk: jax.Array | None  # int32, the likeliest tokens
    top_logp_WBk: jax.Array | None  # float32
    # Of a mixture, on demand: int16; -1 of a row's last token, which is not read any more.
    experts_WBLA: jax.Array | None = None


def prefers_stacked(mesh: Mesh) -> bool:
    """Whether its platform decodes faster from weights and a cache that are stacked over layers
    (models.qwen3.cache.Cache). TPUs do; on GPUs XLA cuts each layer out of both into memory before
    it reads it, at every step, and turns the cache's axes around a loop: 2.7 to 5.8 times the bytes
    that one reading of weights and cache takes, against 1.02 to 1.11 layer by layer."""
    return mesh.devices.flat[0].platform == "tpu"


def least_rows(mesh: Mesh) -> int:
    """The fewest rows that decode together: one in each part that the mesh splits rows in, on GPUs
    two. Of a product with a single row XLA makes a multiplication and a sum there, with all that is
    multiplied written to memory in between: 1.4 times the bytes of two rows."""
    return mesh_lib.row_shards(mesh) * (2 if mesh_lib.on_gpu(mesh) else 1)


def weights(
    qwen3: Qwen3,
    params: Params,
    mesh: Mesh,
    *,
    stacked: bool,
    gathered: bool,
    param_dtype: str = "",
) -> tuple[Qwen3, Params]:
    """The model as it decodes: parameters in param_dtype ("": its own), which may be one of 8 bits
    (models.qwen3.quantised), in the layout that goes with the cache's.

    gathered: no longer split over the mesh axes that also split the rows (experts still are), so
    that no step has to fetch them; this takes the memory of all weights / tensor on each device.
    """
    rules = mesh_lib.GATHERED if gathered else mesh_lib.RULES
    return qwen3.clone(scan=stacked, remat=False), for_decoding(
        qwen3, params, mesh=mesh, rules=rules, stacked=stacked, param_dtype=param_dtype
    )


@functools.partial(jax.jit, static_argnames=("qwen3", "mesh", "rules", "stacked", "param_dtype"))
def for_decoding(
    qwen3: Qwen3, params: Params, mesh: Mesh, rules: tuple, stacked: bool, param_dtype: str
) -> Params:
    """See `weights`. Cast once: every step reads all of them, else in float32."""
    kind, dtype = quantised.split(param_dtype or qwen3.dtype, qwen3.dtype)
    shapes = mesh_lib.parameters(qwen3.config, mesh, rules=rules)
    shapes = quantised.abstract(shapes, kind) if kind else shapes
    params = jax.tree.map(
        lambda p, like: jax.lax.with_sharding_constraint(p, like.sharding),
        quantised.tree(params, kind, dtype),
        shapes,
    )
    return params if stacked else model.unstack(params, qwen3.config.num_hidden_layers)


@functools.partial(jax.jit, static_argnames=("decoder", "rows", "slots", "first"))
def empty_cache(decoder: Decoder, rows: int, slots: int, first: int = 0) -> Cache:
    """What `read` begins with; it will fill the slots from `first` on."""
    qwen3, dtype = decoder.qwen3, jnp.dtype(decoder.cache_dtype)
    return init_cache(qwen3.config, rows, slots, dtype, qwen3.scan).move(first)


@functools.partial(jax.jit, static_argnames=("decoder", "rows", "slots"))
def empty(decoder: Decoder, rows: int, slots: int) -> State:
    """No row yet."""
    cache = empty_cache(decoder, rows, slots)
    hidden_BD = jnp.zeros((rows, decoder.qwen3.config.hidden_size), decoder.qwen3.dtype)
    zeros_B, keys_B2 = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 2), jnp.uint32)
    done_B, seen_BV = jnp.ones(rows, bool), None
    if decoder.sampling.presence_penalty:
        seen_BV = jnp.zeros((rows, decoder.qwen3.config.vocab_size), bool)
    return _split(State(cache, hidden_BD, zeros_B, zeros_B, zeros_B, keys_B2, done_B, seen_BV))


def _split(state: State) -> State:
    rest = dataclasses.replace(state, cache=None)  # pyright: ignore[reportArgumentType]
    rest = jax.tree.map(mesh_lib.split_rows, rest)
    return dataclasses.replace(rest, cache=state.cache.constrained())


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="cache")
def read(
    decoder: Decoder, params: Params, cache: Cache, tokens_positions_2BT: jax.Array
) -> tuple[Cache, jax.Array, jax.Array | None]:
    """Reads T tokens a row into the cache; position -1 is padding. With the last hidden [B, D], and
    the experts [B, T, L, A] where they are asked for."""
    tokens_BT, positions_BT = tokens_positions_2BT
    segments_BT = (positions_BT >= 0).astype(jnp.int32)
    positions_BT = jnp.maximum(positions_BT, 0)
    hidden_BTD, cache, experts_BTLA = _forward(
        decoder, params, tokens_BT, positions_BT, segments_BT, cache
    )
    return cache.constrained(), hidden_BTD[:, -1], experts_BTLA


def _forward(
    decoder: Decoder,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: Cache,
) -> tuple[jax.Array, Cache, jax.Array | None]:
    applied: Any = decoder.qwen3.apply(
        {"params": params},
        tokens_BT,
        positions_BT,
        segments_BT,
        cache,
        mutable=[moe.CHOSEN] if decoder.routing else False,
    )
    if not decoder.routing:
        return *applied, None
    (hidden_BTD, cache), noted = applied
    return hidden_BTD, cache, mesh_lib.whole(moe.chosen(noted[moe.CHOSEN]))


ADMITTED = ("source", "row", "length", "drawn", "limit", "key0", "key1")


@functools.partial(jax.jit, donate_argnames="state")
def admit(state: State, cache: Cache, hidden_BD: jax.Array, about_7B: jax.Array) -> State:
    """Lets rows begin, or go on, from prompts that `read` has read.

    about_7B: int32, a column for each that comes (see ADMITTED); row -1 is none, and only at the
    end. `source` is its prompt's row in `cache` and `hidden_BD`.
    """
    source_B, row_B, length_B, drawn_B, limit_B = about_7B[:5]
    key_B2 = jax.lax.bitcast_convert_type(about_7B[5:].T, jnp.uint32)
    into_B = jnp.where(row_B < 0, len(row_B), row_B)  # past the end: dropped

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[into_B].set(new, mode="drop")

    count, seen_BV = jnp.sum(row_B >= 0), state.seen_BV
    if seen_BV is not None:
        seen_BV = put(seen_BV, jnp.zeros_like(seen_BV))
    return _split(
        State(
            state.cache.insert(cache, source_B, row_B, count),
            put(state.hidden_BD, mesh_lib.whole(hidden_BD)[source_B]),
            put(state.length_B, length_B),
            put(state.drawn_B, drawn_B),
            put(state.limit_B, limit_B),
            put(state.key_B2, key_B2),
            put(state.done_B, jnp.zeros(len(row_B), bool)),
            seen_BV,
        )
    )


@functools.partial(jax.jit, donate_argnums=0)
def remember(state: State, row_token_2T: jax.Array) -> State:
    """Notes tokens that rows had before they were admitted; row -1 is none."""
    assert state.seen_BV is not None
    row_T, token_T = row_token_2T
    into_T = jnp.where(row_T < 0, state.seen_BV.shape[0], row_T)
    seen_BV = state.seen_BV.at[into_T, token_T].set(True, mode="drop")
    return _split(dataclasses.replace(state, seen_BV=seen_BV))


@functools.partial(jax.jit, static_argnames="slots")
def refit(state: State, rows_XB: jax.Array, slots: int) -> State:
    """The rows rows_XB of each of X parts (-1: none) in a cache of `slots` slots."""
    kept_XB = rows_XB >= 0
    rows_XB = jnp.maximum(rows_XB, 0)
    cache = state.cache.refit(rows_XB, kept_XB, slots)
    rest = dataclasses.replace(state, cache=None)  # pyright: ignore[reportArgumentType]
    rest = jax.tree.map(lambda x: take_rows(x, rows_XB), rest)
    done_B = rest.done_B | ~kept_XB.reshape(-1)
    return _split(dataclasses.replace(rest, cache=cache, done_B=done_B))


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def decode(
    decoder: Decoder, params: Params, state: State, steps_bound_2: jax.Array, live_B: jax.Array
) -> tuple[State, Drawn]:
    """Draws `steps` tokens for each live row, or fewer: until it ends, or `bound` rows have."""
    head_VD = model.head(params)
    steps, bound = steps_bound_2

    def running(carry: Any) -> jax.Array:
        step, state, _ = carry
        return (step < steps) & (jnp.sum(state.done_B) < bound)

    def body(carry: Any) -> Any:
        step, state, drawn = carry
        state, fed_B, drawn = _draw(decoder, head_VD, step, state, drawn)
        hidden_B1D, cache, experts_B1LA = _forward(
            decoder,
            params,
            fed_B[:, None],
            state.length_B[:, None],
            (~state.done_B)[:, None].astype(jnp.int32),
            state.cache,
        )
        if experts_B1LA is not None:
            assert drawn.experts_WBLA is not None
            experts_BLA = jnp.where(state.done_B[:, None, None], -1, experts_B1LA[:, 0])
            written_WBLA = drawn.experts_WBLA.at[step].set(experts_BLA)
            drawn = dataclasses.replace(drawn, experts_WBLA=written_WBLA)
        length_B = state.length_B + ~state.done_B
        state = dataclasses.replace(
            state, cache=cache, hidden_BD=hidden_B1D[:, 0], length_B=length_B
        )
        return step + 1, state, drawn

    state = dataclasses.replace(state, done_B=state.done_B | (live_B == 0))
    start = (jnp.int32(0), state, _nothing(decoder, state.done_B.shape[0]))
    _, state, drawn = jax.lax.while_loop(running, body, start)
    return _split(state), jax.tree.map(mesh_lib.whole, drawn)


def _nothing(decoder: Decoder, B: int) -> Drawn:
    W, k = decoder.segment, decoder.top_logprobs
    tokens_WB, logp_WB = jnp.zeros((W, B), jnp.int32), jnp.zeros((W, B), jnp.float32)
    count_reason_2B = jnp.zeros((2, B), jnp.int32)
    experts_WBLA = None
    if decoder.routing:
        experts_WBLA = jnp.zeros((W, B, *decoder.qwen3.config.routing), jnp.int16)
    if not k:
        return Drawn(tokens_WB, logp_WB, count_reason_2B, None, None, None, experts_WBLA)
    top_ids_WBk, top_logp_WBk = jnp.zeros((W, B, k), jnp.int32), jnp.zeros((W, B, k), jnp.float32)
    return Drawn(
        tokens_WB, logp_WB, count_reason_2B, logp_WB, top_ids_WBk, top_logp_WBk, experts_WBLA
    )


def _draw(
    decoder: Decoder, head_VD: jax.Array, step: jax.Array, state: State, drawn: Drawn
) -> tuple[State, jax.Array, Drawn]:
    """One token a live row: the state with who has ended, the tokens [B] to read, all drawn."""
    logits_BV = jnp.einsum(
        "BD,VD->BV", state.hidden_BD, head_VD, preferred_element_type=jnp.float32
    )
    keys_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(state.key_B2), state.drawn_B)
    tokens_B, logp_B = draw(logits_BV, keys_B, decoder.sampling, state.seen_BV)
    bad_B = ~state.done_B & ~jnp.isfinite(logp_B)
    live_B = ~state.done_B & ~bad_B
    tokens_B = jnp.where(live_B, tokens_B, 0)
    drawn_B = state.drawn_B + live_B
    stops = jnp.array(decoder.stop_ids, jnp.int32)
    stop_B = live_B & jnp.any(tokens_B[:, None] == stops[None], axis=1)
    limit_B = live_B & (drawn_B >= state.limit_B)
    count_B, reason_B = drawn.count_reason_2B
    reason_B = jnp.select([bad_B, stop_B, limit_B], [BAD, STOP, LENGTH], reason_B)
    new: dict[str, jax.Array] = {"tokens_WB": tokens_B, "logp_WB": jnp.where(live_B, logp_B, 0.0)}
    if decoder.top_logprobs:
        new["model_logp_WB"] = model_logp(logits_BV, tokens_B)
        new["top_ids_WBk"], new["top_logp_WBk"] = model_top(logits_BV, decoder.top_logprobs)
    written = {name: getattr(drawn, name).at[step].set(x) for name, x in new.items()}
    drawn = dataclasses.replace(
        drawn, count_reason_2B=jnp.stack([count_B + live_B, reason_B]), **written
    )
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(tokens_B)), tokens_B].max(live_B)
    done_B = state.done_B | bad_B | stop_B | limit_B
    return (
        dataclasses.replace(state, drawn_B=drawn_B, done_B=done_B, seen_BV=seen_BV),
        tokens_B,
        drawn,
    )
