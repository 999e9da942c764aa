"""The sampler: one jitted prefill and a while_loop of decoding steps, no host in between.

Randomness belongs to a row: the token at response position i of a row is drawn with
fold_in(row key, i), and `row_keys` folds (prompt, sample) into the key of the step. So a row's
draws are the same alone, in any batch, in any order and on any mesh.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill import data
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.policy import Policy
from distill.sampling import Sampling, draw, model_logp, model_top
from models.qwen3 import model
from models.qwen3.model import Params, Qwen3


def prefers_stacked() -> bool:
    """Whether this platform decodes faster from a stacked cache (models.qwen3.model.Cache)."""
    return jax.default_backend() != "cpu"


def row_keys(
    key: jax.Array, prompts_B: jax.typing.ArrayLike, samples_B: jax.typing.ArrayLike
) -> jax.Array:
    """Keys [B] from the key of a step, the index of each row's prompt and of its sample."""
    return jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(key, p), s))(
        prompts_B, samples_B
    )


def _for_decoding(qwen3: Qwen3, params: Params, stacked: bool) -> tuple[Qwen3, Params]:
    # Cast once: every step reads all weights, and would otherwise read them in float32.
    params = jax.tree.map(lambda p: p.astype(qwen3.dtype), params)
    if not stacked:
        params = model.unstack(params, qwen3.config.num_hidden_layers)
    return qwen3.clone(scan=stacked, remat=False), params


class Drawn(NamedTuple):
    """What is known of the tokens of a response: of one step [B], or of all [B, R]."""

    tokens: jax.Array
    logp: jax.Array
    live: jax.Array
    model_logp: jax.Array | None = None
    top_ids: jax.Array | None = None  # these two with one axis more
    top_logp: jax.Array | None = None


def _nothing_drawn(B: int, R: int, top_logprobs: int) -> Drawn:
    nothing_BR = jnp.zeros((B, R), jnp.float32)
    drawn = Drawn(nothing_BR.astype(jnp.int32), nothing_BR, nothing_BR.astype(bool))
    if not top_logprobs:
        return drawn
    nothing_BRk = jnp.zeros((B, R, top_logprobs), jnp.float32)
    return Drawn(*drawn[:3], nothing_BR, nothing_BRk.astype(jnp.int32), nothing_BRk)


@functools.partial(
    jax.jit,
    static_argnames=("qwen3", "max_new_tokens", "sampling", "stop_ids", "stacked", "top_logprobs"),
)
def sample(
    qwen3: Qwen3,
    params: Params,
    tokens_BP: jax.Array,
    segments_BP: jax.Array,
    keys_B: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    stacked: bool,
    top_logprobs: int = 0,
) -> Batch:
    """Continues left-padded prompts until a stop token or `max_new_tokens`.

    Args:
      tokens_BP, segments_BP: prompts, padded on the left with segment 0.
      keys_B: one key a row, from `row_keys`.
      stacked: the cache's layout; true on TPU and GPU (see models.qwen3.model.Cache).
      top_logprobs: fill the batch's model_logp_BT, and top_*_BTk with so many tokens.

    Returns:
      A Batch of T = P + max_new_tokens. mask_BT marks the sampled tokens up to and including the
      stop token; a row that met the limit is not `finished` and has no stop token. A row whose
      logits came out as nan ends there, unfinished, with a token -1 outside the mask.
    """
    sampling.require(qwen3.config.vocab_size)
    B, P = tokens_BP.shape
    R = max_new_tokens
    qwen3, params = _for_decoding(qwen3, params, stacked)
    head_VD = model.head(params)
    cache = model.init_cache(qwen3.config, B, P + R, qwen3.dtype, stacked)
    positions_BP = jnp.maximum(jnp.cumsum(segments_BP, axis=1) - 1, 0)
    lengths_B = jnp.sum(segments_BP, axis=1)
    stops = jnp.array(stop_ids, jnp.int32)

    def forward(tokens, positions, segments, cache):
        hidden, cache = qwen3.apply({"params": params}, tokens, positions, segments, cache)
        return hidden[:, -1], cache

    def running(carry):
        i, _, _, done_B, _, _ = carry
        return (i < R) & ~jnp.all(done_B)

    def step(carry):
        i, hidden_BD, cache, done_B, seen_BV, out = carry
        logits_BV = jnp.einsum("BD,VD->BV", hidden_BD, head_VD, preferred_element_type=jnp.float32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, i)
        tokens_B, logp_B = draw(logits_BV, keys, sampling, seen_BV)
        live_B, fed_B = ~done_B & (tokens_B >= 0), jnp.maximum(tokens_B, 0)
        logp_B = jnp.where(live_B, logp_B, 0.0)
        new = Drawn(jnp.where(done_B, 0, tokens_B), logp_B, live_B)
        if top_logprobs:
            model_logp_B = jnp.where(live_B, model_logp(logits_BV, fed_B), 0.0)
            new = Drawn(*new[:3], model_logp_B, *model_top(logits_BV, top_logprobs))
        out = jax.tree.map(lambda written, now: written.at[:, i].set(now), out, new)
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(B), fed_B].set(True)
        done_B = ~live_B | jnp.any(tokens_B[:, None] == stops[None], axis=1)
        live_B1 = live_B[:, None].astype(jnp.int32)
        hidden_BD, cache = forward(fed_B[:, None], (lengths_B + i)[:, None], live_B1, cache)
        return i + 1, hidden_BD, cache, done_B, seen_BV, out

    hidden_BD, cache = forward(tokens_BP, positions_BP, segments_BP, cache)
    out = _nothing_drawn(B, R, top_logprobs)
    seen_BV = None
    if sampling.presence_penalty:
        seen_BV = jnp.zeros((B, qwen3.config.vocab_size), bool)
    start = (jnp.zeros((), jnp.int32), hidden_BD, cache, jnp.zeros((B,), bool), seen_BV, out)
    _, _, _, done_B, _, out = jax.lax.while_loop(running, step, start)
    positions_BT = jnp.concatenate([positions_BP, lengths_B[:, None] + jnp.arange(R)[None]], axis=1)
    return _batch(tokens_BP, segments_BP, positions_BT, out, done_B)


def _batch(
    tokens_BP: jax.Array,
    segments_BP: jax.Array,
    positions_BT: jax.Array,
    out: Drawn,
    done_B: jax.Array,
) -> Batch:
    """Prompts and what was drawn after them."""
    P = tokens_BP.shape[1]

    def after_prompt(x):
        return jnp.pad(x, [(0, 0), (P, 0)] + [(0, 0)] * (x.ndim - 2))

    after = jax.tree.map(after_prompt, out)
    return Batch(
        tokens_BT=after.tokens.at[:, :P].set(tokens_BP),
        positions_BT=positions_BT,
        segments_BT=after.live.astype(jnp.int32).at[:, :P].set(segments_BP),
        mask_BT=after.live,
        sampler_logp_BT=after.logp,
        finished_B=done_B & jnp.all(out.tokens >= 0, axis=1),
        model_logp_BT=after.model_logp,
        top_ids_BTk=after.top_ids,
        top_logp_BTk=after.top_logp,
    )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response: its tokens (the stop token included) and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]
    reason: str  # it ended: stop (a stop token), length (the limit), error (the logits were nan)
    # Where asked for, of the model's own distribution: of each token, and the likeliest (id, logp).
    model_logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


def complete(
    policy: Policy,
    prompts: list[list[int]],
    *,
    samples: int,
    key: jax.Array,
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int,
    first: int = 0,
    top_logprobs: int = 0,
) -> Iterator[list[Completion]]:
    """Yields the `samples` completions of each prompt, in order, `batch_size` rows at a time.

    `first` is the number of the first prompt: a call that goes on where another stopped draws what
    that one would have drawn. All batches have one shape, so the sampler is compiled once.
    """
    mesh = jax.tree.leaves(policy.params)[0].sharding.mesh
    shards = mesh_lib.row_shards(mesh)
    rows = [(p, s) for p in range(len(prompts)) for s in range(samples)]
    size = -(-min(batch_size, len(rows)) // shards) * shards
    width = bucket(max(map(len, prompts)))
    finished: list[Completion] = []
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        padded = chunk + chunk[:1] * (size - len(chunk))
        tokens, segments = data.left_pad([prompts[p] for p, _ in padded], width)
        numbers_B, samples_B = np.array(padded, np.int32).T
        put = functools.partial(jax.device_put, device=mesh_lib.rows(mesh))
        batch = sample(
            policy.model,
            policy.params,
            put(tokens),
            put(segments),
            put(row_keys(key, numbers_B + first, samples_B)),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=policy.stop_ids,
            stacked=prefers_stacked(),
            top_logprobs=top_logprobs,
        )
        batch = jax.device_get(batch)
        for i in range(len(chunk)):
            finished.append(_completion(batch, i))
            if len(finished) == samples:
                yield finished
                finished = []


def _completion(batch: Batch, row: int) -> Completion:
    """The response in one row of a batch that lies on the host."""

    def live(x: Any) -> list:
        return x[row][batch.mask_BT[row]].tolist()

    top = None
    if batch.top_ids_BTk is not None:
        pairs = zip(live(batch.top_ids_BTk), live(batch.top_logp_BTk), strict=True)
        top = [list(zip(ids, logp, strict=True)) for ids, logp in pairs]
    assert batch.finished_B is not None
    broken = (batch.tokens_BT[row] < 0).any()
    return Completion(
        tokens=live(batch.tokens_BT),
        logprobs=live(batch.sampler_logp_BT),
        reason="stop" if batch.finished_B[row] else "error" if broken else "length",
        model_logprobs=None if top is None else live(batch.model_logp_BT),
        top_logprobs=top,
    )


def bucket(length: int) -> int:
    """A length rounded up, by a quarter or 15 tokens at most, to one of few: each is compiled."""
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step
