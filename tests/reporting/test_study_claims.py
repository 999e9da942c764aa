"""Tests the claims of a study: intervals against computations of their own, and every verdict."""

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from distill.reporting import study_claims, study_read
from distill.reporting.study_claims import Finding
from tests.support.study_files import (
    CONTRAST,
    REACH,
    SLOPE,
    make_definition,
    make_result,
    write_study,
)


def judge(tmp_path: Path, claim: dict[str, Any], results: list[dict[str, Any]]) -> Finding:
    definition = make_definition(claims=[claim])
    (finding,) = study_claims.judge(
        study_read.read_study(str(write_study(tmp_path / "z", definition, results)))
    )
    return finding


def judge_pair(tmp_path: Path, claim: dict[str, Any], opd: list, grpo: list) -> Finding:
    """Judges a claim about curves of `greedy` at seeds 0, 1, …; None: no such result."""
    results = [
        make_result(arm, seed, values)
        for arm, curves in (("opd", opd), ("grpo", grpo))
        for seed, values in enumerate(curves)
        if values is not None
    ]
    return judge(tmp_path, claim, results)


def t_density(x: float, df: int) -> float:
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    return scale * (1 + x * x / df) ** (-(df + 1) / 2)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.5, 0.4], [1, 1, 1, 5, 7, -3.0]])
def test_intervals_hold_95_percent_of_the_density_of_t(values: list[float]) -> None:
    """Integrates Student's density itself between the ends."""
    x = study_claims.estimate_mean(values)
    assert x.low is not None and x.high is not None
    assert x.mean == pytest.approx(statistics.mean(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    low, high = ((end - x.mean) / error for end in (x.low, x.high))
    share, _ = integrate.quad(t_density, low, high, args=(len(values) - 1,))
    assert share == pytest.approx(0.95, abs=1e-6) and low == pytest.approx(-high)
    ends = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (x.low, x.high) == pytest.approx((ends.low, ends.high))


def test_ratios_are_averaged_in_their_logarithms() -> None:
    x = study_claims.estimate_ratio([2.0, 8.0, 4.0])
    assert x.mean == pytest.approx(4) and x.low is not None and x.high is not None
    half = 4.302653 * math.log(2) / math.sqrt(3)  # quantile of two degrees of freedom, from a table
    assert (x.low, x.high) == pytest.approx((4 / math.exp(half), 4 * math.exp(half)), rel=1e-6)


@pytest.mark.parametrize(
    ("differences", "changes", "verdict"),
    [
        ([0.10, 0.11, 0.12], {}, "reproduced"),
        ([-0.10, -0.11, -0.12], {}, "reversed"),
        ([0.10, -0.10, 0.01], {}, "not reproduced"),
        ([0, 0, 0], {}, "not reproduced"),
        ([-0.10, -0.11, -0.12], {"expected": "below"}, "reproduced"),
        ([0.10, 0.11, 0.12], {"expected": "below"}, "reversed"),
        ([0.01, 0.011, 0.012], {"expected": "none", "margin": 0.02}, "reproduced"),
        ([-0.3, -0.31, -0.32], {"expected": "none", "margin": 0.02}, "reproduced"),
        ([0.01, 0.03, 0.02], {"expected": "none", "margin": 0.02}, "not reproduced"),
        ([0.10, 0.11, 0.12], {"expected": "none", "margin": 0.02}, "reversed"),
        ([0.10], {}, "not settled: one seed"),
        ([], {}, "no result yet"),
    ],
)
def test_verdicts_of_contrasts(
    tmp_path: Path, differences: list[float], changes: dict[str, Any], verdict: str
) -> None:
    opd = [[0.5 + x] for x in differences]
    finding = judge_pair(tmp_path, CONTRAST | changes, opd, [[0.5]] * len(opd))
    assert finding.verdict == verdict
    if len(differences) == 1:
        assert "one seed: no interval" in finding.found


def test_a_contrast_takes_a_single_result_for_every_seed(tmp_path: Path) -> None:
    results = [make_result("opd", seed, [0.5 + seed / 100]) for seed in range(3)]
    results.append(make_result("start", 0, [0.25]))
    claim = CONTRAST | {"weights": {"opd": 1, "start": -2}}
    finding = judge(tmp_path, claim, results)
    assert finding.estimate
    assert finding.estimate.values == pytest.approx((0.0, 0.01, 0.02))
    assert finding.found.startswith("opd \N{MINUS SIGN} 2 start: +1.0 [-1.5, +3.5] points")
    # An arm of several seeds of which one is done stands for that seed alone.
    results = [x for x in results if x["arm"] == "start" or x["seed"] == 0]
    assert judge(tmp_path / "1", claim, results).verdict == "not settled: one seed"


def test_missing_seeds_and_numbers_are_said(tmp_path: Path) -> None:
    finding = judge_pair(tmp_path, CONTRAST, [[0.6], [0.61], [0.6]], [[0.5], None, [float("nan")]])
    assert "seed 1 is missing: no greedy of grpo" in finding.detail
    assert "seed 2 is missing: no greedy of grpo" in finding.detail
    assert finding.verdict == "not settled: one seed"


@pytest.mark.parametrize(
    ("claimed", "words"),
    [
        ([0.10, 0.11], "the interval holds the claimed 10.0 to 11.0 points"),
        ([0.11, 0.5], "the interval holds a part of the claimed 11.0 to 50.0 points"),
        ([0.3, 0.3], "the interval does not hold the claimed 30.0 points"),
    ],
)
def test_a_contrast_says_whether_the_interval_holds_the_claimed(
    tmp_path: Path, claimed: list[float], words: str
) -> None:
    claim = CONTRAST | {"claimed_range": claimed}
    finding = judge_pair(tmp_path, claim, [[0.59], [0.6], [0.62]], [[0.5]] * 3)
    assert finding.verdict == "reproduced" and words in finding.detail


def find_first(curve: list[float], target: float) -> float:
    """Walks along the running maximum in small steps until it reaches the target."""
    best = np.maximum.accumulate(curve)
    xs = np.linspace(0, 10 * (len(curve) - 1), 100_001)
    ys = np.interp(xs, 10.0 * np.arange(len(curve)), best)
    return float(xs[np.argmax(ys >= target - 1e-12)])


def test_ratios_of_steps_are_those_of_a_walk_along_the_curves(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    opd = [[0.2, *(0.2 + 0.6 * draw.random(6)), 0.9] for _ in range(3)]
    grpo = [[0.2, *(0.2 + 0.5 * draw.random(9))] for _ in range(3)]
    finding = judge_pair(tmp_path, REACH, opd, grpo)
    expected = [
        find_first(slow, max(slow)) / find_first(fast, max(slow))
        for fast, slow in zip(opd, grpo, strict=True)
    ]
    assert finding.estimate
    assert finding.estimate.values == pytest.approx(expected, rel=1e-3)
    assert finding.estimate.mean == pytest.approx(statistics.geometric_mean(expected), rel=1e-3)


FAST = [[0.2, 0.2 + x] for x in (0.79, 0.8, 0.81)]  # reaches 0.3 at steps 1.2 to 1.3
SLOW = [[0.2, 0.3]] * 3  # at step 10


@pytest.mark.parametrize(
    ("fast", "slow", "changes", "verdict", "words"),
    [
        (FAST, SLOW, {}, "reproduced", "grpo needs 8 ["),
        (FAST, SLOW, {"claimed_range": [50, 60]}, "not reproduced: same direction, smaller", ""),
        (FAST, SLOW, {"claimed_range": None}, "reproduced", ""),
        (SLOW, FAST, {"at": 0.3}, "reversed", "times the steps of opd to reach 0.3"),
        (FAST, [FAST[1], FAST[2], FAST[0]], {"at": 0.3}, "not reproduced", ""),
        (FAST[:1], SLOW[:1], {}, "not settled: one seed", ""),
        ([], [], {}, "no result yet", ""),
        # The fast arm never reaches the slow one's best.
        (
            [[0.2, 0.25], *FAST[1:]],
            SLOW,
            {},
            "not reproduced",
            "never reaches the target at seed 0",
        ),
        ([[0.2] * 40] * 3, SLOW, {}, "reversed", "never reaches the target at seeds 0, 1, 2"),
        ([[0.2, 0.25]] * 3, SLOW, {}, "not reproduced", "the ratio is at most 1"),
        # The slow one never reaches a fixed value: its last step is the least possible.
        (FAST, SLOW, {"at": 0.9}, "not settled", "grpo never reaches it at seeds 0, 1, 2"),
        (FAST, [[0.2] * 20] * 3, {"at": 0.3}, "reproduced", "least possible ratio"),
        (FAST, SLOW, {"at": 2.0}, "not settled", "at seed 0 neither arm reaches the target"),
        # The slow arm is best at its start.
        (FAST, [[0.2, 0.1]] * 3, {}, "not settled", "is at the target from the start: no ratio"),
    ],
)
def test_verdicts_of_ratios(
    tmp_path: Path, fast: list, slow: list, changes: dict[str, Any], verdict: str, words: str
) -> None:
    finding = judge_pair(tmp_path, REACH | changes, fast, slow)
    assert finding.verdict == verdict
    assert words in f"{finding.found}; {finding.detail}"


def test_a_curve_without_numbers_is_a_missing_seed(tmp_path: Path) -> None:
    slow = [[0.2, float("nan"), float("inf")], None, [0.2, 0.3]]
    finding = judge_pair(tmp_path, REACH, FAST, slow)
    assert finding.verdict == "not settled: one seed"
    assert "seed 0 is missing: no curve of grpo; seed 1 is missing" in finding.detail


def make_sft(values: list[tuple[float, float]], opd: float) -> list[dict[str, Any]]:
    """Returns results with `greedy` of the two amounts; 20 FLOPs at the larger, opd takes 10."""
    results = []
    for seed, (low, high) in enumerate(values):
        results += [
            make_result("sft 100", seed, [0.2, low], flops=0.5),
            make_result("sft 400", seed, [0.2, high], flops=2.0),
            make_result("opd", seed, [0.2, opd]),
        ]
    return results


def test_costs_between_amounts_are_those_measured_there(tmp_path: Path) -> None:
    """The larger amount costs twice the smaller one's 10, not four times; the line is at `opd`
    half-way between them in logarithms, so at the geometric mean of their costs."""
    results = make_sft([(0.4, 0.6), (0.4, 0.6)], 0.5)
    for result in results:
        if result["arm"] == "sft 100":
            result["points"] = make_result("sft 100", 0, [0.2, 0.4])["points"]
    finding = judge(tmp_path, SLOPE, results)
    assert finding.estimate
    assert finding.estimate.values == pytest.approx([math.sqrt(10 * 20) / 10] * 2)


def test_slopes_and_costs_are_those_of_a_library(tmp_path: Path) -> None:
    amounts = {"sft 100": 100, "sft 400": 400, "grpo": 1600}
    draw, results, ratios = np.random.default_rng(1), [], []
    slopes = []
    for seed in range(3):
        ys = [0.4, 0.5, 0.6] + 0.02 * draw.random(3)
        results += [
            make_result(arm, seed, [0.2, y], flops=2.0) for arm, y in zip(amounts, ys, strict=True)
        ]
        results.append(make_result("opd", seed, [0.2, 0.7]))
        slope, offset = np.polyfit(np.log2([*amounts.values()]), ys, 1)
        slopes.append(slope)
        ratios.append(2.0 * 2 ** ((0.7 - offset) / slope) / 1600)
    finding = judge(tmp_path, SLOPE | {"amounts": amounts}, results)
    assert finding.estimate and finding.estimate.values == pytest.approx(ratios)
    line = stats.linregress(
        np.log2([*amounts.values()]),
        [
            statistics.mean(x["final"]["greedy"] for x in results if x["arm"] == arm)
            for arm in amounts
        ],
    )
    assert f"R\N{SUPERSCRIPT TWO} {line.rvalue**2:.2f}" in finding.found
    assert f"{100 * statistics.mean(slopes):+.1f} [" in finding.found


RISING, NOISE = [(0.4, 0.6), (0.4, 0.61), (0.4, 0.59)], [(0.4, 0.3), (0.4, 0.5), (0.4, 0.41)]


@pytest.mark.parametrize(
    ("values", "opd", "changes", "verdict", "words"),
    [
        (RISING, 0.9, {}, "reproduced", "beyond the largest amount that was measured, 400"),
        (RISING, 0.7, {}, "not reproduced: same direction, smaller", "times the FLOPs of opd"),
        (RISING, 0.41, {}, "reversed", ""),
        (RISING, 0.5, {}, "not reproduced", ""),
        (RISING[:1], 0.9, {}, "not settled: one seed", ""),
        ([(x, y - 0.4) for x, y in RISING], 0.9, {}, "not settled", "the line never reaches opd"),
        (RISING, 0.9, {"cost": None}, "reproduced", "the line reaches opd at"),
        (RISING, 0.9, {"cost": "joules"}, "not settled", "seed 0 has no joules of sft 100"),
        (RISING, 0.9, {"cost": None, "reach_of": None}, "reproduced", "each doubling adds"),
        (NOISE, 0.9, {"cost": None, "reach_of": None}, "not reproduced", ""),
        ([(0.5, 0.4), (0.5, 0.41), (0.5, 0.4)], 0.9, {"cost": None}, "reversed", ""),
        ([(0.5, 0.5)] * 3, 0.9, {"cost": None}, "not reproduced", "undefined"),
        ([], 0.9, {}, "no result yet", "seed 2 is missing: no greedy of sft 100"),
    ],
)  # fmt: skip
def test_verdicts_of_slopes(
    tmp_path: Path,
    values: list[tuple[float, float]],
    opd: float,
    changes: dict[str, Any],
    verdict: str,
    words: str,
) -> None:
    results = make_sft(values, opd) or [make_result("opd", 0, [0.2])]
    finding = judge(tmp_path, SLOPE | changes, results)
    assert finding.verdict == verdict
    assert words in f"{finding.found}; {finding.detail}"


@pytest.mark.parametrize(
    ("explained", "is_explained"),
    [
        ("", True),
        ("reproduced", True),
        ("not reproduced", False),
        ("reversed", False),
    ],
)
def test_a_sentence_explains_the_verdict_that_was_computed(
    tmp_path: Path, explained: str, is_explained: bool
) -> None:
    claim = CONTRAST | {"verdict_explained": explained, "why": "because"}
    finding = judge_pair(tmp_path, claim, [[0.6], [0.61], [0.62]], [[0.5]] * 3)
    assert finding.verdict == "reproduced" and finding.is_explained == is_explained


def test_a_smaller_ratio_may_be_explained_in_short(tmp_path: Path) -> None:
    claim = REACH | {"claimed_range": [50, 60], "verdict_explained": "not reproduced"}
    finding = judge_pair(tmp_path, claim, FAST, SLOW)
    assert finding.verdict.endswith("smaller") and finding.is_explained


def test_the_largest_numbers_overflow_nothing(tmp_path: Path) -> None:
    results = [
        make_result(arm, seed, [1e-300, (-1) ** seed * 9e149])
        for arm in ("opd", "grpo", "sft 100", "sft 400")
        for seed in range(3)
    ]
    claims = [CONTRAST | {"weights": {"opd": 1000, "grpo": -1000}}, REACH, SLOPE]
    for number, claim in enumerate(claims):
        assert judge(tmp_path / str(number), claim, results).verdict
