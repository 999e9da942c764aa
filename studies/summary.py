"""python -m studies.summary: README's table of claims and its two pictures, from results/.

Prints the table in Markdown, and writes each picture for a light and a dark page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from matplotlib import pyplot
from matplotlib.figure import Figure

from benchmarks import figures
from benchmarks.figures import Theme
from distill.reporting import study_claims, study_read
from distill.reporting.study_read import Study
from distill.runtime import cli, console, paths

OPTIONS = flags.FlagValues()
RESULTS = flags.DEFINE_string("results", "results", "Directory of the studies' results.", OPTIONS)
OUT = flags.DEFINE_string("out", "docs/images", "Directory for the pictures.", OPTIONS)

# Claims of README's table, by study; the pages have the others.
CLAIMS = {
    "a": (
        "steps to equal accuracy",
        "cost to equal accuracy, against RL",
        "cost to equal accuracy, against SFT",
        "accuracy against SFT on the most traces",
        "the same by all three boxes",
        "the same, greedily",
        "accuracy against RL",
    ),
    "b": ("distillation widens", "RL does not widen"),
    "c": ("verified traces", "distillation after SFT"),
    "d": ("the gap narrows", "the gap narrows, greedily"),
    "e": ("one prompt is as good as many",),
    "f": ("documents cost behaviour", "nearly all behaviour comes back", "own samples do harm"),
    "g": (
        "sampled against reverse",
        "entropy weights against reverse",
        "prefixes lose nothing",
        "drift stops lose nothing",
    ),
    "h": (
        "thinking is learned as well beside the other mode",
        "at once against one after another",
    ),
    "i": (
        "as good as reading",
        "distillation against SFT, equal steps",
        "other manuals suffer less",
    ),
    "j": ("ordered helps", "half traces helps", "hybrid helps", "a stored teacher is as good"),
}
# Arms of the pictures -> colours of a theme, and names for readers.
ARMS = {
    "opd": ("student", "on-policy distillation"),
    "sft 16000": ("update", "SFT on 16,000 responses of the teacher"),
    "grpo": ("score", "GRPO"),
    "start": ("other", "student before"),
    "teacher": ("teacher", "teacher"),
}
KS = (1, 2, 4, 8, 16, 32, 64)


def list_rows(studies: Sequence[Study]) -> list[list[str]]:
    """Returns the rows of the table: claim, what was found, verdict, command, seeds and time."""
    rows = []
    for study in studies:
        seconds = sum(x.seconds or 0.0 for x in [*study.results, *study.trials])
        chosen = CLAIMS.get(study.name, ())
        findings = {x.claim["name"]: x for x in study_claims.judge(study)}
        for name in chosen:
            finding = findings.get(name)
            if finding is None or finding.estimate is None:
                continue
            seeds = len(finding.estimate.values)
            rows.append(
                [
                    finding.claim["claimed"],
                    finding.found,
                    finding.verdict,
                    f"[`make study NAME={study.name}`](results/{study.name}/report.md)",
                    f"{seeds}",
                    console.format_duration(seconds),
                ]
            )
    return rows


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Renders the table in Markdown."""
    header = ["claimed", "found, with 95% interval", "verdict", "command", "seeds", "core time"]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_curves(study: Study, theme: Theme) -> Figure:
    """Draws the accuracy at temperature 1 of each seed by steps and by operations."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained", sharey=True)
    for arm, (colour, label) in ARMS.items():
        for result in study.get_results(arm).values():
            points = [x for x in result.points if x.get("sampled") is not None]
            values = [100 * x["sampled"] for x in points]
            for axis, key in zip(axes, ("step", "flops"), strict=True):
                first = result.seed == study.seeds[0]
                if points:
                    places = [x[key] for x in points]
                    axis.plot(places, values, color=theme[colour], linewidth=1.2, alpha=0.8,
                              label=label if first and key == "step" else None)  # fmt: skip
                elif arm == "teacher":
                    level = 100 * result.final["sampled"]
                    axis.axhline(level, color=theme[colour], linestyle="--",
                                 label=label if key == "step" else None)  # fmt: skip
    axes[0].set(
        xlabel="step of 32 responses (GRPO: 128)",
        ylabel="%",
        title="Accuracy at T = 1, held-out problems",
    )
    axes[1].set(xlabel="FLOPs of student, teacher and sampling", xscale="log")
    axes[1].set_title("The same by cost")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_pass(study: Study, theme: Theme) -> Figure:
    """Draws pass@k by k, the mean over seeds with the least and the largest."""
    figure, axes = pyplot.subplots(figsize=(8.4, 3.1), layout="constrained")
    for arm, (colour, label) in ARMS.items():
        results = list(study.get_results(arm).values())
        if not results:
            continue
        values = [[100 * x.final[f"many/contents@{k}"] for x in results] for k in KS]
        means = [sum(x) / len(x) for x in values]
        axes.plot(KS, means, color=theme[colour], marker=".", label=label,
                  linestyle="--" if arm == "teacher" else "-")  # fmt: skip
        axes.fill_between(KS, [min(x) for x in values], [max(x) for x in values],
                          color=theme[colour], alpha=0.2, linewidth=0)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(KS, [str(k) for k in KS])
    axes.set(xlabel="k", ylabel="%", title="Problems that at least one of k samples solves")
    axes.legend(loc="lower right")
    return figure


PICTURES: dict[str, tuple[str, Any]] = {
    "study-curves": ("a", draw_curves),
    "study-pass": ("b", draw_pass),
}


def read_studies(folder: Path) -> list[Study]:
    """Reads the studies that have results, in the order of their names."""
    return [study_read.read_study(str(x.parent)) for x in sorted(folder.glob("*/study.json"))]


def main() -> None:
    studies = {study.name: study for study in read_studies(Path(RESULTS.value))}
    print(render_table(list_rows(list(studies.values()))))
    for name, (letter, draw) in PICTURES.items():
        if letter in studies:
            for suffix in figures.THEMES:
                out = Path(paths.check_output(f"{OUT.value}/{name}{suffix}.svg"))
                figures.save_figure(draw, studies[letter], out, suffix)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    cli.run(main, OPTIONS)
