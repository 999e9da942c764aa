"""Tests when the rules of config.alerts fire, on made-up rows of metrics.jsonl."""

import pytest

from configs import base
from distill.training.alerts import MIN_SPIKE_STEPS, Alerts
from models.errors import UserError


def fire(rows, **changes):
    """Returns (step, rule) of every alert of a run with these rows, and the last messages."""
    c = base.make_alerts()
    c.update(changes)
    alerts = Alerts(c)
    found = [alert for row in rows for alert in alerts.add_row(row)]
    return [(x.step, x.rule) for x in found], {x.rule: x.message for x in found}


def rows_of(**series):
    """Makes the rows of one stage; `a__b` stands for the metric a/b."""
    count = len(next(iter(series.values())))
    return [
        {"step": i, "stage": "opd", "train/trained_tokens": 8.0}
        | {name.replace("__", "/"): values[i] for name, values in series.items()}
        for i in range(count)
    ]


def test_a_spike_is_six_deviations_above_the_mean():
    noise = [1.0 + 0.1 * (-1) ** i for i in range(MIN_SPIKE_STEPS)]
    fired, messages = fire(rows_of(train__loss=[*noise, 1.59, 9.0, 99.0]))
    assert fired == [(MIN_SPIKE_STEPS + 1, "loss")]  # once, and not at 1.59
    assert messages["loss"].startswith("train/loss is 9, ")
    assert fire(rows_of(train__grad_norm=[*noise, 1.7]))[0] == [(MIN_SPIKE_STEPS, "loss")]
    assert fire(rows_of(train__loss=[*noise[1:], 9.0]))[0] == []  # too early
    assert fire(rows_of(train__loss=[*noise, 9.0]), loss_spike=0.0)[0] == []
    assert fire(rows_of(train__loss=[1.0] * 200))[0] == []  # no deviation at all


FALLS = {
    "length": ("rollout__mean_length", 400.0, 99.0, "length_drop"),
    "truncation": ("rollout__truncated", 0.2, 0.51, "truncation"),
    "entropy": ("train__entropy", 0.8, 0.07, "entropy_drop"),
    "overlap": ("train__top_overlap", 0.7, 0.59, "overlap_drop"),
}


@pytest.mark.parametrize("rule", FALLS)
def test_a_fall_is_measured_from_the_start_of_the_stage(rule):
    """The mean of five steps is compared with that of the first ten, and warned of once."""
    name, start, now, field = FALLS[rule]
    rows = rows_of(**{name: [start] * 20 + [now] * 10})
    fired, messages = fire(rows)
    assert fired == [(24, rule)] and messages[rule]
    assert fire(rows, **{field: 0.0})[0] == []
    assert fire(rows_of(**{name: [now] * 30}))[0] == []
    later = [{**row, "stage": "grpo", "step": row["step"] + 30} for row in rows]
    assert fire(rows + later)[0] == [(24, rule), (54, rule)]  # once in each stage
    assert fire(rows_of(**{name: [None] * 30}))[0] == []


WHOLE = {
    "truncation": ("rollout__truncated", "config.opd.max_response_tokens"),
    "groups": ("reward__zero_variance_groups", "config.opd.reward"),
}


@pytest.mark.parametrize("rule", WHOLE)
def test_what_teaches_nothing_is_said_once_from_the_start_on(rule):
    name, words = WHOLE[rule]
    fired, messages = fire(rows_of(**{name: [1.0] * 30}))
    assert fired == [(4, rule)] and words in messages[rule]
    assert fire(rows_of(**{name: [1.0] * 4 + [0.99] + [1.0] * 4}))[0] == []
    assert fire(rows_of(**{name: [None, *[1.0] * 4, None, 1.0]}))[0] == [(6, rule)]


def test_steps_in_which_no_response_ended_do_not_count_as_short():
    lengths, ended = [400.0] * 10 + [0.0, 400.0] * 10, [4] * 10 + [0, 4] * 10
    assert fire(rows_of(rollout__mean_length=lengths, rollout__ended=ended))[0] == []


def test_accuracy_falls_from_its_best():
    accuracy = [0.5, None, 0.8, None, 0.71, 0.69]
    fired, messages = fire(rows_of(eval__accuracy=accuracy))
    assert fired == [(5, "accuracy")]
    assert messages["accuracy"] == "eval/accuracy is 69.0%, after 80.0% at its best"
    reward, accuracy = [0.1] * 10 + [0.9] * 6, [0.8] + [None] * 14 + [0.5]
    _, messages = fire(rows_of(reward__mean=reward, eval__accuracy=accuracy))
    assert messages["accuracy"].endswith(", while the reward rose from 0.1 to 0.9")


def test_skipped_steps_stop_a_run_only_in_a_row():
    skipped = [0, 1, 2, 0, 1, 1, 1, 1, 1, 1, 0]
    assert fire(rows_of(train__skipped_updates=skipped))[0] == [(6, "skipped"), (9, "skipped")]
    assert fire(rows_of(rollout__failed=skipped))[0] == [(6, "skipped"), (9, "skipped")]
    assert fire(rows_of(train__skipped_updates=skipped), max_skipped_steps=0)[0] == []


def test_only_chosen_rules_stop_a_run_and_a_resumed_one_goes_on():
    rows = rows_of(train__entropy=[1.0] * 10 + [0.01] * 10)
    c = base.make_alerts()
    alerts = Alerts(c)
    alerts.read_rows(rows)
    assert alerts.stop is None
    c.stop_on = ("entropy",)
    alerts = Alerts(c)
    for row in rows:
        alerts.add_row(row)
    assert alerts.stop and (alerts.stop.step, alerts.stop.rule) == (14, "entropy")
    resumed = Alerts(c)
    resumed.read_rows(rows[:17])
    assert [resumed.add_row(row) for row in rows[17:]] == [[], [], []] and resumed.stop is None
    resumed = Alerts(c)
    resumed.read_rows(rows[:12])  # it remembers the start
    assert [len(resumed.add_row(row)) for row in rows[12:]] == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("stop_on", ("colapse",), "config.alerts.stop_on: 'colapse' is none of loss, length, "),
        ("truncation", 1.5, "config.alerts.truncation=1.5: must be at least 0 (off) and at most 1"),
        ("max_skipped_steps", -1, "config.alerts.max_skipped_steps=-1: must be at least 0 (never)"),
    ],
)
def test_bad_settings_are_refused(field, value, words):
    c = base.make_alerts()
    c[field] = value
    with pytest.raises(UserError) as error:
        Alerts(c)
    assert str(error.value).startswith(words)
