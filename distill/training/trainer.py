"""Trains a step: scores and trains its micro-batches one after another, and then drops them."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.batch import Batch
from distill.objectives import losses
from distill.policy.policy import Policy
from distill.teachers import local
from distill.teachers.external import ExternalTeacher
from distill.teachers.local import Teacher
from distill.training import setup, stages, update, update_metrics
from distill.training.microbatches import Microbatch, Minibatches
from distill.training.setup import RunSetup, StageSetup
from models.transformer import Params

# A micro-batch and its [B, T] stats, for transcripts.
KeptStats = list[tuple[Microbatch, losses.Stats]]


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """Trains the steps of a stage."""

    stage: StageSetup
    mesh: Mesh
    update_programs: update.UpdatePrograms
    teachers: Sequence[Teacher | ExternalTeacher]  # with heads; none if the loss reads none
    reference: Policy | None
    frozen_params: Params | None
    loss_chunk_mib: float
    temperature: float

    def step(
        self, state: update.TrainState, minibatches: Minibatches, transcript_count: int = 0
    ) -> tuple[update.TrainState, dict[str, jax.Array], KeptStats, float]:
        """Trains one step: one update per minibatch, repeated for `epochs` epochs.

        With several updates, each batch gets the student's log-probabilities from before the first
        as `old_logp_BT`, and the metrics are means over updates. Teachers score a micro-batch each
        time that it is trained, a moving average with its current parameters.

        Returns:
          The state after the step; its metrics, on the device; the micro-batches of the first
          `transcript_count` sequences with their stats of the last epoch; and the seconds that
          scoring took.
        """
        seconds, updates = 0.0, self.stage.updates_per_step

        def run_timed(function: Callable[..., Any], *args: Any) -> Any:
            nonlocal seconds
            start = time.perf_counter()
            result = function(*args)
            seconds += time.perf_counter() - start
            return result

        known_before = (
            run_timed(self._compute_known_before, state.params, minibatches) if updates > 1 else {}
        )
        measured, kept_stats = [], []
        for number in range(updates):
            epoch, j = divmod(number, len(minibatches))
            microbatches = minibatches[j]
            is_last_epoch = epoch + 1 == self.stage.c.epochs
            state, metrics, stats = self.update_programs.run_update(
                state,
                (
                    dataclasses.replace(x.to_device(self.mesh), **known_before.get((j, k), {}))
                    for k, x in enumerate(microbatches)
                ),
                self.frozen_params,
                prepare_batch=functools.partial(run_timed, self._score, state.average),
                keep_stats={
                    k
                    for k, x in enumerate(microbatches)
                    if is_last_epoch and has_transcript(x, transcript_count)
                },
                single_microbatch=not self.stage.sampled_rows and self.stage.c.accumulate == 1,
                steps=int(number + 1 == updates),
            )
            measured.append(metrics)
            kept_stats += [(microbatches[k].drop_outputs(), x) for k, x in stats.items()]
        metrics = measured[0] if updates == 1 else update_metrics.average_metrics(measured)
        return state, metrics, kept_stats, seconds

    def _score(self, average: Params | None, batch: Batch) -> Batch:
        """Returns the batch with the outputs of the reference and the teachers."""
        if self.reference and batch.reference_logp_BT is None:
            logp_BT = self._compute_reference_logp(batch)
            batch = dataclasses.replace(batch, reference_logp_BT=logp_BT)
        return local.score(self.teachers, batch, average)

    def _compute_reference_logp(self, batch: Batch) -> jax.Array:
        assert self.reference
        return local.compute_logp(self.reference, batch, self.loss_chunk_mib, self.temperature)

    def _compute_known_before(
        self, params: Params, minibatches: Minibatches
    ) -> dict[tuple[int, int], dict[str, jax.Array]]:
        """Computes batch fields that are the same for all updates of a step.

        Keys are the numbers of the minibatch and of its micro-batch.
        """
        known_before = {}
        for j, microbatches in enumerate(minibatches):
            for k, micro in enumerate(microbatches):
                batch = micro.to_device(self.mesh, with_hidden=False)
                logp_BT = self.update_programs.compute_logp(params, batch, self.frozen_params)
                known = {"old_logp_BT": logp_BT}
                if self.reference:
                    known["reference_logp_BT"] = self._compute_reference_logp(batch)
                known_before[j, k] = jax.block_until_ready(known)
        return known_before


def has_transcript(micro: Microbatch, transcript_count: int) -> bool:
    """Returns True if the micro-batch has one of the first `transcript_count` sequences."""
    return any(number < transcript_count for row in micro.rows for number in row)


def make_trainer(
    c: ConfigDict, run_setup: RunSetup, stage: StageSetup, mesh: Mesh, state: update.TrainState
) -> Trainer:
    """Makes the trainer of a stage whose models are loaded, for states like `state`."""
    student, loss = run_setup.student, stage.loss
    known = {**run_setup.teachers, **{t.name: t for t in stage.external}}
    names = stage.teacher_names if loss.teacher else ()
    teachers = [known[name] for name in names]
    return Trainer(
        stage,
        mesh,
        setup.make_stage_update(c, stage.c, loss, stage.optimizer, student, mesh, state),
        local.place_heads(teachers),
        run_setup.reference if loss.reference else None,
        student.params if student.model.lora else None,
        stages.get_loss_chunk_mib(c, mesh),
        stages.get_temperature(stage.c, loss),
    )
