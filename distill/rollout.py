"""The sampler: one jitted prefill and a while_loop of decoding steps, no host in between.

Randomness belongs to a row: the token at response position i of a row is drawn with
fold_in(row key, i), and `row_keys` folds (prompt, sample) into the key of the step. So a row's
draws are the same alone, in any batch, in any order and on any mesh.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from distill import data
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.policy import Policy
from models.errors import UserError
from models.qwen3 import model
from models.qwen3.model import Params, Qwen3


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: softmax(logits / temperature), truncated.

    temperature 0 is greedy; top_k 0 and top_p 1 truncate nothing (what training uses).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must be above 0 and at most 1 (off)")


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


def truncate(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Tempered logits with -inf outside the top_k most likely and outside the nucleus top_p.

    The nucleus (arXiv 1904.09751) is the smallest set of most likely tokens whose probability,
    taken after top_k as Hugging Face does, reaches top_p.
    """
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # mass of the tokens ahead of this one
        kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
        logits_BV = jnp.where(
            logits_BV < jnp.min(kept_BV, axis=-1, keepdims=True), -jnp.inf, logits_BV
        )
    return logits_BV


def draw(
    logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """One token a row, and its log-probability under the distribution it was drawn from, [B].

    Greedy is a point mass, whose log-probability would always be 0; there the model's own
    log-probability (temperature 1) is recorded instead.
    """
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, axis=-1)
    else:
        logits_BV = truncate(logits_BV, sampling)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return tokens_B.astype(jnp.int32), jnp.take_along_axis(logp_BV, tokens_B[:, None], axis=1)[:, 0]


def _for_decoding(qwen3: Qwen3, params: Params, stacked: bool) -> tuple[Qwen3, Params]:
    # Cast once: every step reads all weights, and would otherwise read them in float32.
    params = jax.tree.map(lambda p: p.astype(qwen3.dtype), params)
    if not stacked:
        params = model.unstack(params, qwen3.config.num_hidden_layers)
    return qwen3.clone(scan=stacked, remat=False), params


@functools.partial(
    jax.jit, static_argnames=("qwen3", "max_new_tokens", "sampling", "stop_ids", "stacked")
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
) -> Batch:
    """Continues left-padded prompts until a stop token or `max_new_tokens`.

    Args:
      tokens_BP, segments_BP: prompts, padded on the left with segment 0.
      keys_B: one key a row, from `row_keys`.
      stacked: the cache's layout; true on TPU and GPU (see models.qwen3.model.Cache).

    Returns:
      A Batch of T = P + max_new_tokens. mask_BT marks the sampled tokens up to and including the
      stop token; a row that met the limit is not `finished` and has no stop token.
    """
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
        i, _, _, done_B, _, _, _ = carry
        return (i < R) & ~jnp.all(done_B)

    def step(carry):
        i, hidden_BD, cache, done_B, out_BR, logp_BR, live_BR = carry
        logits_BV = jnp.einsum("BD,VD->BV", hidden_BD, head_VD, preferred_element_type=jnp.float32)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, i)
        tokens_B, logp_B = draw(logits_BV, keys, sampling)
        tokens_B = jnp.where(done_B, 0, tokens_B)
        out_BR = out_BR.at[:, i].set(tokens_B)
        logp_BR = logp_BR.at[:, i].set(jnp.where(done_B, 0.0, logp_B))
        live_BR = live_BR.at[:, i].set(~done_B)
        live_B1 = (~done_B)[:, None].astype(jnp.int32)
        done_B = done_B | jnp.any(tokens_B[:, None] == stops[None], axis=1)
        hidden_BD, cache = forward(tokens_B[:, None], (lengths_B + i)[:, None], live_B1, cache)
        return i + 1, hidden_BD, cache, done_B, out_BR, logp_BR, live_BR

    hidden_BD, cache = forward(tokens_BP, positions_BP, segments_BP, cache)
    start = (
        jnp.zeros((), jnp.int32),
        hidden_BD,
        cache,
        jnp.zeros((B,), bool),
        jnp.zeros((B, R), jnp.int32),
        jnp.zeros((B, R), jnp.float32),
        jnp.zeros((B, R), bool),
    )
    _, _, _, done_B, out_BR, logp_BR, live_BR = jax.lax.while_loop(running, step, start)
    nothing_BP = jnp.zeros((B, P), bool)

    def joined(prompt_BP, response_BR):
        return jnp.concatenate([prompt_BP, response_BR], axis=1)

    return Batch(
        tokens_BT=joined(tokens_BP, out_BR),
        positions_BT=joined(positions_BP, lengths_B[:, None] + jnp.arange(R)[None]),
        segments_BT=joined(segments_BP, live_BR.astype(jnp.int32)),
        mask_BT=joined(nothing_BP, live_BR),
        sampler_logp_BT=joined(nothing_BP.astype(jnp.float32), logp_BR),
        finished_B=done_B,
    )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response: its tokens (the stop token included) and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool  # by a stop token; otherwise the length limit came first


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
        )
        tokens, logp, mask, done = jax.device_get(
            (batch.tokens_BT, batch.sampler_logp_BT, batch.mask_BT, batch.finished_B)
        )
        for i in range(len(chunk)):
            live = mask[i]
            finished.append(
                Completion(tokens[i][live].tolist(), logp[i][live].tolist(), bool(done[i]))
            )
            if len(finished) == samples:
                yield finished
                finished = []


def bucket(length: int) -> int:
    """A length rounded up, by a quarter or 15 tokens at most, to one of few: each is compiled."""
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step
