"""What all pages are made of: one HTML file that needs nothing else.

What comes from files is text in it, never markup; its own scripts alone may run (the policy in its
head names their hashes), and it may fetch nothing.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from distill.reporting import figures
from distill.reporting.figures import Chart, Group
from distill.reporting.tables import Table
from distill.runtime import paths

_MAX_UNBROKEN = 60  # characters of a cell that stays on one line


def render_document(
    title: str,
    sections: Sequence[tuple[str, str]],
    data: str = "[]",
    script: str = "",
    policy: str = "",
) -> str:
    """Returns a page, all in ASCII.

    Args:
      title: a text.
      sections: headings and bodies, in HTML; those without a body are left out, and what has no
        heading is not in the list of sections.
      data: the transcripts, as JSON that may stand in a script.
      script: a further script, and what the page's policy must allow for it.
    """
    scripts = [read_asset("page.js"), *([script] if script else [])]
    title = escape(title)
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
<style>{read_asset("page.css")}</style>
</head>
<body>
<header><h1>{title}</h1><nav aria-label="Sections">{" ".join(links)}</nav></header>
<main>
{"".join(bodies)}
</main>
<script type="application/json" id="transcripts-data">{data}</script>
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


def read_asset(name: str) -> str:
    return (resources.files("distill.reporting") / "assets" / name).read_text("ascii")


def escape(text: str) -> str:
    """Returns a text as HTML: control characters as Python escapes them."""
    return html.escape(paths.escape_controls(text))


def make_id(heading: str) -> str:
    return re.sub(r"\W+", "-", heading.lower())


def render_table(table: Table) -> str:
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
    if len(cell) > _MAX_UNBROKEN:
        return ' class="text"'
    return ' class="number"' if re.match(r"[-+]?[\d.,]+(e-?\d+)?( |$|%)", cell) else ""


def render_chart(chart: Chart, groups: Sequence[Group]) -> str:
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

    is_steps = chart.axis == "step"
    return {
        "axis": chart.axis,
        "log": chart.is_log,
        "joined": chart.joins_points,
        "box": [round(float(box.x0), 4), round(float(box.x1), 4)],
        "limits": [round(float(x), 3) if is_steps else float(f"{x:.6g}") for x in limits],
        "curves": [
            {
                "name": groups[curve.group].name,
                "colour": curve.group % len(figures.COLOURS),
                "steps": [x if is_steps else float(f"{x:.6g}") for x in curve.steps_N.tolist()],
                "level": curve.is_level,
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


def render_legend(names: Sequence[str], label: str) -> str:
    """Renders the names of curves with their colours."""
    count = len(figures.COLOURS)
    items = "".join(
        f'<li class="c{i % count}{" again" if i >= count else ""}">{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    return f'<ul class="legend" aria-label="{label}">{items}</ul>'
