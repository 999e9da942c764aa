"""Sampling: sequences in, each once and in order, with what was drawn for it.

Randomness belongs to a sequence: `row_keys` folds (prompt, sample) into the key of the step, and
each token's position into that. So its draws are the same alone, in any batch, in any order, on any
mesh, and where it was parked and went on later.
"""

from collections import Counter, abc, deque

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill.data import dataset
from distill.policy.policy import Policy
from distill.rollout import decode
from distill.rollout.engine import Engine
from distill.rollout.options import RolloutOptions, get_segment_steps, make_cache_shape
from distill.rollout.sampling import Sampling
from distill.rollout.sequence import Sequence
from distill.runtime import mesh as mesh_lib
from models.errors import UserError
from models.transformer import Params, Transformer


def make_row_keys(
    key: jax.Array,
    prompts_B: abc.Sequence[int] | np.ndarray,
    samples_B: abc.Sequence[int] | np.ndarray,
) -> list[tuple[int, int]]:
    """Each sequence's key (its data), from the key of a step and the numbers of prompt and
    sample."""
    keys_B2 = _fold_row_keys(key, np.asarray(prompts_B, np.int32), np.asarray(samples_B, np.int32))
    return [(int(a), int(b)) for a, b in np.asarray(jax.device_get(keys_B2))]


@jax.jit
def _fold_row_keys(key: jax.Array, prompts_B: jax.Array, samples_B: jax.Array) -> jax.Array:
    fold = jax.random.fold_in
    keys_B = jax.vmap(lambda p, s: fold(fold(key, p), s))(prompts_B, samples_B)
    return jax.random.key_data(keys_B)


def expand_prompts(
    examples: abc.Sequence[dataset.Example], samples: int, key: jax.Array, limit: int
) -> list[Sequence]:
    """`samples` sequences for each example, of at most `limit` tokens, under the key of a step."""
    numbers_B, samples_B = np.divmod(np.arange(len(examples) * samples), samples)
    keys = make_row_keys(key, numbers_B, samples_B)
    return [
        Sequence(
            e.prompt,
            k,
            limit,
            e.where,
            teacher_prompt=e.teacher_prompt,
            source_id=e.source_id,
            thinking=e.thinking,
            difficulty=e.difficulty,
        )
        for e, k in zip([examples[i] for i in numbers_B], keys, strict=True)
    ]


def sample(
    model: Transformer,
    params: Params,
    sequences: abc.Iterable[Sequence],
    *,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    options: RolloutOptions,
    version: int = 0,
    token_budget: int | None = None,
    counts: Counter[str] | None = None,
    top_logprobs: int = 0,
    routing: bool = False,
    ended: abc.Callable[[Sequence], bool] | None = None,
    warm_up: bool = False,
    lora_params: Params | None = None,
) -> abc.Iterator[Sequence]:
    """Continues sequences, and yields each once, in order, as soon as it and those before end; it
    is not held any longer then.

    One that has tokens already goes on from them. With a `budget`, sampling stops when so many
    tokens were drawn in all (or up to one a row more), and sequences that have not ended come
    without a reason: parked, to go on later. `version` is noted with each token. With
    `top_logprobs`, they have the model's own log-probabilities too, and those of so many tokens;
    with `routing`, the experts of all tokens but the last, which is never read. `ended` is asked of
    sequences that go on, now and then, and may end them: stop strings. What was done is added to
    `counts`: `tokens` drawn, `steps` and `slot_steps` (steps x rows) of decoding, of these
    `queued_tokens` and `queued_slot_steps` while sequences were waiting, `prompt_tokens` read and
    `read_tokens` with padding, `segments`, sequences `parked` to make room. `warm_up` compiles all
    programs first, also those that these sequences do not need. `trained` is the LoRA beside
    `params`, of a model that has one.

    The weights are taken before it returns, and what they are of may then be donated.

    Raises:
      UserError: naming the first sequence whose prompt is empty, or which does not fit the cache,
        before anything runs.
    """
    sampling.check_vocab_size(model.config.vocab_size)
    mesh = mesh_lib.to_decode_mesh(jax.tree.leaves(params)[0].sharding.mesh)
    waiting = deque(sequences)
    for number, row in enumerate(waiting):
        _check_sequence(row, row.where or f"row {number}", options, mesh)
    stacked = decode.prefers_stacked(mesh) if options.stacked is None else options.stacked
    with mesh_lib.use_mesh(mesh):
        model, params = decode.prepare_weights(
            model,
            params,
            mesh,
            stacked=stacked,
            gather_weights=options.gather_weights,
            param_dtype=options.param_dtype,
            lora_params=lora_params,
        )
    dtype, max_length = jnp.dtype(model.dtype).name, max((s.max_length for s in waiting), default=1)
    num_unfinished = sum(not s.finish_reason for s in waiting)
    shape = make_cache_shape(options, model.config, mesh, dtype, max(1, num_unfinished), max_length)
    steps = get_segment_steps(options, shape)
    decoder = decode.Decoder(model, sampling, stop_ids, shape, steps, top_logprobs, routing)
    counts = Counter() if counts is None else counts
    engine = Engine(decoder, params, mesh, waiting, options, version, counts, ended)
    if warm_up:
        with mesh_lib.use_mesh(mesh):
            engine.warm_up()
    return _yield_finished(engine, waiting, token_budget)


def _yield_finished(
    engine: Engine, waiting: deque[Sequence], token_budget: int | None
) -> abc.Iterator[Sequence]:
    counts, before = engine.counts, engine.counts["tokens"]

    def advance_engine() -> bool:
        with mesh_lib.use_mesh(engine.mesh):
            return engine.advance(
                None if token_budget is None else token_budget + before - counts["tokens"]
            )

    while advance_engine():
        while waiting and waiting[0].finish_reason:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _check_sequence(row: Sequence, where: str, options: RolloutOptions, mesh: Mesh) -> None:
    if not row.prompt:
        raise UserError(f"{where}: the prompt is empty")
    max_tokens = min(options.max_length or row.max_length, options.get_max_sequence_tokens(mesh))
    if row.max_length > max_tokens:
        raise UserError(
            f"{where}: a prompt of {len(row.prompt)} tokens and {row.limit} new ones exceed "
            f"the {max_tokens} tokens that the cache has for a row"
        )


def complete(
    policy: Policy,
    prompts: abc.Sequence[list[int]],
    *,
    samples: int,
    key: jax.Array,
    limits: abc.Sequence[int],
    sampling: Sampling,
    batch_size: int,
    first: int = 0,
    counts: Counter[str] | None = None,
    top_logprobs: int = 0,
    ended: abc.Callable[[Sequence], bool] | None = None,
    warm_up: bool = False,
) -> abc.Iterator[list[Sequence]]:
    """Yields the `samples` completions of each prompt, in order; `batch_size` rows decode at once.

    Those of prompt i have at most limits[i] new tokens. For the rest see `sample`.

    `first` is the number of the first prompt: a call that goes on where another stopped draws what
    that one would have drawn. An empty prompt has no completions.
    """
    numbers_B, samples_B = np.divmod(np.arange(len(prompts) * samples), samples)
    keys = make_row_keys(key, numbers_B + first, samples_B)
    max_length = max((len(p) + n for p, n in zip(prompts, limits, strict=True) if p), default=1)
    done = sample(
        policy.model,
        policy.params,
        (
            Sequence(prompts[p], k, limits[p])
            for p, k in zip(numbers_B, keys, strict=True)
            if prompts[p]
        ),
        sampling=sampling,
        stop_ids=policy.stop_ids,
        options=RolloutOptions(batch_size, max_length=bucket_length(max_length)),
        counts=counts,
        top_logprobs=top_logprobs,
        ended=ended,
        warm_up=warm_up,
    )
    return ([next(done) for _ in range(samples if prompt else 0)] for prompt in prompts)


def bucket_length(length: int) -> int:
    """A length rounded up, by a quarter or 15 tokens at most, to one of few: each is compiled."""
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step
