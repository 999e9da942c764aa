"""The loop of a run: from a config to checkpoints, metrics and transcripts."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.policy import policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.runtime import cli, distributed, run_files, xla
from distill.runtime import mesh as mesh_lib
from distill.runtime.checkpoint import Checkpoints
from distill.training import collect, eval_hook, optim, preflight, setup, stages, trainer, update
from distill.training.setup import Plan, Stage
from models.errors import UserError

# May change on resume: they do not touch the trajectory.
RUN_LOCAL = ("checkpoint", "log", "eval", "compilation_cache")


@dataclasses.dataclass(frozen=True)
class Open:
    """What a run holds open through its stages."""

    mesh: Mesh
    saved: Checkpoints
    writer: run_files.Writer
    judge: eval_hook.Judge
    grader: graders.Grader
    received: Callable[[], int]  # the signal that asked this process to stop, or 0
    programs: xla.Compiled

    def stopped(self) -> int:
        """The signal that came to any process: all stop after the same step."""
        return distributed.anyone(self.received())


@dataclasses.dataclass
class Rows:
    """Writes the metrics of each step once the next one is under way, so that the device is not
    waited for; and shows them."""

    stage: Stage
    writer: run_files.Writer
    bar: run_files.Progress
    waiting: tuple[int, float, dict, dict] | None = None

    def add(self, step: int, begun: float, measured: dict, trained: dict[str, jax.Array]) -> None:
        """Takes a step that began at `begun`, what was measured, and what the device will have."""
        self.write(begun)
        self.waiting = (step, begun, measured, trained)

    def settle(self, ended: float | None = None) -> None:
        """Fetches what the device has of the step that waits, which `ended` when the next began, or
        now, once the device is done."""
        if self.waiting and "time/step" not in self.waiting[2]:
            _, begun, measured, trained = self.waiting
            found = jax.device_get(trained)
            compiling = {k: measured.pop(k) for k in ("time/compile",) if k in measured}
            measured |= {f"train/{name}": float(x) for name, x in found.items()}
            measured["time/step"] = (ended or time.perf_counter()) - begun
            measured |= compiling

    def write(self, ended: float | None = None) -> None:
        """Writes the row that waits; of `ended` see `settle`."""
        if self.waiting is None:
            return
        self.settle(ended)
        (step, _, row, _), self.waiting = self.waiting, None
        self.writer.write(step, self.stage.name, row)
        shown = ("train/loss", "train/grad_norm", "rollout/mean_length", "time/step")
        beside = {k: row[k] for k in shown if k in row}
        if not row["train/trained_tokens"]:  # there is no loss to tell
            del beside["train/loss"]
        self.bar.update(step + 1 - self.stage.first, beside)


def transcripts(
    shown: trainer.Shown, mesh: Mesh, student: Policy, count: int
) -> list[dict[str, object]]:
    """The first sequences of a step as text with per-token numbers, for rollouts/*.jsonl."""
    rows: dict[int, dict[str, object]] = {}
    decode = student.tokenizer.decode if student.tokenizer else lambda ids: None
    for micro, stats in shown:
        batch = micro.put(mesh)
        arrays = (batch.tokens_BT, batch.mask_BT, batch.segments_BT, batch.finished_BT, stats)
        arrays = jax.tree.map(np.asarray, mesh_lib.first_rows(arrays, len(micro.rows)))
        tokens, mask, segments, finished, figures = arrays
        for i, numbers in enumerate(micro.rows):
            for segment, number in enumerate(numbers, start=1):
                if number >= count:
                    continue
                own = segments[i] == segment
                prompt = tokens[i][own & ~mask[i]].tolist()
                response = tokens[i][own & mask[i]].tolist()
                row = rows[number] = {
                    "prompt": decode(prompt),
                    "response": decode(response),
                    "prompt_tokens": prompt,
                    "tokens": response,
                    **{name: x[i][own & mask[i]].tolist() for name, x in figures.items()},
                }
                if finished is not None:
                    row["finish_reason"] = "stop" if finished[i][own].any() else "length"
    return [rows[number] for number in sorted(rows)]


def claim(workdir: epath.Path, c: ConfigDict) -> None:
    """Makes `workdir` this run's directory, or makes sure that it already is.

    Raises:
      UserError: naming the first key that differs from the run that the directory holds.
    """
    path = workdir / "config.json"
    now = json.loads(c.to_json_best_effort())
    if path.is_file():
        before = json.loads(path.read_text())
        changed = sorted(_differences(before, now, ""))
        if changed:
            raise UserError(f"{workdir} holds a run of another config: {changed[0]}")
    elif (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds checkpoints but no config.json: not a run to resume")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        run_files.write_json(path, now)
        run_files.write_json(workdir / "environment.json", run_files.environment())
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error}") from error


def _differences(before: object, now: object, at: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            if at or key not in RUN_LOCAL:
                yield from _differences(before.get(key), now.get(key), f"{at}.{key}")
    elif before != now:
        yield f"config{at} was {before!r}, now {now!r}"


def begin(c: ConfigDict, plan: Plan, checkpoints: Checkpoints) -> tuple[update.TrainState, int]:
    """The state to go on from and the number of its stage: the newest checkpoint, or the start."""
    found = checkpoints.latest()
    if found:
        optimizer, student = plan.stages[found[1]["index"]].optimizer, plan.student
        trained = mesh_lib.parameters(student.config, policy.mesh_of(student), student.model.lora)
        restored = checkpoints.restore(update.abstract(optimizer, trained, bool(c.student.ema)))
        if restored:
            stage = plan.stages[restored[1]["index"]]
            if stage.packer:
                stage.packer.resume(restored[1]["packing"])
            if stage.parked:
                stage.parked.resume(restored[1]["parked"])
            if stage.ahead:
                stage.ahead.resume(restored[1]["ahead"])
            return restored[0], restored[1]["index"]
    key = jax.random.key(c.seed)
    if plan.student.model.lora:
        params = policy.first(plan.student, key)
    elif c.student.random_init:
        params = policy.randomise(plan.student, key).params
    else:
        params = policy.load(plan.student, "float32").params
    # A copy: the state is donated, and no buffer of it may be there twice.
    average = jax.tree.map(jnp.copy, params) if c.student.ema else None
    return update.init(plan.stages[0].optimizer, params, 0, average), 0


def run(c: ConfigDict, workdir: epath.PathLike) -> None:
    """Runs the stages of a config, from the newest checkpoint in `workdir` on if there is one."""
    run_files.require_reachable(str(workdir), "--workdir")
    workdir = epath.Path(workdir)
    xla.keep(c.compilation_cache)
    mesh, apart = mesh_lib.meshes(c)
    plan = setup.prepare(c, mesh, apart)
    validation = eval_hook.prepare(c.eval, plan.student)
    distributed.from_primary(lambda: claim(workdir, c))
    run_files.say(f"attention: {plan.student.model.kernel}")
    with policy.use(plan.student):
        plan, held = setup.base(c, plan), {}
        with (
            Checkpoints(workdir / "checkpoints", c.checkpoint.every, c.checkpoint.keep) as saved,
            eval_hook.judging(validation, plan.student, workdir, c.seed) as judge,
            graders.Grader() as grader,
            cli.stop_signals() as received,
            xla.Compiled() as programs,
        ):
            state, at = begin(c, plan, saved)
            with run_files.Writer(workdir, int(state.step)) as writer:
                opened = Open(mesh, saved, writer, judge, grader, received, programs)
                for index, stage in enumerate(plan.stages[at:], start=at):
                    loaded = plan  # or it would hold on to what the last stage read
                    loaded = setup.load(c, loaded, stage, held)
                    if int(state.step) == 0:
                        preflight.show(c, loaded, validation, state.params)
                    if index == at and int(state.step) < stage.end:
                        judge.warm_up(state.params)
                    if index > at:
                        state = update.init(
                            stage.optimizer, state.params, int(state.step), state.average
                        )
                    state = run_stage(c, loaded, index, state, opened)
                    if opened.stopped():
                        break
        if code := opened.stopped():
            run_files.say(
                f"stopped after step {int(state.step)}; the same command goes on from there"
            )
            raise SystemExit(128 + code)


def run_stage(
    c: ConfigDict, plan: Plan, index: int, state: update.TrainState, opened: Open
) -> update.TrainState:
    """The loop. Its order is fixed: draw, update, evaluate, log, save. A checkpoint after step i
    holds all that came of steps 0 to i, and the rows of metrics.jsonl for them are written."""
    stage, s = plan.stages[index], plan.stages[index].c
    logits_mib = stages.logits_mib(c, opened.mesh)
    room = preflight.cache_room(c, plan, stage, state.params)
    draw = collect.batches(plan, stage, c.seed, opened.mesh, logits_mib, opened.grader, room)
    train = trainer.make(c, plan, stage, opened.mesh, state)
    schedule = optim.schedule(s.optim, s.steps * stage.updates)
    begun = int(state.step)
    with run_files.progress(s.steps, begun - stage.first, stage.name) as bar:
        rows = Rows(stage, opened.writer, bar)
        for step in range(begun, stage.end):
            start = time.perf_counter()
            work, measured = draw(state.params, step, state.average)
            told = c.log.transcripts if step % c.log.transcripts_every == 0 else 0
            state, trained, shown, seconds = train.step(state, work, told)
            measured["time/score"] += seconds
            if stage.ahead:
                stage.ahead.sample(trained)  # the next step's rows, while the device trains
            trained["learning_rate"] = schedule((step - stage.first) * stage.updates)
            rows.add(step, start, measured, trained)
            meta = functools.partial(_meta, stage, index, step)
            ending = step + 1 == stage.end
            if opened.judge.due(step + 1, ending):
                rows.settle()
                measured |= opened.judge.run(state, meta, step + 1)
            measured["time/compile"] = opened.programs.look(
                f"step {step}", 0.0 if step == begun else 1.0
            )
            if told:
                lines = transcripts(shown, opened.mesh, plan.student, told)
                opened.writer.write_rollouts(step, lines)
            # Asked once: a signal may come while the state is being saved.
            stopping = bool(opened.stopped())
            if opened.saved.due(step + 1, stopping or ending):
                rows.write()
                opened.writer.flush()  # what a checkpoint holds is in the files
                opened.saved.save(step + 1, state, meta(), force=stopping or ending)
            if stopping:
                break
    return state


def _meta(stage: Stage, index: int, step: int) -> dict[str, Any]:
    """What a checkpoint after a step holds beside the state."""
    meta: dict[str, Any] = {"stage": stage.name, "index": index}
    if stage.packer:
        meta["packing"] = stage.packer.position(step + 1 - stage.first)
    if stage.parked:
        meta["parked"] = stage.parked.position()
    if stage.ahead:
        meta["ahead"] = stage.ahead.position()
    return meta
