"""A step's sequences as micro-batches of one shape, any number of them: one program trains all.

Sequences that the student wrote, and read ones beside them, are packed: whole sequences one behind
the other in rows of a set length, first-fit decreasing, so that a step costs what its tokens cost.
The last micro-batch is filled up with empty rows. Which sequence lies where follows from lengths
alone, and is the same in every process.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from distill import rollout
from distill.batch import Batch
from distill.data import collate, packing
from distill.data.collate import Form, Written
from distill.data.examples import Example
from distill.runtime import mesh as mesh_lib
from models.errors import UserError

Rows = tuple[tuple[int, ...], ...]  # of each row the numbers of its sequences


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatch:
    """Rows of a step's sequences, which are numbered over the whole step."""

    rows: Rows
    lay: Callable[[], Batch]  # this process's rows, on the host

    def put(self, mesh: Mesh) -> Batch:
        """Lays them out, split by rows over a mesh."""
        return mesh_lib.from_own_rows(self.lay(), mesh, len(self.rows))


# What a step trains on: of each of its minibatches the micro-batches.
Work = list[list[Microbatch]]


def written(sequences: Sequence[rollout.Sequence]) -> list[Written]:
    """What the student wrote, as examples.

    Raises:
      UserError: naming a sequence that ended in NaN.
    """
    for number, x in enumerate(sequences):
        if x.reason == "error":
            at = f"after {len(x.tokens)} sampled tokens"
            raise UserError(f"{x.where or f'row {number}'}: NaN logits {at}")
    return [
        Written(
            x.prompt,
            x.tokens,
            "",
            x.where,
            told=x.told,
            kind=x.kind,
            thinking=x.thinking,
            difficulty=x.difficulty,
            logprobs=x.logprobs,
            finished=x.reason == "stop",
            experts=x.experts,
        )
        for x in sequences
    ]


def unpacked(
    sequences: Sequence[rollout.Sequence],
    rows: int,
    tokens: int,
    room: int = 0,
    routing: tuple[int, int] | None = None,
) -> Batch:
    """What the student wrote in a row each, on the host; empty rows last."""
    form = Form(tokens, tokens, room=room, written=True, routing=routing)
    listed = [[example] for example in written(sequences)]
    return collate.lay(listed + [[] for _ in range(rows - len(listed))], form)


def split(
    rows: Sequence[Sequence[Example]],
    own: Sequence[int],
    sizes: tuple[int, int, int],
    form: Form,
) -> Work:
    """Micro-batches of the rows of a batch, of which this process has those numbered `own`.

    sizes: rows of the batch, its minibatches, and the micro-batches of each. Rows interleave, so
    that each part spans all devices.
    """
    count, minibatches, accumulate = sizes
    at = {row: place for place, row in enumerate(own)}

    def one(first: int) -> Microbatch:
        numbers = range(first, count, minibatches * accumulate)
        laid = collate.lay([rows[at[row]] for row in numbers if row in at], form)
        return Microbatch(tuple((row,) for row in numbers), lambda: laid)

    return [[one(j + k * minibatches) for k in range(accumulate)] for j in range(minibatches)]


def pack(examples: Sequence[Example], rows: int, minibatches: int, form: Form) -> list[list[Rows]]:
    """Packs the examples of each minibatch (i belongs to minibatch i % minibatches) into
    micro-batches of `rows` rows: of each the numbers of the examples."""
    capacity = (form.tokens, form.tokens + form.room) if form.room else (form.tokens,)

    def lengths(example: Example) -> tuple[int, ...]:
        response = min(len(example.response), form.max_response)
        own = len(example.prompt) + response
        return (own, len(example.told or example.prompt) + response) if form.room else (own,)

    found = []
    for j in range(minibatches):
        sizes = {i: lengths(examples[i]) for i in range(j, len(examples), minibatches)}
        packed = [tuple(row) for row in packing.first_fit_decreasing(sizes, capacity)]
        count = max(1, -(-len(packed) // rows))  # without a sequence, too, a step has its figures
        packed += [()] * (count * rows - len(packed))
        found.append([tuple(packed[at : at + rows]) for at in range(0, len(packed), rows)])
    return found


def lay(packed: list[list[Rows]], examples: Sequence[Example], form: Form, mesh: Mesh) -> Work:
    """Micro-batches of examples that were packed, each laid out when it is put on the mesh."""

    def laid(rows: Rows) -> Batch:
        mine = mesh_lib.own_rows(mesh, len(rows))
        return collate.lay([[examples[i] for i in rows[row]] for row in mine], form)

    return [[Microbatch(rows, functools.partial(laid, rows)) for rows in part] for part in packed]


def spans(rows: Rows, examples: Sequence[Example], max_response: int):
    """(number, row, where the response begins, where it ends) of each sequence of a micro-batch."""
    for row, numbers in enumerate(rows):
        at = 0
        for number in numbers:
            example = examples[number]
            start = at + len(example.prompt)
            at = start + min(len(example.response), max_response)
            yield number, row, start, at
