"""Puts the page of a study together, and its tables as Markdown.

The page is a pure function of study.json and of the results beside it, wherever the directory is.
"""

import dataclasses
from collections.abc import Sequence

from distill.reporting import document, study_claims, study_curves, study_tables, tables
from distill.reporting.document import escape
from distill.reporting.figures import Chart
from distill.reporting.study_claims import Finding
from distill.reporting.study_read import Study
from distill.reporting.tables import Table


@dataclasses.dataclass(frozen=True)
class StudyReport:
    """All that the page of a study shows."""

    study: Study
    findings: Sequence[Finding]
    charts: Sequence[Chart]


def make_report(study: Study) -> StudyReport:
    """Computes what the page of a study shows."""
    return StudyReport(study, study_claims.judge(study), study_curves.make_charts(study))


def render_page(report: StudyReport) -> str:
    """Returns the page, all in ASCII."""
    study = report.study
    seeds = document.render_table(study_tables.tabulate_seeds(study))
    details = f"<details><summary>Each seed</summary>{seeds}</details>" if study.results else ""
    results = document.render_table(study_tables.tabulate_results(study)) + details
    facts = document.render_table(study_tables.tabulate_facts(study))
    sections = [
        ("", _render_notes(study.notes)),
        ("Question", f"<p>{escape(study.question)}</p>{facts}"),
        ("Claims", "".join(map(_render_claim, report.findings))),
        ("Results", results),
        ("Paired differences", _render_filled(study_tables.tabulate_differences(study))),
        ("Curves", _render_charts(report)),
        ("Tuning", _render_filled(study_tables.tabulate_tuning(study))),
        ("Runs", _render_runs(study)),
    ]
    title = f"Study {study.name}: {study.title}" if study.title else f"Study {study.name}"
    return document.render_document(title, sections)


def _render_notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="notes" aria-label="Notes">{items}</ul>' if items else ""


def _render_filled(table: Table) -> str:
    return document.render_table(table) if table.rows else ""


def _render_claim(finding: Finding) -> str:
    """Renders a claim as a list of what was claimed, found and concluded."""
    table = study_tables.tabulate_claims([finding])
    (name, *cells), names = table.rows[0], table.header[1:]
    items = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(cell)}</dd>"
        for label, cell in zip(names, cells, strict=True)
    )
    warning = "" if finding.is_explained else " notes"
    return f'<article class="claim{warning}"><h3>{escape(name)}</h3><dl>{items}</dl></article>'


def _render_charts(report: StudyReport) -> str:
    groups = study_curves.list_groups(report.study)
    charts = "".join(document.render_chart(chart, groups) for chart in report.charts)
    if not charts:
        return ""
    legend = document.render_legend([group.name for group in groups], "Arms")
    return f'{legend}<p>{escape(study_curves.NOTE)}</p><div class="charts">{charts}</div>'


def _render_runs(study: Study) -> str:
    table = study_tables.tabulate_runs(study)
    runs = [x for x in [*study.results, *study.trials] if x.command]
    lines = [escape(f"{x.file}: {x.command}") for x in runs]
    commands = '<pre tabindex="0">' + "\n".join(lines) + "</pre>"
    details = f"<details><summary>Commands</summary>{commands}</details>" if lines else ""
    return (document.render_table(table) if table.rows else "") + details


def render_markdown(report: StudyReport, images: Sequence[tuple[str, str]]) -> str:
    """Renders claims, results and links to images, pairs of a title and a file, for a README."""
    study = report.study
    found = [
        study_tables.tabulate_claims(report.findings),
        study_tables.tabulate_results(study),
        study_tables.tabulate_differences(study),
        study_tables.tabulate_tuning(study),
    ]
    parts = [f"# {study.title}", study.question] if study.question else [f"# {study.title}"]
    parts += [tables.render_markdown(table) for table in found if table.rows]
    parts += [f"![{title}]({name})" for title, name in images]
    notes = [f"- {note}" for note in study.notes]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])]) + "\n"
