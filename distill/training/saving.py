"""Saves the state of a run, and restores it."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from distill.policy import policy
from distill.runtime import environment, run_files
from distill.runtime import mesh as mesh_lib
from distill.runtime.checkpoint import Checkpoints, Meta
from distill.training import config_changes, resume, update
from distill.training.collect import Collector
from distill.training.setup import RunSetup


def restore_or_init(
    c: ConfigDict, run_setup: RunSetup, checkpoints: Checkpoints, input_keys: Sequence[str]
) -> tuple[update.TrainState, Meta | None]:
    """Restores the newest checkpoint, or initialises the state.

    Args:
      input_keys: config keys of inputs whose content was compared (resume.init_workdir).

    Returns:
      The state, and what `make_meta` made for it; None at the start of a run.
    """
    student = run_setup.student
    trained = mesh_lib.make_abstract_params(
        student.config, policy.get_mesh(student), student.model.lora
    )

    def make_abstract_state(meta: dict[str, Any]) -> Any:
        if before := meta.get("config"):  # earlier versions had it in config.json alone
            first_step = sum(before[name]["steps"] for name in before["stages"][: meta["index"]])
            changes = config_changes.compare_configs(before, c, first_step + 1, input_keys)
            resume.require_allowed("--workdir: its checkpoints are of another config", changes)
        # Of the checkpoint's own stage: an earlier one may have another optimiser.
        optimizer = run_setup.stages[meta["index"]].optimizer
        return update.make_abstract_state(optimizer, trained, bool(c.student.ema_decay))

    restored = checkpoints.restore(make_abstract_state)
    if restored:
        state, meta = restored
        git = meta.get("git", "of an earlier version")
        if git != environment.describe_git():
            run_files.log_line(f"the checkpoint was written by other code: {git}")
        return state, meta
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
    return update.init_train_state(optimizer, params, 0, ema_params), None


def save(
    checkpoints: Checkpoints, writer: run_files.Writer, state: update.TrainState, meta: Meta
) -> None:
    """Saves the state of a run, whose rows of metrics have been written.

    Raises:
      UserError: if the state is not finite.
    """
    writer.flush()  # the files are then as new as the checkpoint
    update.require_finite(state)
    checkpoints.save(int(state.step), state, meta)


def make_meta(c: ConfigDict, collector: Collector, index: int, step: int) -> Meta:
    """Makes the JSON that a checkpoint after `step` steps holds beside the state.

    One that is saved in the middle of the evaluation after its step also has that step's `row` of
    metrics.
    """
    stage = collector.stage
    return {
        "stage": stage.name,
        "index": index,
        "progress": collector.progress.get_state(step - stage.first_step),
        "config": json.loads(c.to_json_best_effort()),
        "git": environment.describe_git(),
    }
