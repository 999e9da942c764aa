"""The programs that sampling runs on the device: weights, an empty state, prompts, a segment.

A fixed number of rows decodes together. Which sequence a row is, and where its tokens lie in the
cache, is the host's affair (distill/rollout/scheduler.py): it comes as numbers with each call. On
the device are the cache and the newest token of each row, which the next step begins with. The
token at response position i of a row is drawn with fold_in(row key, i), so that a row's draws
depend on nothing beside it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from distill.rollout.sampling import Sampling, compute_model_logp, draw_tokens, find_model_top
from distill.runtime import mesh as mesh_lib
from models import transformer
from models.layers import lora, moe, quantised
from models.layers.pages import Pages, init_pages
from models.layers.slabs import Slabs, init_slabs
from models.transformer import Params, Transformer

UNFINISHED, STOP, LENGTH, ERROR = range(
    4
)  # why a row ended: a stop token, its limit, logits of NaN


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """backend: slabs, or one of models.layers.pages. pages: of each row shard; of slabs its rows."""

    backend: str
    dtype: str
    rows: int  # that decode together
    shards: int
    pages: int
    page_size: int  # tokens
    max_pages_per_row: int  # pages that a row may have


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What the programs are compiled for."""

    model: Transformer  # as `weights` returns it
    sampling: Sampling
    stop_ids: tuple[int, ...]
    cache: CacheShape
    segment: int  # decoding steps at most in one call of `decode`
    top_logprobs: int = 0  # report so many of the likeliest tokens at each step
    routing: bool = False  # report the experts that each token went to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What stays on the device from one call to the next."""

    cache: Pages | Slabs
    token_B: jax.Array  # int32: the newest of each row, not in the cache yet
    seen_BV: jax.Array | None  # bool: tokens of the response so far, for a presence penalty


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOutput:
    """What a call of `decode` drew: row b's tokens are tokens_WB[:count_B[b], b]."""

    tokens_WB: jax.Array  # int32
    logp_WB: jax.Array  # float32, of the distribution drawn from
    count_reason_2B: jax.Array  # int32: how many tokens, and GOING, STOP, LENGTH or BAD
    # On demand, of the model's own distribution:
    model_logp_WB: jax.Array | None  # float32, of the tokens
    top_ids_WBk: jax.Array | None  # int32, the likeliest tokens
    top_logp_WBk: jax.Array | None  # float32
    experts_WBLA: jax.Array | None = None  # int16, of a mixture: of the token that each step read


def prefers_stacked(mesh: Mesh) -> bool:
    """Whether its platform decodes faster from weights that are stacked over layers. TPUs do; on
    GPUs XLA cuts each layer out of them into memory before it reads it, at every step."""
    return mesh.devices.flat[0].platform == "tpu"


def get_min_rows(mesh: Mesh) -> int:
    """The fewest rows that decode together: one in each part that the mesh splits rows in, on GPUs
    two. Of a product with a single row XLA makes a multiplication and a sum there, with all that is
    multiplied written to memory in between: 1.4 times the bytes of two rows."""
    return mesh_lib.count_row_shards(mesh) * (2 if mesh_lib.is_on_gpu(mesh) else 1)


def prepare_weights(
    model: Transformer,
    params: Params,
    mesh: Mesh,
    *,
    stacked: bool,
    gather_weights: bool,
    param_dtype: str,
    lora_params: Params | None = None,
) -> tuple[Transformer, Params]:
    """The model as it decodes, and its variables: parameters in param_dtype ("": its own), which
    may be one of 8 bits (models.layers.quantised), stacked over layers or not; and, `trained`
    beside
    them, the factors of a LoRA.

    gather_weights: no longer split over the mesh axes that also split the rows (experts still
    are), so
    that no step has to fetch them; this takes the memory of all weights / tensor on each device.
    """
    rules = mesh_lib.GATHERED_RULES if gather_weights else mesh_lib.SHARDING_RULES
    kind = None if lora_params is None or model.lora is None else lora.with_unit_scale(model.lora)
    return model.clone(scan=stacked, remat=False, lora=kind), convert_weights(
        model, params, lora_params, mesh=mesh, rules=rules, stacked=stacked, param_dtype=param_dtype
    )


@functools.partial(jax.jit, static_argnames=("model", "mesh", "rules", "stacked", "param_dtype"))
def convert_weights(
    model: Transformer,
    params: Params,
    lora_params: Params | None,
    mesh: Mesh,
    rules: tuple,
    stacked: bool,
    param_dtype: str,
) -> Params:
    """See `weights`. Cast once: every step reads all of them, else in float32."""
    kind, dtype = quantised.split_dtypes(param_dtype or model.dtype, model.dtype)

    def constrain_params(tree: Params, shapes: Params) -> Params:
        tree = jax.tree.map(
            lambda p, like: jax.lax.with_sharding_constraint(p, like.sharding), tree, shapes
        )
        return tree if stacked else transformer.unstack_layers(tree, model.config.num_hidden_layers)

    converted = quantised.quantise_params(params, kind, dtype)
    leaves = jax.tree.leaves(converted, is_leaf=quantised.is_quantised)
    dtypes = {x.values.dtype.name for x in leaves if quantised.is_quantised(x)}
    shapes = mesh_lib.make_abstract_params(model.config, mesh, rules=rules)
    shapes = quantised.quantise_shapes(shapes, dtypes.pop()) if dtypes else shapes
    variables = {"params": constrain_params(converted, shapes)}
    if lora_params is not None:
        assert model.lora is not None
        factors, _ = lora.fold_scale(lora_params, model.lora, model.dtype)
        shapes = mesh_lib.make_abstract_params(model.config, mesh, model.lora, rules)
        variables[lora.LORA] = constrain_params(factors, shapes)
    return variables


@functools.partial(jax.jit, static_argnames="decoder")
def init_state(decoder: Decoder) -> DecodeState:
    """No row yet."""
    config, c, seen_BV = decoder.model.config, decoder.cache, None
    if c.backend == "slabs":
        cache = init_slabs(config, c.rows, c.page_size, jnp.dtype(c.dtype))
    else:
        cache = init_pages(config, c.shards, c.pages, c.page_size, jnp.dtype(c.dtype), c.backend)
    if decoder.sampling.presence_penalty:
        seen_BV = mesh_lib.split_rows(jnp.zeros((c.rows, config.vocab_size), bool))
    return DecodeState(cache, mesh_lib.split_rows(jnp.zeros(c.rows, jnp.int32)), seen_BV)


# The rows of `line_3XT`: tokens, their positions, and whose they are: a row of the part's table,
# -1: padding.
@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def prefill(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    line_3XT: jax.Array,
    table_RN: jax.Array,
    length_R: jax.Array,
    starts_XR: jax.Array,
) -> tuple[DecodeState, jax.Array | None]:
    """Reads a line of T tokens for each shard into the cache, pieces of prompts one behind the
    other. With their experts [X, T, L, A], where these are asked for.

    table_RN: the pages of R prompts; length_R: their tokens in the cache, once these are;
    starts_XR: [X, R / X + 1], where their pieces begin in the line.
    """
    tokens_XT, position_XT, row_XT = map(mesh_lib.split_rows, line_3XT)
    table_RN, length_R, starts_XR = map(mesh_lib.split_rows, (table_RN, length_R, starts_XR))
    cache = state.cache.bind_tokens(table_RN, length_R, starts_XR, row_XT, position_XT)
    own_XT = (row_XT >= 0).astype(jnp.int32)
    _, cache, experts = _run_model(decoder, params, tokens_XT, position_XT, own_XT, cache)
    return dataclasses.replace(state, cache=cache.bare()), experts


def _run_model(
    decoder: Decoder,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: Any,
) -> tuple[jax.Array, Any, jax.Array | None]:
    applied: Any = decoder.model.apply(
        params,
        tokens_BT,
        positions_BT,
        segments_BT,
        cache,
        mutable=[moe.CHOSEN] if decoder.routing else False,
    )
    if not decoder.routing:
        return *applied, None
    (hidden_BTD, cache), variables = applied
    return (
        hidden_BTD,
        cache,
        mesh_lib.replicate_array(moe.get_chosen_experts(variables[moe.CHOSEN])),
    )


@functools.partial(jax.jit, donate_argnums=0)
def mark_seen_tokens(
    state: DecodeState, fresh_B: jax.Array, row_token_2T: jax.Array
) -> DecodeState:
    """Notes tokens that rows had before they came; row -1 is none. Those of rows that are fresh are
    forgotten first."""
    assert state.seen_BV is not None
    row_T, token_T = row_token_2T
    into_T = jnp.where(row_T < 0, state.seen_BV.shape[0], row_T)
    seen_BV = state.seen_BV & ~fresh_B[:, None]
    seen_BV = seen_BV.at[into_T, token_T].set(True, mode="drop")
    return dataclasses.replace(state, seen_BV=mesh_lib.split_rows(seen_BV))


@jax.jit
def resize(state: DecodeState, rows_XR: jax.Array) -> DecodeState:
    """Of slabs, with fewer rows: entry i of a shard is its row rows_XR[x, i]; -1: none."""
    assert isinstance(state.cache, Slabs)
    rows_XR = mesh_lib.split_rows(rows_XR)
    X = rows_XR.shape[0]

    def take_rows(x: jax.Array) -> jax.Array:
        x = x.reshape(X, -1, *x.shape[1:])
        x = jax.vmap(lambda x, rows: x[jnp.maximum(rows, 0)])(x, rows_XR)
        return mesh_lib.split_rows(x.reshape(-1, *x.shape[2:]))

    seen_BV = None if state.seen_BV is None else take_rows(state.seen_BV)
    return DecodeState(state.cache.gather_rows(rows_XR), take_rows(state.token_B), seen_BV)


# What the host says of each row, as int32: its newest token, or -1: the one that the device has;
# how many tokens the cache holds of it; how many were drawn for it, and may be at most; its key;
# and whether it lives.
ROW_FIELDS = ("token", "length", "drawn", "limit", "key0", "key1", "live")


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def decode(
    decoder: Decoder,
    params: Params,
    state: DecodeState,
    steps_bound_2: jax.Array,
    row_fields_7B: jax.Array,
    table_BN: jax.Array,
    copies_2XC: jax.Array,
) -> tuple[DecodeState, DecodeOutput]:
    """Draws `steps` tokens for each live row, or fewer: until it ends, or `bound` rows have.

    about_7B: see ABOUT. copies_2XC: pages of each shard that are copied before (source, target).
    """
    head_VD = transformer.get_output_head(params["params"])
    steps, bound = steps_bound_2
    order_XR = _order_live_first(row_fields_7B[-1], decoder.cache)
    rows = (row_fields_7B.T, table_BN, state.token_B, state.seen_BV)
    row_fields_B7, table_BN, newest_B, seen_BV = _reorder_rows(rows, order_XR)
    token_B, length_B, drawn_B, limit_B, *_, live_B = row_fields_B7.T
    keys_B = jax.random.wrap_key_data(
        jax.lax.bitcast_convert_type(row_fields_B7[:, 4:6], jnp.uint32)
    )
    token_B = jnp.where(token_B < 0, newest_B, token_B)
    source_XC, target_XC = map(mesh_lib.split_rows, copies_2XC)
    cache = state.cache.copy_pages(source_XC, target_XC)
    cache = cache.begin_segment(length_B, decoder.segment)
    start = _LoopState(
        jnp.int32(0),
        cache,
        token_B,
        length_B,
        drawn_B,
        live_B == 0,
        seen_BV,
        _init_output(decoder, token_B.shape[0]),
    )

    def is_running(loop: _LoopState) -> jax.Array:
        return (loop.step < steps) & (jnp.sum(loop.done_B) < bound)

    def body(loop: _LoopState) -> _LoopState:
        view = loop.cache.step(table_BN, jnp.where(loop.done_B, 0, loop.length_B + 1))
        hidden_B1D, view, experts_B1LA = _run_model(
            decoder,
            params,
            loop.token_B[:, None],
            loop.length_B[:, None],
            (~loop.done_B)[:, None].astype(jnp.int32),
            view,
        )
        length_B = loop.length_B + ~loop.done_B
        loop = dataclasses.replace(loop, cache=view.bare(), length_B=length_B)
        return _draw_step(decoder, head_VD, keys_B, limit_B, hidden_B1D[:, 0], experts_B1LA, loop)

    end = jax.lax.while_loop(is_running, body, start)
    cache = end.cache.end(end.length_B - length_B)
    back_XR = None if order_XR is None else jnp.argsort(order_XR, axis=1)
    drawn = jax.tree.map(lambda x: x.swapaxes(0, 1), end.output)
    token_B, seen_BV, drawn = _reorder_rows((end.token_B, end.seen_BV, drawn), back_XR)
    output = jax.tree.map(lambda x: mesh_lib.replicate_array(x.swapaxes(0, 1)), drawn)
    return DecodeState(cache, token_B, seen_BV), output


def _order_live_first(live_B: jax.Array, shape: CacheShape) -> jax.Array | None:
    """[X, R]: the rows of each shard, those that decode before the others, of whose pages a kernel
    then reads nothing. None of slabs, where rows lie as they do in the cache."""
    if shape.backend == "slabs":
        return None
    return jnp.argsort(live_B.reshape(shape.shards, -1) == 0, axis=1, stable=True)


def _reorder_rows(tree: Any, order_XR: jax.Array | None) -> Any:
    """Arrays [B, ...] whose rows are split, with those of each shard in this order."""
    if order_XR is None:
        return jax.tree.map(mesh_lib.split_rows, tree)

    def reorder_array(x: jax.Array) -> jax.Array:
        x_XR = mesh_lib.split_rows(x.reshape(*order_XR.shape, *x.shape[1:]))
        index_XR = order_XR.reshape(*order_XR.shape, *(1,) * (x.ndim - 1))
        return mesh_lib.split_rows(jnp.take_along_axis(x_XR, index_XR, axis=1).reshape(x.shape))

    return jax.tree.map(reorder_array, tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _LoopState:
    """What a segment's steps hand on."""

    step: jax.Array
    cache: Any
    token_B: jax.Array
    length_B: jax.Array
    drawn_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None
    output: DecodeOutput


def _init_output(decoder: Decoder, B: int) -> DecodeOutput:
    W, k = decoder.segment, decoder.top_logprobs
    tokens_WB, logp_WB = jnp.zeros((W, B), jnp.int32), jnp.zeros((W, B), jnp.float32)
    count_reason_2B = jnp.zeros((2, B), jnp.int32)
    experts_WBLA = None
    if decoder.routing:
        experts_WBLA = jnp.zeros((W, B, *decoder.model.config.routing_shape), jnp.int16)
    if not k:
        return DecodeOutput(tokens_WB, logp_WB, count_reason_2B, None, None, None, experts_WBLA)
    top_ids_WBk, top_logp_WBk = jnp.zeros((W, B, k), jnp.int32), jnp.zeros((W, B, k), jnp.float32)
    return DecodeOutput(
        tokens_WB, logp_WB, count_reason_2B, logp_WB, top_ids_WBk, top_logp_WBk, experts_WBLA
    )


def _draw_step(
    decoder: Decoder,
    head_VD: jax.Array,
    keys_B: jax.Array,
    limit_B: jax.Array,
    hidden_BD: jax.Array,
    experts_B1LA: jax.Array | None,
    loop: _LoopState,
) -> _LoopState:
    """One token for each live row, from the hidden states of its newest."""
    logits_BV = jnp.einsum("BD,VD->BV", hidden_BD, head_VD, preferred_element_type=jnp.float32)
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, loop.drawn_B)
    tokens_B, logp_B = draw_tokens(logits_BV, keys_B, decoder.sampling, loop.seen_BV)
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
        new["model_logp_WB"] = compute_model_logp(logits_BV, tokens_B)
        new["top_ids_WBk"], new["top_logp_WBk"] = find_model_top(logits_BV, decoder.top_logprobs)
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
