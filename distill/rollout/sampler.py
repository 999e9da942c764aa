"""Sampling: rows of prompts in, each once and in order, with what was drawn for it.

Randomness belongs to a row: `row_keys` folds (prompt, sample) into the key of the step, and each
token's position into that. So a row's draws are the same alone, in any batch, in any order, on any
mesh, and where it was parked and went on later.
"""

import base64
import dataclasses
from collections import Counter, abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill import data, engine
from distill import mesh as mesh_lib
from distill.policy import Policy
from distill.rollout.sequence import Sequence
from distill.sampling import Sampling
from distill.slots import Options, Slots
from models.errors import UserError
from models.qwen3.model import Params, Qwen3


def row_keys(
    key: jax.Array,
    prompts_B: abc.Sequence[int] | np.ndarray,
    samples_B: abc.Sequence[int] | np.ndarray,
) -> list[tuple[int, int]]:
    """Each row's key (its data), from the key of a step and the numbers of prompt and sample."""
    keys_B2 = _row_keys(key, np.asarray(prompts_B, np.int32), np.asarray(samples_B, np.int32))
    return [(int(a), int(b)) for a, b in np.asarray(jax.device_get(keys_B2))]


@jax.jit
def _row_keys(key: jax.Array, prompts_B: jax.Array, samples_B: jax.Array) -> jax.Array:
    fold = jax.random.fold_in
    keys_B = jax.vmap(lambda p, s: fold(fold(key, p), s))(prompts_B, samples_B)
    return jax.random.key_data(keys_B)


def expand_prompts(
    examples: abc.Sequence[data.Example], samples: int, key: jax.Array, limit: int
) -> list[Sequence]:
    """`samples` rows for each example, of at most `limit` tokens, under the key of a step."""
    numbers_B, samples_B = np.divmod(np.arange(len(examples) * samples), samples)
    keys = row_keys(key, numbers_B, samples_B)
    return [
        Sequence(
            e.prompt,
            k,
            limit,
            e.where,
            told=e.told,
            kind=e.kind,
            thinking=e.thinking,
            difficulty=e.difficulty,
        )
        for e, k in zip([examples[i] for i in numbers_B], keys, strict=True)
    ]


def sample(
    qwen3: Qwen3,
    params: Params,
    rows: abc.Sequence[Sequence],
    *,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    options: Options,
    version: int = 0,
    budget: int | None = None,
    counts: Counter[str] | None = None,
    top_logprobs: int = 0,
    routing: bool = False,
    ended: abc.Callable[[Sequence], bool] | None = None,
) -> abc.Iterator[Sequence]:
    """Continues `rows`, and yields each of them once, in order, as soon as it and those before end.

    A row that has tokens already goes on from them. With a `budget`, sampling stops when so many
    tokens were drawn in all (or up to one a slot more), and rows that have not ended come without
    a reason: parked, to go on later. `version` is noted with each token. With `top_logprobs`, rows
    have the model's own log-probabilities too, and those of so many tokens; with `routing`, the
    experts of all tokens but the last, which is never read. `ended` is asked of rows that go on,
    now and then, and may end them: stop strings. What was done is added to `counts`: `tokens`
    drawn, `steps` and `slot_steps` (steps x slots) of decoding, of these `queued_tokens` and
    `queued_slot_steps` while rows were waiting, `prompt_tokens` read and `read_tokens` with
    padding, `segments`, `refits` of the cache, rows `parked` to make room.

    The weights are taken before it returns, and `params` may then be donated.

    Raises:
      UserError: naming the first row whose prompt is empty, or which does not fit the cache,
        before anything runs.
    """
    sampling.require(qwen3.config.vocab_size)
    mesh = mesh_lib.decoding(jax.tree.leaves(params)[0].sharding.mesh)
    for number, row in enumerate(rows):
        _check(row, row.where or f"row {number}", options, mesh)
    stacked = engine.prefers_stacked(mesh) if options.stacked is None else options.stacked
    with mesh_lib.use(mesh):
        qwen3, params = engine.weights(
            qwen3,
            params,
            mesh,
            stacked=stacked,
            gathered=options.gathered,
            param_dtype=options.param_dtype,
        )
    dtype = options.cache_dtype or jnp.dtype(qwen3.dtype).name
    decoder = engine.Decoder(
        qwen3, sampling, stop_ids, dtype, options.segment, top_logprobs, routing
    )
    counts = Counter() if counts is None else counts
    return _drawn(Slots(decoder, params, mesh, rows, options, version, counts, ended), rows, budget)


def _drawn(
    slots: Slots, rows: abc.Sequence[Sequence], budget: int | None
) -> abc.Iterator[Sequence]:
    counts, before, returned = slots.counts, slots.counts["tokens"], 0

    def advance() -> bool:
        with mesh_lib.use(slots.mesh):
            return slots.advance(None if budget is None else budget + before - counts["tokens"])

    while advance():
        while returned < len(rows) and rows[returned].reason:
            yield rows[returned]
            returned += 1
    yield from rows[returned:]


def _check(row: Sequence, where: str, options: Options, mesh: Mesh) -> None:
    if not row.prompt:
        raise UserError(f"{where}: the prompt is empty")
    room = min(options.longest or row.longest, options.room(mesh))
    if row.longest > room:
        raise UserError(
            f"{where}: a prompt of {len(row.prompt)} tokens and {row.limit} new ones exceed "
            f"the {room} tokens that the cache has for a row"
        )


@dataclasses.dataclass
class PartialRollouts:
    """Rows that a step's budget of tokens left unfinished: they go on in the next step."""

    rows: list[Sequence] = dataclasses.field(default_factory=list)
    begun: int = 0  # rows that were begun, over all steps

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: JSON."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        for row in rows:
            row["experts"] = [
                [x.shape, base64.b64encode(x.tobytes()).decode()] for x in row["experts"]
            ]
        return {"rows": rows, "begun": self.begun}

    def resume(self, position: dict[str, Any]) -> None:
        self.begun, self.rows = position["begun"], []
        for row in position["rows"]:
            experts = [
                np.frombuffer(base64.b64decode(x), np.int16).reshape(shape)
                for shape, x in row["experts"]
            ]
            self.rows.append(Sequence(**{**row, "key": tuple(row["key"]), "experts": experts}))


@dataclasses.dataclass
class AsyncRollouts:
    """The rows of the coming step, sampled while the one before it is trained."""

    step: int = -1  # whose rows they are; -1: none
    rows: list[Sequence] = dataclasses.field(default_factory=list)
    measured: dict[str, float] = dataclasses.field(default_factory=dict)
    # Samples them: the weights are taken already.
    begun: abc.Callable[[], tuple[list[Sequence], dict[str, float]]] | None = None

    def sample(self, trained: Any) -> None:
        """Samples what was begun, while the device computes `trained`."""
        begun, self.begun = self.begun, None
        if begun is None:
            self.step, self.rows, self.measured = -1, [], {}
            return
        devices = jax.tree.leaves(trained)[0].sharding.device_set
        if len(devices) > 1 and jax.default_backend() == "cpu":
            jax.block_until_ready(trained)  # or XLA may deadlock, see Slots.read_together
        self.step += 1
        self.rows, self.measured = begun()

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: JSON."""
        rows = PartialRollouts(self.rows).position()
        return {"step": self.step, "measured": self.measured, "sampled": rows}

    def resume(self, position: dict[str, Any]) -> None:
        kept = PartialRollouts()
        kept.resume(position["sampled"])
        self.step, self.rows, self.measured = position["step"], kept.rows, position["measured"]


def complete(
    policy: Policy,
    prompts: list[list[int]],
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
) -> abc.Iterator[list[Sequence]]:
    """Yields the `samples` completions of each prompt, in order; `batch_size` rows decode at once.

    Those of prompt i have at most limits[i] new tokens. For the rest see `sample`.

    `first` is the number of the first prompt: a call that goes on where another stopped draws what
    that one would have drawn. An empty prompt has no completions.
    """
    numbers_B, samples_B = np.divmod(np.arange(len(prompts) * samples), samples)
    keys = row_keys(key, numbers_B + first, samples_B)
    all_rows = [Sequence(prompts[p], k, limits[p]) for p, k in zip(numbers_B, keys, strict=True)]
    rows = [row for row in all_rows if row.prompt]
    longest = bucket(max((row.longest for row in rows), default=1))
    done = sample(
        policy.model,
        policy.params,
        rows,
        sampling=sampling,
        stop_ids=policy.stop_ids,
        options=Options(batch_size, longest=longest),
        counts=counts,
        top_logprobs=top_logprobs,
        ended=ended,
    )
    for prompt in prompts:
        yield [next(done) for _ in range(samples if prompt else 0)]


def bucket(length: int) -> int:
    """A length rounded up, by a quarter or 15 tokens at most, to one of few: each is compiled."""
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step
