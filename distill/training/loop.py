"""The training loop: from a config to checkpoints, metrics and transcripts."""

import contextlib
import dataclasses
import functools
import json
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.policy import policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.runtime import (
    distributed,
    locks,
    paths,
    run_files,
    stop_signals,
    trackers,
    watchdog,
    xla,
)
from distill.runtime import mesh as mesh_lib
from distill.runtime.checkpoint import Checkpoints
from distill.runtime.progress import show_progress
from distill.runtime.stop_signals import Stopped, StopSignals
from distill.teachers.local import Teacher
from distill.training import (
    alerts,
    collect,
    eval_hook,
    grading,
    memory,
    metrics_log,
    microbatches,
    optim,
    preflight,
    resume,
    run_summary,
    saving,
    setup,
    stopping,
    trainer,
    update,
)
from distill.training.collect import Collector
from distill.training.microbatches import Minibatches
from distill.training.setup import RunSetup
from distill.training.stopping import RunContext
from models.errors import SourceFailure
from models.transformer import Params


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
        trackers.check_trackers(c.log.to)
        inputs = resume.describe_inputs(c, remaining, eval_rows)
        models = setup.describe_models(run_setup)
        return resume.init_workdir(
            workdir, c, inputs, steps_done, allow_changed_inputs, models=models
        )

    return run_setup, validation, distributed.broadcast_from_primary(write_first_files)


def run(
    c: ConfigDict,
    workdir: epath.PathLike,
    allow_changed_inputs: bool = False,
    is_whole: bool = True,
) -> None:
    """Runs the stages of a config, continuing from the newest checkpoint in `workdir` if any.

    Args:
      allow_changed_inputs: a run that is resumed may go on with other data, models or adapters than
        it began with.
      is_whole: nothing of the caller's follows, so a user is told what may follow.

    Raises:
      UserError: naming the problem in the config, its files or `workdir`; or, after a checkpoint,
        the alert that stopped the run.
      SystemExit: with code 128 + signal, after a checkpoint, if a signal asked the run to stop.
      KeyboardInterrupt: if it did where there was nothing to save, as before the first step.
    """
    paths.require_reachable(str(workdir), "--workdir")
    workdir, flag = epath.Path(workdir), f"--workdir={workdir}"
    xla.init_compilation_cache(c.compilation_cache)
    with (
        run_files.explain_write_errors(workdir, flag),
        stop_signals.advise_interrupted("the same command goes on from the newest checkpoint"),
        locks.hold_lock(workdir / "lock", flag),
    ):
        run_setup = run_stages(c, workdir, allow_changed_inputs)
        run_summary.print_end(c, run_setup.stages, workdir, is_whole)


def run_stages(c: ConfigDict, workdir: epath.Path, allow_changed_inputs: bool) -> RunSetup:
    """Does what `run` says, in a directory that no other run writes. Returns the run's setup."""
    mesh, teacher_mesh = mesh_lib.make_meshes(c)
    run_alerts = alerts.Alerts(c.alerts)
    prepare = functools.partial(prepare_run, c, workdir, mesh, teacher_mesh, allow_changed_inputs)
    steps_done = distributed.broadcast_from_primary(
        lambda: policy.find_newest_step(str(workdir)) or 0
    )
    run_setup, validation, input_keys = prepare(steps_done)
    run_summary.print_start(c, run_setup.stages, workdir, steps_done)
    for line in preflight.check_memory(c, run_setup, mesh, steps_done):
        run_files.log_line(line)
    with policy.use(run_setup.student):
        run_setup = setup.load_lora_base(c, run_setup)
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: run_setup.close())
            signals = stack.enter_context(
                StopSignals("stopping at the checkpoint of the last finished step")
            )
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
            compile_monitor = stack.enter_context(xla.CompileMonitor())
            with signals.interrupt():
                state, meta = saving.restore_or_init(c, run_setup, checkpoints, input_keys)
                if int(state.step) < steps_done:  # the newest checkpoint is damaged
                    earlier, *_ = prepare(int(state.step))
                    run_summary.print_start(c, earlier.stages, workdir, int(state.step))
                    run_setup = dataclasses.replace(earlier, student=run_setup.student)
            step = int(state.step)
            writer = stack.enter_context(trackers.open_writer(c.log.to, workdir, step, signals))
            if run_files.is_primary() and (workdir / "metrics.jsonl").exists():
                rows = (workdir / "metrics.jsonl").read_text().splitlines()
                run_alerts.read_rows(map(json.loads, rows))
            run_context = RunContext(
                mesh,
                checkpoints,
                writer,
                validation_hook,
                grader,
                signals,
                compile_monitor,
                run_alerts,
                stack.enter_context(watchdog.Watchdog(c.alerts.hang_seconds, c.alerts.hang_exits)),
            )
            if meta and "row" in meta:
                stopping.finish_evaluation(run_context, state, meta)
            first_stage, progress = (meta["index"], meta["progress"]) if meta else (0, None)
            loaded_models: dict[str, Policy | Teacher] = {}
            for index, stage in enumerate(run_setup.stages[first_stage:], start=first_stage):
                if int(state.step) >= stage.end_step:
                    continue
                if run_context.check_stop_signal():
                    break
                loaded_setup = run_setup  # releases the last stage's models before loading
                with signals.interrupt():
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
        if code := run_context.check_stop_signal():
            stopping.stop_run(run_alerts, code, int(state.step))
    return run_setup


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
        c, run_setup, stage, mesh, run_context.grader, cache_capacity, run_context.check_stop
    )
    if progress:
        collector.progress.restore(progress)
    stage_trainer = trainer.make_trainer(c, run_setup, stage, mesh, state)
    schedule = optim.make_schedule(s.optim, s.steps * stage.updates_per_step)
    first_step = int(state.step)
    num_done = first_step - stage.first_step
    with show_progress(s.steps, num_done, stage.name) as progress_bar:
        metrics_logger = metrics_log.MetricsLogger(
            stage, run_context.writer, progress_bar, run_context.alerts, mesh, run_setup.student
        )
        run_context.compile_monitor.report_compiles(f"before step {first_step}", 1.0)
        for step in range(first_step, stage.end_step):
            run_context.watchdog.start_step(step)
            start_time, is_last = time.perf_counter(), step + 1 == stage.end_step
            transcript_count = metrics_log.count_transcripts(c.log, step)
            buffer = dataclasses.replace(collector.progress.buffer)
            try:
                collected = collect_step(collector, state.params, step, state.average)
                run_context.check_stop()  # the update will take the last step's state
            except (Stopped, SourceFailure) as error:
                metrics_logger.write()
                collector.progress.buffer = buffer
                stopping.leave_step(c, run_context, collector, state, index, error)
                break
            minibatches, host_metrics = collected
            train_time = time.perf_counter()
            num_kept = transcript_count if metrics_logger.has_skipped else s.batch_size
            state, device_metrics, kept_stats, score_seconds = stage_trainer.step(
                state, minibatches, num_kept
            )
            del collected, minibatches  # the host's memory of the step is free for the next one's
            if stage.asynchronous:
                collect.sample_ahead(collector, device_metrics)

            host_metrics["time/score"] += score_seconds
            num_updates = (step - stage.first_step) * stage.updates_per_step
            device_metrics["learning_rate"] = schedule(num_updates)
            metrics_logger.time_update(train_time, device_metrics)
            metrics_logger.add_step(step, start_time, host_metrics, device_metrics, kept_stats)
            make_meta = functools.partial(saving.make_meta, c, collector, index, step + 1)
            if transcript_count:
                metrics_logger.write_transcripts(step, c.log, kept_stats)
            if validation_hook.is_due(step + 1, is_last):
                metrics_logger.fetch_pending()
                if not stopping.evaluate_step(run_context, state, make_meta, host_metrics):
                    break
            host_metrics["time/compile"] = run_context.compile_monitor.report_compiles(
                f"step {step}", 0.0 if step == first_step else 1.0
            )
            # Checked once, since a signal may arrive while the state is being saved.
            is_stopping = bool(run_context.check_stop_signal())
            validation_hook.check_last_save()
            is_due = checkpoints.should_save(step + 1)
            if is_due or is_stopping or is_last:
                metrics_logger.write()
                saving.save(checkpoints, run_context.writer, state, make_meta())
            if is_stopping:
                break
    run_context.watchdog.stop_step()
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
    # Before sampling, which must not be lost if they cannot be read.
    traces = collect.read_traces(collector, step)
    if not stage.asynchronous:  # the sampler would wait for the last update, as if it took so long
        jax.block_until_ready(params)
    if stage.loss.reward:
        sequences, rewards, metrics = collect.sample_graded_sequences(collector, params, step)
    else:
        sequences, metrics = collect.sample_sequences(collector, params, step, ema_params)
        rewards = None
    sequences, rewards = grading.drop_failed_groups(sequences, rewards, s.samples)
    samples = microbatches.to_examples(sequences, rewards)
    samples = collector.outputs.add_early(samples, sequences)
    packed = microbatches.pack_examples(
        [*samples, *traces], stage.microbatch_rows, s.minibatches, layout
    )
    start_time = time.perf_counter()
    samples, traces = collector.outputs.read(packed, samples, traces, mesh, collector.check_stop)
    if stage.loss.reward and s.reward.teacher_logprob and samples:
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
