"""Writes reports to files."""

from collections.abc import Sequence

from etils import epath

from distill.reporting import figures, page, read
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
    folder, images = epath.Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for metric, title in figures.MAIN_METRICS.items():
        chart = figures.make_chart(report.groups, metric)
        if chart is None:
            continue
        figure = figures.draw(chart, report.groups)
        for kind in ("svg", "png"):
            name = f"{metric.replace('/', '_')}.{kind}"
            (folder / name).write_bytes(figures.render(figure, kind))
        images.append((title, f"{metric.replace('/', '_')}.svg"))
    paths.write_text(folder / "report.md", page.render_markdown(report, images))
