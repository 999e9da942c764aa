"""Compares evaluations: a table, and differences paired by problem."""

import json
from typing import Any

from etils import epath

from distill.evaluation import records, statistics
from distill.runtime import paths
from models.errors import UserError

Record = dict[str, Any]


def read_evaluation(folder: str) -> tuple[Record, list[Record]]:
    """Reads a finished evaluation, local or gs://, as (summary, rows).

    Raises UserError if `folder` holds none.
    """
    paths.require_reachable(folder, "--runs")
    path = epath.Path(folder)
    try:
        summary = json.loads((path / "summary.json").read_text())
        with (path / records.EXAMPLES_FILE).open() as file:
            rows = [records.drop_bulky_fields(json.loads(line)) for line in file]
        for row in rows:
            _ = row["id"], row["correct"]
        render_table([folder], [summary])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"--runs: {folder}: no finished evaluation ({error})") from None
    if not rows:
        raise UserError(f"--runs: {folder}: {records.EXAMPLES_FILE} holds no response")
    return summary, rows


def compare_pair(names: tuple[str, str], a: list[Record], b: list[Record]) -> Record:
    """Compares evaluation b with a, paired by problem; returns statistics and a sentence.

    Raises UserError if the problems are not the same.
    """
    answers = [{str(row["id"]): row.get("answer") for row in rows} for rows in (a, b)]
    for name in answers[0].keys() | answers[1].keys():
        if answers[0].get(name) != answers[1].get(name):
            raise UserError(f"{names[0]} and {names[1]}: problem {name!r} is not the same in both")
    ours, theirs = (statistics.compute_problem_scores(rows) for rows in (a, b))
    pairs = list(zip(*[(ours[name], theirs[name]) for name in ours], strict=True))
    gain, (low, high) = statistics.compute_difference(*pairs)
    result: Record = {
        "runs": list(names),
        "difference": gain,
        "interval": (low, high),
        "better_on": sum(y > x for x, y in zip(*pairs, strict=True)),
        "worse_on": sum(y < x for x, y in zip(*pairs, strict=True)),
        "problems": len(ours),
        "p": statistics.compute_p_value(*pairs),
    }
    return {**result, "sentence": _describe_pair(result)}


def _describe_pair(pair: Record) -> str:
    a, b = pair["runs"]
    low, high = (100 * end for end in pair["interval"])
    size = f"{abs(100 * pair['difference']):.1f} ± {(high - low) / 2:.1f} points"
    if low > 0 or high < 0:
        verdict = f"{b} is {'better' if low > 0 else 'worse'} than {a} by {size}"
    else:
        direction = "above" if pair["difference"] >= 0 else "below"
        verdict = f"no difference between {b} and {a} is shown: {b} is {size} {direction}"
    return (
        f"{verdict} (95% interval {low:+.1f} to {high:+.1f}, {pair['problems']} problems: "
        f"better on {pair['better_on']}, worse on {pair['worse_on']}; p = {pair['p']:.2g})"
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


def render_table(names: list[str], summaries: list[Record]) -> str:
    """Renders a line per evaluation: accuracy, interval, n, pass@k, maj@k, cost of the model."""
    votes = [k for summary in summaries for k in summary if k.startswith(("pass@", "maj@"))]
    votes = [v for v in dict.fromkeys(votes) if v != "pass@1"]
    head = ["", "benchmark", "protocol", "n", "accuracy % [95%]", *votes]
    rows = [head + [title for title, _, _ in _COLUMNS]]
    for name, summary_row in zip(names, summaries, strict=True):
        protocol = summary_row.get("protocol", {})
        low, high = summary_row["interval"]
        row = [name, protocol.get("benchmark", ""), protocol.get("protocol", "")]
        row += [str(round(summary_row["responses"] / summary_row["problems"]))]
        row += [f"{100 * summary_row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
        row += [f"{100 * summary_row[v]:.1f}" if v in summary_row else "" for v in votes]
        rows.append(row + [_render_cell(summary_row, field, form) for _, field, form in _COLUMNS])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows
    )


def _render_cell(summary: Record, field: str, number_format: str) -> str:
    value = summary.get(field)
    if field == "memory" and value:
        value = value.get("device_gib", value["host_gib"])
    if value is None:
        return ""
    scale = {"parameter_bytes": 2**-20, "truncation_rate": 100}.get(field, 1)
    return number_format.format(value * scale)


def compare_runs(runs: list[str]) -> Record:
    """Returns the summaries of the folders, and paired comparisons with the first one.

    Folders of another benchmark than the first one's are not paired.

    Raises:
      UserError: if a folder holds no finished evaluation, or one of the same benchmark has other
        problems than the first.
    """
    evaluations = [read_evaluation(run) for run in runs]
    result: Record = {
        "runs": dict(zip(runs, [s for s, _ in evaluations], strict=True)),
        "paired": [],
    }
    first, rows = evaluations[0]
    for name, (summary, others) in list(zip(runs, evaluations, strict=True))[1:]:
        benchmarks = [x.get("protocol", {}).get("benchmark") for x in (first, summary)]
        if benchmarks[0] == benchmarks[1]:
            result["paired"].append(compare_pair((runs[0], name), rows, others))
    return result
