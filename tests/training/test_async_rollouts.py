"""Tests sampling one step ahead of the update: batches, resumed runs, refused losses, and that
sampling overlaps the update."""

import dataclasses
import signal
from typing import Any

import jax
import numpy as np
import pytest

from distill import rollout
from distill.data import dataset
from distill.objectives import losses
from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from distill.training import collect, loop, microbatches, setup, stages, trainer, update
from models.errors import UserError
from tests.support.runs import config, final, numbers, stop_after, transcripts

STEPS = 4


def make_async_config(models, **changes):
    """Configures on-policy steps of 2 prompts x 2 samples with a rate at which stale weights sample
    differently."""
    c = config(models)
    c.stages, c.opd.steps, c.opd.rollout.asynchronous = ("opd",), STEPS, True
    c.opd.optim.learning_rate, c.opd.optim.warmup_steps = 0.03, 0
    c.log.transcripts_every, c.checkpoint.every = 1, 1
    c.opd.update(changes)
    return c


def record_batches(patch: pytest.MonkeyPatch) -> list[list[rollout.Sequence]]:
    """Records the rows of every batch from now on."""
    batches: list[list[rollout.Sequence]] = []
    written = microbatches.to_examples

    def note(rows, rewards=None):
        batches.append(list(rows))
        return written(rows, rewards)

    patch.setattr(microbatches, "to_examples", note)
    return batches


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """Trains without interruption; returns the run directory and the rows of its batches."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        rows = record_batches(patch)
        loop.run(make_async_config(models), workdir)
    return workdir, rows


def train_sequentially(c) -> tuple[list[list[rollout.Sequence]], Any]:
    """Trains step by step: rows of step i + 1 are sampled with a copy of the weights before update
    i."""
    plan = setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))
    stage, s, batches = plan.stages[0], c.opd, []
    with policy.use(plan.student):
        plan = setup.load_lora_base(c, plan)
        plan = setup.load_stage_models(c, plan, plan.stages[0])
        params = policy.load(plan.student, "float32").params
        older = jax.tree.map(lambda x: x.copy(), params)
        state = update.init_train_state(stage.optimizer, params, 0)
        mesh = policy.get_mesh(plan.student)
        form = microbatches.make_stage_layout(s, stage.loss, stage.sampled_rows, None)
        train = trainer.make_trainer(c, plan, stage, mesh, state)
        for step in range(STEPS):
            examples = dataset.get_step_examples(stage.source, step, 2, c.seed)
            key = jax.random.fold_in(jax.random.key(c.seed), step)
            rows = rollout.expand_prompts(examples, 2, key, s.max_response_tokens)
            rows = list(
                rollout.sample(
                    rollout.SamplingModel(plan.student.model, older, plan.student.stop_ids),
                    rows,
                    sampling=stages.make_sampling(s),
                    options=stages.make_rollout_options(s),
                )
            )
            batches.append(rows)
            older = jax.tree.map(lambda x: x.copy(), state.params)
            examples = microbatches.to_examples(rows)
            packed = microbatches.pack_examples(examples, stage.microbatch_rows, 1, form)
            state, *_ = train.step(
                state, microbatches.make_microbatches(packed, examples, form, mesh)
            )
    return batches, jax.tree.map(np.asarray, state.params)


def test_batches_are_sampled_with_weights_one_update_old(whole, models) -> None:
    workdir, rows = whole
    expected, params = train_sequentially(make_async_config(models))
    actual = [[(row.prompt, row.tokens, row.logprobs) for row in step] for step in rows]
    assert actual == [[(row.prompt, row.tokens, row.logprobs) for row in step] for step in expected]
    assert [{*row.versions} for step in rows for row in step] == [{0}] * 8 + [{1}] * 4 + [{2}] * 4
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, final(workdir, models), params)))
    figures = numbers(workdir)
    assert [row["rollout/stale"] for row in figures] == [0, 1, 1, 1]
    assert figures[0]["train/sampler_delta"] < 1e-5 < figures[1]["train/sampler_delta"]


@pytest.mark.parametrize("budget", [0, 30])
def test_resumed_run_has_the_same_bits(whole, models, tmp_path, budget) -> None:
    """No row is sampled again, lost or trained twice, with and without parked rows."""
    c = make_async_config(
        models, rollout={**make_async_config(models).opd.rollout, "token_budget": budget}
    )
    unbroken, rows = whole
    with pytest.MonkeyPatch.context() as patch:
        trained = record_batches(patch)
        if budget:
            unbroken = tmp_path / "whole"
            loop.run(c, unbroken)
            rows = [*trained]
            trained.clear()
            assert any(len({*row.versions}) > 1 for step in rows for row in step)
        with patch.context() as stopping:
            stop_after(stopping, 1)
            with pytest.raises(SystemExit) as stopped:
                loop.run(c, tmp_path / "stopped")
        assert stopped.value.code == 128 + signal.SIGTERM
        loop.run(c, tmp_path / "stopped")
    assert trained == rows
    keys = [row.key for step in trained for row in step]
    assert len({*keys}) == len(keys)
    assert numbers(tmp_path / "stopped") == numbers(unbroken)
    assert transcripts(tmp_path / "stopped") == transcripts(unbroken)
    same = jax.tree.map(
        np.array_equal, final(tmp_path / "stopped", models), final(unbroken, models)
    )
    assert all(jax.tree.leaves(same))


def test_rows_are_sampled_while_the_update_runs(models, tmp_path, monkeypatch) -> None:
    """The update is still running when sampling begins, unless it is very fast, which may
    happen."""
    running: list[bool] = []
    sample_ahead = collect.sample_ahead

    def watch(collector, wait_for):
        running.append(collector.started is not None and not wait_for["loss"].is_ready())
        sample_ahead(collector, wait_for)

    monkeypatch.setattr(collect, "sample_ahead", watch)
    loop.run(make_async_config(models), tmp_path)
    assert len(running) == STEPS and any(running) and not running[-1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "sft"}, "sft samples nothing"),
        ({"objective": "opd_sampled", "loss": {"ratio": "none"}}, "takes every sample for fresh"),
        ({"objective": "opd_sampled", "loss": {"k1_from": "sampler"}}, "lags behind"),
        ({"objective": "opd_sampled", "epochs": 2}, "loss.tis_clip weighs what came before"),
    ],
)
def test_losses_without_an_off_policy_correction_are_refused(
    models, tmp_path, changes, words
) -> None:
    c = make_async_config(models, **changes)
    with pytest.raises(UserError) as error:
        loop.run(c, tmp_path / "run")
    assert "config.opd.rollout.asynchronous: " in str(error.value) and words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_objectives_with_an_off_policy_correction_are_accepted(models) -> None:
    for name in ("opd", "opd_sampled", "cispo", "hybrid"):
        c = make_async_config(models, objective=name)
        plan = setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))
        assert plan.stages[0].asynchronous
        assert plan.stages[0].loss == dataclasses.replace(losses.OBJECTIVES[name])
