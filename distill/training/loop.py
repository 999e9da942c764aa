"""The training loop: from a config to checkpoints, metrics and transcripts."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
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
from distill.runtime import cli, distributed, environment, paths, run_files, xla
from distill.runtime import mesh as mesh_lib
from distill.runtime.checkpoint import Checkpoints
from distill.teachers.local import Teacher
from distill.training import (
    collect,
    eval_hook,
    grading,
    memory,
    microbatches,
    optim,
    preflight,
    resume,
    setup,
    trainer,
    update,
)
from distill.training.collect import Collector
from distill.training.microbatches import Minibatches
from distill.training.setup import RunSetup, StageSetup
from models.errors import UserError
from models.transformer import Params


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Resources that a run keeps open through its stages."""

    mesh: Mesh
    checkpoints: Checkpoints
    writer: run_files.Writer
    validation_hook: eval_hook.ValidationHook
    grader: graders.Grader
    get_stop_signal: Callable[[], int]  # signal that asked us to stop, or 0
    compile_monitor: xla.CompileMonitor

    def check_stop_signal(self) -> int:
        """Returns the signal that any process received, or 0; all stop after the same step."""
        return distributed.max_over_processes(self.get_stop_signal())


@dataclasses.dataclass
class MetricsLogger:
    """Writes and displays the metrics of each step once the next one has started, so that the host
    does not wait for the device."""

    stage: StageSetup
    writer: run_files.Writer
    progress_bar: run_files.Progress
    pending: tuple[int, float, dict, dict] | None = None

    def add_step(
        self, step: int, start_time: float, host_metrics: dict, device_metrics: dict[str, jax.Array]
    ) -> None:
        """Writes the pending row, if any, and makes the step's row the pending one."""
        self.write(start_time)
        self.pending = (step, start_time, host_metrics, device_metrics)

    def fetch_pending(self, end_time: float | None = None) -> None:
        """Completes the pending row with its device metrics. The step ended at `end_time`, when the
        next one started; by default now, once the device is done."""
        if self.pending and "time/step" not in self.pending[2]:
            _, start_time, host_metrics, device_metrics = self.pending
            fetched = jax.device_get(device_metrics)
            compiling = {k: host_metrics.pop(k) for k in ("time/compile",) if k in host_metrics}
            host_metrics |= {f"train/{name}": float(x) for name, x in fetched.items()}
            host_metrics["time/step"] = (end_time or time.perf_counter()) - start_time
            host_metrics |= compiling

    def write(self, end_time: float | None = None) -> None:
        """Writes the pending row, if any; for `end_time` see `fetch_pending`."""
        if self.pending is None:
            return
        self.fetch_pending(end_time)
        (step, _, row, _), self.pending = self.pending, None
        self.writer.write(step, self.stage.name, row)
        bar_names = ("train/loss", "train/grad_norm", "rollout/mean_length", "time/step")
        bar_metrics = {k: row[k] for k in bar_names if k in row}
        if not row["train/trained_tokens"]:  # then there is no loss either
            del bar_metrics["train/loss"]
        self.progress_bar.update(step + 1 - self.stage.first_step, bar_metrics)


def make_transcripts(
    kept_stats: trainer.KeptStats, mesh: Mesh, student: Policy, count: int
) -> list[dict[str, object]]:
    """Makes the rows of rollouts/*.jsonl for the first `count` sequences of a step.

    A row has the text and tokens of a sequence, and each statistic as a list of one number per
    response token.
    """
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
                in_segment = segments[i] == segment
                in_response = in_segment & mask[i]
                prompt, response = tokens[i][in_segment & ~mask[i]], tokens[i][in_response]
                row = rows[number] = {
                    "prompt": decode(prompt.tolist()),
                    "response": decode(response.tolist()),
                    "prompt_tokens": prompt.tolist(),
                    "tokens": response.tolist(),
                    **{name: x[i][in_response].tolist() for name, x in stats_arrays.items()},
                }
                if finished is not None:
                    row["finish_reason"] = "stop" if finished[i][in_segment].any() else "length"
    return [rows[number] for number in sorted(rows)]


def restore_or_init(
    c: ConfigDict, run_setup: RunSetup, checkpoints: Checkpoints, input_keys: Sequence[str]
) -> tuple[update.TrainState, int, dict[str, Any] | None]:
    """Restores the newest checkpoint, or initialises the state.

    Args:
      input_keys: config keys of inputs whose content was compared (resume.init_workdir).

    Returns:
      The state, the number of its stage, and the stage's progress (collect.StageProgress), which
      is None at the start of a run.
    """
    student = run_setup.student
    trained = mesh_lib.make_abstract_params(
        student.config, policy.get_mesh(student), student.model.lora
    )

    def make_abstract_state(meta: dict[str, Any]) -> Any:
        config = json.loads(c.to_json_best_effort())
        if changed := resume.find_config_changes(meta["config"], config, input_keys):
            raise UserError(f"--workdir: its checkpoints are of another config: {changed[0]}")
        # Of the checkpoint's own stage: an earlier one may have another optimiser.
        optimizer = run_setup.stages[meta["index"]].optimizer
        return update.make_abstract_state(optimizer, trained, bool(c.student.ema_decay))

    restored = checkpoints.restore(make_abstract_state)
    if restored:
        state, meta = restored
        if meta["git"] != environment.describe_git():
            run_files.log_line(f"the checkpoint was written by other code: {meta['git']}")
        return state, meta["index"], meta["progress"]
    key = jax.random.key(c.seed)
    if student.model.lora:
        params = policy.load_or_init_lora(student, key)
    elif c.student.random_init:
        params = policy.init_random_policy(student, key).params
    else:
        params = policy.load(student, "float32").params
    # A copy, since the state is donated and nothing in it may alias.
    ema_params = jax.tree.map(jnp.copy, params) if c.student.ema_decay else None
    optimizer = run_setup.stages[0].optimizer
    return update.init_train_state(optimizer, params, 0, ema_params), 0, None


def prepare_run(
    c: ConfigDict,
    workdir: epath.Path,
    mesh: Mesh,
    teacher_mesh: Mesh,
    allow_changed_inputs: bool,
    steps_done: int,
) -> tuple[RunSetup, eval_hook.ValidationSetup | None, list[str]]:
    """Checks what is left of a run after `steps_done` steps, and writes its first files.

    The last item of the result is that of resume.init_workdir.
    """
    run_setup = setup.setup_run(c, mesh, teacher_mesh, steps_done)
    validation = eval_hook.setup_validation(c.eval, run_setup.student, c.seed)
    eval_rows = validation.rows if validation else None
    remaining = [stage for stage in run_setup.stages if stage.end_step > steps_done]

    def write_first_files() -> list[str]:
        inputs = resume.describe_inputs(c, remaining, eval_rows)
        return resume.init_workdir(workdir, c, inputs, steps_done, allow_changed_inputs)

    return run_setup, validation, distributed.broadcast_from_primary(write_first_files)


def run(c: ConfigDict, workdir: epath.PathLike, allow_changed_inputs: bool = False) -> None:
    """Runs the stages of a config, continuing from the newest checkpoint in `workdir` if any.

    Args:
      allow_changed_inputs: a run that is resumed may go on with other data, models or adapters than
        it began with.

    Raises:
      UserError: naming the problem in the config, its files or `workdir`.
      SystemExit: with code 128 + signal, after a checkpoint, if a signal asked the run to stop.
    """
    paths.require_reachable(str(workdir), "--workdir")
    workdir = epath.Path(workdir)
    xla.init_compilation_cache(c.compilation_cache)
    mesh, teacher_mesh = mesh_lib.make_meshes(c)
    prepare = functools.partial(prepare_run, c, workdir, mesh, teacher_mesh, allow_changed_inputs)
    steps_done = distributed.broadcast_from_primary(
        lambda: policy.find_newest_step(str(workdir)) or 0
    )
    run_setup, validation, input_keys = prepare(steps_done)
    run_files.log_line(f"attention: {run_setup.student.model.kernel}")
    with policy.use(run_setup.student):
        run_setup = setup.load_lora_base(c, run_setup)
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(
                Checkpoints(
                    workdir / "checkpoints",
                    c.checkpoint.every,
                    c.checkpoint.keep,
                    c.checkpoint.every_minutes,
                    c.checkpoint.keep_every,
                )
            )
            validation_hook = stack.enter_context(
                eval_hook.open_validation_hook(validation, run_setup.student, workdir)
            )
            grader = stack.enter_context(graders.Grader())
            get_stop_signal = stack.enter_context(cli.catch_stop_signals())
            compile_monitor = stack.enter_context(xla.CompileMonitor())
            state, first_stage, progress = restore_or_init(c, run_setup, checkpoints, input_keys)
            if int(state.step) < steps_done:  # the newest checkpoint is damaged
                earlier, *_ = prepare(int(state.step))
                run_setup = dataclasses.replace(earlier, student=run_setup.student)
            writer = stack.enter_context(run_files.Writer(workdir, int(state.step)))
            run_context = RunContext(
                mesh, checkpoints, writer, validation_hook, grader, get_stop_signal, compile_monitor
            )
            loaded_models: dict[str, Policy | Teacher] = {}
            for index, stage in enumerate(run_setup.stages[first_stage:], start=first_stage):
                if int(state.step) >= stage.end_step:
                    continue
                loaded_setup = run_setup  # releases the last stage's models before loading
                loaded_setup = setup.load_stage_models(c, loaded_setup, stage, loaded_models)
                if int(state.step) == 0:
                    preflight.print_summary(c, loaded_setup, validation, state.params)
                if index == first_stage:
                    validation_hook.warm_up(state.params)
                if index > first_stage:
                    progress = None
                    state = update.init_train_state(
                        stage.optimizer, state.params, int(state.step), state.average
                    )
                state = run_stage(c, loaded_setup, index, state, progress, run_context)
                if run_context.check_stop_signal():
                    break
        if code := run_context.check_stop_signal():
            run_files.log_line(f"stopped after step {int(state.step)}; the same command resumes it")
            raise SystemExit(128 + code)


def run_stage(
    c: ConfigDict,
    run_setup: RunSetup,
    index: int,
    state: update.TrainState,
    progress: dict[str, Any] | None,
    run_context: RunContext,
) -> update.TrainState:
    """Runs the remaining steps of stage `index`, and returns the state after them.

    The order within a step is fixed: collect, train, evaluate, log, save. A checkpoint after step i
    holds the results of steps 0 to i, whose rows of metrics.jsonl are then written.
    """
    stage, mesh, checkpoints = run_setup.stages[index], run_context.mesh, run_context.checkpoints
    s, validation_hook = stage.c, run_context.validation_hook
    abstract_stage = memory.describe_stage(c, run_setup, stage, state.params)
    cache_capacity = memory.compute_cache_capacity(abstract_stage, memory.get_memory_limit())
    collector = collect.make_collector(
        c, run_setup, stage, mesh, run_context.grader, cache_capacity
    )
    if progress:
        collector.progress.restore(progress)
    stage_trainer = trainer.make_trainer(c, run_setup, stage, mesh, state)
    schedule = optim.make_schedule(s.optim, s.steps * stage.updates_per_step)
    first_step = int(state.step)
    num_done = first_step - stage.first_step
    with run_files.show_progress(s.steps, num_done, stage.name) as progress_bar:
        metrics_logger = MetricsLogger(stage, run_context.writer, progress_bar)
        for step in range(first_step, stage.end_step):
            start_time, is_last = time.perf_counter(), step + 1 == stage.end_step
            transcript_count = c.log.transcripts if step % c.log.transcripts_every == 0 else 0

            minibatches, host_metrics = collect_step(collector, state.params, step, state.average)
            state, device_metrics, kept_stats, score_seconds = stage_trainer.step(
                state, minibatches, transcript_count
            )
            if stage.asynchronous:
                collect.sample_ahead(collector, device_metrics)

            host_metrics["time/score"] += score_seconds
            num_updates = (step - stage.first_step) * stage.updates_per_step
            device_metrics["learning_rate"] = schedule(num_updates)
            metrics_logger.add_step(step, start_time, host_metrics, device_metrics)
            make_meta = functools.partial(make_checkpoint_meta, c, collector, index, step + 1)
            if validation_hook.is_due(step + 1, is_last):
                metrics_logger.fetch_pending()
                host_metrics |= validation_hook.run(state, make_meta, step + 1)
            host_metrics["time/compile"] = run_context.compile_monitor.report_compiles(
                f"step {step}", 0.0 if step == first_step else 1.0
            )
            if transcript_count:
                rows = make_transcripts(kept_stats, mesh, run_setup.student, transcript_count)
                run_context.writer.write_rollouts(step, rows)
            # Checked once, since a signal may arrive while the state is being saved.
            stopping = bool(run_context.check_stop_signal())
            validation_hook.check_last_save()
            is_due = checkpoints.should_save(step + 1)
            if is_due or stopping or is_last:
                metrics_logger.write()
                run_context.writer.flush()  # the files are then as new as the checkpoint
                checkpoints.save(step + 1, state, make_meta())
            if stopping:
                break
    return state


def collect_step(
    collector: Collector, params: Params, step: int, ema_params: Params | None = None
) -> tuple[Minibatches, grading.Metrics]:
    """Collects the data of a step: reads traces, or samples sequences and grades them, and packs
    them into micro-batches for `trainer.Trainer.step`.

    Args:
      params: the trained parameters before the step.
      ema_params: their moving average, if one is kept.

    Returns:
      The micro-batches of each minibatch, on the host, and the step's metrics so far.
    """
    stage, s, layout, mesh = collector.stage, collector.stage.c, collector.layout, collector.mesh
    if not stage.sampled_rows:
        return collect.read_minibatches(collector, step)
    if stage.loss.reward:
        sequences, rewards, metrics = collect.sample_graded_sequences(collector, params, step)
    else:
        sequences, metrics = collect.sample_sequences(collector, params, step)
        rewards = None
    samples = microbatches.to_examples(sequences, rewards)
    traces = collect.read_traces(collector, step)
    packed = microbatches.pack_examples(
        [*samples, *traces], stage.microbatch_rows, s.minibatches, layout
    )
    start_time = time.perf_counter()
    if stage.loss.reward and s.reward.teacher_logprob:
        scores_B = grading.score_with_teachers(
            collector.teachers, packed, samples, layout, mesh, collector.loss_chunk_mib, ema_params
        )
        samples, teacher_metrics = grading.add_teacher_rewards(s, samples, scores_B)
        metrics |= teacher_metrics
    if stage.loss.reward:
        samples = grading.add_advantages(samples, s.samples, stage.loss.advantage_norm)
    if traces:
        metrics |= collect.measure_traces(stage, packed, samples, traces, layout)
    minibatches = microbatches.make_microbatches(packed, [*samples, *traces], layout, mesh)
    metrics["time/score"] = time.perf_counter() - start_time
    return minibatches, metrics


def make_checkpoint_meta(
    c: ConfigDict, collector: Collector, index: int, step: int
) -> dict[str, Any]:
    """Makes the JSON that a checkpoint after `step` steps holds beside the state."""
    stage = collector.stage
    return {
        "stage": stage.name,
        "index": index,
        "progress": collector.progress.get_state(step - stage.first_step),
        "config": json.loads(c.to_json_best_effort()),
        "git": environment.describe_git(),
    }
