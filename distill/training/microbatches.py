"""A step's sequences as micro-batches of one shape, any number of them: one program trains all.

Sequences that the student wrote, and read ones beside them, are packed: whole sequences one behind
the other in rows of a set length, first-fit decreasing, so that a step costs what its tokens cost.
The last micro-batch is filled up with empty rows. Which sequence lies where follows from lengths
alone, and is the same in every process.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import rollout
from distill.batch import Batch
from distill.data import collate, packing
from distill.data.collate import BatchLayout, SampledExample
from distill.data.examples import Example
from distill.objectives import losses
from distill.runtime import mesh as mesh_lib
from distill.training import stages
from models.errors import UserError

PackedRows = tuple[tuple[int, ...], ...]  # of each row the numbers of its sequences


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatch:
    """Rows of a step's sequences, which are numbered over the whole step."""

    rows: PackedRows
    make_batch: Callable[[], Batch]  # this process's rows, on the host

    def to_device(self, mesh: Mesh) -> Batch:
        """Lays them out, split by rows over a mesh."""
        return mesh_lib.from_local_rows(self.make_batch(), mesh, len(self.rows))


# What a step trains on: of each of its minibatches the micro-batches.
Minibatches = list[list[Microbatch]]


def make_stage_layout(
    s: ConfigDict, loss: losses.Loss, sampled_rows: int, routing: tuple[int, int] | None
) -> BatchLayout:
    """The layout of a stage's batches, of which the student writes `sampled_rows` rows.

    routing: layers and experts a token, where the update replays the sampler's; else None.
    """
    N = len(s.teachers)
    weights_SN = np.eye(N)  # each teacher counts for the rows of its own source
    if s.teacher_weights:  # for all sources alike
        weights = np.array([float(weight) for weight in s.teacher_weights])
        weights_SN = np.tile(weights / sum(weights), (max(1, len(s.data.mixture)), 1))
    return BatchLayout(
        stages.get_row_tokens(s),
        s.max_response_tokens,
        top_k=loss.teacher_topk if loss.teacher_output == "top" else 0,
        context_tokens=s.context.max_tokens if s.context.text or s.context.column else 0,
        has_sampler_logprobs=sampled_rows == s.batch_size,
        has_advantages=loss.reward > 0,
        routing=routing if sampled_rows else None,
        teacher_weights=weights_SN if stages.needs_teacher(s, loss) and N > 1 else None,
    )


def make_abstract_microbatch(layout: BatchLayout, rows: int, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a micro-batch of `rows` rows on a mesh."""
    sharding = mesh_lib.make_row_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding),
        collate.collate_rows([[]], layout),
    )


def to_examples(sequences: Sequence[rollout.Sequence]) -> list[SampledExample]:
    """What the student wrote, as examples.

    Raises:
      UserError: naming a sequence that ended in NaN.
    """
    for number, x in enumerate(sequences):
        if x.finish_reason == "error":
            at = f"after {len(x.tokens)} sampled tokens"
            raise UserError(f"{x.where or f'row {number}'}: NaN logits {at}")
    return [
        SampledExample(
            x.prompt,
            x.tokens,
            "",
            x.where,
            teacher_prompt=x.teacher_prompt,
            source_id=x.source_id,
            thinking=x.thinking,
            difficulty=x.difficulty,
            logprobs=x.logprobs,
            finished=x.finish_reason == "stop",
            experts=x.experts,
        )
        for x in sequences
    ]


def make_unpacked_batch(
    sequences: Sequence[rollout.Sequence],
    rows: int,
    tokens: int,
    context_tokens: int = 0,
    routing: tuple[int, int] | None = None,
) -> Batch:
    """What the student wrote in a row each, on the host; empty rows last."""
    layout = BatchLayout(
        tokens, tokens, context_tokens=context_tokens, has_sampler_logprobs=True, routing=routing
    )
    example_rows = [[example] for example in to_examples(sequences)]
    return collate.collate_rows(
        example_rows + [[] for _ in range(rows - len(example_rows))], layout
    )


def split_rows(
    rows: Sequence[Sequence[Example]],
    own_rows: Sequence[int],
    sizes: tuple[int, int, int],
    layout: BatchLayout,
) -> Minibatches:
    """Micro-batches of the rows of a batch, of which this process has those numbered `own`.

    sizes: rows of the batch, its minibatches, and the micro-batches of each. Rows interleave, so
    that each part spans all devices.
    """
    count, minibatches, accumulate = sizes
    own_index = {row: place for place, row in enumerate(own_rows)}

    def make_microbatch(first: int) -> Microbatch:
        numbers = range(first, count, minibatches * accumulate)
        batch = collate.collate_rows(
            [rows[own_index[row]] for row in numbers if row in own_index], layout
        )
        return Microbatch(tuple((row,) for row in numbers), lambda: batch)

    return [
        [make_microbatch(j + k * minibatches) for k in range(accumulate)]
        for j in range(minibatches)
    ]


def pack_examples(
    examples: Sequence[Example], rows: int, num_minibatches: int, layout: BatchLayout
) -> list[list[PackedRows]]:
    """Packs the examples of each minibatch (i belongs to minibatch i % minibatches) into
    micro-batches of `rows` rows: of each the numbers of the examples."""
    capacity = (
        (layout.row_tokens, layout.row_tokens + layout.context_tokens)
        if layout.context_tokens
        else (layout.row_tokens,)
    )

    def count_row_tokens(example: Example) -> tuple[int, ...]:
        response = min(len(example.response), layout.max_response)
        own = len(example.prompt) + response
        return (
            (own, len(example.teacher_prompt or example.prompt) + response)
            if layout.context_tokens
            else (own,)
        )

    packed_minibatches = []
    for j in range(num_minibatches):
        sizes = {i: count_row_tokens(examples[i]) for i in range(j, len(examples), num_minibatches)}
        packed = [tuple(row) for row in packing.pack_first_fit_decreasing(sizes, capacity)]
        count = max(1, -(-len(packed) // rows))  # without a sequence, too, a step has its figures
        packed += [()] * (count * rows - len(packed))
        packed_minibatches.append(
            [tuple(packed[at : at + rows]) for at in range(0, len(packed), rows)]
        )
    return packed_minibatches


def make_microbatches(
    packed: list[list[PackedRows]], examples: Sequence[Example], layout: BatchLayout, mesh: Mesh
) -> Minibatches:
    """Micro-batches of examples that were packed, each laid out when it is put on the mesh."""

    def collate_microbatch(rows: PackedRows) -> Batch:
        own_rows = mesh_lib.list_local_rows(mesh, len(rows))
        return collate.collate_rows([[examples[i] for i in rows[row]] for row in own_rows], layout)

    return [
        [Microbatch(rows, functools.partial(collate_microbatch, rows)) for rows in part]
        for part in packed
    ]


def find_response_spans(rows: PackedRows, examples: Sequence[Example], max_response: int):
    """(number, row, where the response begins, where it ends) of each sequence of a micro-batch."""
    for row, numbers in enumerate(rows):
        at = 0
        for number in numbers:
            example = examples[number]
            start = at + len(example.prompt)
            at = start + min(len(example.response), max_response)
            yield number, row, start, at
