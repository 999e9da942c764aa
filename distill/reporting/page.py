"""Puts a report together: one page of HTML that needs nothing else, or figures and Markdown.

The page is a pure function of the files that it shows: no time of day, no random names. What comes
from files is text in it, never markup; its own script alone may run (the policy in its head names
its hash), and it may fetch nothing.
"""

import base64
import dataclasses
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from distill.reporting import figures, tables, transcripts
from distill.reporting.figures import Chart, Group
from distill.reporting.read import Evaluation, Run
from distill.reporting.tables import Table
from distill.runtime import paths

_RUN_FILES = ("config", "environment")
_SECTIONS = ("Runs", "Curves", "Results", "Transcripts", "Cost", "Differences of configs", "Files")


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a report shows."""

    runs: Sequence[Run]
    evaluations: Sequence[Evaluation]
    groups: Sequence[Group]
    tables: Sequence[Table]


def make_report(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> Report:
    """Computes what a report shows of runs and evaluations."""
    results = tables.tabulate_results(evaluations)
    results.notes.extend(tables.compare_evaluations(evaluations))
    differences = tables.tabulate_differences(runs)
    found = [tables.tabulate_runs(runs), results, tables.tabulate_cost(runs), differences]
    groups = tables.group_runs(runs)
    return Report(runs, evaluations, groups, [table for table in found if table and table.rows])


def render_page(report: Report, script: str = "", policy: str = "") -> str:
    """Returns the page, all in ASCII.

    Args:
      script: a further script, and what the page's policy must allow for it.
    """
    scripts = [_read_asset("page.js"), *([script] if script else [])]
    names = [run.name for run in report.runs] + [x.name for x in report.evaluations if not x.run]
    title = escape(f"Report: {', '.join(names)}")
    bodies = {table.title: _render_table(table) for table in report.tables}
    bodies["Curves"] = _render_charts(report.groups)
    if _has_transcripts(report):
        bodies["Transcripts"] = _read_asset("transcripts.html")
    bodies["Files"] = _render_files(report.runs)
    sections = [("", _render_notes(report)), *((x, bodies.get(x, "")) for x in _SECTIONS)]
    sections = [(heading, body) for heading, body in sections if body]
    links = [f'<a href="#{make_id(heading)}">{heading}</a>' for heading, _ in sections if heading]
    bodies = [
        f'<section id="{make_id(heading)}"><h2>{heading}</h2>{body}</section>' if heading else body
        for heading, body in sections
    ]
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_make_policy(scripts)}{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{_read_asset("page.css")}</style>
</head>
<body>
<header><h1>{title}</h1><nav aria-label="Sections">{" ".join(links)}</nav></header>
<main>
{"".join(bodies)}
</main>
<script type="application/json" id="transcripts-data">{_pack_transcripts(report)}</script>
{"".join(f"<script>{text}</script>" for text in scripts)}
</body>
</html>
"""
    return page.encode("ascii", "xmlcharrefreplace").decode()


def is_page(head: bytes) -> bool:
    """Returns True if a file that begins with these bytes (the first 1,000) is such a page."""
    return head.startswith(b"<!DOCTYPE html>") and b"default-src 'none'; script-src" in head


def _make_policy(scripts: Sequence[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in scripts]
    allowed = " ".join(f"'sha256-{x}'" for x in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _read_asset(name: str) -> str:
    return (resources.files("distill.reporting") / "assets" / name).read_text("ascii")


def escape(text: str) -> str:
    """Returns a text as HTML: control characters as Python escapes them."""
    return html.escape(paths.escape_controls(text))


def make_id(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower())


def _render_notes(report: Report) -> str:
    """Renders what is missing, broken or to be warned of, beside the run's name."""
    noted = [(x.name, x.notes) for x in [*report.runs, *report.evaluations] if x.notes]
    items = [f"<li><b>{escape(name)}</b>: {escape('; '.join(notes))}</li>" for name, notes in noted]
    if not items:
        return ""
    return f'<ul class="notes" aria-label="Notes">{"".join(items)}</ul>'


def _render_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td{_align(cell)}>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in table.rows
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    label = escape(table.title)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{notes}"
    )


def _align(cell: str) -> str:
    return ' class="number"' if re.match(r"[-+]?[\d.,]+(e-?\d+)?( |$|%)", cell) else ""


def _render_charts(groups: Sequence[Group]) -> str:
    """Renders the main metrics, and the others where they open on request."""
    main, others = [], []
    for metric in figures.list_metrics(groups):
        chart = figures.make_chart(groups, metric)
        if chart:
            kind = main if metric in figures.MAIN_METRICS else others
            kind.append(_render_chart(chart, groups))
    if not main and not others:
        return ""
    legend = "".join(
        f'<li class="c{i % len(figures.COLOURS)}">{escape(group.name)}</li>'
        for i, group in enumerate(groups)
    )
    more = f"<details><summary>{len(others)} more metrics</summary>"
    more += f'<div class="charts">{"".join(others)}</div></details>'
    return (
        f'<ul class="legend" aria-label="Runs">{legend}</ul>'
        f'<div class="charts">{"".join(main)}</div>{more if others else ""}'
    )


def _render_chart(chart: Chart, groups: Sequence[Group]) -> str:
    figure = figures.draw(chart)
    svg = figures.render(figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    # White backgrounds are the page's own.
    svg = re.sub(r'style="fill: #ffffff[^"]*"', 'style="fill: none"', svg)
    names = [*((x, f"var(--c{i})") for i, x in enumerate(figures.COLOURS))]
    for colour, variable in [*names, (figures.INK, "var(--muted)"), (figures.GRID, "var(--line)")]:
        svg = svg.replace(colour, variable)
    svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)
    title, data = escape(chart.title), html.escape(json.dumps(_list_points(chart, figure, groups)))
    means = f"; each point is the mean of {chart.mean_of} steps" if chart.mean_of > 1 else ""
    return (
        f'<figure class="chart" tabindex="0" role="group" aria-label="{title}, a curve; left and '
        f'right read its points" data-points="{data}"><figcaption>{title}{means}</figcaption>'
        f'<div class="plot">{svg}<div class="cursor" hidden></div></div>'
        "<output></output></figure>"
    )


def _list_points(chart: Chart, figure: Any, groups: Sequence[Group]) -> dict[str, Any]:
    """Returns what the page reads out at a point: steps, and the curves' values there."""
    axes = figure.axes[0]
    box, limits = axes.get_position(), axes.get_xlim()

    def round_all(values: np.ndarray) -> list[float]:
        return [float(f"{x:.4g}") for x in values]

    return {
        "box": [round(float(box.x0), 4), round(float(box.x1), 4)],
        "limits": [round(float(x), 3) for x in limits],
        "curves": [
            {
                "name": groups[curve.group].name,
                "colour": curve.group % len(figures.COLOURS),
                "steps": curve.steps_N.tolist(),
                "mean": round_all(curve.mean_N),
                **(
                    {"low": round_all(curve.low_N), "high": round_all(curve.high_N)}
                    if curve.runs > 1
                    else {}
                ),
            }
            for curve in chart.curves
        ],
    }


def _has_transcripts(report: Report) -> bool:
    examples = any(evaluation.examples for evaluation in report.evaluations)
    return examples or any(run.rollouts for run in report.runs)


def _pack_transcripts(report: Report) -> str:
    sources = [transcripts.pack_run(run) for run in report.runs if run.rollouts]
    sources += [transcripts.pack_evaluation(x) for x in report.evaluations if x.examples]
    return transcripts.to_script(sources)


def _render_files(runs: Sequence[Run]) -> str:
    blocks = []
    for run in runs:
        for name in _RUN_FILES:
            value = getattr(run, name)
            text = json.dumps(value, indent=2) if value else ""
            if text:
                blocks.append(
                    f"<details><summary>{escape(run.name)}/{name}.json</summary>"
                    f'<pre tabindex="0">{html.escape(text)}</pre></details>'
                )
    return "".join(blocks)


def render_markdown(report: Report, images: Sequence[tuple[str, str]]) -> str:
    """Renders tables and links to images, pairs of a title and a file's name, for a README."""
    parts = [tables.render_markdown(table) for table in report.tables]
    parts += [f"![{title}]({name})" for title, name in images]
    return "\n\n".join(parts) + "\n"
