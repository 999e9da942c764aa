"""Scores sequences of many requests together, in batches of a few shapes that are compiled once."""

import functools
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill.batch import Batch
from distill.data import collate
from distill.data.examples import Example
from distill.objectives import fused_head, losses
from distill.policy import forward
from distill.runtime import mesh as mesh_lib
from distill.serving.errors import ApiError
from distill.serving.jobs import Scoring
from distill.teachers.outputs import ResponseOutput
from models import transformer
from models.transformer import Params, Transformer

LOGITS_MIB = 128.0  # float32 logits of one chunk on a device
MIN_WIDTH = 64  # tokens of a row
MAX_ROWS, MAX_TOKENS = 8, 16384  # of a batch, in each row shard


@functools.partial(jax.jit, static_argnames=("model", "output", "top_k", "loss_chunk_mib"))
def _compute_outputs(
    model: Transformer,
    params: Params,
    batch: Batch,
    output: str,
    top_k: int,
    loss_chunk_mib: float,
) -> dict[str, jax.Array]:
    """Returns fields of ResponseOutput, [B, T, ...]: column t is about token t + 1."""
    hidden_BTD = forward.compute_hidden(model, params, batch)
    if output == "hidden":
        return {"hidden": mesh_lib.replicate_array(hidden_BTD)}
    inputs = fused_head.HeadInputs(
        hidden_BTD, transformer.get_output_head(params), losses.shift(batch.tokens_BT)
    )
    options = fused_head.StatsOptions(loss_chunk_mib, split=mesh_lib.split_vocabulary, top_k=top_k)
    stats = fused_head.compute_token_stats(inputs, options)
    names = ("logp", *(("top_ids", "top_logp") if top_k else ()))
    return {name: mesh_lib.replicate_array(stats[name]) for name in names}


class ScoreQueue:
    """Sequences that wait to be scored, and the programs that score them.

    All methods run within mesh_lib.use_mesh of `mesh`, whose devices hold the parameters.
    """

    def __init__(self, model: Transformer, params: Params, mesh: Mesh, max_length: int) -> None:
        self._model, self._params, self._mesh = model, params, mesh
        self._max_width = -(-max_length // MIN_WIDTH) * MIN_WIDTH
        self._waiting: deque[tuple[Scoring, int]] = deque()  # (request, index of its sequence)

    def __len__(self) -> int:
        return len(self._waiting)

    def add_job(self, job: Scoring) -> None:
        self._waiting.extend((job, index) for index in range(job.num_sequences))

    def list_jobs(self) -> list[Scoring]:
        """Returns the requests of which sequences wait."""
        return list({id(job): job for job, _ in self._waiting}.values())

    def warm_up(self) -> None:
        """Compiles the smallest program."""
        self._score_rows([[0, 0]], "token", 0)

    def score_batch(self) -> Iterator[Scoring]:
        """Scores the oldest sequence and those that go with it; yields the requests that are done.

        A request whose logits are no numbers gets an ApiError alone, in place of its outputs.
        """
        batch = self._take_batch()
        if not batch:
            return
        job = batch[0][0]
        rows = [[*prompt, *response] for prompt, response in (job.sequences[i] for job, i in batch)]
        fields = self._score_rows(rows, job.output, round_top_k(job.top_k, self._vocab_size))
        for row, (job, index) in enumerate(batch):
            prompt, response = job.sequences[index]
            place = slice(len(prompt) - 1, len(prompt) - 1 + len(response))
            own = {name: x[row, place] for name, x in fields.items()}
            own |= {name: own[name][:, : job.top_k] for name in own if name.startswith("top")}
            job.outputs[index] = ResponseOutput(**{name: x.copy() for name, x in own.items()})
            job.num_left -= 1
            if not job.num_left:
                yield job

    @property
    def _vocab_size(self) -> int:
        return self._model.config.vocab_size

    def _take_batch(self) -> list[tuple[Scoring, int]]:
        """Takes the oldest sequence and others of its width and output out of the queue."""
        waiting = [entry for entry in self._waiting if not entry[0].is_cancelled]
        if not waiting:
            return []
        kind = self._get_kind(*waiting[0])
        alike = [entry for entry in waiting if self._get_kind(*entry) == kind]
        taken = alike[: count_rows(kind[0], len(alike), mesh_lib.count_row_shards(self._mesh))]
        self._waiting = deque(entry for entry in waiting if entry not in taken)
        return taken

    def _get_kind(self, job: Scoring, index: int) -> tuple[int, str, int]:
        width = round_width(sum(map(len, job.sequences[index])), self._max_width)
        return width, job.output, round_top_k(job.top_k, self._vocab_size)

    def _score_rows(self, rows: list[list[int]], output: str, top_k: int) -> dict[str, np.ndarray]:
        width = round_width(max(map(len, rows)), self._max_width)
        count = count_rows(width, len(rows), mesh_lib.count_row_shards(self._mesh))
        examples = [Example(ids, [], "", "") for ids in rows]
        examples += [Example([], [], "", "")] * (count - len(rows))
        batch = jax.device_put(
            collate.collate_padded(examples, width, 0), mesh_lib.make_row_sharding(self._mesh)
        )
        chunk_mib = LOGITS_MIB * self._mesh.size
        fields: Any = _compute_outputs(self._model, self._params, batch, output, top_k, chunk_mib)
        return jax.device_get(mesh_lib.wait_on_cpu(fields))


def round_width(tokens: int, most: int) -> int:
    """Returns the row width that takes so many tokens: a power of two, or the most there can be."""
    return min(most, max(MIN_WIDTH, 1 << (tokens - 1).bit_length()))


def round_top_k(top_k: int, vocab_size: int) -> int:
    """Returns how many likeliest tokens are computed where `top_k` are wanted."""
    return min(vocab_size, 1 << (top_k - 1).bit_length()) if top_k else 0


def count_rows(width: int, waiting: int, shards: int) -> int:
    """Returns the rows of a batch: one in each shard, or as many as go together."""
    return shards * (min(MAX_ROWS, max(1, MAX_TOKENS // width)) if waiting > shards else 1)


def find_fault(outputs: list[ResponseOutput]) -> ApiError | None:
    """Returns the error of outputs that are not finite; None for sound ones."""
    for number, output in enumerate(outputs):
        for name, values in output.get_fields().items():
            if name != "top_ids" and not np.isfinite(values).all():
                return ApiError(f"sequence {number}: the model's {name} is not finite", 500)
    return None
