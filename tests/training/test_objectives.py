"""Tests objectives through the whole training loop, and combinations of settings that are
refused."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from distill.objectives import losses
from distill.policy import policy
from distill.rewards import graders
from distill.runtime import mesh as mesh_lib
from distill.training import collect, loop, setup, trainer, update
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.updates import sequences_of


def config(objective: str, **changes) -> ConfigDict:
    c = quickstart.get_config("tiny")
    c.student.path, c.teacher.path = str(ROOT / "assets/student"), str(ROOT / "assets/teacher")
    c.mesh.fsdp = 1
    c.log.transcripts = 0
    s = c.opd
    s.objective, s.steps, s.batch_size, s.samples = objective, 2, 8, 4
    for name, value in changes.items():
        *groups, field = name.split("__")
        group_config = s
        for group in groups:
            group_config = group_config[group]
        group_config[field] = value
    return c


def rows_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


RUNS = {
    "grpo": {"reward__format": 0.5, "reward__zero_variance_groups": "replace"},
    "hybrid": {
        "loss__reference": 0.1,
        "reward__teacher_logprob": 0.1,
        "loss__aggregation": "constant",
    },
    "gkd": {
        **{"loss__beta": 0.3, "samples": 2, "accumulate": 2},
        **{"loss__position_half_life": 8.0, "loss__entropy_weight": 0.5},
    },
    "distill": {"loss__estimator": "topk", "loss__k": 8},
    "opd_sampled": {"loss__baseline": True, "loss__clip": "ppo", "epochs": 2, "minibatches": 2},
}


@pytest.mark.parametrize("objective", RUNS)
def test_every_objective_trains_by_its_flag(objective, tmp_path):
    c = config(objective, **RUNS[objective])
    loop.run(c, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        assert np.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0
    first = rows[0]
    if losses.OBJECTIVES[objective].reward:
        assert 0 <= first["reward/correct"] <= 1
        assert first["reward/correct_std"] >= 0
        assert "train/advantage" in first and "train/ratio" in first
        assert first["train/ratio"] == pytest.approx(
            1, abs=1e-4
        )  # one update per step: fresh samples
    if objective == "grpo":
        # The loss is the weighted sum of its terms; the terms' means include replaced groups.
        assert 0 <= first["reward/mean"] <= 1.5
        assert first["reward/dropped_rows"] % 4 == 0
    if objective == "hybrid":
        assert first["train/reference_kl"] == pytest.approx(
            0, abs=1e-5
        )  # the student starts as its own reference
        assert first["reward/teacher_logprob"] < 0
        assert first["train/reverse_kl"] > 0
    if objective == "gkd":
        assert "rollout/mean_length" in first and "data/truncated" in first
        assert first["train/token_weight"] > 0 and 0 < first["train/effective_tokens"] < 1
    if objective == "opd_sampled":
        assert first["train/ratio"] != 1  # later updates see older samples


def test_policy_gradient_uses_the_sampling_temperature(tmp_path):
    """At that temperature, fresh samples have a ratio of 1 and the reference equals the student."""
    c = config("grpo", sampling__temperature=0.7, loss__reference=0.1)
    loop.run(c, tmp_path / "run")
    first = rows_of(tmp_path / "run")[0]
    assert first["train/ratio"] == pytest.approx(1, abs=1e-4)
    assert first["train/ratio_max"] == pytest.approx(1, abs=1e-3)
    assert first["train/reference_kl"] == pytest.approx(0, abs=1e-5)
    assert first["train/sampler_delta"] < 1e-4


def test_every_row_of_the_table_can_be_prepared():
    for objective in losses.OBJECTIVES:
        plan = setup.setup_run(config(objective), mesh_lib.make_mesh(1, 1, 1))
        (stage,) = plan.stages
        assert stage.loss == losses.OBJECTIVES[objective]
        assert stage.sampled_rows == {"sft": 0, "distill": 0, "gkd": 4}.get(objective, 8)
        assert bool(plan.teachers) == bool(stage.loss.teacher)


def collect_step(c: ConfigDict, step: int = 0):
    """Returns the sequences that a step of the stage trains on, and its metrics."""
    mesh = mesh_lib.make_mesh(1, 1, 1)
    plan = setup.setup_run(c, mesh)
    with policy.use(plan.student), graders.Grader() as grader:
        params = policy.load(plan.student, "float32").params
        plan = setup.load_lora_base(c, plan)
        plan = setup.load_stage_models(c, plan, plan.stages[0])
        collector = collect.make_collector(c, plan, plan.stages[0], mesh, grader)
        work, measured = loop.collect_step(collector, params, step)
    return sequences_of(work), measured


def test_advantages_compare_the_rewards_of_a_group():
    rows, measured = collect_step(config("grpo", batch_size=16))
    for row in rows:  # one number per response, none on the prompt
        assert len(np.unique(row.advantages_BT[row.mask_BT])) == 1
        assert not row.advantages_BT[~row.mask_BT].any()
    advantages_PG = np.array([row.advantages_BT[-1] for row in rows]).reshape(4, 4)
    np.testing.assert_allclose(advantages_PG.sum(axis=1), 0, atol=1e-5)
    mixed = np.abs(advantages_PG).max(axis=1) > 0
    assert mixed.sum() > 0  # the embedded student solves about a third of its problems
    assert measured["reward/zero_variance_groups"] == pytest.approx(1 - mixed.mean())
    # Rewards are 0 or 1, so a group has one positive and one negative advantage.
    for group in advantages_PG[mixed]:
        assert len(np.unique(group.round(4))) == 2
        share = (group > 0).mean()
        assert 0 < share < 1


def test_dropped_zero_variance_groups_are_not_trained():
    kept, _ = collect_step(config("grpo", batch_size=16))
    rows, measured = collect_step(
        config("grpo", batch_size=16, reward__zero_variance_groups="drop")
    )
    differ = [row for row in kept if row.advantages_BT.any()]
    assert 0 < len(differ) < len(kept) == 16
    for row, expected in zip(rows, differ, strict=True):
        np.testing.assert_array_equal(row.tokens_BT, expected.tokens_BT)
        np.testing.assert_array_equal(row.advantages_BT, expected.advantages_BT)
    assert measured["reward/dropped_rows"] == 16 - len(rows)


def test_several_updates_per_step_are_counted():
    results = []
    for several in ({}, {"epochs": 3, "minibatches": 2}):
        c, mesh = config("opd", **several, optim__learning_rate=0.0), mesh_lib.make_mesh(1, 1, 1)
        c.opd.optim.warmup_steps = 0
        plan = setup.setup_run(c, mesh)
        with policy.use(plan.student), graders.Grader() as grader:
            plan = setup.load_stage_models(c, plan, plan.stages[0])
            params, stage = policy.load(plan.student, "float32").params, plan.stages[0]
            collector = collect.make_collector(c, plan, stage, mesh, grader)
            work, _ = loop.collect_step(collector, params, 0)
            state = update.init_train_state(stage.optimizer, params, 5)
            train = trainer.make_trainer(c, plan, stage, mesh, state)
            state, measured, shown, _ = train.step(state, work, 8)
            stats = [
                row.positions_BT[row.mask_BT]
                for micro, micro_stats in shown
                for row in sequences_of(
                    [[micro]],
                    lambda micro, micro_stats=micro_stats: dataclasses.replace(
                        micro.make_batch(), positions_BT=np.asarray(micro_stats["logp"])
                    ),
                )
            ]
            results.append((state, measured, np.sort(np.concatenate(stats))))
    (_, single, alone), (state, several, merged) = results
    assert int(state.step) == 6
    counts = {int(x) for x in jax.tree.leaves(state.opt_state) if x.dtype == np.int32}
    assert counts == {6}
    # At rate 0 nothing moves: all six updates equal the single one, on halves of its rows.
    assert single.keys() <= several.keys()
    np.testing.assert_allclose(several.get("ratio", 1), 1, atol=1e-6)
    np.testing.assert_allclose(merged, alone, atol=1e-5)
    assert several["loss"] == pytest.approx(float(single["loss"]), rel=0.2)


def test_stored_topk_needs_no_teacher(tmp_path):
    """Trains on rows as generate --top_logprobs writes them, naming no teacher."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(8):
        places = [rng.choice(500, 4, False) for _ in range(5)]
        top = [[[int(v), -1.0 - k] for k, v in enumerate(place)] for place in places]
        tokens = [place[0][0] for place in top]
        sample = {"tokens": tokens, "top_logprobs": top, "finish_reason": "stop"}
        rows.append({"prompt_tokens": [5, 6, 7], "tokens": [5, 6, 7], "samples": [sample]})
    file = tmp_path / "traces.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config(
        "distill",
        loss__teacher_output="top",
        loss__teacher_topk=4,
        loss__estimator="topk",
        loss__k=4,
        data__source=str(file),
    )
    c.teacher.path = ""
    loop.run(c, tmp_path / "run")
    assert rows_of(tmp_path / "run")[-1]["train/divergence"] > 0


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        ("grpo", {"samples": 1}, "config.opd.samples=1: an advantage compares"),
        ("grpo", {"reward__grader": "chess"}, "config.opd.reward.grader='chess': must be one of"),
        ("grpo", {"reward__correct": 0.0}, "config.opd.reward: all weights are 0"),
        ("grpo", {"reward__format": float("nan")}, "are not all finite"),
        ("grpo", {"optim__b1": 1.0}, "config.opd.optim.b1=1.0: must be at least 0 and below 1"),
        ("grpo", {"reward__length": 1.0}, "config.opd.reward.length_margin=0"),
        ("grpo", {"rollout__token_budget": 100}, "must end together"),
        (
            "grpo",
            {"on_policy_share": 0.5},
            "config.opd.on_policy_share=0.5: rewards are of sampled responses",
        ),
        (
            "opd_sampled",
            {"on_policy_share": 0.5},
            "config.opd.on_policy_share=0.5: this loss needs the sampler's",
        ),
        (
            "opd",
            {"on_policy_share": 1.5},
            "config.opd.on_policy_share=1.5: must be at least 0 and at most 1",
        ),
        (
            "opd",
            {"loss__teacher_output": "top", "loss__teacher_topk": 4},
            "estimator=exact: teacher_output=top needs topk",
        ),
        ("distill", {"loss__estimator": "topk"}, "config.opd.loss.k=0 with estimator=topk"),
        (
            "opd",
            {"loss__estimator": "topk", "loss__k": 513},
            "config.opd.loss.k=513: the vocabulary has 512 tokens",
        ),
        (
            "opd",
            {"data__thinking": 1.5},
            "config.opd.data.thinking=1.5: must be at least 0 and at most 1",
        ),
        (
            "grpo",
            {"reward__length": 1.0, "reward__length_margin": 999},
            "from 1 to max_response_tokens=",
        ),
        ("wish", {}, "config.opd.objective='wish': must be one of 'sft', 'distill'"),
        ("opd", {"epochs": 0}, "config.opd.epochs=0"),
        (
            "grpo",
            {"sampling__temperature": 0.0},
            "temperature=0: grpo needs tokens",
        ),
        (
            "opd",
            {"sampling__temperature": 0.0, "samples": 4},
            "temperature=0: the 4 samples of a prompt would all be the same",
        ),
        ("opd", {"minibatches": 3}, "does not divide by accumulate times minibatches"),
        ("hybrid", {"loss__clip": "ppo", "loss__ratio": "none"}, "config.opd.loss.clip=ppo"),
    ],
)
def test_contradictory_settings_are_refused(objective, changes, words, monkeypatch):
    monkeypatch.setattr(policy, "load", None)  # before any weight is read
    with pytest.raises(UserError, match=words):
        setup.setup_run(config(objective, **changes), mesh_lib.make_mesh(1, 1, 1))


def test_a_judge_needs_a_teacher():
    c = config("grpo", reward__teacher_logprob=1.0)
    c.teacher.path = ""
    with pytest.raises(UserError, match=r"config\.teacher\.path: name a model directory"):
        setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))


@pytest.mark.parametrize("objective", ["hybrid", "distill"])
def test_statistics_by_thinking_mode_average_to_the_whole(objective, tmp_path):
    """Overall statistics are means over the modes, weighted by rows or tokens."""
    c = config(objective, samples=2, data__thinking=0.5, data__max_rows=16, accumulate=2)
    c.opd.data.difficulty, c.opd.data.curriculum = "operations", "ordered"
    c.opd.reward.format = 0.5
    loop.run(c, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    seen = {mode for row in rows for mode in ("think", "no_think") if row[f"train/logp/{mode}"]}
    assert seen == {"think", "no_think"}
    for row in rows:
        for name in ("reverse_kl", "entropy"):
            both = [row[f"train/{name}/{mode}"] for mode in ("think", "no_think")]
            known = [x for x in both if x is not None]
            assert min(known) - 1e-5 <= row[f"train/{name}"] <= max(known) + 1e-5
        if objective == "hybrid":
            assert row["train/stop_logp"] <= 0 and row["train/teacher_stop_logp"] <= 0
            sizes = {m: row.get(f"rollout/rows/{m}", 0) for m in ("think", "no_think")}
            assert sum(sizes.values()) == 8
            for name in ("rollout/mean_length", "rollout/truncated", "reward/correct"):
                parts = [n * row[f"{name}/{m}"] for m, n in sizes.items() if n]
                assert row[name] == pytest.approx(sum(parts) / 8)
    # Problems with the fewest operations come first.
    assert rows[0]["data/difficulty"] < rows[-1]["data/difficulty"]
