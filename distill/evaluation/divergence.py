"""Reverse KL of a student from its teacher, on existing responses."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill import rollout
from distill.batch import Batch, TeacherOutput
from distill.data import collate, dataset
from distill.objectives import fused_head, losses
from distill.policy import forward, policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from models import transformer
from models.transformer import Params, Transformer

Record = dict[str, object]


def compute_reverse_kl(
    subject: Policy, teacher: Policy, rows: Iterable[Record], batch_size: int
) -> float:
    """Computes the mean exact KL(subject‖teacher) in nats per response token of `rows`.

    Iterates over `rows` twice. On the subject's own samples at temperature 1 this is the quantity
    that on-policy distillation minimises.
    """

    def iter_examples() -> Iterator[dataset.Example]:
        for row in rows:
            yield dataset.Example(row["prompt_tokens"], row["tokens"], "", str(row["id"]))  # type: ignore[arg-type]

    width = rollout.bucket_length(max(len(e.prompt) + len(e.response) for e in iter_examples()))

    models, total, count = _Models.of(subject, teacher), 0.0, 0.0
    for _, batch in _iter_batches(subject, iter_examples(), width, batch_size):
        kl, tokens = _compute_kl_sum(models, subject.params, teacher.params, batch)
        total, count = total + float(kl), count + float(tokens)
    return total / count


def compute_token_reverse_kl(
    subject: Policy, teacher: Policy, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[np.ndarray]:
    """Computes the exact KL(subject‖teacher) in nats at each response token, float32 [tokens] each.

    Args:
      pairs: token ids of prompts and responses. No prompt is empty.
    """
    if not pairs:
        return []
    examples = [dataset.Example(prompt, response, "", "") for prompt, response in pairs]
    width = rollout.bucket_length(max(len(p) + len(r) for p, r in pairs))

    models, response_kls = _Models.of(subject, teacher), []
    for chunk, batch in _iter_batches(subject, iter(examples), width, batch_size):
        kl_BT = np.asarray(_compute_token_kl(models, subject.params, teacher.params, batch))
        for row, example in enumerate(chunk):
            start = len(example.prompt)
            response_kls.append(kl_BT[row, start : start + len(example.response)])
    return response_kls


class _Models(NamedTuple):
    """What the programs are compiled for: models of the same shapes share them."""

    student: Transformer
    teacher: Transformer
    loss_chunk_mib: float

    @classmethod
    def of(cls, subject: Policy, teacher: Policy) -> "_Models":
        return cls(subject.model, teacher.model, 128.0 * policy.get_mesh(subject).size)


def _compute_kl(
    models: _Models, params: Params, teacher_params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns (reverse KL, mask), float32 [B, T], aligned by losses.shift."""
    inputs = fused_head.HeadInputs(
        forward.compute_hidden(models.student, params, batch),
        transformer.get_output_head(params),
        losses.shift(batch.tokens_BT),
        teacher=TeacherOutput(
            hidden_BTE=(forward.compute_hidden(models.teacher, teacher_params, batch),),
            heads_VE=(transformer.get_output_head(teacher_params),),
        ),
    )
    options = fused_head.StatsOptions(models.loss_chunk_mib, split=mesh_lib.split_vocabulary)
    stats = fused_head.compute_token_stats(inputs, options)
    return stats["reverse_kl"], losses.shift(batch.mask_BT).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _compute_kl_sum(
    models: _Models, params: Params, teacher_params: Params, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the reverse KL over the tokens of the mask, and their number."""
    kl_BT, mask_BT = _compute_kl(models, params, teacher_params, batch)
    return jnp.sum(kl_BT * mask_BT), jnp.sum(mask_BT)


@functools.partial(jax.jit, static_argnums=0)
def _compute_token_kl(
    models: _Models, params: Params, teacher_params: Params, batch: Batch
) -> jax.Array:
    """Returns the reverse KL at each token, float32 [B, T], in every process."""
    kl_BT, _ = _compute_kl(models, params, teacher_params, batch)
    return mesh_lib.replicate_array(losses.unshift(kl_BT))


def _iter_batches(
    subject: Policy, examples: Iterator[dataset.Example], width: int, batch_size: int
) -> Iterator[tuple[list[dataset.Example], Batch]]:
    """Yields batches padded with empty rows, with rows split over the subject's mesh."""
    mesh = policy.get_mesh(subject)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    padding = dataset.Example([], [], "", "padding")
    while chunk := list(itertools.islice(examples, batch_size)):
        batch = collate.collate_padded(chunk + [padding] * (batch_size - len(chunk)), 0, width)
        rows = mesh_lib.make_row_sharding(mesh)
        yield chunk, jax.tree.map(lambda x, rows=rows: mesh_lib.to_global_array(x, rows), batch)
