"""Ends responses while they are sampled, where the teachers no longer agree with the student.

After every `drift.every` tokens sampling stops, and student and teachers read the unfinished
responses. Those whose mean reverse KL over these tokens, KL(student‖teacher), is above `drift.kl`
end there; the others go on. What a student writes after it has left what the teacher would write
costs much and teaches little: Prune-OPD (arXiv 2605.07804), which judges by the overlap of the
likeliest tokens, trains later tokens less and shortens the responses of later steps.

Whether a response goes on depends on the tokens before that point alone, and all tokens that were
sampled are trained. So a response ends at a stopping time τ, and the loss is Σ_{t<=τ} of what it
was, at states of the student: nothing is left out because of what came after it.

A check reads a response from its prompt on, as nothing keeps the teachers' caches, and the sampler
reads it again to go on.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from distill import rollout
from distill.batch import Batch
from distill.data.collate import BatchLayout
from distill.objectives import fused_head, losses
from distill.policy import forward
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.teachers.external import ExternalTeacher
from distill.teachers.local import Teacher
from distill.training import microbatches, stages
from distill.training.setup import RunSetup, StageSetup
from models import transformer
from models.transformer import Params, Transformer

Teachers = Sequence[Teacher | ExternalTeacher]

DRIFTED = "drift"  # the finish_reason of a response that was ended here


@dataclasses.dataclass(eq=False)
class DriftChecks:
    """The checks of one step's responses."""

    run_setup: RunSetup
    stage: StageSetup
    mesh: Mesh
    layout: BatchLayout
    loss_chunk_mib: float
    params: Params  # the trained parameters
    average: Params | None  # their moving average, if one is kept
    kl: list[float] = dataclasses.field(default_factory=list)  # of each response at each check
    seconds: float = 0.0

    def sample(
        self,
        sample: Callable[..., Iterator[rollout.Sequence]],
        sequences: Sequence[rollout.Sequence],
    ) -> Iterator[rollout.Sequence]:
        """Samples sequences and ends those that drift; yields all of them, in order.

        sample: continues sequences to their limits.
        """
        limits, drift = [x.limit for x in sequences], self.stage.c.drift
        every, teachers = drift.every, self._place_heads()
        for edge in range(every, max(limits) + every, every):
            for x, limit in zip(sequences, limits, strict=True):
                x.limit = min(limit, edge)
            for _ in sample(sequences, rows=len(sequences)):
                pass
            unfinished = []
            for x, limit in zip(sequences, limits, strict=True):
                if x.finish_reason == "length" and x.limit < limit:
                    unfinished.append(x)
                x.limit = limit
            if not unfinished:
                break
            for x, kl in zip(unfinished, self.measure(teachers, unfinished), strict=True):
                x.finish_reason = DRIFTED if kl > drift.kl else ""
        yield from sequences

    def _place_heads(self) -> Teachers:
        names = self.stage.local_teachers
        return local.place_heads([self.run_setup.teachers[name] for name in names])

    def measure(self, teachers: Teachers, sequences: Sequence[rollout.Sequence]) -> list[float]:
        """Returns the mean reverse KL, in nats, of the last `drift.every` tokens of each. All
        processes get the same.

        teachers: those of the stage, with heads.
        """
        start_time, every = time.perf_counter(), self.stage.c.drift.every
        examples, rows = microbatches.to_examples(sequences), self.stage.microbatch_rows
        packed = microbatches.pack_examples(examples, rows, 1, self.layout)
        kl_B = np.zeros(len(sequences))
        for micro in microbatches.make_microbatches(packed, examples, self.layout, self.mesh)[0]:
            batch = local.score(teachers, micro.to_device(self.mesh), self.average)
            kl_BT = np.asarray(mesh_lib.wait_on_cpu(self._compute_kl(batch)))
            spans = microbatches.find_response_spans(micro.rows, examples, self.layout.max_response)
            for number, row, start, end in spans:
                kl_B[number] = kl_BT[row, max(start, end - every) : end].mean()
        self.kl += kl_B.tolist()
        self.seconds += time.perf_counter() - start_time
        return kl_B.tolist()

    def _compute_kl(self, batch: Batch) -> jax.Array:
        student, temperature = (
            self.run_setup.student,
            stages.get_temperature(self.stage.c, self.stage.loss),
        )
        has_lora = student.model.lora is not None
        params = (student.params, self.params) if has_lora else (self.params, None)
        return compute_reverse_kl(student.model, self.loss_chunk_mib, temperature, *params, batch)

    def get_metrics(self, sequences: Sequence[rollout.Sequence]) -> dict[str, float]:
        """Returns the share of the sequences that were ended, and what the checks saw: the mean and
        the 90th percentile of the KL that is compared with `drift.kl`."""
        drifted = sum(x.finish_reason == DRIFTED for x in sequences)
        metrics = {"rollout/drifted": drifted / max(1, len(sequences)), "time/drift": self.seconds}
        if self.kl:
            metrics["rollout/checked_kl"] = float(np.mean(self.kl))
            metrics["rollout/checked_kl_p90"] = float(np.quantile(self.kl, 0.9))
        return metrics


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compute_reverse_kl(
    model: Transformer,
    loss_chunk_mib: float,
    temperature: float,
    params: Params,
    lora: Params | None,
    batch: Batch,
) -> jax.Array:
    """Computes KL(student‖teacher) of each response token of a scored batch, float32 [B, T], 0
    elsewhere."""
    inputs = fused_head.HeadInputs(
        forward.compute_hidden(model, params, batch, lora),
        transformer.get_output_head(params),
        losses.shift(batch.tokens_BT),
        losses.shift(batch.mask_BT),
        batch.teacher,
    )
    options = fused_head.StatsOptions(
        loss_chunk_mib,
        mesh_lib.split_vocabulary,
        temperature=temperature,
        shards=mesh_lib.count_shards(*batch.tokens_BT.shape),
    )
    stats: Any = fused_head.compute_token_stats(inputs, options)
    return mesh_lib.replicate_array(losses.unshift(stats["reverse_kl"]))
