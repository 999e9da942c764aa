"""Judges the claims of a study: numbers with intervals over seeds, a verdict, and a sentence.

- contrast: a weighted sum of figures of arms is above 0, below it, or at most a margin.
- reach: one arm reaches the other's best figure in so many times less of an axis.
- slope: a figure grows linearly in the logarithm of an amount; how much of it equals another arm.

Intervals are those of Student's t over seeds, 95%; ratios are averaged in their logarithms.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from distill.reporting.read import Record
from distill.reporting.study_read import Figure, Result, Study, join_seeds

REPRODUCED, NOT_REPRODUCED, REVERSED = "reproduced", "not reproduced", "reversed"
NOT_SETTLED, ONE_SEED, NO_RESULT = "not settled", "not settled: one seed", "no result yet"
MINUS = "\N{MINUS SIGN}"  # between names, which may have hyphens
SMALLER = "same direction, smaller"
AXES: dict[str, str] = {
    "step": "steps",
    "seconds": "seconds",
    "sampled_tokens": "sampled tokens",
    "trained_tokens": "trained tokens",
    "flops": "FLOPs",
    "flops_student": "FLOPs of the student",
    "flops_teacher": "FLOPs of the teacher",
    "flops_sampling": "FLOPs of sampling",
}
_MAX_LOG = 700.0  # whose exponential is still a number
_MIN_R2 = 0.9  # of a figure that counts as linear in the logarithm
_MAX_DOUBLINGS = 60.0  # from the largest amount; beyond, a line does not reach a figure


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds. `low` and `high` are None with one value, which has no interval."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    def is_above(self, x: float) -> bool:
        """Returns True if the whole interval is above `x`."""
        return self.low is not None and self.low > x

    def is_below(self, x: float) -> bool:
        return self.high is not None and self.high < x


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a study found about a claim. `found` and `detail` are texts; `detail` may be ""."""

    claim: Record
    verdict: str
    estimate: Estimate | None
    found: str
    detail: str

    @property
    def is_explained(self) -> bool:
        """False if the sentence of the definition explains another verdict."""
        explained = self.claim.get("verdict_explained", "")
        return not explained or explained.partition(":")[0] == self.verdict.partition(":")[0]


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Returns the mean of values, at least one, with its 95% t interval."""
    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        half = float(stats.t.ppf(0.975, len(values) - 1)) * error
        low, high = mean - half, mean + half
    return Estimate(mean, low, high, tuple(values))


def estimate_ratio(values: Sequence[float]) -> Estimate:
    """Returns the geometric mean of positive values, with the 95% t interval of their logs."""
    x = estimate_mean([math.log(value) for value in values])
    low, high = (None if y is None else math.exp(min(y, _MAX_LOG)) for y in (x.low, x.high))
    return Estimate(math.exp(x.mean), low, high, tuple(values))


def format_number(x: float, figure: Figure, sign: str = "") -> str:
    return f"{100 * x:{sign}.1f}" if figure.is_share else f"{x:{sign}.4g}"


def format_estimate(x: Estimate, figure: Figure, sign: str = "") -> str:
    """Returns a mean with its interval, of a share in percent."""
    return _write(x, lambda value: format_number(value, figure, sign))


def _write(x: Estimate, write: Callable[[float], str]) -> str:
    if x.low is None or x.high is None:
        return f"{write(x.mean)} (one seed: no interval)"
    return f"{write(x.mean)} [{write(x.low)}, {write(x.high)}]"


def judge(study: Study) -> list[Finding]:
    """Returns what the results say about each claim, in the order of the definition."""
    kinds = {"contrast": _judge_contrast, "reach": _judge_reach, "slope": _judge_slope}
    return [kinds[claim["kind"]](study, claim) for claim in study.claims]


def list_seeds(study: Study, arms: Sequence[str]) -> list[int]:
    """Returns the seeds that arms together have or are to have."""
    trained = [x for x in map(study.find_arm, arms) if not x.is_repeated]
    if not trained:
        return list(study.find_arm(arms[0]).seeds)
    return sorted({seed for arm in trained for seed in arm.seeds})


def contrast_seeds(
    study: Study, weights: dict[str, float], figure: str
) -> tuple[dict[int, float], list[str]]:
    """Returns the weighted sum of a figure at each seed, and words about seeds that lack one."""
    sums, words = {}, []
    for seed in list_seeds(study, list(weights)):
        found, missing = _find_results(study, list(weights), seed)
        missing += [x.arm for x in found.values() if figure not in x.final]
        if missing:
            words.append(f"seed {seed} is missing: no {figure} of {', '.join(missing)}")
        else:
            sums[seed] = sum(w * found[arm].final[figure] for arm, w in weights.items())
    return sums, words


def _find_results(
    study: Study, arms: Sequence[str], seed: int
) -> tuple[dict[str, Result], list[str]]:
    """Returns the results of arms at a seed, and the arms that have none."""
    found = {arm: study.find_result(arm, seed) for arm in dict.fromkeys(arms)}
    missing = [arm for arm, result in found.items() if result is None]
    return {arm: result for arm, result in found.items() if result is not None}, missing


def describe_weights(weights: dict[str, float]) -> str:
    """Returns a weighted sum as a text, as in "0.5 a + b"."""
    parts = []
    for arm, weight in weights.items():
        size = "" if abs(weight) == 1 else f"{abs(weight):g} "
        parts.append((f"{MINUS} " if weight < 0 else "+ ") + size + arm)
    text = " ".join(parts)
    return text.removeprefix("+ ")


def _judge_contrast(study: Study, claim: Record) -> Finding:
    weights, expected = claim["weights"], claim["expected"]
    sums, words = contrast_seeds(study, weights, claim["figure"])
    if not sums:
        return Finding(claim, NO_RESULT, None, "", "; ".join(words))
    figure, unit = study.find_figure(claim["figure"]), str(claim.get("unit") or "")
    figure = dataclasses.replace(figure, is_share=unit == "points")
    x = estimate_mean(list(sums.values()))
    found = f"{describe_weights(weights)}: {format_estimate(x, figure, '+')}"
    found = f"{found} {unit}".rstrip() + f", {study.find_figure(claim['figure']).title}"
    if expected == "none":
        margin = claim["margin"]
        is_met = x.high is not None and x.high <= margin
        verdict = REPRODUCED if is_met else REVERSED if x.is_above(margin) else NOT_REPRODUCED
        words.insert(0, f"margin: {format_number(margin, figure)} {unit}".rstrip())
    else:
        is_met, is_reversed = x.is_above(0), x.is_below(0)
        if expected == "below":
            is_met, is_reversed = is_reversed, is_met
        verdict = REPRODUCED if is_met else REVERSED if is_reversed else NOT_REPRODUCED
    if claim.get("claimed_range") and x.low is not None and x.high is not None:
        low, high = claim["claimed_range"]
        holds = "holds" if x.low <= low and high <= x.high else "holds a part of"
        holds = "does not hold" if high < x.low or low > x.high else holds
        ends = " to ".join(format_number(end, figure) for end in dict.fromkeys((low, high)))
        words.append(f"the interval {holds} the claimed {ends} {unit}".rstrip())
    detail = _end(x, words, lambda value: format_number(value, figure, "+"))
    return Finding(claim, ONE_SEED if x.low is None else verdict, x, found, detail)


def _end(x: Estimate, words: Sequence[str], write: Callable[[float], str]) -> str:
    """Returns words with the values of all seeds."""
    count = len(x.values)
    values = [f"{count} seeds: {', '.join(map(write, x.values))}"] if count > 1 else []
    return "; ".join([*words, *values])


def find_crossing(result: Result, axis: str, figure: str, target: float) -> float | None:
    """Returns where on an axis the running maximum of a curve first reaches `target`, between
    points by a straight line; None if it never does."""
    curve = read_curve(result, axis, figure)
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y >= target:
            if before is None:
                return x
            return before[0] + (x - before[0]) * (target - before[1]) / (y - before[1])
        # The running maximum is flat where the curve is below it.
        before = x, max(y, before[1]) if before else y
    return None


def read_curve(result: Result, axis: str, figure: str) -> list[tuple[float, float]]:
    """Returns the points of a run that have both quantities, in the order of the axis."""
    return sorted((x[axis], x[figure]) for x in result.points if axis in x and figure in x)


def _judge_reach(study: Study, claim: Record) -> Finding:
    fast, slow, axis, figure = (claim[key] for key in ("fast", "slow", "axis", "figure"))
    ratios: dict[int, float] = {}  # at which neither end is unknown
    at_most: dict[int, float] = {}  # where the fast arm never reaches the target
    at_least: dict[int, float] = {}  # where the slow one does not
    missing_words, words = list[str](), list[str]()
    for seed in list_seeds(study, [fast, slow]):
        found, missing = _find_results(study, [fast, slow], seed)
        curves = {arm: read_curve(result, axis, figure) for arm, result in found.items()}
        missing += [arm for arm, curve in curves.items() if len(curve) < 2]
        if missing:
            missing_words.append(f"seed {seed} is missing: no curve of {', '.join(missing)}")
            continue
        target = claim.get("at")
        target = max(y for _, y in curves[slow]) if target is None else target
        places = [find_crossing(found[arm], axis, figure, target) for arm in (fast, slow)]
        ends = [curves[arm][-1][0] for arm in (fast, slow)]
        known = [end if x is None else x for x, end in zip(places, ends, strict=True)]
        if places == [None, None]:
            words.append(f"at seed {seed} neither arm reaches the target")
        elif min(known) <= 0:
            words.append(f"at seed {seed} {fast if known[0] <= 0 else slow} is at the target from "
                         "the start: no ratio")  # fmt: skip
        else:
            into = at_most if places[0] is None else at_least if places[1] is None else ratios
            into[seed] = known[1] / known[0]
    if at_most:
        words.insert(0, f"{fast} never reaches the target at {join_seeds([*at_most])}")
    if at_least:
        words.insert(0, f"{slow} never reaches it at {join_seeds([*at_least])}, where the least "
                     "possible ratio counts")  # fmt: skip
    if not (ratios or at_most or at_least):
        verdict = NOT_SETTLED if words else NO_RESULT
        return Finding(claim, verdict, None, "", "; ".join([*words, *missing_words]))
    words += missing_words
    # Bounds take the side of the claim that is harder to pass.
    bounded = estimate_ratio([*ratios.values(), *at_least.values(), *at_most.values()])
    if at_most:
        is_reversed = bounded.is_below(1) and not at_least
        verdict = REVERSED if is_reversed else NOT_REPRODUCED
        verdict = ONE_SEED if bounded.low is None else verdict
    else:
        verdict = _judge_ratio(bounded, claim, is_least=bool(at_least))
    shown = [*ratios.values(), *at_least.values()]
    if not shown:
        words.append(f"the ratio is at most {format_ratio(max(at_most.values()))}")
        return Finding(claim, verdict, None, "", "; ".join(words))
    x = estimate_ratio(shown)
    to = f"{slow}'s best" if claim.get("at") is None else f"{claim['at']:g}"
    found = f"{slow} needs {_write(x, format_ratio)} times the {AXES.get(axis, axis)} of {fast}"
    found += f" to reach {to}{_mention_range(x, claim, verdict)}"
    return Finding(claim, verdict, x, found, _end(x, words, format_ratio))


def _mention_range(x: Estimate, claim: Record, verdict: str) -> str:
    """Returns a warning if a claim is not reproduced, and its range is not excluded either."""
    low, high = claim.get("claimed_range") or (None, None)
    if verdict != NOT_REPRODUCED or low is None or x.low is None or x.high is None:
        return ""
    return f"; the interval also holds {low:g} to {high:g}" if x.low <= low <= x.high else ""


def format_ratio(x: float) -> str:
    return f"{x:.3g}" if 0.001 <= x < 10_000 else f"{x:.2e}"


def _judge_ratio(x: Estimate, claim: Record, is_least: bool = False) -> str:
    """Returns the verdict about a ratio that is claimed to be above 1.

    Args:
      is_least: the ratio may be larger, so it cannot be called smaller than claimed.
    """
    if x.low is None or x.high is None:
        return ONE_SEED
    if x.is_below(1):
        return NOT_SETTLED if is_least else REVERSED
    if not x.is_above(1):
        return NOT_REPRODUCED
    claimed = claim.get("claimed_range")
    if claimed and x.high < claimed[0]:
        return NOT_SETTLED if is_least else f"{NOT_REPRODUCED}: {SMALLER}"
    return REPRODUCED


@dataclasses.dataclass(frozen=True)
class Line:
    """A least-squares line on the logarithm to base 2."""

    slope: float
    offset: float
    r2: float | None  # None if all values are equal

    def find_log(self, y: float) -> float | None:
        """Returns the logarithm at which the line is `y`; None if it does not rise."""
        return (y - self.offset) / self.slope if self.slope > 0 else None


def fit_line(amounts: Sequence[float], values: Sequence[float]) -> Line:
    """Fits values at amounts, two or more of which differ."""
    x_N, y_N = np.log2(amounts), np.asarray(values, float)
    slope = float(np.dot(x_N - x_N.mean(), y_N - y_N.mean()) / np.sum((x_N - x_N.mean()) ** 2))
    offset = float(y_N.mean() - slope * x_N.mean())
    total = float(np.sum((y_N - y_N.mean()) ** 2))
    rest = float(np.sum((y_N - offset - slope * x_N) ** 2))
    return Line(slope, offset, 1 - rest / total if total > 0 else None)


def _judge_slope(study: Study, claim: Record) -> Finding:
    amounts, figure_key = claim["amounts"], claim["figure"]
    names, other = list(amounts), claim.get("reach_of")
    figure, words = study.find_figure(figure_key), list[str]()
    lines: dict[int, Line] = {}
    values: dict[int, list[float]] = {}
    found_at: dict[int, dict[str, Result]] = {}
    for seed in list_seeds(study, [*names, *([other] if other else [])]):
        found, missing = _find_results(study, [*names, *([other] if other else [])], seed)
        missing += [x.arm for x in found.values() if figure_key not in x.final]
        if missing:
            words.append(f"seed {seed} is missing: no {figure_key} of {', '.join(missing)}")
            continue
        values[seed] = [found[arm].final[figure_key] for arm in names]
        lines[seed] = fit_line([amounts[arm] for arm in names], values[seed])
        found_at[seed] = found
    if not lines:
        return Finding(claim, NO_RESULT, None, "", "; ".join(words))
    slope = estimate_mean([line.slope for line in lines.values()])
    r2 = fit_line(list(amounts.values()), np.mean([*values.values()], axis=0).tolist()).r2
    unit = " points" if figure.is_share else ""
    text = f"each doubling adds {format_estimate(slope, figure, '+')}{unit}, {figure.title}"
    text += f", R² {'undefined' if r2 is None else f'{r2:.2f}'}"
    verdict = REPRODUCED if slope.is_above(0) and (r2 or 0) >= _MIN_R2 else NOT_REPRODUCED
    verdict = REVERSED if slope.is_below(0) else verdict
    verdict = ONE_SEED if slope.low is None else verdict
    write = functools.partial(format_number, figure=figure, sign="+")
    if not other:
        return Finding(claim, verdict, slope, text, _end(slope, words, write))
    needed, ratios, more = _compare_costs(claim, lines, found_at)
    words += more
    if needed:
        x = estimate_ratio(needed)
        text += f"; the line reaches {other} at {_write(x, lambda value: f'{value:,.0f}')}"
        if x.mean > max(amounts.values()):
            words.append(f"beyond the largest amount that was measured, {max(amounts.values()):,g}")
    if not claim.get("cost"):
        return Finding(claim, verdict, slope, text, _end(slope, words, write))
    if not ratios:
        return Finding(claim, NOT_SETTLED, None, text, "; ".join(words))
    x = estimate_ratio(ratios)
    axis = AXES.get(claim["cost"], claim["cost"])
    text += f", for {_write(x, format_ratio)} times the {axis} of {other}"
    return Finding(claim, _judge_ratio(x, claim), x, text, _end(x, words, format_ratio))


def _compare_costs(
    claim: Record, lines: dict[int, Line], found_at: dict[int, dict[str, Result]]
) -> tuple[list[float], list[float], list[str]]:
    """Returns the amount at which the line equals the other arm, and the ratio of costs there, at
    the seeds that have them; and words about the others."""
    other, cost, amounts = claim["reach_of"], claim.get("cost"), claim["amounts"]
    needed, ratios, words = [], [], []
    for seed, line in lines.items():
        results = found_at[seed]
        log = line.find_log(results[other].final[claim["figure"]])
        top = math.log2(max(amounts.values()))
        if log is None or abs(log - top) > _MAX_DOUBLINGS:
            words.append(f"at seed {seed} the line never reaches {other}")
            continue
        needed.append(2**log)
        if cost:
            costs = {arm: max((p[cost] for p in results[arm].points if cost in p), default=0.0)
                     for arm in (*amounts, other)}  # fmt: skip
            if min(costs.values()) <= 0:
                lacking = " and ".join(arm for arm, value in costs.items() if value <= 0)
                words.append(f"seed {seed} has no {cost} of {lacking}")
            else:
                ratios.append(_find_cost(log, amounts, costs) / costs[other])
    return needed, ratios, words


def _find_cost(log: float, amounts: dict[str, float], costs: dict[str, float]) -> float:
    """Returns the cost of 2**log: between the measured amounts on a line in logarithms, outside
    them proportional to the amount."""
    arms = sorted(amounts, key=lambda arm: amounts[arm])
    places, logs = [math.log2(amounts[x]) for x in arms], [math.log2(costs[x]) for x in arms]
    inside = min(max(log, places[0]), places[-1])
    return 2 ** (float(np.interp(inside, places, logs)) + log - inside)
