"""Scores token sequences: log-probabilities under a model, or what a loss reads of a teacher."""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from distill import rollout
from distill.batch import Batch
from distill.data import collate, dataset, sources
from distill.data.examples import encode_prompt
from distill.objectives import fused_head, losses
from distill.policy import forward, policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.runtime.progress import show_progress
from distill.teachers.outputs import ResponseOutput
from models import transformer
from models.errors import UserError
from models.transformer import Params, Transformer

LOGITS_MIB = 128.0  # float32 logits of one chunk on a device
Logprobs = list[float | None]
TopLogprobs = list[list[list[float]] | None]  # [id, logprob] pairs of each token


@functools.partial(jax.jit, static_argnames=("model", "top_k", "loss_chunk_mib", "with_hidden"))
def _compute_token_stats(
    model: Transformer,
    params: Params,
    batch: Batch,
    top_k: int,
    loss_chunk_mib: float,
    with_hidden: bool,
) -> losses.Stats:
    inputs = fused_head.HeadInputs(
        forward.compute_hidden(model, params, batch),
        transformer.get_output_head(params),
        losses.shift(batch.tokens_BT),
    )
    options = fused_head.StatsOptions(loss_chunk_mib, split=mesh_lib.split_vocabulary, top_k=top_k)
    stats = fused_head.compute_token_stats(inputs, options)
    return {**stats, "hidden": inputs.hidden_BTD} if with_hidden else stats


def read_token_ids(subject: Policy, rows: Iterable[tuple[str, dict]]) -> dataset.TokenLists:
    """Reads the `tokens` of each row. Reads no parameters of `subject`.

    Raises:
      UserError: naming the first row without valid tokens.
    """
    limit = subject.config.context_length
    token_lists = dataset.TokenLists()
    for where, row in rows:
        if "tokens" not in row:
            raise UserError(f"{where}: no tokens among its fields {sorted(row)}")
        ids = encode_prompt(row, where, None, None)
        dataset.require_ids(ids, subject.config.vocab_size, where)
        if len(ids) > limit:
            raise UserError(f"{where}: {len(ids)} tokens exceed the model's {limit} positions")
        token_lists.append(ids)
    return token_lists


def score_sequences(
    subject: Policy, sequences: Sequence[list[int]], *, batch_size: int, top_k: int = 0
) -> Iterator[tuple[Logprobs, TopLogprobs]]:
    """Yields (logprobs, top) of each sequence. Call within `policy.use(subject)`.

    Both have one entry per token, and the first is None; without top_k, `top` is empty.
    """
    for stats in _compute_sequence_stats(subject, sequences, batch_size, top_k):
        top: TopLogprobs = []
        if top_k:
            places = zip(stats["top_ids"].tolist(), stats["top_logp"].tolist(), strict=True)
            top = [None, *([[i, x] for i, x in zip(*k, strict=True)] for k in places)]
        yield [None, *stats["logp"].tolist()], top


def score_responses(
    subject: Policy,
    responses: Sequence[tuple[list[int], list[int]]],
    *,
    batch_size: int,
    top_k: int = 0,
    with_hidden: bool = False,
) -> Iterator[ResponseOutput]:
    """Yields what `subject` says of each response, of pairs of a prompt and a response.

    Log-probabilities always, the K likeliest tokens with top_k, and the hidden states, in the
    model's dtype. Call within `policy.use(subject)`.
    """
    sequences = [prompt + response for prompt, response in responses]
    scored = _compute_sequence_stats(subject, sequences, batch_size, top_k, with_hidden)
    for (prompt, _), stats in zip(responses, scored, strict=True):
        fields = ["logp", *(["top_ids", "top_logp"] if top_k else [])]
        fields += ["hidden"] if with_hidden else []
        # Copies, since the stats are views of a whole batch.
        yield ResponseOutput(**{name: stats[name][len(prompt) - 1 :].copy() for name in fields})


def _compute_sequence_stats(
    subject: Policy,
    sequences: Sequence[list[int]],
    batch_size: int,
    top_k: int,
    with_hidden: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the stats of all tokens of each sequence but its first, which nothing predicts.

    A batch is as wide as the bucket of its longest row, so each width that occurs is compiled once.
    """
    mesh = policy.get_mesh(subject)
    shards = mesh_lib.count_row_shards(mesh)
    size = -(-min(batch_size, len(sequences)) // shards) * shards
    for start in range(0, len(sequences), size):
        chunk = sequences[start : start + size]
        width = rollout.bucket_length(max(map(len, chunk)))
        examples = [dataset.Example(ids, [], "", "") for ids in chunk]
        examples += [dataset.Example([], [], "", "")] * (size - len(chunk))
        batch = jax.device_put(
            collate.collate_padded(examples, width, 0), mesh_lib.make_row_sharding(mesh)
        )
        stats = _compute_token_stats(
            subject.model, subject.params, batch, top_k, LOGITS_MIB * mesh.size, with_hidden
        )
        host_stats = {name: jax.device_get(x) for name, x in stats.items() if name != "entropy"}
        for row, ids in enumerate(chunk):
            # Column t belongs to token t + 1.
            yield {name: x[row, : len(ids) - 1] for name, x in host_stats.items()}


def score_rows(
    subject: Policy,
    rows: sources.Rows,
    sequences: dataset.TokenLists,
    *,
    batch_size: int,
    top_k: int = 0,
) -> Iterator[dict]:
    """Yields each row with `logprobs` and, with top_k, `top`.

    Call within `policy.use(subject)`.
    """
    scores = score_sequences(subject, sequences, batch_size=batch_size, top_k=top_k)
    with show_progress(len(rows), 0, "score", batch_size) as bar:
        for number, ((_, row), (logprobs, top)) in enumerate(zip(rows, scores, strict=True)):
            yield {**row, "logprobs": logprobs, **({"top": top} if top_k else {})}
            bar.update(number + 1)
