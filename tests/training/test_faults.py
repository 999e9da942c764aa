"""Tests what a run does when a number is not finite: skip, count, stop at a checkpoint."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill import rollout
from distill.batch import Batch
from distill.data.collate import SampledExample
from distill.objectives import losses
from distill.runtime import mesh as mesh_lib
from distill.runtime.checkpoint import Checkpoints
from distill.training import grading, loop, saving, trainer, update, update_metrics
from models import families
from models.errors import UserError
from tests.support.runs import config, final, numbers
from tests.support.updates import CONFIG, one_update, placed

B, T = 4, 12


def make_batch(bad: float) -> Batch:
    """Makes a batch whose second row has an advantage of `bad`."""
    rng = np.random.default_rng(0)
    mask: Any = np.tile(np.arange(T) >= 3, (B, 1))
    tokens: Any = rng.integers(0, 96, (B, T), np.int32)
    positions: Any = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    advantages: Any = np.where(mask, np.where(np.arange(B)[:, None] == 1, bad, 1.0), 0)
    logp: Any = np.full((B, T), -4.5, np.float32)
    return Batch(
        tokens,
        positions,
        np.ones_like(tokens),
        mask,
        sampler_logp_BT=logp,
        advantages_BT=advantages.astype(np.float32),
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30], ids=str)
def test_an_update_that_is_not_finite_changes_nothing(bad, accumulate):
    """Neither parameters, moments nor the moving average change; the gradient of 1e30 is finite,
    but its norm is not. The next update is as if the bad one had never been."""
    mesh = mesh_lib.make_mesh(1, 1, 1)
    with mesh_lib.use_mesh(mesh):
        optimizer = optax.adamw(1e-2)
        loss, options = losses.OBJECTIVES["grpo"], update.UpdateOptions(T, 1.0, ema_decay=0.5)
        params = placed(CONFIG, 0, mesh)
        state = update.init_train_state(optimizer, params, 0, jax.tree.map(jnp.copy, params))
        programs = update.make_update(families.make_model(CONFIG), optimizer, loss, options, state)
        state, good, _ = one_update(programs, state, make_batch(2.0), accumulate=accumulate)
        assert good["trained_tokens"] == B * (T - 3) and good["skipped_updates"] == 0
        before = jax.tree.map(np.array, state)  # copies, because the state is donated
        state, measured, _ = one_update(programs, state, make_batch(bad), accumulate=accumulate)
        assert measured["trained_tokens"] == 0 and measured["skipped_updates"] == 1
        after = dataclasses.replace(jax.tree.map(np.array, state), step=before.step)
        assert int(state.step) == 2 and jax.tree.all(jax.tree.map(np.array_equal, before, after))
        update.require_finite(state)
        both = update_metrics.average_metrics([good, measured])
        assert both["skipped_updates"] == 1 and both["loss"] == good["loss"]


def test_a_state_that_is_not_finite_is_named():
    mesh = mesh_lib.make_mesh(1, 1, 1)
    params = {"a": jnp.ones(3), "b": jnp.array([1.0, jnp.inf])}
    shard = jax.tree.map(
        lambda x: mesh_lib.to_global_array(np.asarray(x), mesh_lib.make_replicated_sharding(mesh)),
        params,
    )
    with pytest.raises(UserError, match=r"after step 7 is not finite in 1 of 2 arrays \(params/b"):
        update.require_finite(update.init_train_state(optax.sgd(1.0), shard, 7))


@pytest.fixture
def bad_steps(monkeypatch):
    """Steps in which the teacher's scores are NaN."""
    steps, take = set(), trainer.Trainer.step

    def step(self, state, *arguments):
        score = trainer.Trainer._score
        is_bad = int(state.step) in steps

        def score_badly(self, average, batch):
            scored: Any = score(self, average, batch)
            hidden = tuple(jnp.full_like(x, jnp.nan) for x in scored.teacher.hidden_BTE)
            teacher = dataclasses.replace(scored.teacher, hidden_BTE=hidden)
            return dataclasses.replace(scored, teacher=teacher)

        with pytest.MonkeyPatch.context() as patch:
            if is_bad:
                patch.setattr(trainer.Trainer, "_score", score_badly)
            return take(self, state, *arguments)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    return steps


def test_a_run_stops_at_a_checkpoint_after_steps_that_are_not_finite(
    models, tmp_path, bad_steps, capsys
):
    """The checkpoint is finite, and the batch can be inspected."""
    c = config(models)
    c.stages, c.opd.steps, c.alerts.max_skipped_steps = ("opd",), 7, 2
    c.student.ema_decay = 0.5
    bad_steps |= {1, 3, 4}
    with pytest.raises(UserError, match=r"^step 4: .* not finite in 2 step.*of step 6, from which"):
        loop.run(c, tmp_path)
    assert "warning: step 1: loss or gradient not finite" in capsys.readouterr().err
    rows = numbers(tmp_path)
    assert [row["train/skipped_updates"] for row in rows] == [0, 1, 0, 1, 1, 0]
    assert [row["train/loss"] is None for row in rows] == [x > 0 for x in (0, 1, 0, 1, 1, 0)]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(final(tmp_path, models)))
    (file,) = (tmp_path / "skipped").iterdir()
    batch = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.name == "000001.jsonl" and len(batch) == 4
    assert all(row["tokens"] and None in row["reverse_kl"] for row in batch)
    assert all(None not in row["logp"] for row in batch)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        latest = checkpoints.read_latest()
        assert latest and latest[0] == 6


def fail_first_response(monkeypatch):
    """Makes the first sampled response of a run end in NaN logits."""
    sample, reasons = rollout.sample, ["error"]

    def sample_badly(*arguments, **options):
        for sequence in sample(*arguments, **options):
            sequence.finish_reason = reasons.pop() if reasons else sequence.finish_reason
            yield sequence

    monkeypatch.setattr(rollout, "sample", sample_badly)


def test_a_response_with_nan_logits_is_left_out(models, tmp_path, monkeypatch, capsys):
    """With rewards, so are the other samples of its prompt, with which it would be compared."""
    c = config(models)
    c.stages, c.opd.steps, c.opd.objective = ("opd",), 2, "grpo"
    c.opd.reward.correct, c.opd.reward.length, c.opd.reward.length_margin = 0.0, 1.0, 16
    fail_first_response(monkeypatch)
    loop.run(c, tmp_path)
    first, last = numbers(tmp_path)
    assert first["rollout/failed"] == 1 and last["rollout/failed"] == 0
    assert first["train/trained_tokens"] < last["train/trained_tokens"]
    assert "1 of 4 responses ended in NaN logits and are left out" in capsys.readouterr().err
    (file,) = (tmp_path / "rollouts").iterdir()
    assert len(file.read_text().splitlines()) == 2


def test_only_groups_with_rewards_are_left_out_whole():
    reasons = ("stop", "error", "length", "stop")
    sequences: Any = [
        SimpleNamespace(finish_reason=x, tokens=[], where=f"row {i}") for i, x in enumerate(reasons)
    ]
    kept, rewards = grading.drop_failed_groups(sequences, None, 2)
    assert [x.where for x in kept] == ["row 0", "row 2", "row 3"] and rewards is None
    kept, rewards = grading.drop_failed_groups(sequences, [0.0, 1.0, 2.0, 3.0], 2)
    assert [x.where for x in kept] == ["row 2", "row 3"] and rewards == [2.0, 3.0]
    assert grading.drop_failed_groups(sequences[1:2], [1.0], 1) == ([], [])


def test_a_judge_that_is_not_finite_spoils_its_group_alone():
    """The update of these advantages is then skipped."""
    c = config(["", ""])
    c.opd.reward.teacher_logprob = 1.0
    samples: Any = [SampledExample([1], [2], "", "", reward=0.0, logprobs=[0.0]) for _ in range(4)]
    scores_B = np.array([-1.0, np.nan, -1.0, -3.0], np.float32)
    samples, metrics = grading.add_teacher_rewards(c.opd, samples, scores_B)
    advantages: Any = [x.advantage for x in grading.add_advantages(samples, 2, "mean")]
    assert np.isnan(advantages[:2]).all() and advantages[2:] == [1.0, -1.0]
    assert np.isnan(metrics["reward/mean"]) and metrics["reward/zero_variance_groups"] == 0


def test_weights_that_are_not_finite_are_never_saved(models, tmp_path):
    """Every response fails at its first token, and no step divides by their number."""
    c = config(models)
    c.stages, c.opd.steps, c.checkpoint.every = ("opd",), 5, 100
    init = saving.restore_or_init

    def poison(*arguments):
        state, *rest = init(*arguments)
        params = jax.tree.map(lambda x: x * jnp.nan, state.params)
        return dataclasses.replace(state, params=params), *rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "restore_or_init", poison)
        with pytest.raises(UserError, match="the state after step 4 is not finite"):
            loop.run(c, tmp_path)
    assert [row["rollout/failed"] for row in numbers(tmp_path)] == [4] * 4
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.read_latest() is None
