"""Schedules of response lengths: what is refused, which limit a step has, and what is reported."""

import pytest

from configs import quickstart
from distill.policy import policy
from distill.rewards import graders
from distill.runtime import mesh as mesh_lib
from distill.training import alerts, collect, response_limits, setup, stages
from models.errors import UserError
from tests.support.paths import ROOT

SCHEDULE = ((0, 6), (2, 16))


def config(**changes):
    c = quickstart.get_config("tiny")
    c.student.path, c.teacher.path = str(ROOT / "assets/student"), str(ROOT / "assets/teacher")
    c.mesh.fsdp = 1
    s = c.opd
    s.steps, s.response_schedule = 4, SCHEDULE
    s.update_from_flattened_dict({name.replace("__", "."): x for name, x in changes.items()})
    return c


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"response_schedule": (0, 64)}, "must be pairs of a step and of tokens"),
        ({"response_schedule": ((0, 6.5),)}, "must be pairs of a step and of tokens"),
        ({"response_schedule": ((1, 6),)}, "must begin with step 0"),
        ({"response_schedule": ((0, 6), (0, 8))}, "steps must ascend"),
        ({"response_schedule": ((0, 6), (3, 8), (2, 9))}, "steps must ascend"),
        ({"response_schedule": ((0, 6), (4, 8))}, "step 4 is beyond the 4 of the stage"),
        ({"response_schedule": ((0, 0),)}, "must be at least 1"),
        ({"response_schedule": ((0, 8), (2, 6))}, "never become fewer"),
        ({"response_schedule": ((0, 6), (2, 53))}, "53 tokens exceed max_response_tokens=52"),
        ({"objective": "distill"}, "distill samples nothing"),
        ({"objective": "grpo", "samples": 4}, "has no answer to reward"),
    ],
)
def test_schedules_that_cannot_be_followed_are_refused(changes, words):
    """One line, before any model is read."""
    with pytest.raises(UserError) as error:
        stages.resolve_objective("opd", config(**changes).opd)
    message = str(error.value)
    assert message.startswith("config.opd.response_schedule")
    assert words in message and "\n" not in message


def test_a_step_has_the_limit_of_the_last_pair_that_has_begun():
    s = config().opd
    limits = [response_limits.get_response_limit(s, step) for step in range(4)]
    assert limits == [6, 6, 16, 16]
    s.response_schedule = ()
    assert response_limits.get_response_limit(s, 0) == s.max_response_tokens


def sample_steps(c, steps):
    """Returns the sequences that ended in each step of a stage with fixed weights, and metrics."""
    mesh = mesh_lib.make_mesh(1, 1, 1)
    plan = setup.setup_run(c, mesh)
    with policy.use(plan.student), graders.Grader() as grader:
        params = policy.load(plan.student, "float32").params
        if c.opd.drift.kl:
            plan = setup.load_stage_models(c, plan, plan.stages[0])
        collector = collect.make_collector(c, plan, plan.stages[0], mesh, grader)
        return [collect.sample_sequences(collector, params, step) for step in steps]


def test_responses_end_at_the_limit_of_the_step_in_which_they_began():
    """Those that end at the schedule's limit are counted apart from truncated ones, and are the
    beginnings of the responses that the stage would sample without it. With a budget of tokens, a
    response that goes on in a later step keeps its limit."""
    whole = sample_steps(config(response_schedule=()), [1, 2])
    cut = sample_steps(config(), [1, 2])
    for (sequences, metrics), (longer, others), limit in zip(cut, whole, (6, 16), strict=True):
        for short, x in zip(sequences, longer, strict=True):
            assert short.tokens == x.tokens[:limit]
            assert short.finish_reason == ("length" if len(x.tokens) > limit else "stop")
        assert metrics["rollout/response_limit"] == limit
        assert metrics["rollout/cut_by_schedule"] == sum(
            x.finish_reason == "length" for x in sequences
        ) / len(sequences)
        assert metrics["rollout/truncated"] == metrics["rollout/truncated/think"] == 0
        assert "rollout/response_limit" not in others
    budget = sample_steps(config(rollout__token_budget=16), range(4))
    assert [len(sequences) for sequences, _ in budget[:2]] == [0, 0]
    assert all(x.limit == 6 and set(x.versions) == {0, 1, 2} for x in budget[2][0])
    assert all(x.limit == 16 and set(x.versions) == {3} for x in budget[3][0])


def test_rules_compare_with_what_follows_a_step_of_the_schedule():
    """Longer responses have another loss and are cut more often: no alarm."""
    rules = alerts.Alerts(config().alerts)
    found = []
    for step in range(160):
        row = {"step": step, "stage": "opd", "train/trained_tokens": 9, "rollout/truncated": 0.0}
        row |= {"train/loss": 1 + step % 2 / 100, "rollout/response_limit": 6}
        if step >= 80:
            row |= {"rollout/truncated": 0.7, "rollout/response_limit": 52}
            row["train/loss"] += 8
        found += rules.add_row(row)
    assert not found
    assert [x.rule for x in rules.add_row({**row, "step": 160, "train/loss": 30.0})] == ["loss"]
