"""Writes reports to files."""

from collections.abc import Sequence

from etils import epath

from distill.reporting import figures, page, read, study_curves, study_page, study_read
from distill.reporting.figures import Chart, Group
from distill.runtime import paths

MAX_TRANSCRIPTS = 200  # of a run


def write_report(
    names: Sequence[str], out: epath.PathLike, max_transcripts: int = MAX_TRANSCRIPTS
) -> page.Report:
    """Writes the report of directories to the file `out`, and returns what it shows.

    Raises:
      UserError: naming a directory that is neither a run nor an evaluation.
    """
    report = page.make_report(*read.read_directories(names, max_transcripts))
    paths.write_text(out, page.render_page(report))
    return report


def write_figures(report: page.Report, folder: epath.PathLike) -> None:
    """Writes the main curves as SVG and PNG, and report.md with them and the tables."""
    charts = [figures.make_chart(report.groups, metric) for metric in figures.MAIN_METRICS]
    named = [(chart.metric.replace("/", "_"), chart) for chart in charts if chart]
    images = _write_charts(named, report.groups, folder)
    paths.write_text(epath.Path(folder) / "report.md", page.render_markdown(report, images))


def write_study(name: str, out: epath.PathLike) -> study_page.StudyReport:
    """Writes the page of a study to the file `out`, and returns what it shows.

    Raises:
      UserError: if the study's definition cannot be read.
    """
    report = study_page.make_report(study_read.read_study(name))
    paths.write_text(out, study_page.render_page(report))
    return report


def write_study_figures(report: study_page.StudyReport, folder: epath.PathLike) -> None:
    """Writes the curves of a study as SVG and PNG, and report.md with them and the tables."""
    groups = study_curves.list_groups(report.study)
    # Numbered, as the names of quantities need not be names of files.
    named = [(f"curve_{number}", chart) for number, chart in enumerate(report.charts)]
    images = _write_charts(named, groups, folder)
    text = study_page.render_markdown(report, images)
    paths.write_text(epath.Path(folder) / "report.md", text)


def _write_charts(
    named: Sequence[tuple[str, Chart]], groups: Sequence[Group], folder: epath.PathLike
) -> list[tuple[str, str]]:
    """Writes charts by name as SVG and PNG; returns titles and names of the SVGs."""
    folder, images = epath.Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, chart in named:
        figure = figures.draw(chart, groups)
        for kind in ("svg", "png"):
            (folder / f"{name}.{kind}").write_bytes(figures.render(figure, kind))
        images.append((chart.title, f"{name}.svg"))
    return images
