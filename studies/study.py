"""What a study is: arms that are trained at several seeds, and claims about their figures.

`plan_study` turns a study into jobs. Rates are tuned first: each tuned arm has the same number of
trials of the same number of sequences, measured on problems that are not the test's. Then every arm
runs at every seed with its best trial's changes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.jobs import Job, Queue

Changes = Mapping[str, Any]  # by dotted key of the config, `opd.optim.learning_rate`
TUNING_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Training:
    """One run of `configs/miniature.py`. Strings of `changes` may name jobs, as commands do.

    Args:
      base: the job whose model it starts from; "": the arm's training before this one.
    """

    objective: str
    changes: Changes
    base: str = ""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to train that a study compares.

    Args:
      trainings: one after another; none: the model of the job `model` is measured as it is.
      trials: changes to the last training, of which tuning chooses one; (): nothing is tuned.
      trial_changes: further changes in trials alone, such as fewer steps.
      measures: further ones than the study's.
      tuned_as: the arm whose choice it takes, instead of trials of its own.
      traces: how many traces a teacher sampled for it, each of which counts once for its cost.
      teacher: the job of the model that wrote them.
    """

    name: str
    about: str
    trainings: tuple[Training, ...] = ()
    model: str = ""
    measures: tuple[str, ...] = ()
    trials: tuple[Changes, ...] = ()
    trial_changes: Changes = dataclasses.field(default_factory=dict)
    tuned_as: "Arm | None" = None
    traces: int = 0
    teacher: str = ""

    @property
    def is_trained(self) -> bool:
        return bool(self.trainings)


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms, and what is measured of them.

    Args:
      jobs: rows and models that the arms need, in order.
      measures: NAME:BENCHMARK:ROWS:SAMPLES:TOKENS, see studies/worker.py; of the final models.
      of: measures the finished models of another study, and trains none.
      tune_by: the figure by which trials are compared, and their measurements.
    """

    name: str
    title: str
    question: str
    jobs: tuple[Job, ...]
    arms: tuple[Arm, ...]  # with `of`: some of its arms
    measures: tuple[str, ...]
    figures: tuple[Mapping[str, str], ...]
    claims: tuple[Mapping[str, Any], ...]
    curves: tuple[Mapping[str, Any], ...] = ()
    of: "Study | None" = None
    judge: str = ""  # job of the model to which the distance of samples is measured
    start: str = ""  # arm of the model that all others start from
    tune_by: str = ""
    tune_measures: tuple[str, ...] = ()
    tuning: str = ""  # the budget, in words
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The jobs of a study, as far as they are known.

    Args:
      trials: of each tuned arm, in order.
      chosen: number of the best trial, of arms whose trials are all done.
      finals: by arm and seed, the first seed's first, so that a study that is stopped has whole
        seeds; without arms that wait for their trials.
    """

    trials: Mapping[str, Sequence[str]]
    chosen: Mapping[str, int]
    finals: Mapping[tuple[str, int], str]


def plan_study(study: Study, queue: Queue) -> Plan:
    """Adds the jobs of a study to a queue, and returns them. Call it again when trials are done."""
    for job in study.jobs:
        queue.add(job)
    base = plan_study(study.of, queue) if study.of else None
    trials, chosen = (base.trials, base.chosen) if base else _plan_trials(study, queue)
    finals = {}
    for seed in study.seeds:
        for arm in study.arms:
            if not arm.is_trained:
                if seed == study.seeds[0]:
                    model = f"{{{arm.model}}}/model"
                    finals[arm.name, seed] = _plan_measurement(study, queue, arm, model, "as_is")
            elif base:
                if run := base.finals.get((arm.name, seed)):
                    suffix = f"seed{seed}.measured"
                    finals[arm.name, seed] = _plan_measurement(
                        study, queue, arm, f"{{{run}}}", suffix
                    )
            elif (changes := get_changes(arm, chosen)) is not None:
                finals[arm.name, seed] = _plan_run(study, queue, arm, changes, seed, f"seed{seed}")
    return Plan(trials, chosen, finals)


def _plan_trials(study: Study, queue: Queue) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Adds the trials of each tuned arm; returns their jobs, and the numbers of the best ones of
    arms whose trials are all done."""
    trials, chosen = {}, {}
    for arm in list_tuned_arms(study):
        trials[arm.name] = [
            _plan_run(
                *(study, queue, arm, {**trial, **arm.trial_changes}, TUNING_SEED),
                f"trial{number}",
            )
            for number, trial in enumerate(arm.trials)
        ]
        if all(queue.read_done(job) for job in trials[arm.name]):
            found = [read_figures(queue.root / x)[study.tune_by] for x in trials[arm.name]]
            chosen[arm.name] = max(range(len(found)), key=lambda i: found[i])
    return trials, chosen


def list_tuned_arms(study: Study) -> list[Arm]:
    """Returns the arms that have trials: of the study, or whose choice its arms take."""
    tuned = [arm.tuned_as or arm for arm in study.arms]
    return list({arm.name: arm for arm in tuned if arm.trials}.values())


def get_changes(arm: Arm, chosen: Mapping[str, int]) -> Changes | None:
    """Returns what tuning changes of an arm; None if its trials are not done."""
    tuned = arm.tuned_as or arm
    if not tuned.trials:
        return {}
    return tuned.trials[chosen[tuned.name]] if tuned.name in chosen else None


def read_figures(directory: Path) -> dict[str, float]:
    """Returns what a finished run measured."""
    return json.loads((directory / "measured.json").read_text())["figures"]


def _plan_run(
    study: Study, queue: Queue, arm: Arm, changes: Changes, seed: int, suffix: str
) -> str:
    """Adds the jobs of an arm's trainings; returns the last one's name."""
    is_trial, before = suffix.startswith("trial"), ""
    for number, training in enumerate(arm.trainings):
        is_last = number == len(arm.trainings) - 1
        base, own = training.base or before, dict(training.changes)
        measures: tuple[str, ...] = ()
        if is_last:
            own |= changes
            measures = study.tune_measures if is_trial else (*study.measures, *arm.measures)
        if is_trial:
            own["eval.every"] = 0
        train = (
            *("-m", "studies.worker", "--workdir={out}"),
            f"--config=configs/miniature.py:{training.objective}",
            f"--config.student.path={{{base}}}/model",
            f"--config.seed={seed}",
            *(f"--config.{key}={_format_value(value)}" for key, value in own.items()),
            f"--seed={seed}",
            *_list_measures(study, measures),
        )
        export = ("-m", "distill.export", "--run={out}", "--out={out}/model")
        # Arms, and trials of one, share the trainings before their last.
        name = f"{to_file_name(arm.name)}.{suffix}" if is_last else f"then.seed{seed}"
        before = _add_run(queue, name, (train,) if is_last else (train, export))
    return before


def _plan_measurement(study: Study, queue: Queue, arm: Arm, model: str, suffix: str) -> str:
    """Adds the job that measures a model, a path with a job's name in it; returns its name."""
    command = (
        *("-m", "studies.worker", "--workdir={out}", f"--model={model}"),
        *_list_measures(study, (*study.measures, *arm.measures)),
    )
    return _add_run(queue, f"{to_file_name(arm.name)}.{suffix}", (command,))


def _list_measures(study: Study, measures: Sequence[str]) -> list[str]:
    is_judged = any(":judged" in text for text in measures)
    teacher = [f"--teacher={{{study.judge}}}/model"] if is_judged else []
    return [*(f"--measure={text}" for text in measures), *teacher]


def _add_run(queue: Queue, name: str, commands: tuple[tuple[str, ...], ...]) -> str:
    """Adds a job whose name holds a hash of its commands: studies that need the same run share it,
    and one that has changed runs again."""
    digest = hashlib.sha256(json.dumps(commands).encode()).hexdigest()[:8]
    return queue.add(Job(f"runs/{name}.{digest}", commands))


def to_file_name(name: str) -> str:
    """Returns an arm's name with "_" for what file names had better not have."""
    return "".join(x if x.isalnum() or x in "-." else "_" for x in name)


def _format_value(value: Any) -> str:
    return str(value) if not isinstance(value, bool) else str(value).lower()
