"""Runs that are stopped in the middle of a rollout or of an evaluation, and go on."""

import signal

import jax
import numpy as np
import pytest

from distill.rollout import engine
from distill.runtime.checkpoint import Checkpoints
from distill.training import loop
from distill.training.collect import Collector
from distill.training.eval_hook import ValidationHook
from tests.support.runs import config, final, numbers, transcripts

NUM_SEGMENTS = 2  # before the signal, so that some rows are finished, and some half-way


@pytest.fixture
def stop_within(monkeypatch):
    """Returns a function that sends SIGTERM to this process in the middle of a rollout or of an
    evaluation, after so many steps; at most once."""
    target, segments, now = [], [], [("", 0)]
    advance, evaluate, collect_step = engine.Engine.advance, ValidationHook.run, loop.collect_step

    def advance_and_stop(self, token_budget):
        if target and now[0] == target[0]:
            segments.append(self.counts["segments"])
            if len(segments) > NUM_SEGMENTS:
                target.clear()
                signal.raise_signal(signal.SIGTERM)
        return advance(self, token_budget)

    def collect_step_within(collector: Collector, params, step, *rest):
        now[0] = ("rollout", step)
        return collect_step(collector, params, step, *rest)

    def evaluate_within(self, state, make_meta, step, *rest):
        now[0] = ("evaluation", step)
        return evaluate(self, state, make_meta, step, *rest)

    monkeypatch.setattr(engine.Engine, "advance", advance_and_stop)
    monkeypatch.setattr(loop, "collect_step", collect_step_within)
    monkeypatch.setattr(ValidationHook, "run", evaluate_within)

    def set_target(where, step):
        segments.clear()
        target[:] = [(where, step)]

    return set_target


def make_config(models):
    c = config(models)
    c.checkpoint.every = 100
    c.opd.rollout.segment, c.opd.rollout.token_budget = 3, 30
    c.eval.every, c.eval.best = 2, "-mean_length"
    c.eval.limit, c.eval.batch_size, c.eval.max_new_tokens = 6, 2, 8
    return c


def read_evaluations(workdir):
    return {p.parent.name: p.read_text() for p in sorted(workdir.glob("eval/*/examples.jsonl"))}


def test_a_run_stopped_within_steps_has_the_same_bits(models, tmp_path, stop_within, capfd):
    c, whole, broken = make_config(models), tmp_path / "whole", tmp_path / "broken"
    loop.run(c, whole)
    rows = numbers(whole)
    assert any(row.get("rollout/stale") for row in rows), "rows are carried from step to step"
    for where, step in (("rollout", 3), ("evaluation", 4), ("evaluation", 5)):
        stop_within(where, step)
        with pytest.raises(SystemExit) as stopped:
            loop.run(c, broken)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert f"stopped after step {step}; the same command resumes it" in capfd.readouterr().err
        with Checkpoints(broken / "checkpoints") as checkpoints:
            newest, _ = checkpoints.read_latest() or (0, {})
        assert newest == step, "the last finished step is saved"
        is_finished = where == "rollout"  # its row awaits what the evaluation finds
        assert numbers(broken) == rows[: step if is_finished else step - 1]
    examples = read_evaluations(broken)
    assert len(examples["000005"]) < len(read_evaluations(whole)["000005"])
    loop.run(c, broken)
    assert numbers(broken) == rows
    assert transcripts(broken) == transcripts(whole)
    assert read_evaluations(broken) == read_evaluations(whole)
    same = jax.tree.map(np.array_equal, final(broken, models), final(whole, models))
    assert all(jax.tree.leaves(same))
    loop.run(c, broken)  # the newest checkpoint still has the row of its step
    assert numbers(broken) == rows
    assert sorted(p.name for p in (broken / "best" / "checkpoints").iterdir()) == sorted(
        p.name for p in (whole / "best" / "checkpoints").iterdir()
    )


def test_a_run_stopped_in_its_first_step_begins_again(models, tmp_path, stop_within, capfd):
    c = make_config(models)
    c.stages, c.opd.steps, c.eval.every = ("opd",), 1, 0
    stop_within("rollout", 0)
    with pytest.raises(SystemExit) as stopped:
        loop.run(c, tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "SIGTERM: stopping at the checkpoint of the last finished step" in (
        errors := capfd.readouterr().err
    )
    assert "stopped before the end of the first step; the same command" in errors
    assert not numbers(tmp_path) and not list((tmp_path / "checkpoints").iterdir())
    loop.run(c, tmp_path)
    assert len(numbers(tmp_path)) == 1
