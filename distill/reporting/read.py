"""Reads the directories of runs and evaluations, whatever state they are in.

What cannot be read is left out, and said in the notes of the run it belongs to: a report of a run
that was killed, still goes on, or comes from another version shows all that is there.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from distill.evaluation.example_rows import EXAMPLES_FILE
from distill.runtime import paths
from distill.training import alerts
from models.errors import UserError

Record = dict[str, Any]

MAX_EXAMPLES = 50  # responses of an evaluation that a page holds, wrong ones first
_PLACES = {0: "before", 2: "after", 3: "teacher"}  # by the folder of an evaluation; others: 1
_MAX_NOTES = 8  # about one kind of file


@dataclasses.dataclass
class Evaluation:
    """An evaluation: its summary, and what was answered."""

    name: str
    summary: Record
    rows: list[Record]  # of all responses, without their texts
    examples: list[Record]  # a few responses with their texts, wrong ones first
    run: str = ""  # the run that it belongs to; "": none
    step: int | None = None  # of that run
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def protocol(self) -> Record:
        return as_record(self.summary.get("protocol"))


@dataclasses.dataclass
class Run:
    """A run directory. What it lacks is empty."""

    name: str
    config: Record
    environment: Record
    metrics: list[Record]  # rows of metrics.jsonl
    rollouts: dict[int, list[Record]]  # transcripts of a step
    num_rollout_files: int  # of which `rollouts` may be a part
    notes: list[str]  # what is missing, broken or warned of

    @property
    def steps(self) -> int:
        """The number of steps that are done."""
        return self.metrics[-1]["step"] + 1 if self.metrics else 0


def as_record(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def is_number(value: Any) -> bool:
    """Returns True for a finite number that may be squared or summed with others."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e150


def read_directories(
    names: Sequence[str], max_transcripts: int
) -> tuple[list[Run], list[Evaluation]]:
    """Reads runs, with the evaluations in them, and evaluations.

    Args:
      max_transcripts: of each run, from files spread over its steps.

    Raises:
      UserError: naming a directory that is neither.
    """
    runs: list[Run] = []
    evaluations: list[Evaluation] = []
    for name in names:
        paths.require_reachable(name, "report")
        folder = epath.Path(name)
        is_evaluation = any((folder / file).exists() for file in (EXAMPLES_FILE, "protocol.json"))
        if any((folder / file).exists() for file in ("config.json", "metrics.jsonl")):
            runs.append(_read_run(name, folder, max_transcripts))
            for path in _find_evaluations(folder / "eval"):
                relative = path.relative_to(folder)
                evaluations.append(read_evaluation(f"{name}/{relative}", path, name))
        elif is_evaluation or (folder / "summary.json").exists():
            evaluations.append(read_evaluation(name, folder))
        else:
            found = "no config.json or metrics.jsonl of a run, no summary.json of an evaluation"
            missing = f"no such directory{paths.suggest_path(name)}"
            raise UserError(f"{name}: {found if folder.is_dir() else missing}")
    return runs, evaluations


def _find_evaluations(folder: epath.Path) -> list[epath.Path]:
    """Returns the folders of evaluations: a run's eval/, and those at most two levels below it.
    What was before the run comes first, and its teacher last."""
    files = ("summary.json", EXAMPLES_FILE)
    patterns = [f"{above}{file}" for above in ("", "*/", "*/*/") for file in files]

    def get_place(path: epath.Path) -> tuple[int, epath.Path]:
        name = str(path.relative_to(folder))
        found = (i for i, word in _PLACES.items() if word in name)
        return next(found, 1), path

    found = {path.parent for pattern in patterns for path in folder.glob(pattern)}
    return sorted(found, key=get_place)


def _read_run(name: str, folder: epath.Path, max_transcripts: int) -> Run:
    notes: list[str] = []
    config = _read_object(folder / "config.json", notes)
    environment = _read_object(folder / "environment.json", notes)
    metrics = _read_metrics(folder / "metrics.jsonl", notes)
    rollouts, num_files = _read_rollouts(folder / "rollouts", max_transcripts, notes)
    run = Run(name, config, environment, metrics, rollouts, num_files, notes)
    planned = count_planned_steps(config)
    if not metrics:
        notes.append("no step is done yet")
    elif planned and run.steps < planned:
        notes.append(f"{run.steps} of {planned} steps: it goes on, or was stopped")
    notes += _find_alerts(config, metrics)
    return run


def list_stages(config: Record) -> list[str]:
    stages = config.get("stages")
    names = stages if isinstance(stages, list) else [stages]
    return [name for name in names if isinstance(name, str)]


def count_planned_steps(config: Record) -> int:
    """Returns the steps of all stages of a config; 0 if it does not say."""
    steps: list[Any] = [as_record(config.get(name)).get("steps") for name in list_stages(config)]
    return sum(steps) if all(isinstance(x, int) for x in steps) else 0


def _find_alerts(config: Record, metrics: list[Record]) -> list[str]:
    """Returns the alerts that the run's own rules find in its metrics."""
    try:
        rules = alerts.Alerts(ConfigDict(config["alerts"]))
        return [f"step {a.step}: {a.message}" for row in metrics for a in rules.add_row(row)]
    except (UserError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError):
        return []  # a config of another version


def _read_object(path: epath.Path, notes: list[str]) -> Record:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        notes.append(f"no {path.name}")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({_shorten(error)})")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} holds no object")
    return as_record(value)


def _read_rows(path: epath.Path, notes: list[str], label: str) -> Iterator[tuple[int, Record]]:
    """Yields the number and the object of each line that holds one, and notes the others."""
    broken: list[int] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield number, row
                elif line.strip():
                    broken.append(number)
    except FileNotFoundError:
        notes.append(f"no {label}")
    except OSError as error:
        notes.append(f"{label} cannot be read ({_shorten(error)})")
    if broken:
        shown = ", ".join(map(str, broken[:5])) + ("…" if len(broken) > 5 else "")
        notes.append(f"{label}: {len(broken)} broken line(s), left out: {shown}")


def _read_metrics(path: epath.Path, notes: list[str]) -> list[Record]:
    """Returns the rows in the order of their steps, the last of each."""
    rows: dict[int, Record] = {}
    odd = 0
    for _, row in _read_rows(path, notes, path.name):
        step = row.get("step")
        if type(step) is not int or not 0 <= step < 2**53 or not isinstance(row.get("stage"), str):
            odd += 1
            continue
        numbers = {name: x for name, x in row.items() if is_number(x)}
        rows[step] = numbers | {"step": step, "stage": row["stage"]}
    if odd:
        notes.append(f"{path.name}: {odd} row(s) without step and stage, left out")
    return [rows[step] for step in sorted(rows)]


def _read_rollouts(
    folder: epath.Path, max_transcripts: int, notes: list[str]
) -> tuple[dict[int, list[Record]], int]:
    """Returns the transcripts of files that are spread over the steps, and the number of files."""
    try:
        files = {int(p.stem): p for p in folder.glob("*.jsonl") if p.stem.isdigit()}
    except OSError as error:
        notes.append(f"rollouts/ cannot be read ({_shorten(error)})")
        return {}, 0
    found: dict[int, list[Record]] = {}
    file_notes: list[str] = []

    def read(step: int) -> list[Record]:
        label = f"rollouts/{files[step].name}"
        for number, row in _read_rows(files[step], file_notes, label):
            if isinstance(row.get("response"), str) or isinstance(row.get("tokens"), list):
                found.setdefault(step, []).append(row)
            else:
                file_notes.append(f"{label}:{number}: no transcript, left out")
        return found.get(step, [])

    steps = sorted(files)
    if steps and max_transcripts:
        per_file = max(1, len(read(steps[-1])))
        for step in _spread(steps[:-1], max_transcripts // per_file - 1):
            read(step)
    notes += file_notes[:_MAX_NOTES]
    if len(file_notes) > _MAX_NOTES:
        notes.append(f"rollouts/: {len(file_notes) - _MAX_NOTES} more such lines")
    rows_left, kept = max_transcripts, {}
    for step in sorted(found, reverse=True):
        kept[step], rows_left = found[step][:rows_left], max(0, rows_left - len(found[step]))
    return {step: kept[step] for step in sorted(kept) if kept[step]}, len(files)


def _spread(steps: list[int], count: int) -> list[int]:
    """Returns `count` of the steps, evenly spread, the first one among them."""
    if count >= len(steps):
        return steps
    return [steps[i * len(steps) // count] for i in range(count)] if count > 0 else []


def read_evaluation(name: str, folder: epath.Path, run: str = "") -> Evaluation:
    """Reads an evaluation, finished or not."""
    notes: list[str] = []
    summary = _read_object(folder / "summary.json", notes)
    if not is_number(summary.get("accuracy")) or not _is_interval(summary.get("interval")):
        notes.append("summary.json has no accuracy: not finished, or of another version")
        summary = {}
    rows, examples = [], []
    for number, row in _read_rows(folder / EXAMPLES_FILE, notes, EXAMPLES_FILE):
        if "id" not in row or not isinstance(row.get("correct"), bool):
            notes.append(f"{EXAMPLES_FILE}:{number}: no graded response, left out")
            continue
        texts = ("response", "prompt", "question", "tokens", "prompt_tokens")
        rows.append({key: x for key, x in row.items() if key not in texts})
        if isinstance(row.get("response"), str):
            examples.append(row)
            if len(examples) > 4 * MAX_EXAMPLES:
                examples = _choose_examples(examples)
    if len(notes) > _MAX_NOTES:
        notes[_MAX_NOTES:] = [f"{len(notes) - _MAX_NOTES} more such lines"]
    step = int(folder.name) if run and folder.name.isdigit() else None
    return Evaluation(name, summary, rows, _choose_examples(examples), run, step, notes)


def _choose_examples(rows: list[Record]) -> list[Record]:
    """Returns up to MAX_EXAMPLES rows: the first wrong ones, then the first right ones, of which a
    quarter is kept a place."""
    wrong = [row for row in rows if not row["correct"]]
    right = [row for row in rows if row["correct"]]
    count = MAX_EXAMPLES - min(len(right), MAX_EXAMPLES // 4)
    wrong = wrong[:count]
    return wrong + right[: MAX_EXAMPLES - len(wrong)]


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _shorten(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)[:80]
