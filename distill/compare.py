"""python -m distill.compare --runs=A,B[,C…]: folders of `evaluate` side by side.

One row a folder; then, for each that has the problems of the first one, how much better or worse
it is, paired by problem: a difference of the same problems is known better than either accuracy.
"""

import json
from typing import Any

from absl import flags
from etils import epath

from distill.evaluation import records, statistics
from distill.runtime import cli, run_files
from models.errors import UserError

OPTIONS = flags.FlagValues()
RUNS = flags.DEFINE_list(
    "runs", None, "Folders that evaluate wrote.", flag_values=OPTIONS, required=True
)
OUT = flags.DEFINE_string("out", "", "Also write what is compared as JSON.", flag_values=OPTIONS)

Row = dict[str, Any]


def read(folder: str) -> tuple[Row, list[Row]]:
    """(summary, rows) of a finished evaluation, local or gs://. Raises UserError if it is none."""
    run_files.require_reachable(folder, "--runs")
    path = epath.Path(folder)
    try:
        summary = json.loads((path / "summary.json").read_text())
        with (path / records.EXAMPLES).open() as file:
            rows = [records.brief(json.loads(line)) for line in file]
        for row in rows:
            _ = row["id"], row["correct"]
        _ = summary["accuracy"], summary["interval"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--runs: {folder}: no finished evaluation ({error})") from None
    return summary, rows


def paired(names: tuple[str, str], a: list[Row], b: list[Row]) -> Row:
    """How much better b is than a on the same problems, and the sentence that says so.

    Raises UserError if they are not the same problems.
    """
    answers = [{str(row["id"]): row.get("answer") for row in rows} for rows in (a, b)]
    for name in answers[0].keys() | answers[1].keys():
        if answers[0].get(name) != answers[1].get(name):
            raise UserError(f"{names[0]} and {names[1]}: problem {name!r} is not the same in both")
    ours, theirs = (statistics.scores(rows) for rows in (a, b))
    pairs = list(zip(*[(ours[name], theirs[name]) for name in ours], strict=True))
    gain, (low, high) = statistics.difference(*pairs)
    found: Row = {
        "runs": list(names),
        "difference": gain,
        "interval": (low, high),
        "better_on": sum(y > x for x, y in zip(*pairs, strict=True)),
        "worse_on": sum(y < x for x, y in zip(*pairs, strict=True)),
        "problems": len(ours),
        "p": statistics.chance(*pairs),
    }
    return {**found, "sentence": _sentence(found)}


def _sentence(found: Row) -> str:
    a, b = found["runs"]
    low, high = (100 * end for end in found["interval"])
    size = f"{abs(100 * found['difference']):.1f} ± {(high - low) / 2:.1f} points"
    if low > 0 or high < 0:
        said = f"{b} is {'better' if low > 0 else 'worse'} than {a} by {size}"
    else:
        way = "above" if found["difference"] >= 0 else "below"
        said = f"no difference between {b} and {a} is shown: {b} is {size} {way}"
    return (
        f"{said} (95% interval {low:+.1f} to {high:+.1f}, {found['problems']} problems: "
        f"better on {found['better_on']}, worse on {found['worse_on']}; p = {found['p']:.2g})"
    )


_COLUMNS = (
    ("parameters", "parameters", "{:,}"),
    ("MiB", "parameter_bytes", "{:.4g}"),
    ("tokens", "mean_length", "{:.1f}"),
    ("cut %", "truncation_rate", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:.4g}"),
    ("s/problem", "seconds_per_problem", "{:.3g}"),
    ("peak GiB", "memory", "{:.2f}"),
)


def table(names: list[str], summaries: list[Row]) -> str:
    """A row a folder: accuracy with its interval, n, pass@k, maj@k, and what the model costs."""
    votes = [k for summary in summaries for k in summary if k.startswith(("pass@", "maj@"))]
    votes = [v for v in dict.fromkeys(votes) if v != "pass@1"]
    head = ["", "benchmark", "protocol", "n", "accuracy % [95%]", *votes]
    rows = [head + [title for title, _, _ in _COLUMNS]]
    for name, found in zip(names, summaries, strict=True):
        protocol = found.get("protocol", {})
        low, high = found["interval"]
        row = [name, protocol.get("benchmark", ""), protocol.get("protocol", "")]
        row += [str(round(found["responses"] / found["problems"]))]
        row += [f"{100 * found['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
        row += [f"{100 * found[v]:.1f}" if v in found else "" for v in votes]
        rows.append(row + [_cell(found, field, form) for _, field, form in _COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows
    )


def _cell(summary: Row, field: str, form: str) -> str:
    value = summary.get(field)
    if field == "memory" and value:
        value = value.get("device_gib", value["host_gib"])
    if value is None:
        return ""
    scale = {"parameter_bytes": 2**-20, "truncation_rate": 100}.get(field, 1)
    return form.format(value * scale)


def compare(runs: list[str]) -> Row:
    """The folders' summaries and, with the first one, all that have its problems. Raises as `read`;
    where no other has, and where the first has no problems of another of its benchmark."""
    read_all = [read(run) for run in runs]
    found: Row = {"runs": dict(zip(runs, [s for s, _ in read_all], strict=True)), "paired": []}
    first, rows = read_all[0]
    for name, (summary, others) in list(zip(runs, read_all, strict=True))[1:]:
        benchmarks = [one.get("protocol", {}).get("benchmark") for one in (first, summary)]
        if benchmarks[0] == benchmarks[1]:
            found["paired"].append(paired((runs[0], name), rows, others))
    return found


def main() -> None:
    if len(set(RUNS.value)) < max(2, len(RUNS.value)):
        raise UserError("--runs: name two different folders or more")
    out = cli.output(OUT.value) if OUT.value else None
    found = compare(RUNS.value)
    if out:
        run_files.write_json(out, found)
    print(table(RUNS.value, list(found["runs"].values())))
    for pair in found["paired"]:
        print("\n" + pair["sentence"])


if __name__ == "__main__":
    cli.run(main, OPTIONS)
