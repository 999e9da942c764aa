"""The curves of a study: each arm's mean over seeds, with a band from the lowest to the highest.

Where the points of seeds are at different places of the axis, as with FLOPs, they are interpolated
by straight lines at the places of all seeds, within the part of the axis that every seed covers.
A curve over `k` is of figures of the finished models: with y = "pass@", pass@1, pass@2 and so on.
"""

from collections.abc import Sequence

import numpy as np

from distill.reporting.figures import MAX_POINTS, Chart, Curve, Group
from distill.reporting.read import Record
from distill.reporting.study_claims import AXES, read_curve
from distill.reporting.study_read import Result, Study

NOTE = "Lines are means over seeds, bands go from the lowest to the highest seed, and an arm "
NOTE += "without training is a level line. The start has no place on a logarithmic axis."
_COUNT = "k"  # an axis


def list_groups(study: Study) -> list[Group]:
    """Returns the arms, whose numbers choose colours and dashes."""
    return [Group(arm.name, ()) for arm in study.arms]


def make_charts(study: Study) -> list[Chart]:
    """Returns a chart for each entry of `curves` of which there are points."""
    charts = [_make_chart(study, entry) for entry in study.curves]
    return [chart for chart in charts if chart]


def _make_chart(study: Study, entry: Record) -> Chart | None:
    x: str = entry["x"]
    y: str = entry["y"]
    is_log, figure = entry.get("log_x", False), study.find_figure(y)
    if x == _COUNT:
        figure = next((f for f in study.figures if _read_count(f.key, y)), figure)
    scale = 100 if figure.is_share else 1
    curves = []
    for number, arm in enumerate(study.arms):
        results = study.get_results(arm.name).values()
        found = [_read_points(result, x, y) for result in results]
        is_level = all(len(points) < 2 for points in found)
        if is_log and not is_level:  # the start has no place on the axis
            found = [[point for point in points if point[0] > 0] for points in found]
        found = [points for points in found if points]
        if found:
            if is_level:
                grid_N, values_RN = np.zeros(1), np.array([[points[-1][1]] for points in found])
            else:
                grid_N, values_RN = interpolate_curves(found)
            if len(grid_N):
                mean_N, low_N, high_N = values_RN.mean(0), values_RN.min(0), values_RN.max(0)
                ends = (scale * low_N, scale * high_N)
                curves.append(
                    Curve(number, grid_N, scale * mean_N, *ends, len(found), is_level=is_level)
                )
    if all(curve.is_level for curve in curves):
        return None
    axis = "step" if x == "step" else AXES.get(x, x)
    title = entry.get("title") or f"{figure.title}, by {axis}"
    title += ", %" if figure.is_share else ""
    return Chart(y, title, curves, [], 1, axis=axis, is_log=is_log, joins_points=True)


def _read_points(result: Result, x: str, y: str) -> list[tuple[float, float]]:
    """Returns the points of a result in the order of the axis; one point if nothing was trained."""
    if x == _COUNT:
        pairs = [(_read_count(key, y), value) for key, value in result.final.items()]
        return sorted((float(count), value) for count, value in pairs if count)
    if not result.points and y in result.final:
        return [(0.0, result.final[y])]
    return read_curve(result, x, y)


def _read_count(key: str, y: str) -> int:
    """Returns the number after `y` in the name of a figure, 0 if there is none."""
    digits = key.removeprefix(y) if key.startswith(y) else ""
    return int(digits) if digits.isdecimal() and len(digits) < 10 else 0


def interpolate_curves(
    found: Sequence[Sequence[tuple[float, float]]],
) -> tuple[np.ndarray, np.ndarray]:
    """Puts curves on one grid.

    Args:
      found: curves, each of one or more points in the order of the axis.

    Returns:
      The grid, [N], empty if the curves have no part of the axis in common; the values of each
      curve there, [curves, N].
    """
    start, end = max(points[0][0] for points in found), min(points[-1][0] for points in found)
    grid = sorted({x for points in found for x, _ in points if start <= x <= end})
    stride = -(-len(grid) // MAX_POINTS)
    grid_N = np.array([*grid[: -1 : max(1, stride)], *grid[-1:]])
    rows = [np.interp(grid_N, *np.array(points).T) for points in found]
    return grid_N, np.array(rows)
