"""Reads the directory of a study: its definition, study.json, and the results in runs/*.json.

A definition that cannot be read is refused. A result that cannot be used is left out, and said in
the study's notes: an interrupted study shows all that is there.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from distill.reporting import study_definition
from distill.reporting.read import Record, as_record, is_number
from distill.reporting.study_definition import show
from distill.runtime import paths
from models.errors import UserError

STUDY_FILE = "study.json"
_MAX_TRIALS = 100  # of an arm, among which missing ones are looked for
MAX_BYTES = 64 * 2**20  # of a file


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared with others: a method, or a model without training."""

    name: str
    about: str
    tuned: bool
    seeds: tuple[int, ...]
    is_repeated: bool  # has one result, which counts for every seed of the study


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured quantity."""

    key: str
    title: str
    is_share: bool  # shown as a percentage


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: of an arm and a seed or, if `trial` is a number, of tuning."""

    file: str
    arm: str
    seed: int
    trial: int | None
    changes: Record
    revision: str
    dirty: bool
    time: str
    processor: str
    command: str
    config: Record
    seconds: float | None
    cpu_seconds: float | None
    points: list[dict[str, float]]
    final: dict[str, float]


@dataclasses.dataclass
class Study:
    """A study, whatever part of it is done.

    `curves`, `tuning` and `claims` are as in study.json, checked.
    """

    name: str
    title: str
    question: str
    command: str
    seeds: tuple[int, ...]
    arms: list[Arm]
    figures: list[Figure]
    curves: list[Record]
    tuning: Record
    claims: list[Record]
    results: list[Result] = dataclasses.field(default_factory=list)  # by arm, then by seed
    trials: list[Result] = dataclasses.field(default_factory=list)
    # What is missing, was left out, or does not fit together.
    notes: list[str] = dataclasses.field(default_factory=list)

    def get_results(self, arm: str) -> dict[int, Result]:
        """Returns the results of an arm by seed."""
        return {result.seed: result for result in self.results if result.arm == arm}

    def find_result(self, arm: str, seed: int) -> Result | None:
        """Returns the result of an arm that counts for a seed, if there is one."""
        found = self.get_results(arm)
        if self.find_arm(arm).is_repeated:
            return next(iter(found.values()), None)
        return found.get(seed)

    def list_tuned(self) -> list[str]:
        """Returns the arms that have trials of tuning or are to have them, also of other studies
        whose choice arms of this one take."""
        names = [arm.name for arm in self.arms if arm.tuned]
        return list(dict.fromkeys([*names, *(trial.arm for trial in self.trials)]))

    def find_arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def find_figure(self, key: str) -> Figure:
        """Returns a figure, which the definition need not list."""
        return next((x for x in self.figures if x.key == key), Figure(key, key, False))


def is_study(name: str) -> bool:
    """Returns True if a directory holds a study."""
    paths.require_reachable(name, "report")
    return (epath.Path(name) / STUDY_FILE).exists()


def read_study(name: str) -> Study:
    """Reads a study from its directory.

    Raises:
      UserError: if study.json cannot be read, naming the field that is wrong.
    """
    folder = epath.Path(name)
    record, problem = _read_object(folder / STUDY_FILE)
    where = f"{name}/{STUDY_FILE}"
    if problem:
        raise UserError(f"{where}: {problem}")
    study_definition.check_definition(record, where)
    study = _make_study(record)
    for path in sorted((folder / "runs").glob("*.json")):
        record, problem = _read_object(path)
        result, problem = (None, problem) if problem else _make_result(record, path.name, study)
        if result is None:
            study.notes.append(f"runs/{path.name}: {problem}; left out")
            continue
        known = study.results if result.trial is None else study.trials
        same = [x for x in known if _get_key(x) == _get_key(result)]
        if same:
            study.notes.append(f"runs/{result.file}: is of the run of {same[0].file}; left out")
            continue
        known.append(result)
    places = {arm.name: place for place, arm in enumerate(study.arms)}
    for found in (study.results, study.trials):
        last = len(places)  # arms of other studies
        found.sort(key=lambda x: (places.get(x.arm, last), x.arm, x.seed, x.trial or 0))
    study.notes += _find_gaps(study) + _find_mixtures(study)
    return study


def _get_key(result: Result) -> tuple[str, int]:
    return result.arm, result.seed if result.trial is None else result.trial


def _read_object(path: epath.Path) -> tuple[Record, str]:
    """Returns the object of a file, and what is wrong with it or ""."""
    try:
        size = path.stat().length
        if size is not None and size > MAX_BYTES:
            return {}, f"has {size / 2**20:.0f} MiB, more than a result has"
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"cannot be read ({str(getattr(error, 'strerror', None) or error)[:80]})"
    return (value, "") if isinstance(value, dict) else ({}, "holds no object")


def _make_study(record: Record) -> Study:
    """Returns a study without results from its checked definition."""
    seeds = tuple(record["seeds"])
    arms = []
    for arm in record["arms"]:
        own = tuple(arm.get("seeds", seeds))
        is_repeated = len(own) == 1 and len(seeds) > 1
        is_tuned = arm.get("tuned", False)
        arms.append(Arm(arm["name"], arm.get("about", ""), is_tuned, own, is_repeated))
    return Study(
        name=record["study"],
        title=record.get("title", ""),
        question=record.get("question", ""),
        command=record.get("command", ""),
        seeds=seeds,
        arms=arms,
        figures=[
            Figure(x["key"], x.get("title", x["key"]), x.get("format") == "percent")
            for x in record["figures"]
        ],
        curves=record.get("curves", []),
        tuning=record.get("tuning") or {},
        claims=record.get("claims", []),
    )


def _make_result(record: Record, file: str, study: Study) -> tuple[Result | None, str]:
    """Returns a result, or None and why the file is none of this study's."""
    if record.get("study") != study.name:
        return None, f"is of another study, {show(record.get('study'))}"
    phase, seed, trial = (record.get(key) for key in ("phase", "seed", "trial"))
    is_known = record.get("arm") in [arm.name for arm in study.arms]
    # An arm of another study may have been tuned for arms of this one.
    if not is_known and not (phase == "tuning" and isinstance(record.get("arm"), str)):
        return None, f"arm: {show(record.get('arm'))} is not in {STUDY_FILE}"
    if phase not in ("final", "tuning"):
        return None, f"phase: {show(phase)} is neither final nor tuning"
    if type(seed) is not int or (phase == "tuning" and type(trial) is not int):
        return None, "has no seed, or no trial of tuning"
    if phase == "final" and seed not in study.find_arm(record["arm"]).seeds:
        return None, f"seed {seed} is not in {STUDY_FILE}"
    points = record.get("points")
    rows = [_keep_numbers(x) for x in points] if isinstance(points, list) else []
    result = Result(
        file=file,
        arm=record["arm"],
        seed=seed,
        trial=trial if phase == "tuning" else None,
        changes=as_record(record.get("changes")),
        revision=_keep_text(record.get("revision")),
        dirty=record.get("dirty") is True,
        time=_keep_text(record.get("time")),
        command=_keep_text(record.get("command")),
        processor=_keep_text(as_record(record.get("machine")).get("processor")),
        config=as_record(record.get("config")),
        seconds=_keep_numbers(record).get("seconds"),
        cpu_seconds=_keep_numbers(record).get("cpu_seconds"),
        points=[row for row in rows if row],
        final=_keep_numbers(record.get("final")),
    )
    return result, ""


def _keep_text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _keep_numbers(value: Any) -> dict[str, float]:
    """Returns the finite numbers of an object."""
    return {key: float(x) for key, x in as_record(value).items() if is_number(x)}


def _find_gaps(study: Study) -> list[str]:
    """Returns what an interrupted study lacks."""
    notes = []
    planned = sum(len(arm.seeds) for arm in study.arms)
    if len(study.results) < planned:
        notes.append(
            f"{len(study.results)} of {planned} runs are there: the study goes on, or was stopped"
        )
    for arm in study.arms:
        missing = [seed for seed in arm.seeds if seed not in study.get_results(arm.name)]
        if len(missing) == len(arm.seeds):
            notes.append(f"{arm.name}: no result yet")
        elif missing:
            notes.append(f"{arm.name}: no result of {join_seeds(missing)}")
    if not study.tuning:
        return notes
    counts = {}
    for name in study.list_tuned():
        trials = [x.trial for x in study.trials if x.arm == name and x.trial is not None]
        counts[name] = len(trials)
        if gaps := [x for x in range(min(_MAX_TRIALS, max(trials, default=0))) if x not in trials]:
            notes.append(f"{name}: trials of tuning are missing: {', '.join(map(str, gaps))}")
        if not trials:
            notes.append(f"{name}: no trial of tuning yet")
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        notes.append(f"the arms were not tuned with equally many trials: {shown}")
    return notes


def join_seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _find_mixtures(study: Study) -> list[str]:
    """Returns where results were not made alike."""
    notes = []
    everything = [*study.results, *study.trials]
    revisions: dict[str, list[Result]] = {}
    for result in everything:
        revisions.setdefault(result.revision, []).append(result)
    if len(revisions) > 1:
        counts = [f"{x[:10] or 'unknown'} ({len(found)} runs)" for x, found in revisions.items()]
        notes.append(f"results are of several revisions: {', '.join(counts)}; see Runs")
    if dirty := [result.file for result in everything if result.dirty]:
        notes.append(f"made with changes that no commit holds: {', '.join(dirty)}")
    for arm in study.arms:
        results = list(study.get_results(arm.name).values())
        for name in ("changes", "config"):
            flat = [
                # Names of what an earlier stage made hold the seed, too, and a hash.
                {
                    key: re.sub(rf"seed{result.seed}(_\d+)?(\.[0-9a-f]+)?", "seed", x)
                    for key, x in _flatten(getattr(result, name)).items()
                }
                for result in results
            ]
            keys = sorted({key for values in flat for key in values})
            differ = [key for key in keys if len({values.get(key) for values in flat}) > 1]
            if differ := [key for key in differ if key.rpartition(".")[2] != "seed"]:
                shown = ", ".join(differ[:5]) + ("…" if len(differ) > 5 else "")
                notes.append(f"{arm.name}: its seeds differ in {name}: {shown}")
                break  # a change is in the config, too
    return notes


def _flatten(record: Record, prefix: str = "") -> dict[str, str]:
    """Returns the leaves of an object as JSON, by their dotted keys."""
    flat: dict[str, str] = {}
    for key, x in record.items():
        name = f"{prefix}{key}"
        flat |= _flatten(x, f"{name}.") if isinstance(x, dict) and x else {name: json.dumps(x)}
    return flat
