"""The one loop: python -m distill.train --config=configs/X.py --workdir=runs/x.

Every objective is a `collect`, which makes a Batch, and a row of losses.TABLE. What a step reads
and draws is a function of (seed, step), so a run that was stopped goes on as if it had not been.
"""

import contextlib
import dataclasses
import json
import signal
import time
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
    for field, dtype, allowed in (
        ("student.dtype", c.student.dtype, policy.DTYPES),
        ("teacher.dtype", c.teacher.dtype, policy.DTYPES),
        ("teacher.param_dtype", c.teacher.param_dtype, policy.PARAM_DTYPES),
    ):
        if dtype not in allowed:
            raise UserError(f"config.{field}: {dtype!r} is none of {', '.join(allowed)}")
    student = policy.describe(c.student.path, c.student.dtype, c.student.remat, mesh)
    if c.student.balance_loss and not any(student.config.sparse_layers):
        raise UserError(f"config.student.balance_loss: {c.student.path} has no experts to balance")
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
        _check_stage(name, s, student, taught, mesh)
        source = data.load(s.data, student.tokenizer, c.seed, traces=s.objective == "sft")
        field, vocabulary = f"config.{name}.max_prompt_tokens", student.config.vocab_size
        data.check(source, s.max_prompt_tokens, field, vocabulary)
        stages.append(Stage(name, s, first, source, optim.make(s.optim, s.steps)))
        first += s.steps
    return Plan(student, taught, tuple(stages))


def _check_stage(
    name: str, s: ConfigDict, student: Policy, taught: Policy | None, mesh: Mesh
) -> None:
    counts = ("steps", "batch_size", "samples", "accumulate")
    for field in (*counts, "max_prompt_tokens", "max_response_tokens"):
        if s[field] < 1:
            raise UserError(f"config.{name}.{field}={s[field]}: must be at least 1")
    _sampling(s)  # refuses what is no distribution
    total = s.max_prompt_tokens + s.max_response_tokens
    for reader in (student, taught) if taught and s.objective == "opd" else (student,):
        limit = reader.config.context_length
        if total > limit:
            raise UserError(
                f"config.{name}: max_prompt_tokens + max_response_tokens = {total} exceeds the "
                f"model's {limit} positions ({reader.path})"
            )
    rows = s.accumulate * mesh_lib.row_shards(mesh)
    for field, parts in (("accumulate times the devices", rows), ("samples", s.samples)):
        if s.batch_size % parts:
            raise UserError(
                f"config.{name}.batch_size={s.batch_size} does not divide by {field} ({parts})"
            )


def _sampling(s: ConfigDict) -> rollout.Sampling:
    return rollout.Sampling(s.sampling.temperature, s.sampling.top_k, s.sampling.top_p)


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
    count = s.batch_size // s.samples
    rows = mesh_lib.rows(mesh)
    prompt_B, sample_B = np.divmod(np.arange(s.batch_size, dtype=np.int32), s.samples)
    sampling = _sampling(s)

    def collect(params: model.Params, step: int, key: jax.Array):
        examples = data.at(stage.source, step - stage.first, count, seed)
        for example in examples:
            data.require_fit(example, s.max_prompt_tokens, f"{stage.name}.max_prompt_tokens")
        prompts = [example.prompt for example in examples for _ in range(s.samples)]
        tokens, segments = data.left_pad(prompts, s.max_prompt_tokens)
        begin = time.perf_counter()
        batch = rollout.sample(
            student.model,
            params,
            jax.device_put(tokens, rows),
            jax.device_put(segments, rows),
            jax.device_put(rollout.row_keys(key, prompt_B, sample_B), rows),
            max_new_tokens=s.max_response_tokens,
            sampling=sampling,
            stop_ids=student.stop_ids,
            stacked=rollout.prefers_stacked(),
        )
        written = int(batch.mask_BT.sum())  # waits for the rollout
        took = time.perf_counter() - begin
        assert batch.finished_B is not None
        measured = {
            "rollout/tokens_per_second": written / took,
            "rollout/mean_length": written / s.batch_size,
            "rollout/truncated": 1 - float(batch.finished_B.mean()),
            "time/rollout": took,
        }
        return teacher.score(taught, batch), measured

    return collect


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


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within it, SIGTERM and SIGINT only set what the yielded function returns (0: none came)."""
    received = 0

    def note(number: int, _: object) -> None:
        nonlocal received
        received = number

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin(c: ConfigDict, plan: Plan, checkpoints: Checkpoints) -> tuple[update.TrainState, int]:
    """The state to go on from and the number of its stage: the newest checkpoint, or the start."""
    found = checkpoints.latest()
    if found:
        optimizer = plan.stages[found[1]["index"]].optimizer
        restored = checkpoints.restore(update.abstract(optimizer, plan.student.params))
        if restored:
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
            stop_signals() as stopped,
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
        student.model,
        stage.optimizer,
        s.objective,
        s.accumulate,
        c.logits_mib * mesh.size,
        state,
        c.student.balance_loss,
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
            saved.save(step + 1, state, {"stage": stage.name, "index": index}, force=last)
            if stopping:
                break
    return state


def main() -> None:
    run(CONFIG.value, Path(WORKDIR.value))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
