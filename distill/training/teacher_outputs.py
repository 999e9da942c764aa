"""Asks the teachers that are not run here for the outputs of a step's responses.

A trace is asked for when it is prefetched, so while the step before it trains. A sampled response
is asked for as soon as it has ended, while others still decode; one with a reward once its group is
kept. Every output is there before the first update of its step: a teacher that fails leaves the
step as if it had not begun.

With several processes each asks for the rows that it lays out, so none is asked for or sent twice.
Which rows these are is known once all responses have ended, so decoding is then not overlapped.
"""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from distill import rollout
from distill.data.collate import SampledExample
from distill.data.examples import Example
from distill.runtime import mesh as mesh_lib
from distill.teachers.external import ExternalTeacher
from distill.training.microbatches import PackedRows

POLL_SECONDS = 0.5  # between checks of whether the run is to stop
Outputs = tuple[concurrent.futures.Future | None, ...]  # of each teacher that is not run here
E = TypeVar("E", bound=Example)


@dataclasses.dataclass(eq=False)
class OutputRequests:
    """The requests of a stage to its teachers that are not run here."""

    teachers: tuple[ExternalTeacher, ...]
    max_response: int  # longer ones are cut
    asks_early: bool  # of responses that have ended, while others decode
    early: dict[tuple[int, int], Outputs] = dataclasses.field(default_factory=dict)  # by row key

    def ask_ended(self, sequences: Iterable[rollout.Sequence]) -> None:
        """Asks for sampled responses that have ended, if that is wanted early."""
        if not self.teachers or not self.asks_early or jax.process_count() > 1:
            return
        for x in sequences:
            if x.finish_reason in ("stop", "length") and x.key not in self.early:
                self.early[x.key] = self._submit(
                    x.teacher_prompt or x.prompt, x.tokens, x.source_id, x.where
                )

    def ask(self, examples: Sequence[E]) -> list[E]:
        """Returns the examples with the futures of their outputs."""
        if not self.teachers:
            return list(examples)
        return [
            x
            if x.teacher_outputs
            else dataclasses.replace(
                x,
                teacher_outputs=self._submit(
                    x.teacher_prompt or x.prompt, x.response, x.source_id, x.where
                ),
            )
            for x in examples
        ]

    def add_early(self, examples: Sequence[E], sequences: Sequence[rollout.Sequence]) -> list[E]:
        """Returns the examples of sampled sequences, with the outputs that were asked for early;
        drops those of sequences that are not trained on."""
        early, self.early = self.early, {}
        return [
            dataclasses.replace(x, teacher_outputs=early.get(sequence.key, ()))
            for x, sequence in zip(examples, sequences, strict=True)
        ]

    def read(
        self,
        packed: list[list[PackedRows]],
        samples: list[SampledExample],
        traces: list[Example],
        mesh: Mesh,
        check_stop: Callable[[], Any],
    ) -> tuple[list[SampledExample], list[Example]]:
        """Returns the examples with the outputs of those that this process lays out: asks for what
        is not asked for yet, and waits for all (`wait_for_outputs`)."""
        if not self.teachers:
            return samples, traces
        own = {
            number
            for rows in itertools.chain(*packed)
            for row in mesh_lib.list_local_rows(mesh, len(rows))
            for number in rows[row]
        }
        asked: list[Any] = [
            self.ask([x])[0] if number in own else x for number, x in enumerate([*samples, *traces])
        ]
        wait_for_outputs(asked, check_stop)
        return asked[: len(samples)], asked[len(samples) :]

    def _submit(
        self, prompt: Sequence[int], response: Sequence[int], source_id: int, where: str
    ) -> Outputs:
        if not response:  # a document of one token
            return (None,) * len(self.teachers)
        limit = self.max_response
        return tuple(t.submit(prompt, response, source_id, where, limit) for t in self.teachers)


def wait_for_outputs(examples: Iterable[Example], check_stop: Callable[[], Any]) -> None:
    """Waits until all outputs of some examples are there.

    Args:
      check_stop: called now and then; what it raises leaves off the step. Not called with several
        processes, which would have to do so together.

    Raises:
      UserError, SourceFailure: of the first that failed.
    """
    waiting = {future for x in examples for future in x.teacher_outputs if future}
    timeout = POLL_SECONDS if jax.process_count() == 1 else None
    while waiting:
        done, waiting = concurrent.futures.wait(
            waiting, timeout, return_when=concurrent.futures.FIRST_EXCEPTION
        )
        for future in done:
            future.result()
        if waiting and timeout:
            check_stop()
