"""Compares evaluations: a table, and differences paired by problem."""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from distill.evaluation import statistics
from distill.evaluation.example_rows import EXAMPLES_FILE, drop_bulky_fields
from distill.runtime import console, paths
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
        with (path / EXAMPLES_FILE).open() as file:
            rows = [drop_bulky_fields(json.loads(line)) for line in file]
        for row in rows:
            _ = row["id"], row["correct"]
        render_table([folder], [summary])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        if (path / "metrics.jsonl").exists():
            why = "is a run; evaluate it first (python -m distill.evaluate)"
        elif isinstance(error, FileNotFoundError):
            missing = "it has no summary.json"
            if not path.is_dir():
                missing = f"no such folder{paths.suggest_path(folder)}"
            why = f"no finished evaluation: {missing}"
        else:
            why = f"no finished evaluation ({error})"
        raise UserError(f"--runs: {folder}: {why}") from None
    if not rows:
        raise UserError(f"--runs: {folder}: {EXAMPLES_FILE} holds no response")
    return summary, rows


def find_others(folder: str, summary: Record) -> list[str]:
    """Returns finished evaluations of as many problems of the same benchmark as `summary`, in
    folders beside the local one that it is from."""
    if paths.is_remote(folder):
        return []
    found = []
    for path in sorted(Path(folder).resolve().parent.glob("*/summary.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            other = json.loads(path.read_text())
            is_same = other["protocol"]["benchmark"] == summary["protocol"]["benchmark"]
            is_same &= other["problems"] == summary["problems"]
            if is_same and path.parent != Path(folder).resolve():
                found.append(os.path.join(os.path.dirname(folder.rstrip("/")), path.parent.name))
    return found


def shorten_names(names: Sequence[str]) -> dict[str, str]:
    """Returns for each path its last parts, as few as tell it from the others."""
    parts = {name: name.rstrip("/").split("/") for name in names}

    def shorten(name: str) -> str:
        for count in range(1, len(parts[name]) + 1):
            end = parts[name][-count:]
            if sum(x[-count:] == end for x in parts.values()) == 1:
                return "/".join(end)
        return name

    return {name: shorten(name) for name in names}


def compare_pair(names: tuple[str, str], a: list[Record], b: list[Record]) -> Record:
    """Compares evaluation b with a, paired by problem; returns statistics and a sentence.

    Raises UserError if the problems are not the same.
    """
    answers = [{str(row["id"]): row.get("answer") for row in rows} for rows in (a, b)]
    for i, j in ((0, 1), (1, 0)):
        if absent := [name for name in answers[i] if name not in answers[j]]:
            raise UserError(
                f"{names[0]} and {names[1]}: {len(absent):,} of the {len(answers[i]):,} problems "
                f"of {names[i]}, such as {absent[0]!r}, are absent from {names[j]}, which has "
                f"{len(answers[j]):,}; evaluate both on the same ones (--data, --limit)"
            )
    for name in answers[0]:
        if answers[0][name] != answers[1][name]:
            raise UserError(
                f"{names[0]} and {names[1]}: problem {name!r} has the answer "
                f"{answers[0][name]!r} in one and {answers[1][name]!r} in the other"
            )
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
    gain = 100 * pair["difference"]
    interval = f"95% interval {low:+.1f} to {high:+.1f}, {pair['problems']} problems: "
    counts = f"better on {pair['better_on']}, worse on {pair['worse_on']}; p = {pair['p']:.2g}"
    if low > 0 or high < 0:
        size = f"{abs(gain):.1f} ± {(high - low) / 2:.1f} points"
        verdict = f"{b} is {'better' if low > 0 else 'worse'} than {a} by {size}"
        return f"{verdict} ({interval}{counts})"
    points = f"{gain:+.1f} points" if abs(gain) >= 0.05 else "0.0 points"
    verdict = f"the data show no difference between {a} and {b}"
    return f"{verdict} (the latter: {points}, {interval}{counts})"


def list_results(summary: Record) -> list[tuple[str, str]]:
    """Returns the results of an evaluation as pairs of a name and a text."""
    low, high = (100 * end for end in summary["interval"])
    problems = f"{summary['problems']:,}"
    if summary.get("coverage", 1) < 1:
        of = summary["problems_in_data"]
        problems += f" of {of:,} ({summary['coverage']:.1%}): the others have no response"
    if summary["responses"] != summary["problems"]:
        problems += f", {summary['responses']:,} responses"
    results = [
        ("accuracy", f"{summary['accuracy']:.1%} [{low:.1f}, {high:.1f}] (95% interval)"),
        ("problems", problems),
    ]
    results += [
        (name, f"{value:.1%}")
        for name, value in summary.items()
        if name.startswith(("pass@", "maj@")) and name != "pass@1"
    ]
    for name in ("score", "exact", "contained"):
        if summary.get(name) is not None:
            low, high = (100 * end for end in summary[f"{name}_interval"])
            results.append((name, f"{summary[name]:.1%} [{low:.1f}, {high:.1f}] (95% interval)"))
    gave_up = {x: n for x, n in summary.get("outcomes", {}).items() if x in ("timeout", "error")}
    if gave_up:
        counts = ", ".join(f"{n:,} by {name}" for name, n in gave_up.items())
        results.append(("not graded", f"{counts}: they count as not correct"))
    judge = summary.get("judge") or {}
    if judge.get("accuracy") is not None:
        low, high = (100 * end for end in judge["interval"])
        text = f"{judge['accuracy']:.1%} [{low:.1f}, {high:.1f}] (95% interval)"
        unjudged = judge["verdicts"]["unjudged"]
        results.append(("judge", text + (f", {unjudged:,} unjudged" if unjudged else "")))
    if summary.get("accuracy_normalised") is not None:
        low, high = (100 * end for end in summary["interval_normalised"])
        text = f"{summary['accuracy_normalised']:.1%} [{low:.1f}, {high:.1f}] (95% interval)"
        results.append(("by length", text))
    letters = summary.get("choices", {}).get("letters", {})
    if letters:
        shares = [f"{x} {result['chosen']:.1%}" for x, result in letters.items()]
        results.append(("chosen", ", ".join(shares)))
        recalls = [f"{x} {r['accuracy']:.1%}" for x, r in letters.items() if "accuracy" in r]
        results.append(("right, where it is", ", ".join(recalls)))
    for name, field, form in (
        ("format", "format_rate", "{:.1%}"),
        ("mean length", "mean_length", "{:,.1f} tokens"),
        ("cut at the limit", "truncation_rate", "{:.1%}"),
        ("repetitive", "repetition_rate", "{:.1%}"),
        ("reverse KL", "reverse_kl", "{:.4f} a token"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ):
        if summary.get(field) is not None:
            results.append((name, form.format(summary[field])))
    if summary.get("seconds") is not None:
        results.append(("time", console.format_duration(summary["seconds"])))
    return results


_COLUMNS = (
    ("parameters", "parameters", "{:,}"),
    ("MiB", "parameter_bytes", "{:.4g}"),
    ("format %", "format_rate", "{:.1f}"),
    ("tokens", "mean_length", "{:.1f}"),
    ("cut %", "truncation_rate", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:.4g}"),
    ("s/problem", "seconds_per_problem", "{:.3g}"),
    ("peak GiB", "memory", "{:.2f}"),
)


def make_rows(names: list[str], summaries: list[Record]) -> list[list[str]]:
    """Makes the header of a table and a row per evaluation: problems, samples, accuracy, interval,
    pass@k, maj@k, cost of the model."""
    votes = [k for summary in summaries for k in summary if k.startswith(("pass@", "maj@"))]
    votes = [v for v in dict.fromkeys(votes) if v != "pass@1"]
    head = ["", "benchmark", "protocol", "problems", "samples a problem"]
    head += ["accuracy % [95%]", *votes]
    rows = [head + [title for title, _, _ in _COLUMNS]]
    for name, summary_row in zip(names, summaries, strict=True):
        protocol = summary_row.get("protocol", {})
        low, high = summary_row["interval"]
        row = [name, protocol.get("benchmark", ""), protocol.get("protocol", "")]
        row += [f"{summary_row['problems']:,}"]
        row += [str(round(summary_row["responses"] / summary_row["problems"]))]
        row += [f"{100 * summary_row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
        row += [f"{100 * summary_row[v]:.1f}" if v in summary_row else "" for v in votes]
        rows.append(row + [_render_cell(summary_row, field, form) for _, field, form in _COLUMNS])
    return rows


def render_table(names: list[str], summaries: list[Record]) -> str:
    """Renders the rows of `make_rows` as lines of text."""
    return console.render_table(make_rows(names, summaries))


def _render_cell(summary: Record, field: str, number_format: str) -> str:
    value = summary.get(field)
    if field == "memory" and value:
        value = value.get("device_gib", value["host_gib"])
    if value is None:
        return ""
    scale = {"parameter_bytes": 2**-20, "truncation_rate": 100, "format_rate": 100}.get(field, 1)
    return number_format.format(value * scale)


def compare_runs(runs: list[str]) -> Record:
    """Returns the summaries of the folders, and paired comparisons with the first one.

    Folders of another benchmark than the first one's are not paired, but listed in `unpaired`.

    Raises:
      UserError: if a folder holds no finished evaluation, or one of the same benchmark has other
        problems than the first.
    """
    evaluations = [read_evaluation(run) for run in runs]
    result: Record = {
        "runs": dict(zip(runs, [s for s, _ in evaluations], strict=True)),
        "paired": [],
        "unpaired": [],
    }
    first, rows = evaluations[0]
    short = shorten_names(runs)
    for name, (summary, others) in list(zip(runs, evaluations, strict=True))[1:]:
        benchmarks = [x.get("protocol", {}).get("benchmark") for x in (first, summary)]
        if benchmarks[0] == benchmarks[1]:
            pair = compare_pair((short[runs[0]], short[name]), rows, others)
            result["paired"].append({**pair, "runs": [runs[0], name]})
        else:
            result["unpaired"].append(name)
    return result
