"""Where a run stops, with which checkpoint, and what a resumed run does first.

A stop is noticed between two segments of a rollout or of an evaluation, before an update and after
a step. Before an update, the state is that of the last finished step: the sequences of a step that
is left off are dropped, and a resumed run samples the same ones again. After it, an evaluation that
is left off is completed by the resumed run. What `rollout.asynchronous` samples ahead is finished
first, since the update takes away the weights that it is drawn with.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import NoReturn

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.rewards import graders
from distill.runtime import distributed, run_files, watchdog, xla
from distill.runtime.checkpoint import Checkpoints, Meta
from distill.runtime.stop_signals import Stopped, StopSignals
from distill.training import alerts, eval_hook, grading, metrics_log, saving, update
from distill.training.collect import Collector
from models.errors import SourceFailure, UserError

ALERT_STOP = 1000  # in place of a signal's number: an alert stops the run


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Resources that a run keeps open through its stages."""

    mesh: Mesh
    checkpoints: Checkpoints
    writer: run_files.Writer
    validation_hook: eval_hook.ValidationHook
    grader: graders.Grader
    stop_signals: StopSignals
    compile_monitor: xla.CompileMonitor
    alerts: alerts.Alerts  # of process 0
    watchdog: watchdog.Watchdog

    def check_stop_signal(self) -> int:
        """Returns the signal that any process received, ALERT_STOP for an alert that stops the run,
        or 0; all stop at the same call."""
        own = ALERT_STOP if self.alerts.stop else self.stop_signals.received
        code = distributed.max_over_processes(own)
        if code:
            self.stop_signals.start_saving()
        return code

    def check_stop(self) -> None:
        """Raises Stopped, in every process, if `check_stop_signal` finds something."""
        if self.check_stop_signal():
            raise Stopped


def stop_run(run_alerts: alerts.Alerts, code: int, step: int) -> NoReturn:
    """Ends a run that an alert or the signal `code` stopped, after the checkpoint of `step`."""
    if code != ALERT_STOP:
        done = f"after step {step}" if step else "before the end of the first step"
        run_files.log_line(f"stopped {done}; the same command resumes it")
        raise SystemExit(128 + code)

    def describe_alert() -> str:
        assert run_alerts.stop
        return f"step {run_alerts.stop.step}: {run_alerts.stop.message}"

    raise UserError(
        f"{distributed.broadcast_from_primary(describe_alert)}; stopped at the checkpoint of step "
        f"{step}, from which the same command goes on"
    )


def leave_step(
    c: ConfigDict,
    run_context: RunContext,
    collector: Collector,
    state: update.TrainState,
    index: int,
    error: Stopped | SourceFailure,
) -> None:
    """Saves the state before a step that is left off; a resumed run collects its data anew.

    Raises:
      UserError: if the data cannot be read. With several processes nothing is saved then, since the
        others have not failed.
    """
    step, is_stop = int(state.step), isinstance(error, Stopped)
    if step and (is_stop or jax.process_count() == 1):
        meta = saving.make_meta(c, collector, index, step)
        saving.save(run_context.checkpoints, run_context.writer, state, meta)
        if not is_stop:
            raise UserError(
                f"{error}; stopped at the checkpoint of step {step}, from which the same command "
                "goes on"
            ) from error
    if not is_stop:
        raise error


def evaluate_step(
    run_context: RunContext,
    state: update.TrainState,
    make_meta: Callable[[], Meta],
    row: grading.Metrics,
) -> bool:
    """Evaluates the state after a step, and adds the result to the step's row of metrics.

    Returns False if a stop left it off. There is then a checkpoint that holds the row, which
    `finish_evaluation` completes.
    """
    step = int(state.step)
    try:
        with run_context.watchdog.watch_evaluation(step - 1):
            row |= run_context.validation_hook.run(state, make_meta, step, run_context.check_stop)
    except Stopped:
        meta = {**make_meta(), "row": json.loads(run_files.to_json(row))}
        saving.save(run_context.checkpoints, run_context.writer, state, meta)
        return False
    return True


def finish_evaluation(run_context: RunContext, state: update.TrainState, meta: Meta) -> None:
    """Completes the evaluation that the run was stopped in, and writes the row of its step.

    A run that was killed later, before the next checkpoint, has that row already.
    """
    meta, hook = dict(meta), run_context.validation_hook
    row, step = meta.pop("row"), int(state.step)
    if hook.validation:
        try:
            row |= hook.run(state, lambda: meta, step, run_context.check_stop)
        except Stopped:
            return
    writer = run_context.writer
    if not distributed.broadcast_from_primary(lambda: has_row(hook.workdir, step - 1)):
        metrics_log.write_row(writer, run_context.alerts, step - 1, meta["stage"], row)


def has_row(workdir: epath.Path, step: int) -> bool:
    """Returns True if metrics.jsonl has a row of this step."""
    path = workdir / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return any(json.loads(row)["step"] == step for row in rows)
