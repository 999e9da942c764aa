"""The studies as they are defined: all can be planned, and judge what they measure."""

import copy
import types
from pathlib import Path

import pytest

from configs import miniature
from distill.training import stages
from studies import study, worker
from studies.definitions import STUDIES, common
from studies.jobs import Queue
from studies.study import Arm, Plan, Study


class TunedQueue(Queue):
    """A queue in which all trials are done, and nothing else."""

    def read_done(self, name: str) -> dict | None:
        return {"seconds": 1.0} if ".trial" in name else None


@pytest.fixture(params=list(STUDIES))
def subject(request: pytest.FixtureRequest) -> Study:
    return STUDIES[request.param]


def plan(subject: Study, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, Queue]:
    """Plans a study whose trials are done."""
    monkeypatch.setattr(study, "read_figures", lambda directory: {subject.tune_by: 0.5})
    queue = TunedQueue(root)
    return study.plan_study(subject, queue), queue


def list_measures(subject: Study, arm: Arm) -> list[worker.Measurement]:
    return [worker.parse_measurement(x) for x in (*subject.measures, *arm.measures)]


def list_figures(measures: list[worker.Measurement]) -> set[str]:
    """Lists what worker.measure finds."""
    figures = {figure for m in measures for figure in (m.name, f"{m.name}/think_rate")}
    figures |= {f"{m.name}/reverse_kl" for m in measures if m.is_judged}
    figures |= {f"{m.name}/length" for m in measures if m.samples}
    sampled = [(m, k) for m in measures for k in worker.KS if k <= max(1, m.samples)]
    figures |= {f"{m.name}/pass@{k}" for m, k in sampled if m.samples}
    boxes = ("{rows/graphs}", f"{{{common.PASS_ROWS}}}")  # rows that say what the boxes hold
    return figures | {f"{m.name}/contents@{k}" for m, k in sampled if m.rows.startswith(boxes)}


def list_arms_of(claim: dict) -> set[str]:
    named = {claim[key] for key in ("fast", "slow", "reach_of") if key in claim}
    return named | {*claim.get("weights", ()), *claim.get("amounts", ())}


def test_names_are_unique_and_seeds_enough(subject: Study) -> None:
    for names in ([x.name for x in subject.arms], [x["name"] for x in subject.claims]):
        assert len(names) == len(set(names))
    assert len(set(subject.seeds)) >= 3


def test_every_place_in_a_command_is_made_by_a_job(
    subject: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, queue = plan(subject, tmp_path, monkeypatch)
    trained = [arm for arm in subject.arms if arm.is_trained]
    others = len(subject.arms) - len(trained)
    assert len(plans.finals) == len(trained) * len(subject.seeds) + others
    for name in queue.jobs:
        words = [word for command in queue.list_commands(name) for word in command]
        assert not any("{" in word for word in words), name
    made = set(study.plan_study(subject, Queue(tmp_path)).finals)
    tuned = {arm.name for arm in subject.arms if (arm.tuned_as or arm).trials}
    assert made == {(arm, seed) for arm, seed in plans.finals if arm not in tuned}


def test_workers_take_the_measurements(
    subject: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags of each planned command pass the check that a run of minutes begins with."""
    _, queue = plan(subject, tmp_path, monkeypatch)
    monkeypatch.setattr(Path, "is_file", lambda path: path.suffix == ".jsonl")
    checked = 0
    for name in queue.jobs:
        for command in queue.list_commands(name):
            if command[1] == "studies.worker":
                words = [x for x in command[2:] if not x.startswith("--config")]
                options = copy.deepcopy(worker.OPTIONS)
                options(["worker", *words, f"--model={tmp_path}"])
                for flag in ("CONFIG", "MEASURE", "MODEL", "TEACHER"):
                    value = types.SimpleNamespace(value=options[flag.lower()].value)
                    monkeypatch.setattr(worker, flag, value)
                worker.check_flags()
                checked += 1
    assert checked >= len(subject.arms)


def test_studies_share_their_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = TunedQueue(tmp_path)
    for subject in STUDIES.values():
        monkeypatch.setattr(study, "read_figures", lambda _, key=subject.tune_by: {key: 0.5})
        study.plan_study(subject, queue)  # raises for two jobs of one name


def test_claims_judge_arms_and_figures_that_exist(subject: Study) -> None:
    arms = {arm.name: arm for arm in subject.arms}
    for claim in subject.claims:
        assert list_arms_of(dict(claim)) <= set(arms), claim["name"]
        for name in list_arms_of(dict(claim)):
            assert claim["figure"] in list_figures(list_measures(subject, arms[name]))
        assert claim["claimed"] and claim["source"]
        if claim["kind"] == "contrast":
            assert sum(claim["weights"].values()) == 0
            assert claim["expected"] in ("above", "below", "none")


def test_all_arms_have_the_figures_of_their_study(subject: Study) -> None:
    keys = {figure["key"] for figure in subject.figures}
    for arm in subject.arms:
        assert keys <= list_figures(list_measures(subject, arm)), arm.name


def test_methods_are_tuned_alike_and_not_on_the_test(subject: Study) -> None:
    subject = subject.of or subject  # whose trials they are
    tuned = study.list_tuned_arms(subject)
    assert len({len(arm.trials) for arm in tuned}) <= 1
    trials = [worker.parse_measurement(x) for x in subject.tune_measures]
    assert not tuned or subject.tune_by in {m.name for m in trials}
    measured = {m.rows for arm in subject.arms for m in list_measures(subject, arm)}
    assert not measured & {m.rows for m in trials}
    assert all("valid" in Path(m.rows).stem for m in trials)


def test_measured_rows_are_not_trained_on(subject: Study) -> None:
    """But for the questions that study f has learned and asks again."""
    for arm in subject.arms:
        trained = [str(v) for t in arm.trainings for k, v in t.changes.items() if ".data." in k]
        held_out = [m.rows for m in list_measures(subject, arm) if m.name != "asked"]
        assert not [rows for rows in held_out if any(rows in text for text in trained)], arm.name


def test_recipes_take_the_changes_of_arms_and_trials(subject: Study) -> None:
    for arm in (*subject.arms, *study.list_tuned_arms(subject)):
        for training in arm.trainings:
            is_last = training is arm.trainings[-1]
            for trial in (*arm.trials, {}) if is_last else ({},):
                config = miniature.get_config(training.objective)
                changes = {**training.changes, **trial, **(arm.trial_changes if trial else {})}
                config.update_from_flattened_dict(changes)
                stages.resolve_objective(training.objective, config[training.objective])
