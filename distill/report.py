"""python -m distill.report runs/a runs/b … --out=report.html: one page about runs and evaluations.

Reads directories of runs and of evaluations, and writes a page that needs nothing else: curves with
bands over seeds, results with intervals and paired differences, cost, differences of configs, and
transcripts with each token coloured by its reverse KL. What is missing or broken in a directory is
said beside its name, and all else is shown. With --figures it also writes the main curves as SVG
and PNG, and the tables as Markdown. With --watch it writes nothing, serves the page on this machine
and follows the runs until Ctrl-C.

A directory with study.json is a study, and has a page of its own: claims with verdicts, results
over seeds, curves and tuning.
"""

from absl import flags

from distill.runtime import cli, paths
from models.errors import UserError

OPTIONS = flags.FlagValues()
OUT = flags.DEFINE_string("out", "report.html", "HTML file to write.", flag_values=OPTIONS)
FIGURES = flags.DEFINE_string(
    "figures", "", "Directory for the main curves (SVG, PNG) and report.md.", flag_values=OPTIONS
)
TRANSCRIPTS = flags.DEFINE_integer(
    "transcripts", 200, "Most transcripts of a run.", lower_bound=0, flag_values=OPTIONS
)
WATCH = flags.DEFINE_boolean(
    "watch", False, "Serve the page on this machine and follow the runs.", flag_values=OPTIONS
)
PORT = flags.DEFINE_integer(
    "port", 0, "Of --watch; 0: any free one.", 0, 65535, flag_values=OPTIONS
)
ARGUMENTS: list[str] = []  # directories


def main() -> None:
    if not ARGUMENTS:
        raise UserError("name a run: python -m distill.report runs/a runs/b --out=report.html")
    from distill.reporting import document, study_read, watching, writing

    names = list(dict.fromkeys(paths.expand_home(name) for name in ARGUMENTS))
    is_watched = WATCH.value  # which refuses buckets
    near = [name for name in names if not (is_watched and paths.is_remote(name))]
    studies = [name for name in near if study_read.is_study(name)]
    if studies and (len(names) > 1 or is_watched):
        reason = "--watch follows runs only" if is_watched else "name it alone"
        raise UserError(f"{studies[0]}: a study has a page of its own: {reason}")
    if is_watched:
        watching.serve(names, PORT.value, TRANSCRIPTS.value)
    files = (
        "study.json",
        "config.json",
        "metrics.jsonl",
        "environment.json",
        "summary.json",
        "examples.jsonl",
    )
    out = paths.check_output(OUT.value, *(f"{name}/{file}" for name in names for file in files))
    if not paths.is_remote(out) and out.exists():
        with out.open("rb") as file:
            head = file.read(1000)
        if head and not document.is_page(head):
            raise UserError(f"--out={OUT.value}: exists and is not a report; name another file")
    if FIGURES.value:
        paths.check_output(f"{FIGURES.value}/report.md", flag="--figures", creates_folder=False)
    if studies:
        study = writing.write_study(studies[0], out)
    else:
        shown = writing.write_report(names, out, TRANSCRIPTS.value)
    print(f"report    {OUT.value}")
    if FIGURES.value:
        if studies:
            writing.write_study_figures(study, FIGURES.value)
        else:
            writing.write_figures(shown, FIGURES.value)
        print(f"figures   {FIGURES.value}: SVG, PNG and report.md")


if __name__ == "__main__":
    cli.run(main, OPTIONS, ARGUMENTS)
