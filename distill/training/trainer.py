"""One step: its micro-batches are scored and trained one after the other, and then dropped."""

import dataclasses
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.batch import Batch
from distill.objectives import losses
from distill.policy.policy import Policy
from distill.teachers import local
from distill.teachers.local import Teacher
from distill.training import setup, stages, update
from distill.training.microbatches import Microbatch, Minibatches
from distill.training.setup import RunSetup, StageSetup
from models import transformer
from models.transformer import Params

# A micro-batch and its [B, T] stats, for transcripts.
KeptStats = list[tuple[Microbatch, losses.Stats]]


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """What trains a stage's steps; `make` makes one."""

    stage: StageSetup
    mesh: Mesh
    update_programs: update.UpdatePrograms
    teachers: Sequence[Teacher]  # of a loss that compares with them
    teacher_heads: tuple[jax.Array | None, ...]
    reference: Policy | None
    frozen_params: Params | None
    loss_chunk_mib: float
    temperature: float

    def step(
        self, state: update.TrainState, minibatches: Minibatches, transcript_count: int = 0
    ) -> tuple[update.TrainState, dict[str, jax.Array], KeptStats, float]:
        """The state after a step, its metrics, on the device, the micro-batches of the first
        `shown` sequences, and the seconds in which other models were asked to read.

        A step may give several updates: one for each minibatch, `epochs` times over. The student's
        own log-probabilities from before the first then stand in each batch as `old_logp_BT`, and
        the metrics are means over updates. The teachers read a micro-batch each time that it is
        trained; one that is the student's moving average is what that is by then.
        """
        start_time, seconds = time.perf_counter(), 0.0
        known_before = (
            self._compute_known_before(state.params, minibatches)
            if self.stage.updates_per_step > 1
            else {}
        )
        seconds += time.perf_counter() - start_time if known_before else 0.0
        measured, kept_stats, epochs = [], [], self.stage.c.epochs
        for number in range(self.stage.updates_per_step):
            epoch, j = divmod(number, len(minibatches))
            last = number + 1 == self.stage.updates_per_step
            keep = {
                k
                for k, micro in enumerate(minibatches[j])
                if _has_transcript(micro, transcript_count)
            }

            def score_timed(batch: Batch, average: Params | None = state.ema_params) -> Batch:
                nonlocal seconds
                start = time.perf_counter()
                batch = self._score_batch(batch, average)
                seconds += time.perf_counter() - start
                return batch

            state, metrics, stats = self.update_programs.run_update(
                state,
                (
                    self._to_device(micro, known_before.get((j, k), {}))
                    for k, micro in enumerate(minibatches[j])
                ),
                self._get_heads(state),
                self.frozen_params,
                prepare_batch=score_timed,
                keep_stats=keep if epoch + 1 == epochs else (),
                single_microbatch=not self.stage.sampled_rows and self.stage.c.accumulate == 1,
                steps=int(last),
            )
            measured.append(metrics)
            kept_stats += [(minibatches[j][k], x) for k, x in stats.items()]
        return (
            state,
            measured[0] if len(measured) == 1 else update.average_metrics(measured),
            kept_stats,
            seconds,
        )

    def _to_device(self, micro: Microbatch, known: dict[str, jax.Array]) -> Batch:
        return dataclasses.replace(micro.to_device(self.mesh), **known)

    def _get_heads(self, state: update.TrainState) -> tuple[jax.Array, ...]:
        """The teachers' heads. That of a moving average is not kept: the state is donated."""
        return tuple(
            transformer.get_output_head(state.ema_params) if x is None else x
            for x in self.teacher_heads
        )

    def _score_batch(self, batch: Batch, average: Params | None) -> Batch:
        """The batch with what the other models make of it."""
        if self.reference and batch.reference_logp_BT is None:
            batch = dataclasses.replace(
                batch, reference_logp_BT=self._compute_reference_logp(batch)
            )
        if self.teachers:
            return local.score(self.teachers, batch, average)
        return dataclasses.replace(batch, teacher_inputs=None, teacher_index_BT=None)

    def _compute_reference_logp(self, batch: Batch) -> jax.Array:
        assert self.reference
        return local.compute_logp(self.reference, batch, self.loss_chunk_mib, self.temperature)

    def _compute_known_before(
        self, params: Params, minibatches: Minibatches
    ) -> dict[tuple[int, int], dict[str, jax.Array]]:
        """Of each micro-batch what is known of its tokens before the first of several updates."""
        known_before = {}
        for j, part in enumerate(minibatches):
            for k, micro in enumerate(part):
                batch = micro.to_device(self.mesh)
                known = {
                    "old_logp_BT": self.update_programs.compute_logp(
                        params, batch, self.frozen_params
                    )
                }
                if self.reference:
                    known["reference_logp_BT"] = self._compute_reference_logp(batch)
                known_before[j, k] = jax.block_until_ready(known)
        return known_before


def _has_transcript(micro: Microbatch, transcript_count: int) -> bool:
    """Whether one of the first `shown` sequences is in it."""
    return any(number < transcript_count for row in micro.rows for number in row)


def make_trainer(
    c: ConfigDict, run_setup: RunSetup, stage: StageSetup, mesh: Mesh, state: update.TrainState
) -> Trainer:
    """The trainer of a stage whose models are loaded, for states like this one."""
    student, loss = run_setup.student, stage.loss
    needs_heads = stage.needs_teacher and loss.teacher
    teachers = [run_setup.teachers[name] for name in stage.c.teachers] if needs_heads else []
    return Trainer(
        stage,
        mesh,
        setup.make_stage_update(c, stage.c, loss, stage.optimizer, student, mesh, state),
        teachers,
        local.get_teacher_heads(teachers),
        run_setup.reference if loss.reference else None,
        student.params if student.model.lora else None,
        stages.get_loss_chunk_mib(c, mesh),
        stages.get_temperature(stage.c, loss),
    )
