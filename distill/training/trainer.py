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
from distill.training.microbatches import Microbatch, Work
from distill.training.setup import Plan, Stage
from models.qwen3 import model
from models.qwen3.model import Params

# A micro-batch and its [B, T] stats, for transcripts.
Shown = list[tuple[Microbatch, losses.Stats]]


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """What trains a stage's steps; `make` makes one."""

    stage: Stage
    mesh: Mesh
    programs: update.Update
    teachers: Sequence[Teacher]  # of a loss that compares with them
    heads: tuple[jax.Array | None, ...]
    reference: Policy | None
    frozen: Params | None
    logits_mib: float
    temperature: float

    def step(
        self, state: update.TrainState, work: Work, shown: int = 0
    ) -> tuple[update.TrainState, dict[str, jax.Array], Shown, float]:
        """The state after a step, its metrics, on the device, the micro-batches of the first
        `shown` sequences, and the seconds in which other models were asked to read.

        A step may give several updates: one for each minibatch, `epochs` times over. The student's
        own log-probabilities from before the first then stand in each batch as `old_logp_BT`, and
        the metrics are means over updates. The teachers read a micro-batch each time that it is
        trained; one that is the student's moving average is what that is by then.
        """
        begun, seconds = time.perf_counter(), 0.0
        before = self._before(state.params, work) if self.stage.updates > 1 else {}
        seconds += time.perf_counter() - begun if before else 0.0
        measured, kept, epochs = [], [], self.stage.c.epochs
        for number in range(self.stage.updates):
            epoch, j = divmod(number, len(work))
            last = number + 1 == self.stage.updates
            keep = {k for k, micro in enumerate(work[j]) if _holds(micro, shown)}

            def ready(batch: Batch, average: Params | None = state.average) -> Batch:
                nonlocal seconds
                start = time.perf_counter()
                batch = self._scored(batch, average)
                seconds += time.perf_counter() - start
                return batch

            state, found, stats = self.programs.once(
                state,
                (self._put(micro, before.get((j, k), {})) for k, micro in enumerate(work[j])),
                self._heads(state),
                self.frozen,
                ready=ready,
                keep=keep if epoch + 1 == epochs else (),
                single=not self.stage.sampled and self.stage.c.accumulate == 1,
                steps=int(last),
            )
            measured.append(found)
            kept += [(work[j][k], x) for k, x in stats.items()]
        return state, measured[0] if len(measured) == 1 else update.mean(measured), kept, seconds

    def _put(self, micro: Microbatch, known: dict[str, jax.Array]) -> Batch:
        return dataclasses.replace(micro.put(self.mesh), **known)

    def _heads(self, state: update.TrainState) -> tuple[jax.Array, ...]:
        """The teachers' heads. That of a moving average is not kept: the state is donated."""
        return tuple(model.head(state.average) if x is None else x for x in self.heads)

    def _scored(self, batch: Batch, average: Params | None) -> Batch:
        """The batch with what the other models make of it."""
        if self.reference and batch.reference_logp_BT is None:
            batch = dataclasses.replace(batch, reference_logp_BT=self._referred(batch))
        if self.teachers:
            return local.score(self.teachers, batch, average)
        return dataclasses.replace(batch, told=None, told_at_BT=None)

    def _referred(self, batch: Batch) -> jax.Array:
        assert self.reference
        return local.logp(self.reference, batch, self.logits_mib, self.temperature)

    def _before(self, params: Params, work: Work) -> dict[tuple[int, int], dict[str, jax.Array]]:
        """Of each micro-batch what is known of its tokens before the first of several updates."""
        found = {}
        for j, part in enumerate(work):
            for k, micro in enumerate(part):
                batch = micro.put(self.mesh)
                known = {"old_logp_BT": self.programs.logp(params, batch, self.frozen)}
                if self.reference:
                    known["reference_logp_BT"] = self._referred(batch)
                found[j, k] = jax.block_until_ready(known)
        return found


def _holds(micro: Microbatch, shown: int) -> bool:
    """Whether one of the first `shown` sequences is in it."""
    return any(number < shown for row in micro.rows for number in row)


def make(c: ConfigDict, plan: Plan, stage: Stage, mesh: Mesh, state: update.TrainState) -> Trainer:
    """The trainer of a stage whose models are loaded, for states like this one."""
    student, loss = plan.student, stage.loss
    compared = stage.taught and loss.teacher
    teachers = [plan.teachers[name] for name in stage.c.teachers] if compared else []
    return Trainer(
        stage,
        mesh,
        setup.updater(c, stage.c, loss, stage.optimizer, student, mesh, state),
        teachers,
        local.heads(teachers),
        plan.reference if loss.reference else None,
        student.params if student.model.lora else None,
        stages.logits_mib(c, mesh),
        stages.read_at(stage.c, loss),
    )
