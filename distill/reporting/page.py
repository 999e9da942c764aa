"""Puts a report together: one page of HTML that needs nothing else, or figures and Markdown.

The page is a pure function of the files that it shows: no time of day, no random names.
"""

import dataclasses
import html
import json
from collections.abc import Sequence

from distill.reporting import document, figures, tables, transcripts
from distill.reporting.document import escape
from distill.reporting.figures import Group
from distill.reporting.read import Evaluation, Run
from distill.reporting.tables import Table

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
    names = [run.name for run in report.runs] + [x.name for x in report.evaluations if not x.run]
    bodies = {table.title: document.render_table(table) for table in report.tables}
    bodies["Curves"] = _render_charts(report.groups)
    if _has_transcripts(report):
        bodies["Transcripts"] = document.read_asset("transcripts.html")
    bodies["Files"] = _render_files(report.runs)
    sections = [("", _render_notes(report)), *((x, bodies.get(x, "")) for x in _SECTIONS)]
    title, data = f"Report: {', '.join(names)}", _pack_transcripts(report)
    return document.render_document(title, sections, data, script, policy)


def _render_notes(report: Report) -> str:
    """Renders what is missing, broken or to be warned of, beside the run's name."""
    noted = [(x.name, x.notes) for x in [*report.runs, *report.evaluations] if x.notes]
    items = [f"<li><b>{escape(name)}</b>: {escape('; '.join(notes))}</li>" for name, notes in noted]
    if not items:
        return ""
    return f'<ul class="notes" aria-label="Notes">{"".join(items)}</ul>'


def _render_charts(groups: Sequence[Group]) -> str:
    """Renders the main metrics, and the others where they open on request."""
    main, others = [], []
    for metric in figures.list_metrics(groups):
        chart = figures.make_chart(groups, metric)
        if chart:
            kind = main if metric in figures.MAIN_METRICS else others
            kind.append(document.render_chart(chart, groups))
    if not main and not others:
        return ""
    more = f"<details><summary>{len(others)} more metrics</summary>"
    more += f'<div class="charts">{"".join(others)}</div></details>'
    return (
        document.render_legend([group.name for group in groups], "Runs")
        + f'<div class="charts">{"".join(main)}</div>{more if others else ""}'
    )


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
