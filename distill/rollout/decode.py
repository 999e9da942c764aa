"""The programs that sampling runs on the device: weights, an empty state, prompts, a segment.

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
from jax.sharding import Mesh

from distill.rollout import sampling as sampling_lib
from distill.rollout.sampling import RowSampling, Sampling
from distill.runtime import mesh as mesh_lib
from models import transformer
from models.layers import lora, moe, quantised
from models.layers.pages import Pages, init_pages
from models.layers.slabs import Slabs, init_slabs
from models.transformer import Params, Transformer

# Why a row ended: a stop token, its limit, or NaN logits.
UNFINISHED, STOP, LENGTH, ERROR = range(4)


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

    model: Transformer  # from `prepare_weights`
    sampling: Sampling
    stop_ids: tuple[int, ...]
    cache: CacheShape
    segment: int  # decoding steps at most in one call of `decode`
    top_logprobs: int = 0  # likeliest tokens to record at each step
    routing: bool = False  # record the experts of each token
    by_row: bool = False  # each row brings its own sampling, and `sampling` is not read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """State that stays on the device between calls."""

    cache: Pages | Slabs
    token_B: jax.Array  # int32: the newest token of each row, not in the cache yet
    seen_BV: jax.Array | None  # bool: tokens of the response so far, for a presence penalty


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


def prefers_stacked(mesh: Mesh) -> bool:
    """Returns true where decoding is faster from weights stacked over layers: on TPUs. On GPUs XLA
    copies each layer out of the stack before it reads it, at every step."""
    return mesh.devices.flat[0].platform == "tpu"


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
    """Returns the model as it decodes, and its variables: the parameters, and the factors of a LoRA
    where lora_params are given.

    Args:
      stacked: parameters of all layers in one array, else one for each layer.
      gather_weights: do not split the weights over the mesh axes that split rows (experts still
        are), so that no step fetches them; takes the memory of all weights / tensor on each device.
      param_dtype: "": the model's; may be one of 8 bits (models.layers.quantised).
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
    """Converts weights for `prepare_weights`, once: every step reads all of them."""
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
    """Returns an empty cache."""
    config, c, seen_BV = decoder.model.config, decoder.cache, None
    if c.backend == "slabs":
        cache = init_slabs(config, c.rows, c.page_size, jnp.dtype(c.dtype))
    else:
        cache = init_pages(config, c.shards, c.pages, c.page_size, jnp.dtype(c.dtype), c.backend)
    if decoder.by_row or decoder.sampling.presence_penalty:
        seen_BV = mesh_lib.split_rows(jnp.zeros((c.rows, config.vocab_size), bool))
    return DecodeState(cache, mesh_lib.split_rows(jnp.zeros(c.rows, jnp.int32)), seen_BV)


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
    """Reads a line of T tokens for each shard into the cache: pieces of prompts, one after another.

    Args:
      line_3XT: int32: tokens, positions, and rows of their shard's table (-1: padding).
      table_RN: int32, pages of R prompts.
      length_R: int32, tokens of each in the cache afterwards.
      starts_XR: int32 [X, R / X + 1], where the pieces begin in the line.

    Returns:
      The state, and the experts [X, T, L, A] with Decoder.routing.
    """
    tokens_XT, position_XT, row_XT = map(mesh_lib.split_rows, line_3XT)
    table_RN, length_R, starts_XR = map(mesh_lib.split_rows, (table_RN, length_R, starts_XR))
    cache = state.cache.bind_tokens(table_RN, length_R, starts_XR, row_XT, position_XT)
    own_XT = (row_XT >= 0).astype(jnp.int32)
    _, cache, experts = _run_model(decoder, params, tokens_XT, position_XT, own_XT, cache)
    return dataclasses.replace(state, cache=cache.unbind_tokens()), experts


def _run_model(
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
    return DecodeState(state.cache.gather_rows(rows_XR), take_rows(state.token_B), seen_BV)


# The host's int32 fields for each row: its newest token (-1: the device has it), its tokens in the
# cache, the tokens drawn so far and at most, its key, and 1 where it decodes a sequence.
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
    sampling_B5: jax.Array | None = None,
) -> tuple[DecodeState, DecodeOutput]:
    """Draws up to `steps` tokens for each live row, until it or `bound` rows have ended.

    Args:
      steps_bound_2: int32.
      row_fields_7B: int32, see ROW_FIELDS.
      table_BN: int32, pages of each row.
      copies_2XC: int32, pages of each shard to copy first (source, target); -1: none.
      sampling_B5: float32, fields of each row's Sampling; with Decoder.by_row.
    """
    head_VD = transformer.get_output_head(params["params"])
    steps, bound = steps_bound_2
    order_XR = _order_live_first(row_fields_7B[-1], decoder.cache)
    rows = (row_fields_7B.T, table_BN, state.token_B, state.seen_BV, sampling_B5)
    row_fields_B7, table_BN, newest_B, seen_BV, sampling_B5 = _reorder_rows(rows, order_XR)
    sampling = decoder.sampling if sampling_B5 is None else RowSampling(*sampling_B5.T)
    token_B, length_B, drawn_B, limit_B, *_, live_B = row_fields_B7.T
    key_data_B2 = jax.lax.bitcast_convert_type(row_fields_B7[:, 4:6], jnp.uint32)
    keys_B = jax.random.wrap_key_data(key_data_B2)
    token_B = jnp.where(token_B < 0, newest_B, token_B)
    cache = state.cache.copy_pages(*map(mesh_lib.split_rows, copies_2XC))
    cache = cache.begin_segment(length_B, decoder.segment)
    start = _LoopState(
        *(jnp.int32(0), cache, token_B, length_B, drawn_B, live_B == 0, seen_BV),
        _init_output(decoder, token_B.shape[0]),
    )

    def is_running(loop: _LoopState) -> jax.Array:
        return (loop.step < steps) & (jnp.sum(loop.done_B) < bound)

    def body(loop: _LoopState) -> _LoopState:
        view = loop.cache.bind_next_tokens(table_BN, jnp.where(loop.done_B, 0, loop.length_B + 1))
        hidden_B1D, view, experts_B1LA = _run_model(
            decoder,
            params,
            loop.token_B[:, None],
            loop.length_B[:, None],
            (~loop.done_B)[:, None].astype(jnp.int32),
            view,
        )
        length_B = loop.length_B + ~loop.done_B
        loop = dataclasses.replace(loop, cache=view.unbind_tokens(), length_B=length_B)
        args = (keys_B, sampling, limit_B, hidden_B1D[:, 0], experts_B1LA)
        return _draw_step(decoder, head_VD, *args, loop)

    end = jax.lax.while_loop(is_running, body, start)
    cache = end.cache.end_segment(end.length_B - length_B)
    back_XR = None if order_XR is None else jnp.argsort(order_XR, axis=1)
    drawn = jax.tree.map(lambda x: x.swapaxes(0, 1), end.output)
    token_B, seen_BV, drawn = _reorder_rows((end.token_B, end.seen_BV, drawn), back_XR)
    output = jax.tree.map(lambda x: mesh_lib.replicate_array(x.swapaxes(0, 1)), drawn)
    return DecodeState(cache, token_B, seen_BV), output


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _LoopState:
    """State that one decoding step passes to the next."""

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


def _draw_step(
    decoder: Decoder,
    head_VD: jax.Array,
    keys_B: jax.Array,
    sampling: Sampling | RowSampling,
    limit_B: jax.Array,
    hidden_BD: jax.Array,
    experts_B1LA: jax.Array | None,
    loop: _LoopState,
) -> _LoopState:
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
