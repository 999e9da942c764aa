"""The one loop: python -m distill.train --config=configs/X.py --workdir=runs/x.

Every objective is a `collect`, which makes a Batch, and a row of losses.TABLE. What a step reads
and draws is a function of (seed, step), so a run that was stopped goes on as if it had not been.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import optax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from distill import cli, data, losses, metrics, optim, policy, rollout, teacher, update
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.checkpoint import Checkpoints
from distill.policy import Policy
from models.errors import UserError
from models.qwen3 import model

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
flags.mark_flag_as_required("config", OPTIONS)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; resumes if it holds one.", OPTIONS, required=True
)

RUN_LOCAL = ("checkpoint", "log")  # may change on resume: they do not touch the trajectory


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage with all that it needs checked and at hand; `first` is its first global step."""

    name: str
    c: ConfigDict
    first: int
    source: data.Source
    optimizer: optax.GradientTransformation
    parked: rollout.Parked | None  # where a budget of tokens ends its steps

    @property
    def end(self) -> int:
        return self.first + self.c.steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run: models described but not loaded, stages in order."""

    student: Policy
    teacher: Policy | None
    stages: tuple[Stage, ...]


def prepare(c: ConfigDict, mesh: Mesh) -> Plan:
    """Checks everything a user can get wrong, before any weight is read or file written.

    Raises:
      UserError: naming the flag, file or row at fault.
    """
    if c.seed < 0:
        raise UserError(f"config.seed={c.seed}: must be 0 or more")
    if not c.stages:
        raise UserError("config.stages: names no stage")
    for name in c.stages:
        if name not in c or not isinstance(c[name], ConfigDict) or "objective" not in c[name]:
            raise UserError(f"config.stages: {name!r} is no stage of this config")
        if c[name].objective not in COLLECT:
            raise UserError(f"config.{name}.objective: {c[name].objective!r} not in {set(COLLECT)}")
    for field in ("student", "teacher"):
        needed = field == "student" or any(c[name].objective == "opd" for name in c.stages)
        if needed and not c[field].path:
            raise UserError(f"config.{field}.path: name a model directory")
    student = policy.describe(c.student.path, c.student.dtype, c.student.remat, mesh)
    if not c.student.random_init:
        policy.check(student)
    taught = None
    if any(c[name].objective == "opd" for name in c.stages):
        taught = policy.describe(c.teacher.path, c.teacher.dtype, False, mesh)
        policy.require_same_vocabulary(student, taught)
        policy.check(taught)
    stages, first = [], 0
    for name in c.stages:
        s = c[name]
        _check_stage(name, s, student, mesh)
        source = data.load(s.data, student.tokenizer, c.seed, traces=s.objective == "sft")
        field, vocabulary = f"config.{name}.max_prompt_tokens", student.config.vocab_size
        data.check(source, s.max_prompt_tokens, field, vocabulary)
        parked = rollout.Parked() if s.rollout.budget else None
        stages.append(Stage(name, s, first, source, optim.make(s.optim, s.steps), parked))
        first += s.steps
    return Plan(student, taught, tuple(stages))


def _check_stage(name: str, s: ConfigDict, student: Policy, mesh: Mesh) -> None:
    counts = ("steps", "batch_size", "samples", "accumulate")
    for field in (*counts, "max_prompt_tokens", "max_response_tokens"):
        if s[field] < 1:
            raise UserError(f"config.{name}.{field}={s[field]}: must be at least 1")
    if s.rollout.budget < 0:
        raise UserError(f"config.{name}.rollout.budget={s.rollout.budget}: must be 0 (off) or more")
    try:
        options = _options(s)
    except UserError as error:
        raise UserError(f"config.{name}.rollout.{error}") from None
    _sampling(s).require(student.config.vocab_size)  # the former refuses what is no distribution
    total = s.max_prompt_tokens + s.max_response_tokens
    room = options.room(mesh_lib.row_shards(mesh))
    if room < total:
        raise UserError(
            f"config.{name}.rollout.cache_tokens={options.cache_tokens}: leaves {room} tokens for "
            f"a row, which may have max_prompt_tokens + max_response_tokens = {total}"
        )
    limit = student.config.max_position_embeddings
    if total > limit:
        raise UserError(
            f"config.{name}: max_prompt_tokens + max_response_tokens = {total} exceeds the "
            f"model's {limit} positions"
        )
    rows = s.accumulate * mesh_lib.row_shards(mesh)
    for field, parts in (("accumulate times the devices", rows), ("samples", s.samples)):
        if s.batch_size % parts:
            raise UserError(
                f"config.{name}.batch_size={s.batch_size} does not divide by {field} ({parts})"
            )


def _sampling(s: ConfigDict) -> rollout.Sampling:
    return rollout.Sampling(**s.sampling)


def _options(s: ConfigDict) -> rollout.Options:
    r = s.rollout
    return rollout.Options(
        slots=r.slots or s.batch_size,
        longest=s.max_prompt_tokens + s.max_response_tokens,
        segment=r.segment,
        chunk=r.chunk,
        cache_tokens=r.cache_tokens,
        cache_dtype=r.cache_dtype,
        gathered=r.gathered,
    )


# collect: (parameters, step, key of the step) -> (batch, what it measured)
Collect = Callable[[model.Params, int, jax.Array], tuple[Batch, dict[str, float]]]


def collect_traces(plan: Plan, stage: Stage, seed: int, mesh: Mesh) -> Collect:
    """Off-policy: written responses from the stage's data."""
    s = stage.c

    def collect(params: model.Params, step: int, key: jax.Array):
        examples = data.at(stage.source, step - stage.first, s.batch_size, seed)
        batch = data.trace_batch(examples, s.max_prompt_tokens, s.max_response_tokens)
        return jax.device_put(batch, mesh_lib.rows(mesh)), {}

    return collect


def collect_rollouts(plan: Plan, stage: Stage, seed: int, mesh: Mesh) -> Collect:
    """On-policy: the student writes, the teacher reads what it wrote."""
    s, student, taught = stage.c, plan.student, plan.teacher
    assert taught is not None
    sampling, options, parked = _sampling(s), _options(s), stage.parked

    def collect(params: model.Params, step: int, key: jax.Array):
        rows = parked.rows if parked else []
        begun = parked.begun if parked else (step - stage.first) * s.batch_size
        rows = rows + _asked(stage, seed, begun, s.batch_size - len(rows))
        counts: Counter[str] = Counter()
        begin = time.perf_counter()
        done = list(
            rollout.run(
                student.model,
                params,
                rows,
                sampling=sampling,
                stop_ids=student.stop_ids,
                options=options,
                version=step,
                # The last step ends all rows.
                budget=s.rollout.budget if parked and step + 1 < stage.end else None,
                counts=counts,
            )
        )
        took = time.perf_counter() - begin
        ended = [row for row in done if row.reason]
        written = sum(len(row.tokens) for row in ended)
        measured = {
            "rollout/tokens_per_second": counts["tokens"] / took,
            "rollout/mean_length": written / max(1, len(ended)),
            "rollout/truncated": sum(r.reason == "length" for r in ended) / max(1, len(ended)),
            "rollout/utilisation": counts["tokens"] / counts["slot_steps"],
            "time/rollout": took,
        }
        if parked:
            parked.begun += len(rows) - len(parked.rows)
            parked.rows = [row for row in done if not row.reason]
            stale = sum(version < step for row in ended for version in row.versions)
            measured |= {"rollout/ended": len(ended), "rollout/stale": stale / max(1, written)}
        batch = rollout.to_batch(ended, s.batch_size, s.max_prompt_tokens, s.max_response_tokens)
        return teacher.score(taught, jax.device_put(batch, mesh_lib.rows(mesh))), measured

    return collect


def _asked(stage: Stage, seed: int, begun: int, count: int) -> list[rollout.Row]:
    """Rows `begun` and after of all that a stage samples, batch_size of them for each step."""
    s, rows = stage.c, []
    for step in range(begun // s.batch_size, -(-(begun + count) // s.batch_size)):
        examples = data.at(stage.source, step, s.batch_size // s.samples, seed)
        for example in examples:
            data.require_fit(example, s.max_prompt_tokens, f"{stage.name}.max_prompt_tokens")
        key = jax.random.fold_in(jax.random.key(seed), stage.first + step)
        rows += rollout.ask(examples, s.samples, key, s.max_response_tokens)
    return rows[begun % s.batch_size :][:count]


COLLECT = {"sft": collect_traces, "opd": collect_rollouts}


def transcripts(
    batch: Batch, stats: losses.Stats, student: Policy, count: int
) -> list[dict[str, object]]:
    """The first rows of a batch as text with per-token numbers, for rollouts/*.jsonl."""
    rows = []
    tokens, mask, segments = (
        np.asarray(x[:count]) for x in (batch.tokens_BT, batch.mask_BT, batch.segments_BT)
    )
    figures = {name: np.asarray(x[:count]) for name, x in stats.items()}
    decode = student.tokenizer.decode if student.tokenizer else lambda ids: None
    for i in range(len(tokens)):
        prompt = tokens[i][(segments[i] > 0) & ~mask[i]].tolist()
        response = tokens[i][mask[i]].tolist()
        row = {
            "prompt": decode(prompt),
            "response": decode(response),
            "prompt_tokens": prompt,
            "tokens": response,
            **{name: x[i][mask[i]].tolist() for name, x in figures.items()},
        }
        if batch.finished_B is not None:
            row["finish_reason"] = "stop" if bool(batch.finished_B[i]) else "length"
        rows.append(row)
    return rows


def claim(workdir: Path, c: ConfigDict) -> None:
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
        metrics.write_json(path, now)
        metrics.write_json(workdir / "environment.json", metrics.environment())
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
        optimizer = plan.stages[found[1]["index"]].optimizer
        restored = checkpoints.restore(update.abstract(optimizer, plan.student.params))
        if restored:
            parked = plan.stages[restored[1]["index"]].parked
            if parked:
                parked.resume(restored[1]["parked"])
            return restored[0], restored[1]["index"]
    if c.student.random_init:
        student = policy.randomise(plan.student, jax.random.key(c.seed))
    else:
        student = policy.load(plan.student, "float32")
    return update.init(plan.stages[0].optimizer, student.params, 0), 0


def run(c: ConfigDict, workdir: Path) -> None:
    """Runs the stages of a config, from the newest checkpoint in `workdir` on if there is one."""
    mesh = mesh_lib.make(**c.mesh)
    plan = prepare(c, mesh)
    claim(workdir, c)
    with policy.use(plan.student):
        if plan.teacher:
            plan = dataclasses.replace(
                plan, teacher=policy.load(plan.teacher, c.teacher.param_dtype)
            )
        with (
            Checkpoints(workdir / "checkpoints", c.checkpoint.every, c.checkpoint.keep) as saved,
            cli.stop_signals() as stopped,
        ):
            state, at = begin(c, plan, saved)
            with metrics.Writer(workdir, int(state.step)) as writer:
                for index, stage in enumerate(plan.stages[at:], start=at):
                    if index > at:
                        state = update.init(stage.optimizer, state.params, int(state.step))
                    state = run_stage(c, plan, index, state, mesh, saved, writer, stopped)
                    if stopped():
                        break
        if stopped():
            metrics.say(
                f"stopped after step {int(state.step)}; the same command goes on from there"
            )
            raise SystemExit(128 + stopped())


def run_stage(
    c: ConfigDict,
    plan: Plan,
    index: int,
    state: update.TrainState,
    mesh: Mesh,
    saved: Checkpoints,
    writer: metrics.Writer,
    stopped: Callable[[], int],
) -> update.TrainState:
    """The loop. Its order is fixed: draw, update, log, save. A checkpoint after step i holds all
    that came of steps 0 to i, and the rows of metrics.jsonl for them are already written."""
    stage, student = plan.stages[index], plan.student
    s = stage.c
    root = jax.random.key(c.seed)
    collect = COLLECT[s.objective](plan, stage, c.seed, mesh)
    take_step = update.make(
        student.model, stage.optimizer, s.objective, s.accumulate, c.logits_mib * mesh.size, state
    )
    teacher_head = model.head(plan.teacher.params) if plan.teacher else None
    schedule = optim.schedule(s.optim, s.steps)
    shown = ("train/loss", "train/grad_norm", "rollout/mean_length", "time/step")
    with metrics.progress(s.steps, int(state.step) - stage.first, stage.name) as bar:
        for step in range(int(state.step), stage.end):
            start = time.perf_counter()
            batch, measured = collect(state.params, step, jax.random.fold_in(root, step))
            state, trained, stats = take_step(state, batch, teacher_head)
            measured |= {f"train/{name}": float(x) for name, x in trained.items()}
            measured["train/learning_rate"] = float(schedule(step - stage.first))
            measured["time/step"] = time.perf_counter() - start
            writer.write(step, stage.name, measured)
            if c.log.transcripts and step % c.log.transcripts_every == 0:
                writer.write_rollouts(step, transcripts(batch, stats, student, c.log.transcripts))
            bar.update(step + 1 - stage.first, {k: measured[k] for k in shown if k in measured})
            stopping = bool(stopped())  # once: a signal may come while the state is being saved
            last = stopping or step + 1 == stage.end
            about = {"stage": stage.name, "index": index}
            if stage.parked:
                about["parked"] = stage.parked.position()
            saved.save(step + 1, state, about, force=last)
            if stopping:
                break
    return state


def main() -> None:
    run(CONFIG.value, Path(WORKDIR.value))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
