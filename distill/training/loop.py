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
from distill.training import (
    collect,
    eval_hook,
    memory,
    optim,
    preflight,
    setup,
    stages,
    trainer,
    update,
)
from distill.training.setup import RunSetup, StageSetup
from models.errors import UserError

# May change on resume: they do not touch the trajectory.
RESUME_MUTABLE_KEYS = ("checkpoint", "log", "eval", "compilation_cache")


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What a run holds open through its stages."""

    mesh: Mesh
    checkpoints: Checkpoints
    writer: run_files.Writer
    validation_hook: eval_hook.ValidationHook
    grader: graders.Grader
    get_stop_signal: Callable[[], int]  # the signal that asked this process to stop, or 0
    compiled_programs: xla.CompileMonitor

    def check_stop_signal(self) -> int:
        """The signal that came to any process: all stop after the same step."""
        return distributed.max_over_processes(self.get_stop_signal())


@dataclasses.dataclass
class MetricsLogger:
    """Writes the metrics of each step once the next one is under way, so that the device is not
    waited for; and shows them."""

    stage: StageSetup
    writer: run_files.Writer
    progress_bar: run_files.Progress
    pending: tuple[int, float, dict, dict] | None = None

    def add_step(
        self, step: int, start_time: float, host_metrics: dict, device_metrics: dict[str, jax.Array]
    ) -> None:
        """Takes a step that began at `begun`, what was measured, and what the device will have."""
        self.write(start_time)
        self.pending = (step, start_time, host_metrics, device_metrics)

    def fetch_pending(self, end_time: float | None = None) -> None:
        """Fetches what the device has of the step that waits, which `ended` when the next began, or
        now, once the device is done."""
        if self.pending and "time/step" not in self.pending[2]:
            _, start_time, host_metrics, device_metrics = self.pending
            fetched = jax.device_get(device_metrics)
            compiling = {k: host_metrics.pop(k) for k in ("time/compile",) if k in host_metrics}
            host_metrics |= {f"train/{name}": float(x) for name, x in fetched.items()}
            host_metrics["time/step"] = (end_time or time.perf_counter()) - start_time
            host_metrics |= compiling

    def write(self, end_time: float | None = None) -> None:
        """Writes the row that waits; of `ended` see `settle`."""
        if self.pending is None:
            return
        self.fetch_pending(end_time)
        (step, _, row, _), self.pending = self.pending, None
        self.writer.write(step, self.stage.name, row)
        bar_names = ("train/loss", "train/grad_norm", "rollout/mean_length", "time/step")
        bar_metrics = {k: row[k] for k in bar_names if k in row}
        if not row["train/trained_tokens"]:  # there is no loss to tell
            del bar_metrics["train/loss"]
        self.progress_bar.update(step + 1 - self.stage.first_step, bar_metrics)


def make_transcripts(
    kept_stats: trainer.KeptStats, mesh: Mesh, student: Policy, count: int
) -> list[dict[str, object]]:
    """The first sequences of a step as text with per-token numbers, for rollouts/*.jsonl."""
    rows: dict[int, dict[str, object]] = {}
    decode = student.tokenizer.decode if student.tokenizer else lambda ids: None
    for micro, stats in kept_stats:
        batch = micro.to_device(mesh)
        arrays = (batch.tokens_BT, batch.mask_BT, batch.segments_BT, batch.finished_BT, stats)
        arrays = jax.tree.map(np.asarray, mesh_lib.gather_first_rows(arrays, len(micro.rows)))
        tokens, mask, segments, finished, stats_arrays = arrays
        for i, numbers in enumerate(micro.rows):
            for segment, number in enumerate(numbers, start=1):
                if number >= count:
                    continue
                is_own = segments[i] == segment
                prompt = tokens[i][is_own & ~mask[i]].tolist()
                response = tokens[i][is_own & mask[i]].tolist()
                row = rows[number] = {
                    "prompt": decode(prompt),
                    "response": decode(response),
                    "prompt_tokens": prompt,
                    "tokens": response,
                    **{name: x[i][is_own & mask[i]].tolist() for name, x in stats_arrays.items()},
                }
                if finished is not None:
                    row["finish_reason"] = "stop" if finished[i][is_own].any() else "length"
    return [rows[number] for number in sorted(rows)]


def init_workdir(workdir: epath.Path, c: ConfigDict) -> None:
    """Makes `workdir` this run's directory, or makes sure that it already is.

    Raises:
      UserError: naming the first key that differs from the run that the directory holds.
    """
    path = workdir / "config.json"
    current = json.loads(c.to_json_best_effort())
    if path.is_file():
        saved = json.loads(path.read_text())
        changed = sorted(_find_differences(saved, current, ""))
        if changed:
            raise UserError(f"{workdir} holds a run of another config: {changed[0]}")
    elif (workdir / "checkpoints").exists():
        raise UserError(f"{workdir} holds checkpoints but no config.json: not a run to resume")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        run_files.write_json(path, current)
        run_files.write_json(workdir / "environment.json", run_files.describe_environment())
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error}") from error


def _find_differences(before: object, now: object, key_path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            if key_path or key not in RESUME_MUTABLE_KEYS:
                yield from _find_differences(before.get(key), now.get(key), f"{key_path}.{key}")
    elif before != now:
        yield f"config{key_path} was {before!r}, now {now!r}"


def restore_or_init(
    c: ConfigDict, run_setup: RunSetup, checkpoints: Checkpoints
) -> tuple[update.TrainState, int]:
    """The state to go on from and the number of its stage: the newest checkpoint, or the start."""
    latest = checkpoints.read_latest()
    if latest:
        optimizer, student = run_setup.stages[latest[1]["index"]].optimizer, run_setup.student
        trained = mesh_lib.make_abstract_params(
            student.config, policy.get_mesh(student), student.model.lora
        )
        restored = checkpoints.restore(
            update.make_abstract_state(optimizer, trained, bool(c.student.ema_decay))
        )
        if restored:
            stage = run_setup.stages[restored[1]["index"]]
            if stage.packer:
                stage.packer.restore(restored[1]["packing"])
            if stage.partial_rollouts:
                stage.partial_rollouts.restore(restored[1]["parked"])
            if stage.async_rollouts:
                stage.async_rollouts.restore(restored[1]["ahead"])
            return restored[0], restored[1]["index"]
    key = jax.random.key(c.seed)
    if run_setup.student.model.lora:
        params = policy.load_or_init_lora(run_setup.student, key)
    elif c.student.random_init:
        params = policy.init_random_policy(run_setup.student, key).params
    else:
        params = policy.load(run_setup.student, "float32").params
    # A copy: the state is donated, and no buffer of it may be there twice.
    average = jax.tree.map(jnp.copy, params) if c.student.ema_decay else None
    return update.init_train_state(run_setup.stages[0].optimizer, params, 0, average), 0


def run(c: ConfigDict, workdir: epath.PathLike) -> None:
    """Runs the stages of a config, from the newest checkpoint in `workdir` on if there is one."""
    run_files.require_reachable(str(workdir), "--workdir")
    workdir = epath.Path(workdir)
    xla.init_compilation_cache(c.compilation_cache)
    mesh, teacher_mesh = mesh_lib.make_meshes(c)
    run_setup = setup.setup_run(c, mesh, teacher_mesh)
    validation = eval_hook.setup_validation(c.eval, run_setup.student, c.seed)
    distributed.broadcast_from_primary(lambda: init_workdir(workdir, c))
    run_files.log_line(f"attention: {run_setup.student.model.kernel}")
    with policy.use(run_setup.student):
        run_setup, loaded_models = setup.load_lora_base(c, run_setup), {}
        with (
            Checkpoints(
                workdir / "checkpoints", c.checkpoint.every, c.checkpoint.keep
            ) as checkpoints,
            eval_hook.open_validation_hook(
                validation, run_setup.student, workdir
            ) as validation_hook,
            graders.Grader() as grader,
            cli.catch_stop_signals() as get_stop_signal,
            xla.CompileMonitor() as compiled_programs,
        ):
            state, first_stage = restore_or_init(c, run_setup, checkpoints)
            with run_files.Writer(workdir, int(state.step)) as writer:
                run_context = RunContext(
                    mesh,
                    checkpoints,
                    writer,
                    validation_hook,
                    grader,
                    get_stop_signal,
                    compiled_programs,
                )
                for index, stage in enumerate(run_setup.stages[first_stage:], start=first_stage):
                    loaded_setup = run_setup  # or it would hold on to what the last stage read
                    loaded_setup = setup.load_stage_models(c, loaded_setup, stage, loaded_models)
                    if int(state.step) == 0:
                        preflight.print_summary(c, loaded_setup, validation, state.params)
                    if index == first_stage and int(state.step) < stage.end_step:
                        validation_hook.warm_up(state.params)
                    if index > first_stage:
                        state = update.init_train_state(
                            stage.optimizer, state.params, int(state.step), state.ema_params
                        )
                    state = run_stage(c, loaded_setup, index, state, run_context)
                    if run_context.check_stop_signal():
                        break
        if code := run_context.check_stop_signal():
            run_files.log_line(
                f"stopped after step {int(state.step)}; the same command goes on from there"
            )
            raise SystemExit(128 + code)


def run_stage(
    c: ConfigDict,
    run_setup: RunSetup,
    index: int,
    state: update.TrainState,
    run_context: RunContext,
) -> update.TrainState:
    """The loop. Its order is fixed: draw, update, evaluate, log, save. A checkpoint after step i
    holds all that came of steps 0 to i, and the rows of metrics.jsonl for them are written."""
    stage, s = run_setup.stages[index], run_setup.stages[index].c
    loss_chunk_mib = stages.compute_logits_mib(c, run_context.mesh)
    cache_capacity = memory.compute_cache_capacity(
        memory.describe_stage(c, run_setup, stage, state.params), memory.get_memory_limit()
    )
    collect_step = collect.make_collect(
        run_setup,
        stage,
        c.seed,
        run_context.mesh,
        loss_chunk_mib,
        run_context.grader,
        cache_capacity,
    )
    stage_trainer = trainer.make_trainer(c, run_setup, stage, run_context.mesh, state)
    schedule = optim.make_schedule(s.optim, s.steps * stage.updates_per_step)
    first_step = int(state.step)
    with run_files.show_progress(
        s.steps, first_step - stage.first_step, stage.name
    ) as progress_bar:
        metrics_logger = MetricsLogger(stage, run_context.writer, progress_bar)
        for step in range(first_step, stage.end_step):
            start = time.perf_counter()
            minibatches, host_metrics = collect_step(state.params, step, state.ema_params)
            transcript_count = c.log.transcripts if step % c.log.transcripts_every == 0 else 0
            state, device_metrics, kept_stats, seconds = stage_trainer.step(
                state, minibatches, transcript_count
            )
            host_metrics["time/score"] += seconds
            if stage.async_rollouts:
                stage.async_rollouts.sample(
                    device_metrics
                )  # the next step's rows, while the device trains
            device_metrics["learning_rate"] = schedule(
                (step - stage.first_step) * stage.updates_per_step
            )
            metrics_logger.add_step(step, start, host_metrics, device_metrics)
            make_meta = functools.partial(_make_checkpoint_meta, stage, index, step)
            is_last = step + 1 == stage.end_step
            if run_context.validation_hook.is_due(step + 1, is_last):
                metrics_logger.fetch_pending()
                host_metrics |= run_context.validation_hook.run(state, make_meta, step + 1)
            host_metrics["time/compile"] = run_context.compiled_programs.report_compiles(
                f"step {step}", 0.0 if step == first_step else 1.0
            )
            if transcript_count:
                lines = make_transcripts(
                    kept_stats, run_context.mesh, run_setup.student, transcript_count
                )
                run_context.writer.write_rollouts(step, lines)
            # Asked once: a signal may come while the state is being saved.
            stopping = bool(run_context.check_stop_signal())
            if run_context.checkpoints.should_save(step + 1, stopping or is_last):
                metrics_logger.write()
                run_context.writer.flush()  # what a checkpoint holds is in the files
                run_context.checkpoints.save(
                    step + 1, state, make_meta(), force=stopping or is_last
                )
            if stopping:
                break
    return state


def _make_checkpoint_meta(stage: StageSetup, index: int, step: int) -> dict[str, Any]:
    """What a checkpoint after a step holds beside the state."""
    meta: dict[str, Any] = {"stage": stage.name, "index": index}
    if stage.packer:
        meta["packing"] = stage.packer.get_state(step + 1 - stage.first_step)
    if stage.partial_rollouts:
        meta["parked"] = stage.partial_rollouts.get_state()
    if stage.async_rollouts:
        meta["ahead"] = stage.async_rollouts.get_state()
    return meta
