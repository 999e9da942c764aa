"""Samples sequences: each comes back once, in order, with what was drawn for it.

Randomness belongs to the sequence: `make_row_keys` folds (prompt, sample) into the key of a step,
and each token's position is folded into that. So a sequence's draws are the same alone, in any
batch, in any order, on any mesh, and after it was parked.
"""

import dataclasses
from collections import Counter, abc, deque

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill.data import dataset
from distill.rollout import decode, decode_weights
from distill.rollout.engine import Engine
from distill.rollout.options import RolloutOptions, get_segment_tokens, make_cache_shape
from distill.rollout.sampling import Sampling
from distill.rollout.sequence import Sequence
from distill.runtime import mesh as mesh_lib
from models.errors import UserError
from models.transformer import Params, Transformer


@dataclasses.dataclass(frozen=True)
class SamplingModel:
    """A model to sample from."""

    transformer: Transformer
    params: Params  # on the mesh whose devices sample
    stop_ids: tuple[int, ...]  # tokens that end a response
    lora_params: Params | None = None  # the factors of a LoRA, if transformer has one

    @property
    def mesh(self) -> Mesh:
        """The mesh that decodes, of the devices that hold the parameters."""
        return mesh_lib.to_decode_mesh(jax.tree.leaves(self.params)[0].sharding.mesh)


def make_row_keys(
    key: jax.Array,
    prompts_B: abc.Sequence[int] | np.ndarray,
    samples_B: abc.Sequence[int] | np.ndarray,
) -> list[tuple[int, int]]:
    """Returns each sequence's key data, from the key of a step and the numbers of its prompt and
    its sample."""
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
    """Returns `samples` sequences for each example, of at most `limit` response tokens, under the
    key of a step."""
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
    model: SamplingModel,
    sequences: abc.Iterable[Sequence],
    *,
    sampling: Sampling,
    options: RolloutOptions,
    version: int = 0,
    token_budget: int | None = None,
    rows: int = 0,
    counts: Counter[str] | None = None,
    ended: abc.Callable[[Sequence], bool] | None = None,
    check_stop: abc.Callable[[], None] = lambda: None,
) -> abc.Iterator[Sequence]:
    """Continues sequences; yields each once, in order, as soon as it and all before it have ended,
    and then drops it. The weights are copied before this returns: the model's may then be donated.

    Args:
      sequences: new ones, or ones with tokens, which go on from these.
      version: of the weights, recorded with each token.
      token_budget: stop after so many tokens in all (or up to one a row more); unfinished sequences
        then come without a finish_reason, and another call may go on with them.
      rows: sequences that the cache is for, at least, so that calls for fewer compile nothing.
      counts: added to: `tokens` drawn; `steps` of decoding, `row_steps` (steps x rows that had
        not ended), `slot_steps` (steps x rows), and `queued_tokens`, `queued_slot_steps` of them
        while sequences waited; `prompt_tokens` read, and `read_tokens` with padding; `segments`;
        sequences `parked` to make room; `resizes`; and with drafts those of DRAFT_COUNTS.
      ended: asked now and then of unfinished sequences; ends those for which it is true (stop
        strings).
      check_stop: called between segments, and between the programs that are compiled before them;
        what it raises ends the sampling.

    Raises:
      UserError: naming the first sequence whose prompt is empty or which does not fit the cache,
        before anything runs.
    """
    transformer, mesh, waiting = model.transformer, model.mesh, deque(sequences)
    sampling.check_vocab_size(transformer.config.vocab_size)
    for number, sequence in enumerate(waiting):
        _check_sequence(sequence, sequence.where or f"row {number}", options, mesh)
    dtype, max_length = (
        jnp.dtype(transformer.dtype).name,
        max((s.max_length for s in waiting), default=1),
    )
    count = max(1, rows, sum(not s.finish_reason for s in waiting))
    shape = make_cache_shape(options, transformer.config, mesh, dtype, count, max_length)
    with mesh_lib.use_mesh(mesh):
        decoder, params = prepare_decoder(model, sampling, options, shape)
        counts = Counter() if counts is None else counts
        engine = Engine(decoder, params, waiting, options, version, counts, ended)
        if options.warm_up:
            engine.warm_up(check_stop)
    return _yield_finished(engine, waiting, token_budget, mesh, check_stop)


def prepare_decoder(
    model: SamplingModel,
    sampling: Sampling,
    options: RolloutOptions,
    shape: decode.CacheShape,
    by_row: bool = False,
) -> tuple[decode.Decoder, Params]:
    """Returns what an Engine decodes with, and the weights as it reads them. Call within
    mesh_lib.use_mesh of the mesh that decodes."""
    mesh = model.mesh
    transformer, params = decode_weights.prepare_weights(
        model.transformer,
        model.params,
        mesh,
        stacked=decode_weights.prefers_stacked(mesh)
        if options.stacked is None
        else options.stacked,
        gather_weights=options.gather_weights,
        param_dtype=options.param_dtype,
        lora_params=model.lora_params,
    )
    decoder = decode.Decoder(
        transformer,
        sampling,
        model.stop_ids,
        shape,
        get_segment_tokens(options, shape),
        options.top_logprobs,
        options.routing,
        by_row,
        options.draft_tokens if options.drafts else None,
    )
    return decoder, params


def _yield_finished(
    engine: Engine,
    waiting: deque[Sequence],
    token_budget: int | None,
    mesh: Mesh,
    check_stop: abc.Callable[[], None],
) -> abc.Iterator[Sequence]:
    counts, before = engine.counts, engine.counts["tokens"]

    def advance_engine() -> bool:
        left = None if token_budget is None else token_budget + before - counts["tokens"]
        with mesh_lib.use_mesh(mesh):
            return engine.advance(left)

    while advance_engine():
        check_stop()
        while waiting and waiting[0].finish_reason:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def _check_sequence(sequence: Sequence, where: str, options: RolloutOptions, mesh: Mesh) -> None:
    if not sequence.prompt:
        raise UserError(f"{where}: the prompt is empty")
    length = sequence.max_length
    max_tokens = min(options.max_length or length, options.get_max_sequence_tokens(mesh))
    if length > max_tokens:
        raise UserError(
            f"{where}: a prompt of {len(sequence.prompt)} tokens and {sequence.limit} new ones "
            f"exceed the {max_tokens} tokens that the cache has for a row"
        )


def bucket_length(length: int) -> int:
    """Rounds a length up, by a quarter or 15 tokens at most, to one of a few that are compiled."""
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step
