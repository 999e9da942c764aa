"""The tables of a report, as texts: runs, results, paired differences, cost, configs."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from distill.evaluation import comparison
from distill.reporting.figures import Group
from distill.reporting.read import (
    Evaluation,
    Record,
    Run,
    as_record,
    count_planned_steps,
    is_number,
    list_stages,
)
from distill.runtime import console
from models.errors import UserError

_MAX_CELL = 120  # characters of a config's value


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a heading. `notes` are sentences below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups runs whose configs differ in `seed` alone. A run without a config stands alone."""
    groups: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        config = {key: x for key, x in run.config.items() if key != "seed"}
        key = json.dumps(config, sort_keys=True) if config else str(number)
        groups.setdefault(key, []).append(run)
    return [Group(_name_group(members), members) for members in groups.values()]


def _name_group(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return runs[0].name
    return f"{runs[0].name} and {len(runs) - 1} more of other seeds"


def tabulate_runs(runs: Sequence[Run]) -> Table:
    """Lists what each run is."""
    header = ["run", "stages", "student", "teacher", "seed", "steps", "devices", "revision"]
    rows = []
    for run in runs:
        c, environment = run.config, run.environment
        shown = [_describe_stage(name, as_record(c.get(name))) for name in list_stages(c)]
        devices = as_record(environment.get("devices"))
        git = as_record(environment.get("git"))
        planned = count_planned_steps(c)
        rows.append(
            [
                run.name,
                ", ".join(shown),
                _find(c, "student", "path"),
                _list_teachers(run),
                _find(c, "seed"),
                f"{run.steps} of {planned}" if planned else str(run.steps),
                f"{devices.get('count', '')} {devices.get('kind', '')}".strip(),
                str(git.get("revision") or "")[:10] + (" (changed)" if git.get("dirty") else ""),
            ]
        )
    return Table("Runs", header, rows)


def _find(record: Record, *keys: str) -> str:
    """Returns a value below some keys as a text, "" if there is none."""
    value: Any = record
    for key in keys:
        value = as_record(value).get(key)
    return "" if value is None else str(value)


def _list_teachers(run: Run) -> str:
    """Returns the paths of the teachers that a run has loaded: every config names one, also where
    no stage has a use for it."""
    models = run.environment.get("models")
    if not isinstance(models, dict):  # no record, so what the config names
        return _find(run.config, "teacher", "path")
    names = [name for name in models if name != "student"]
    # A run that was resumed records the teachers of its later stages alone.
    measured = {"train/reverse_kl", "train/sampled_reverse_kl"}
    for stage in {row["stage"]: 0 for row in run.metrics if measured & row.keys()}:
        teachers = as_record(run.config.get(stage)).get("teachers")
        names += teachers if isinstance(teachers, list) else []
    paths = [_find(run.config, name, "path") for name in names if isinstance(name, str)]
    return ", ".join(dict.fromkeys(filter(None, paths)))


def _describe_stage(name: str, stage: Record) -> str:
    objective = stage.get("objective")
    return name if objective in (None, name) else f"{name}: {objective}"


def tabulate_results(evaluations: Sequence[Evaluation]) -> Table:
    """Lists the results of finished evaluations, as `compare` does."""
    shown: list[Evaluation] = []
    notes = []
    for evaluation in evaluations:
        try:
            if evaluation.summary:
                comparison.make_rows([evaluation.name], [evaluation.summary])
                shown.append(evaluation)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            notes.append(f"{evaluation.name}: summary.json is of another version, left out")
    header, *rows = comparison.make_rows([x.name for x in shown], [x.summary for x in shown])
    return Table("Results", ["evaluation", *header[1:]], rows, notes)


def compare_evaluations(evaluations: Sequence[Evaluation]) -> list[str]:
    """Returns sentences about differences, paired by problem, to the first evaluation of a kind. Of
    those at a run's steps only the last counts: the run's curve shows how one model changes."""
    short = comparison.shorten_names(list(dict.fromkeys(x.run or x.name for x in evaluations)))
    kinds: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        if evaluation.summary and evaluation.rows:
            kinds.setdefault(json.dumps(_get_kind(evaluation)), []).append(evaluation)
    sentences = []
    for members in kinds.values():
        last: list[Evaluation] = []
        for run in dict.fromkeys(x.run or x.name for x in members):
            own = sorted(
                (x for x in members if (x.run or x.name) == run), key=lambda x: x.step or 0
            )
            steps = [x for x in own if x.step is not None]
            last += steps[-1:] + [x for x in own if x.step is None]
        sentences += [_compare(last[0], other, short) for other in last[1:]]
    return sentences


def _get_kind(evaluation: Evaluation) -> list[Any]:
    """Returns what two evaluations must share to be compared."""
    p = evaluation.protocol
    return [p.get("benchmark"), p.get("protocol"), p.get("temperature") == 0]


def _compare(a: Evaluation, b: Evaluation, short: dict[str, str]) -> str:
    """Compares two evaluations.

    Args:
      short: short names of runs and of evaluations that belong to none.
    """
    names = [short[x.run or x.name] + (x.name[len(x.run) :] if x.run else "") for x in (a, b)]
    try:
        return comparison.compare_pair((names[0], names[1]), a.rows, b.rows)["sentence"]
    except UserError as error:
        return f"not compared: {error}"


def tabulate_cost(runs: Sequence[Run]) -> Table:
    """Sums what each run cost, from its metrics."""
    header = ["run", "tokens trained", "tokens sampled", "FLOPs", "time", "of it compiling"]
    header += ["tokens trained/s", "devices", "time × devices"]
    rows = []
    for run in runs:
        sums = {name: _sum(run.metrics, name) for name in _COST_METRICS}
        seconds = sums["time/step"] + sums["time/eval"]
        count = as_record(run.environment.get("devices")).get("count")
        sampled = sum(map(_count_sampled, run.metrics))
        trained, busy = sums["train/trained_tokens"], sums["time/step"] - sums["time/compile"]
        rows.append(
            [
                run.name,
                _format(trained, "{:,.0f}"),
                _format(sampled, "{:,.0f}"),
                _format(_count_flops(run), "{:.3g}"),
                _format_time(seconds),
                _format_time(sums["time/compile"]),
                _format(trained / busy if busy > 0 else 0, "{:.4g}"),
                str(count or ""),
                _format_time(seconds * count if type(count) is int else 0),
            ]
        )
    notes = [
        "The time is that of steps and evaluations. FLOPs are those of weights at the tokens of "
        "responses, without prompts and attention: sampling, a forward pass of each teacher, and "
        "training, which is three times a forward pass, with a LoRA twice."
    ]
    return Table("Cost", header, rows, notes)


def _count_sampled(row: Record) -> float:
    rows = row.get("rollout/rows/think", 0) + row.get("rollout/rows/no_think", 0)
    return row.get("rollout/mean_length", 0) * rows


def _count_flops(run: Run) -> float:
    """Counts the operations that the note of the table describes; 0 if the files do not tell."""
    models = as_record(run.environment.get("models"))
    costs = {name: as_record(x).get("flops_per_token") for name, x in models.items()}
    student = costs.get("student")
    if not is_number(student):
        return 0
    has_lora = as_record(as_record(run.config.get("student")).get("lora")).get("rank")
    total = 0.0
    for row in run.metrics:
        trained = row.get("train/trained_tokens", 0)
        total += student * (_count_sampled(row) + (2 if has_lora else 3) * trained)
        if "train/divergence" in row or "train/reverse_kl" in row:
            names = as_record(run.config.get(row["stage"])).get("teachers")
            known: list[Any] = [costs.get(x) for x in names] if isinstance(names, list) else []
            total += trained * sum(x for x in known if is_number(x))
    return total


_COST_METRICS = ("time/step", "time/eval", "time/compile", "train/trained_tokens")


def _sum(rows: Sequence[Record], name: str) -> float:
    return sum(row.get(name, 0) for row in rows)


def _format(x: float, how: str) -> str:
    return how.format(x) if x else ""


def _format_time(seconds: float) -> str:
    """Returns a duration as people say it, in hours where there are many: devices are paid so."""
    if seconds >= 36_000:
        return f"{seconds / 3600:,.0f} h"
    return console.format_duration(seconds) if seconds else ""


def tabulate_differences(runs: Sequence[Run]) -> Table | None:
    """Lists the keys in which the configs of runs differ; None if they do in none."""
    configs = [_drop_unused_stages(run.config) for run in runs if run.config]
    names = [run.name for run in runs if run.config]
    common = set.intersection(*map(set, configs)) if configs else set()
    # A stage that some runs lack is one row, not one for each of its keys.
    flat = [
        _flatten({key: x for key, x in config.items() if key in common})
        | {key: "(set)" for key in config if key not in common}
        for config in configs
    ]
    rows = [
        [key, *(_shorten(values.get(key, "(none)")) for values in flat)]
        for key in sorted({key for values in flat for key in values})
        if len({values.get(key) for values in flat}) > 1
    ]
    return Table("Differences of configs", ["key", *names], rows) if rows else None


def _drop_unused_stages(config: Record) -> Record:
    """Returns a config without the stages, which have an objective, that its run does not pass."""
    used = list_stages(config)
    return {key: x for key, x in config.items() if "objective" not in as_record(x) or key in used}


def _flatten(config: Record, prefix: str = "") -> dict[str, str]:
    """Returns the leaves of a config as JSON, by their dotted keys."""
    flat: dict[str, str] = {}
    for key, x in config.items():
        name = f"{prefix}{key}"
        flat |= _flatten(x, f"{name}.") if isinstance(x, dict) and x else {name: json.dumps(x)}
    return flat


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…"


def render_markdown(table: Table) -> str:
    """Renders a table for a README."""

    def escape(cell: str) -> str:
        return cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    rows = [table.header, ["---"] * len(table.header), *table.rows]
    lines = [f"| {' | '.join(map(escape, row))} |" for row in rows]
    return "\n".join([f"## {table.title}", "", *lines, *(f"\n{note}" for note in table.notes)])
