"""Curves of metrics over steps, drawn by matplotlib: in the page, and as files.

Runs whose configs differ in the seed alone are one group: a line at the mean of its runs, and a
band from the lowest to the highest of them.
"""

import bisect
import dataclasses
import io
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distill.reporting.read import Record, Run

# Okabe and Ito's colours, which all readers can tell apart (jfly.uni-koeln.de/color), dark enough
# for lines on white; the page replaces them in the dark.
COLOURS = ("#0072b2", "#c04f00", "#007a5a", "#a8487f", "#7a6a00", "#2f87bd", "#1f2328")
_DASHES: tuple = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)))
INK, GRID = "#3d444d", "#d1d9e0"
MAX_POINTS = 400  # of a curve; more steps are averaged
_SIZE = (4.4, 2.7)  # inches: legible at the width of a phone
_AXES = (0.13, 0.17, 0.85, 0.76)  # left, bottom, width and height: shares of the figure

MAIN_METRICS = {
    "train/loss": "Loss",
    "train/reverse_kl": "Reverse KL, nats a token",
    "train/sampled_reverse_kl": "Reverse KL, estimated from sampled tokens, nats a token",
    "reward/mean": "Mean reward",
    "eval/accuracy": "Accuracy in evaluations",
    "rollout/mean_length": "Mean response, tokens",
    "rollout/truncated": "Share of truncated responses",
    "train/entropy": "Entropy of the student, nats",
    "train/grad_norm": "Gradient norm",
}

SHARES = ("accuracy", "_rate", "/truncated")  # endings of metrics from 0 to 1

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: Sequence[Run]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric of a group. Where a step's value is known of some runs only, they alone count."""

    group: int  # its number, which chooses colour and dash
    steps_N: np.ndarray
    mean_N: np.ndarray
    low_N: np.ndarray
    high_N: np.ndarray
    runs: int  # that have the metric
    breaks: Sequence[int] = ()  # indices at which another stage begins, and the line is broken
    is_level: bool = False  # one value, wherever on the axis

    @property
    def parts(self) -> list[slice]:
        """The points of each stage."""
        ends = [0, *self.breaks, len(self.steps_N)]
        return [slice(*pair) for pair in itertools.pairwise(ends)]


@dataclasses.dataclass(frozen=True)
class Chart:
    """The curves of a metric, and what is written around them."""

    metric: str
    title: str
    curves: list[Curve]
    boundaries: list[int]  # steps at which a stage begins
    mean_of: int  # steps that a point is the mean of
    axis: str = "step"
    is_log: bool = False  # the axis
    joins_points: bool = False  # curves have values between their points, too


def list_metrics(groups: Sequence[Group]) -> list[str]:
    """Returns the metrics that any run has, the main ones first."""
    names = {name for group in groups for run in group.runs for row in run.metrics for name in row}
    names -= {"step", "stage"}
    main = [name for name in MAIN_METRICS if name in names]
    return main + sorted(names - set(main))


def make_chart(groups: Sequence[Group], metric: str) -> Chart | None:
    """Returns the curves of a metric; None if no run has it."""
    last = max((run.steps for group in groups for run in group.runs), default=0)
    has_gaps = metric.startswith("eval/")  # every point counts there
    width = 1 if has_gaps else max(1, -(-last // MAX_POINTS))
    shift = int(has_gaps)  # an evaluation is named by the steps that were done before it
    curves = []
    for number, group in enumerate(groups):
        starts = _find_boundaries(group.runs)
        values: list[dict[int, float]] = [
            _average_steps(r.metrics, metric, width, starts) for r in group.runs
        ]
        values = [x for x in values if x]
        steps = sorted({step for x in values for step in x})
        if not steps:
            continue
        places = {bisect.bisect_left(steps, start) for start in starts}
        known = [[x[step] for x in values if step in x] for step in steps]
        curves.append(
            Curve(
                number,
                np.array(steps) + shift + (width - 1) / 2,
                np.array([sum(x) / len(x) for x in known]),
                np.array([min(x) for x in known]),
                np.array([max(x) for x in known]),
                len(values),
                sorted(places - {0, len(steps)}),
            )
        )
    if not curves:
        return None
    shown = [run for group in groups for run in group.runs if any(metric in x for x in run.metrics)]
    boundaries = [step + shift for step in _find_boundaries(shown)]
    return Chart(metric, MAIN_METRICS.get(metric, metric), curves, boundaries, width)


def _average_steps(
    rows: Sequence[Record], metric: str, width: int, starts: Sequence[int]
) -> dict[int, float]:
    """Returns the means of a metric over intervals of `width` steps, by their first steps. No
    interval holds steps of two stages, the later of which begin at `starts`."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if metric in row:
            start = max((x for x in starts if x <= row["step"]), default=0)
            first = start + (row["step"] - start) // width * width
            found.setdefault(first, []).append(row[metric])
    return {step: sum(x) / len(x) for step, x in found.items()}


def _find_boundaries(runs: Sequence[Run]) -> list[int]:
    """Returns the steps at which a stage of any run begins, but for the first."""
    found = set()
    for run in runs:
        stages = [row["stage"] for row in run.metrics]
        pairs = zip(run.metrics[1:], stages, stages[1:], strict=False)
        found |= {row["step"] for row, before, now in pairs if before != now}
    return sorted(found)


def draw(chart: Chart, groups: Sequence[Group] = ()) -> Figure:
    """Draws a chart, with a legend if the groups are given."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE)
        left, bottom, width, height = _AXES
        axes = figure.add_axes((left, bottom, width, height - 0.08 * bool(groups)))
        for step in chart.boundaries:
            axes.axvline(step - 0.5, color=INK, linewidth=0.7, linestyle=(0, (2, 3)))
        for curve in chart.curves:
            # Not to be read as a formula, nor left out for a leading underscore.
            label = f" {groups[curve.group].name}".replace("$", r"\$") if groups else ""
            _draw_curve(axes, curve, label)
        axes.set_xlabel(chart.axis)
        if chart.is_log:
            axes.set_xscale("log")
        elif chart.axis == "step":
            axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        else:
            axes.ticklabel_format(axis="x", scilimits=(-3, 4), useMathText=True)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
        low, high = axes.get_ylim()
        if chart.metric.endswith(SHARES):  # the limits around a single 0 are no shares
            axes.set_ylim(*((0, 1) if high - low < 0.15 else (max(-0.02, low), min(1.02, high))))
        placed = [curve for curve in chart.curves if not curve.is_level]
        ends = [step for curve in placed for step in curve.steps_N[[0, -1]].tolist()]
        if min(ends) == max(ends):
            x = ends[0]
            axes.set_xlim(*((x / 2, 2 * x) if chart.is_log else (x - 1, x + 1)))
        if groups:
            axes.set_title(chart.title)
        if len(groups) > 1:
            axes.legend(frameon=False, fontsize=8)
        return figure


def _draw_curve(axes: Axes, curve: Curve, label: str) -> None:
    rounds, place = divmod(curve.group, len(COLOURS))
    style: Any = {
        "color": COLOURS[place],
        "linestyle": _DASHES[(place + rounds) % len(_DASHES)],  # another one at the second use
        "linewidth": 1.4,
    }
    if curve.is_level:
        axes.axhline(float(curve.mean_N[0]), label=label, **style)
        return
    # What a stage measures, such as its loss, is not what the one before measured: a line from one
    # to the other would look like learning.
    for part in curve.parts:
        steps_N = curve.steps_N[part]
        is_short = len(curve.steps_N) < 15 or len(steps_N) == 1
        axes.plot(
            steps_N,
            curve.mean_N[part],
            marker="o" if is_short else "",
            markersize=3,
            label=label if part.start == 0 else "",
            **style,
        )
        if curve.runs > 1:
            band = (steps_N, curve.low_N[part], curve.high_N[part])
            axes.fill_between(*band, color=style["color"], alpha=0.18, linewidth=0)


_STYLE: Any = {
    **{"svg.fonttype": "none", "svg.hashsalt": "distill", "font.family": "sans-serif"},
    **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK},
    **{"axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6, "text.color": INK},
    "axes.titlesize": 10,
}


def render(figure: Figure, kind: str) -> bytes:
    """Returns a figure as an svg or png file; the same bytes for the same figure."""
    out = io.BytesIO()
    metadata: dict = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format=kind, metadata=metadata, dpi=200)
    return out.getvalue()
