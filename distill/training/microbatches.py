"""Arranges a step's sequences in micro-batches of one shape, so that one program trains them all.

Sampled sequences, and traces beside them, are packed: whole sequences are put one after another in
rows of a fixed length, first-fit decreasing, so that the cost of a step depends on its tokens. The
last micro-batch is padded with empty rows. The place of each sequence depends on lengths alone and
is the same in every process.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from distill import rollout
from distill.batch import Batch
from distill.data import collate, packing
from distill.data.collate import BatchLayout, SampledExample
from distill.data.examples import Example
from distill.objectives import losses
from distill.runtime import mesh as mesh_lib
from distill.teachers.external import ExternalTeacher
from distill.training import stages
from models.errors import UserError

PackedRows = tuple[tuple[int, ...], ...]  # for each row, the numbers of its sequences


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatch:
    """Rows of a step's sequences, which are numbered over the whole step."""

    rows: PackedRows
    make_batch: Callable[[], Batch]  # this process's rows, on the host
    rewards: Mapping[int, float] = dataclasses.field(default_factory=dict)  # of sequences with one
    # makes it without the outputs of teachers that are not run here; None: it has none
    make_plain_batch: Callable[[], Batch] | None = None

    def drop_outputs(self) -> "Microbatch":
        """Returns the micro-batch without the outputs of teachers that are not run here, which take
        much memory, for what comes after the update."""
        if self.make_plain_batch is None:
            return self
        return Microbatch(self.rows, self.make_plain_batch, self.rewards)

    def to_device(self, mesh: Mesh, with_hidden: bool = True) -> Batch:
        """Collates the rows and splits them over a mesh.

        with_hidden: False leaves out the hidden states of teachers that are not run here.
        """
        batch = self.make_batch()
        hidden, T = batch.teacher_hidden_BTE, batch.tokens_BT.shape[1]
        batch = dataclasses.replace(batch, teacher_hidden_BTE=None)
        batch = mesh_lib.from_local_rows(batch, mesh, len(self.rows))
        if hidden is None or not with_hidden:
            return batch
        spec = mesh_lib.make_hidden_spec(mesh, T)
        hidden_BTE = mesh_lib.from_local_rows(hidden, mesh, len(self.rows), spec)
        return dataclasses.replace(batch, teacher_hidden_BTE=hidden_BTE)


# The data of a step: the micro-batches of each of its minibatches.
Minibatches = list[list[Microbatch]]


def make_stage_layout(
    s: ConfigDict,
    loss: losses.Loss,
    sampled_rows: int,
    routing: tuple[int, int] | None,
    external: Sequence[ExternalTeacher] = (),
) -> BatchLayout:
    """Makes the layout of a stage's batches, of which the student samples `sampled_rows` rows.

    Args:
      routing: numbers of layers and of experts per token, if the update replays the sampler's
        routing; else None.
      external: the stage's teachers that are not run here.
    """
    N, has_context = len(s.teachers), bool(s.context.text or s.context.column)
    reads_hidden = loss.teacher > 0 and loss.teacher_output == "hidden"
    judges = loss.reward > 0 and s.reward.teacher_logprob != 0
    weights_SN = np.eye(N)  # each teacher applies to the rows of its own source
    if s.teacher_weights:  # for all sources alike
        weights = np.array([float(weight) for weight in s.teacher_weights])
        weights_SN = np.tile(weights / sum(weights), (max(1, len(s.data.mixture)), 1))
    return BatchLayout(
        stages.get_row_tokens(s),
        s.max_response_tokens,
        top_k=loss.teacher_topk if loss.teacher_output == "top" else 0,
        external_hidden=tuple(t.hidden_form for t in external if t.hidden_form),
        has_teacher_logp=any(t.output == "token" for t in external),
        context_tokens=s.context.max_tokens if has_context and len(external) < N else 0,
        has_sampler_logprobs=sampled_rows == s.batch_size or loss.is_on_policy,
        has_advantages=loss.reward > 0,
        routing=routing if sampled_rows else None,
        teacher_weights=weights_SN if (reads_hidden or judges) and N > 1 else None,
    )


def make_abstract_microbatch(layout: BatchLayout, rows: int, mesh: Mesh) -> Batch:
    """Makes the shapes, dtypes and shardings of a micro-batch of `rows` rows on a mesh."""

    def make_shapes(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding), tree
        )

    batch = collate.collate_rows([[]], layout)
    spec = mesh_lib.make_hidden_spec(mesh, layout.row_tokens)
    hidden_BTE = make_shapes(batch.teacher_hidden_BTE, NamedSharding(mesh, spec))
    batch = dataclasses.replace(batch, teacher_hidden_BTE=None)
    batch = make_shapes(batch, mesh_lib.make_row_sharding(mesh))
    return dataclasses.replace(batch, teacher_hidden_BTE=hidden_BTE)


def to_examples(
    sequences: Sequence[rollout.Sequence], rewards: Sequence[float] | None = None
) -> list[SampledExample]:
    """Converts sampled sequences, with their rewards if any, to examples.

    Raises:
      UserError: naming a sequence that ended in NaN.
    """
    for number, x in enumerate(sequences):
        if x.finish_reason == "error":
            position = f"after {len(x.tokens)} sampled tokens"
            raise UserError(f"{x.where or f'row {number}'}: NaN logits {position}")
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
            reward=None if rewards is None else rewards[number],
        )
        for number, x in enumerate(sequences)
    ]


def make_unpacked_batch(
    sequences: Sequence[rollout.Sequence],
    rows: int,
    tokens: int,
    context_tokens: int = 0,
    routing: tuple[int, int] | None = None,
) -> Batch:
    """Collates sampled sequences on the host, one in each row of `tokens`; empty rows come last."""
    layout = BatchLayout(
        tokens, tokens, context_tokens=context_tokens, has_sampler_logprobs=True, routing=routing
    )
    example_rows = [[example] for example in to_examples(sequences)]
    return collate.collate_rows(example_rows + [[]] * (rows - len(example_rows)), layout)


def split_rows(
    rows: Sequence[Sequence[Example]],
    own_rows: Sequence[int],
    sizes: tuple[int, int, int],
    layout: BatchLayout,
    collates_later: bool = False,
) -> Minibatches:
    """Splits a batch into micro-batches. Rows interleave, so that each spans all devices.

    Args:
      rows: the examples of this process's rows of the batch, whose numbers are `own_rows`.
      sizes: numbers of rows of the batch, of minibatches, and of micro-batches per minibatch.
      collates_later: when a micro-batch is moved to the mesh, since its teachers' outputs are not
        there yet.
    """
    count, num_minibatches, accumulate = sizes
    examples_by_row = dict(zip(own_rows, rows, strict=True))

    def make_microbatch(first: int) -> Microbatch:
        numbers = range(first, count, num_minibatches * accumulate)
        own_examples = [examples_by_row[row] for row in numbers if row in examples_by_row]
        make_batch = functools.partial(collate.collate_rows, own_examples, layout)
        plain = _make_plain_collate(own_examples, layout)
        if not collates_later:
            batch = make_batch()
            make_batch, plain = lambda: batch, None
        return Microbatch(tuple((row,) for row in numbers), make_batch, make_plain_batch=plain)

    return [
        [make_microbatch(j + k * num_minibatches) for k in range(accumulate)]
        for j in range(num_minibatches)
    ]


def pack_examples(
    examples: Sequence[Example], rows: int, num_minibatches: int, layout: BatchLayout
) -> list[list[PackedRows]]:
    """Packs examples into micro-batches of `rows` rows; example i belongs to minibatch
    i % num_minibatches. Returns the micro-batches of each minibatch, by numbers of examples.

    With a context, the examples of a row must fit for the student and for the teachers.
    """
    has_context = layout.context_tokens > 0
    capacity = (layout.row_tokens,)
    if has_context:
        capacity += (layout.row_tokens + layout.context_tokens,)

    def count_tokens(example: Example) -> tuple[int, ...]:
        response = min(len(example.response), layout.max_response)
        tokens = (len(example.prompt) + response,)
        if has_context:
            tokens += (len(example.teacher_prompt or example.prompt) + response,)
        return tokens

    minibatches = []
    for j in range(num_minibatches):
        lengths = {i: count_tokens(examples[i]) for i in range(j, len(examples), num_minibatches)}
        packed = [tuple(row) for row in packing.pack_first_fit_decreasing(lengths, capacity)]
        count = max(1, -(-len(packed) // rows))  # a step without sequences has metrics too
        packed += [()] * (count * rows - len(packed))
        minibatches.append(
            [tuple(packed[start : start + rows]) for start in range(0, len(packed), rows)]
        )
    return minibatches


def make_microbatches(
    packed: list[list[PackedRows]], examples: Sequence[Example], layout: BatchLayout, mesh: Mesh
) -> Minibatches:
    """Makes micro-batches of packed examples, each collated when it is moved to the mesh."""

    def make_microbatch(rows: PackedRows) -> Microbatch:
        own_rows = mesh_lib.list_local_rows(mesh, len(rows))
        own_examples = [[examples[i] for i in rows[row]] for row in own_rows]
        make_batch = functools.partial(collate.collate_rows, own_examples, layout)
        plain = _make_plain_collate(own_examples, layout)
        return Microbatch(rows, make_batch, find_rewards(rows), plain)

    def find_rewards(rows: PackedRows) -> dict[int, float]:
        rewards = {i: getattr(examples[i], "reward", None) for row in rows for i in row}
        return {i: reward for i, reward in rewards.items() if reward is not None}

    return [[make_microbatch(rows) for rows in minibatch] for minibatch in packed]


def _make_plain_collate(
    rows: Sequence[Sequence[Example]], layout: BatchLayout
) -> Callable[[], Batch] | None:
    """Returns what makes the batch of some rows without the outputs of teachers that are not run
    here; None if there are none."""
    if not any(x.teacher_outputs for row in rows for x in row):
        return None
    plain_rows = [[dataclasses.replace(x, teacher_outputs=()) for x in row] for row in rows]
    plain = dataclasses.replace(layout, external_hidden=(), has_teacher_logp=False, top_k=0)
    return functools.partial(collate.collate_rows, plain_rows, plain)


def find_response_spans(
    rows: PackedRows, examples: Sequence[Example], max_response: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yields (number, row, start and end of the response) of each sequence of a micro-batch."""
    for row, numbers in enumerate(rows):
        end = 0
        for number in numbers:
            start = end + len(examples[number].prompt)
            end = start + min(len(examples[number].response), max_response)
            yield number, row, start, end
