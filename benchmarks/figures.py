"""python -m benchmarks.figures [--out=docs/images]: draws README's figures from results/.

Writes each figure twice, for a light and a dark page (NAME.svg, NAME-dark.svg). With the same
version of matplotlib, the same results give the same bytes.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from absl import flags

from distill.runtime import cli, paths

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.figure import Figure

OPTIONS = flags.FlagValues()
OUT = flags.DEFINE_string("out", "docs/images", "Directory for the figures.", OPTIONS)

RESULTS = Path(__file__).parent / "results"
# The colours of Okabe and Ito, which colour-blind readers can tell apart; ink is of text and axes.
THEMES = {
    "": {"ink": "#1f2328", "faint": "#d1d9e0", "student": "#0072b2", "teacher": "#d55e00"}
    | {"decode": "#56b4e9", "score": "#e69f00", "update": "#009e73", "other": "#8c959f"},
    "-dark": {"ink": "#f0f6fc", "faint": "#3d444d", "student": "#56b4e9", "teacher": "#ff9a4d"}
    | {"decode": "#56b4e9", "score": "#e69f00", "update": "#2fc79a", "other": "#9198a1"},
}
Theme = dict[str, str]


def read_results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def draw_quickstart(results: dict[str, Any], theme: Theme) -> Figure:
    """Draws accuracy and reverse KL of each seed by the step of training."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.1), layout="constrained")
    for run in results["runs"]:
        accuracy, kl = run["accuracy"], run["reverse_kl"]
        percent = [100 * value for value in accuracy["value"]]
        left.plot(accuracy["step"], percent, color=theme["student"], marker=".", alpha=0.8)
        right.plot(kl["step"], kl["value"], color=theme["student"], linewidth=1, alpha=0.8)
    models = results["runs"][0]["models"]
    teacher = 100 * models["teacher"]["accuracy"]
    left.axhline(teacher, color=theme["teacher"], linestyle="--")
    size = f"{models['teacher']['parameters'] / 1e6:.2f} M parameters"
    left.text(0, teacher - 1, f"teacher, {size}", color=theme["teacher"], va="top")
    size = f"{models['student_after']['parameters'] / 1e6:.2f} M parameters"
    count = f"{len(results['runs'])} seeds"
    left.text(1, 0.08, f"student, {size}, {count} ", color=theme["student"], ha="right",
              transform=left.transAxes)  # fmt: skip
    left.set(ylim=(None, 102), ylabel="%", xlabel="step", title="Accuracy on held-out problems")
    right.set(ylim=(0, None), ylabel="nats a token", xlabel="step", title="Reverse KL to teacher")
    return figure


def draw_decoding(results: dict[str, Any], theme: Theme) -> Figure:
    """Draws tokens a second of each sampler by the number of rows decoded together."""
    figure, axes = pyplot.subplots(figsize=(8.4, 2.8), layout="constrained")
    samplers = {"ours": "student", "transformers": "other", "tunix": "teacher"}
    batches = sorted({row["batch"] for row in results["decode"]})
    for i, (sampler, colour) in enumerate(samplers.items()):
        rates = [
            row["decode_tokens_per_second"]
            for batch in batches
            for row in results["decode"]
            if (row["sampler"], row["batch"]) == (sampler, batch)
        ]
        label = "qwen3-distill" if sampler == "ours" else sampler
        places = [place + (i - 1) * 0.26 for place in range(len(batches))]
        bars = axes.bar(places, rates, 0.24, color=theme[colour], label=label)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(range(len(batches)), [f"{batch} at once" for batch in batches])
    axes.set(ylabel="tokens a second", title="Decoding: Qwen3-0.6B, float32, two CPU cores")
    axes.legend(loc="upper left")
    return figure


def draw_packing(results: dict[str, Any], theme: Theme) -> Figure:
    """Draws seconds a step, padded and packed, divided into its three parts."""
    figure, axes = pyplot.subplots(figsize=(8.4, 2.8), layout="constrained")
    rows = results["rows"]
    names = [f"{row['mean_response']} of the limit, {row['layout']}" for row in rows]
    starts = [0.0] * len(names)
    for part in ("decode", "score", "update"):
        seconds = [row[part] for row in rows]
        axes.barh(names, seconds, left=starts, color=theme[part], label=part)
        starts = [start + value for start, value in zip(starts, seconds, strict=True)]
    for place, (row, end) in enumerate(zip(rows, starts, strict=True)):
        axes.text(end + 0.5, place, f"{row['step']:.1f} s", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="seconds a step", ylabel="mean response", xlim=(0, 115))
    axes.set_title("A step of 8B from 32B on v6e-64, compiled and not run")
    axes.legend(loc="upper right")
    return figure


def draw_step(results: dict[str, Any], theme: Theme) -> Figure:
    """Draws the seconds of the parts of a step that benchmarks.gpu measured, one after another."""
    figure, axes = pyplot.subplots(figsize=(8.4, 1.7), layout="constrained")
    colours = {"sampling": "decode", "scoring": "score", "update": "update", "rest": "other"}
    total, start = sum(results["parts"].values()), 0.0
    for part, colour in colours.items():
        seconds = results["parts"][part]
        label = f"{part}: {seconds:.3g} s, {seconds / total:.0%}"
        axes.barh([""], [seconds], left=[start], color=theme[colour], label=label)
        start += seconds
    axes.set(xlabel="seconds", xlim=(0, total), title=results["title"])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=len(colours))
    return figure


# Name of a figure -> its file in results/, and what draws it.
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any], Theme], Figure]]] = {
    "quickstart": ("quickstart.json", draw_quickstart),
    "decoding": ("rollout-float32.json", draw_decoding),
    "packing": ("packing.json", draw_packing),
}


def make_style(theme: Theme) -> Any:
    """Returns matplotlib's settings; texts stay texts, and ids of elements are always the same."""
    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {
        **dict.fromkeys(ink, theme["ink"]),
        "axes.edgecolor": theme["faint"],
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "qwen3-distill",
    }


def draw_figure(name: str, theme: Theme) -> Figure:
    file, draw = FIGURES[name]
    with matplotlib.rc_context(make_style(theme)):
        return draw(read_results(file), theme)


def save_figure(
    draw: Callable[[dict[str, Any], Theme], Figure],
    results: dict[str, Any],
    path: Path,
    suffix: str = "",
) -> None:
    """Draws results in one of THEMES, and writes the figure to `path`, whole or not at all."""
    theme, file = THEMES[suffix], io.StringIO()
    with matplotlib.rc_context(make_style(theme)):
        figure = draw(results, theme)
        figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    paths.write_text(path, file.getvalue())


def main() -> None:
    for name, (file, draw) in FIGURES.items():
        for suffix in THEMES:
            out = paths.check_output(f"{OUT.value}/{name}{suffix}.svg")
            save_figure(draw, read_results(file), out, suffix)
            print(out)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
