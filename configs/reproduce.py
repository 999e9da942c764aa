"""Prints the commands that make a paper's table, and from their results the table.

    python configs/reproduce.py
    python configs/reproduce.py qwen3_21
    python configs/reproduce.py qwen3_21 tiny
    python configs/reproduce.py qwen3_21 --results=runs/qwen3_21

The first line lists the tables. The second prints commands, which `| bash -e` runs in order; with
`tiny` they take minutes on a CPU, with tiny models and rows. The last prints the table: each figure
with its 95% interval beside the published one, and the difference with its interval, which holds
the chance in ours only. What has no results yet is named in its place, and where an evaluation was
made in another way than the published one, the last lines say how.

Runs are in runs/TABLE/ROW, and evaluations in runs/TABLE/ROW/eval_BENCHMARK; tiny ones in
runs/TABLE_tiny.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.paper_tables import TABLES, Figure

# Commands


def list_commands(name: str, tiny: bool = False, directory: str = "") -> list[str]:
    """Returns the commands that make a table's results, in order, each a line for a shell."""
    if name not in TABLES:
        raise ValueError(f"configs/reproduce.py takes {'|'.join(TABLES)}, not {name!r}")
    table, directory = TABLES[name], directory or f"runs/{name}{'_tiny' if tiny else ''}"
    documents = "assets/rows/documents.jsonl" if tiny else "documents.jsonl"
    lines = [] if tiny else [*table.prepare]
    for row_name, row in table.rows.items():
        trainings = [_shrink(command) if tiny else command for command in row.commands]
        lines += [x.replace("{documents}", documents) for x in trainings]
        model = row.tiny_model if tiny and row.tiny_model else row.model
        for figure in table.figures:
            if not figure.benchmark or figure.k > 1:  # pass@k comes with the accuracy
                continue
            if tiny and not figure.tiny_rows:
                lines.append(f"# {figure.benchmark}: its prompts are too long for the tiny model")
                continue
            flags = " ".join(_list_flags(figure, tiny))
            out = f"--out={{dir}}/{row_name}/eval_{figure.benchmark}"
            lines.append(f"python -m distill.evaluate --model={model} {flags} {out}")
        lines = [x.replace("{dir}", directory).replace("{row}", row_name) for x in lines]
    return lines


def _shrink(command: str) -> str:
    """Returns a command that trains, with the tiny form of its recipe."""
    words = command.split(" ")
    for i, word in enumerate(words):
        if word.startswith("--config="):
            words[i] = f"{word}{',' if ':' in word else ':'}tiny"
    return " ".join(words)


def _list_flags(figure: Figure, tiny: bool) -> list[str]:
    """Returns the flags of `evaluate` that make a figure."""
    flags = [f"--benchmark={figure.benchmark}", f"--protocol={figure.protocol}"]
    own = shlex.split(figure.flags)
    if not tiny:
        data = [] if any(x.startswith("--data=") for x in own) else ["--data=hf:"]
        return [*flags, *data, *own]
    samples = ["--samples=2", "--k=1,2"] if figure.samples > 1 else []
    return [*flags, f"--data={figure.tiny_rows}", "--limit=2", *samples, "--max_new_tokens=8"]


# Results


@dataclasses.dataclass(frozen=True)
class Result:
    """A figure that was measured: its value and its 95% interval, or why there is none."""

    value: float | None = None
    interval: tuple[float, float] | None = None
    missing: str = ""
    notes: tuple[str, ...] = ()  # how its evaluation differs from the published one


def read_result(folder: Path, figure: Figure) -> Result:
    """Reads a figure of the row whose folder this is."""
    if not figure.benchmark:
        return _read_hours(folder)
    path = folder / f"eval_{figure.benchmark}" / "summary.json"
    try:
        summary = json.loads(path.read_text())
        protocol: Mapping[str, Any] = summary["protocol"]
        name = "accuracy" if figure.k == 1 else f"pass@{figure.k}"
        if protocol["benchmark"] != figure.benchmark:
            return Result(missing=f"{path} is of {protocol['benchmark']}")
        if name not in summary:
            return Result(missing=f"{path} has no {name}: too few samples, or no --k={figure.k}")
        ends = summary["interval"] if figure.k == 1 else summary["k_intervals"][name]
        value, (low, high) = float(summary[name]), map(float, ends)
    except FileNotFoundError:
        return Result(missing=f"no {path}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Result(missing=f"{path} cannot be read ({type(error).__name__}: {error})")
    notes = _list_differences(summary, protocol, figure)
    return Result(100 * value, (100 * low, 100 * high), notes=tuple(notes))


def _list_differences(
    summary: Mapping[str, Any], protocol: Mapping[str, Any], figure: Figure
) -> list[str]:
    """Says in what an evaluation differs from the one that was published."""
    expected = {"protocol": figure.protocol, "samples": figure.samples}
    found = {name: protocol.get(name) for name in expected}
    if figure.problems:
        expected["problems"], found["problems"] = figure.problems, summary.get("problems")
    notes = [
        f"{name} {found[name]}, published {expected[name]}"
        for name in expected
        if found[name] != expected[name]
    ]
    gave_up = [(summary.get("outcomes") or {}).get(name, 0) for name in ("error", "timeout")]
    if sum(gave_up):
        notes.append(f"{sum(gave_up)} responses not graded, which count as not correct")
    return notes


def _read_hours(folder: Path) -> Result:
    """Reads how long the steps of a run took, times its devices, in hours."""
    path = folder / "metrics.jsonl"
    try:
        with path.open() as file:
            rows = [json.loads(line) for line in file]
        seconds = sum(float(row["time/step"]) for row in rows)
        devices = json.loads((folder / "environment.json").read_text())["devices"]
        note = f"of {devices['count']} x {devices['kind']}, without evaluations"
        return Result(seconds * int(devices["count"]) / 3600, None, notes=(note,))
    except FileNotFoundError as error:
        return Result(missing=f"no {error.filename}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Result(missing=f"{path} cannot be read ({type(error).__name__}: {error})")


def render_table(name: str, directory: str) -> str:
    """Renders a table from the results in a folder, beside what was published."""
    table, notes = TABLES[name], []
    cells = [["", "", "here [95%]", "published", "difference [95%]"]]
    for row_name, row in table.rows.items():
        for number, figure in enumerate(table.figures):
            result = read_result(Path(directory) / row_name, figure)
            published = row.published.get(figure.name)
            cells.append(
                [
                    row.title if not number else "",
                    figure.title,
                    (result.missing and "-- none --") or _format(result, 0.0, figure),
                    "" if published is None else f"{published:,.1f}".removesuffix(".0"),
                    "" if published is None else _format(result, published, figure),
                ]
            )
            told = [result.missing] if result.missing else result.notes
            notes += [f"  {row_name}, {figure.title}: {note}" for note in told]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) for line in cells]
    head = [f"{name}: {table.about}", f"Published: {table.source}", ""]
    return "\n".join([*head, *(x.rstrip() for x in lines), *([""] if notes else []), *notes])


def _format(result: Result, published: float, figure: Figure) -> str:
    """Formats a figure, less what was published; "" if there is none."""
    if result.value is None or (published and not figure.benchmark):  # hours of other devices
        return ""
    sign = "+" if published else ""
    text = f"{result.value - published:{sign},.{1 if figure.benchmark else 3}f}"
    if result.interval is None:
        return text
    low, high = (f"{end - published:{sign}.1f}" for end in result.interval)
    return f"{text} [{low}, {high}]"


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        print("\n".join(f"{name:14}{table.about}" for name, table in TABLES.items()))
        return
    name, *words = arguments
    if name not in TABLES:
        raise ValueError(f"configs/reproduce.py takes {'|'.join(TABLES)}, not {name!r}")
    if words in ([], ["tiny"]):
        print("\n".join(list_commands(name, tiny=bool(words))))
    elif len(words) == 1 and words[0].startswith("--results="):
        directory = words[0].partition("=")[2]
        if not Path(directory).is_dir():
            raise ValueError(f"--results={directory}: there is no such folder")
        print(render_table(name, directory))
    else:
        raise ValueError(
            f"configs/reproduce.py {name} takes tiny or --results=DIR, not {shlex.join(words)}"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
