"""Tests rates against enumeration, intervals against simulation, and statistics of texts."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy import stats

from distill.evaluation import statistics
from distill.evaluation.tasks import ifeval

Z = 1.959964


def test_pass_at_k_counts_subsets() -> None:
    """Compares with the share of all subsets of k samples that contain a correct one."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            share = sum(map(any, subsets)) / len(subsets)
            assert statistics.pass_at_k(c, n, k) == pytest.approx(share, abs=1e-12), (n, c, k)
            closed = 1 - math.prod((n - c - i) / (n - i) for i in range(k))
            assert statistics.pass_at_k(c, n, k) == pytest.approx(closed, abs=1e-12), (n, c, k)


def vote_of(answers: tuple[int | None, ...]) -> float:
    """Probability that 0 wins this vote, ties broken at random."""
    votes = Counter(a for a in answers if a is not None)
    most = [a for a, n in votes.items() if n == max(votes.values())]
    return (0 in most) / len(most) if most else 0.0


@pytest.mark.parametrize(
    ("counts", "none"),
    [
        ([3, 2, 1], 1),
        ([0, 4], 1),
        ([2, 2, 2], 0),
        ([1, 1, 1, 1], 2),
        ([5], 2),
        ([0], 3),
        ([4, 3], 0),
    ],
)
def test_majority_at_k_counts_subsets(counts: list[int], none: int) -> None:
    """Compares with the mean vote over all subsets of k samples."""
    samples = [a for a, count in enumerate(counts) for _ in range(count)] + [None] * none
    for k in range(1, len(samples) + 1):
        expected = np.mean([vote_of(s) for s in itertools.combinations(samples, k)])
        assert statistics.majority_at_k(counts, none, k) == pytest.approx(expected, abs=1e-12), k


def test_majority_of_many_is_quick_and_exact() -> None:
    assert statistics.majority_at_k([1] * 64, 0, 64) == pytest.approx(1 / 64)
    assert statistics.majority_at_k([33, 31], 0, 64) == 1


def test_wilson_interval_matches_r() -> None:
    assert statistics.wilson_interval(0, 0) == (0.0, 1.0)
    # R: prop.test(8, 10, correct=FALSE)
    np.testing.assert_allclose(statistics.wilson_interval(8, 10), (0.4901625, 0.9433178), atol=1e-6)
    low, high = statistics.wilson_interval(0, 10)
    assert low == 0.0 and high == pytest.approx(0.2775328)
    low, high = statistics.wilson_interval(10, 10)
    assert low == pytest.approx(0.7224672) and high == pytest.approx(1.0)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (1, 1), (611, 1000)])
def test_one_sample_per_problem_gives_wilsons_interval(right: int, n: int) -> None:
    """At its ends p, right/n is z standard deviations of p away."""
    rate, (low, high) = statistics.compute_accuracy([[i < right] for i in range(n)])
    assert rate == right / n
    assert 0 <= low <= rate <= high <= 1
    for p in (low, high):
        if p not in (0.0, 1.0):
            assert abs(rate - p) == pytest.approx(Z * math.sqrt(p * (1 - p) / n), abs=1e-9)
    assert (low, high) == pytest.approx(statistics.wilson_interval(right, n))


def test_identical_samples_do_not_narrow_the_interval() -> None:
    """Samples of one problem are correlated: 30 problems count as 30, however many samples agree,
    and no success does not prove a rate of zero."""
    for share in (0, 1):
        single = statistics.compute_accuracy([[share == 1]] * 30)[1]
        many = statistics.compute_accuracy([[share == 1] * 64] * 30)[1]
        # The quantile is Student's with 29 degrees of freedom, so the interval is a little wider.
        assert many[1] - many[0] == pytest.approx(single[1] - single[0], rel=0.1)
        assert many[0] <= single[0] and many[1] >= single[1] and share in many
    same = [[i % 3 == 0] for i in range(90)]
    (low, high), (wide_low, wide_high) = (
        statistics.compute_accuracy(hits)[1] for hits in (same, [hit * 16 for hit in same])
    )
    assert wide_high - wide_low == pytest.approx(high - low, rel=0.03)
    assert statistics.compute_accuracy([[True, False]]) == (0.5, (0.0, 1.0))


def test_more_samples_narrow_the_interval_of_similar_problems() -> None:
    widths = []
    for n in (2, 8, 64):
        low, high = statistics.compute_accuracy([[i % 2 == 0 for i in range(n)]] * 100)[1]
        assert low < 0.5 < high
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2] > 0.02


def covered(problems: int, samples: int, mean: float, alike: float) -> float:
    """Returns the share of 2,000 intervals that contain the mean of difficulties drawn from Beta(a,
    b) with 1 / (1 + a + b) = 1 - alike. The standard error of the share is half a point."""
    draw = np.random.default_rng([problems, samples, int(100 * mean), int(100 * alike)])
    rates = np.full((2000, problems), mean)
    if alike < 1:
        scale = alike / (1 - alike)
        rates = draw.beta(mean * scale, (1 - mean) * scale, rates.shape)
    intervals = [
        statistics.compute_interval(s, samples) for s in draw.binomial(samples, rates) / samples
    ]
    return float(np.mean([low <= mean <= high for low, high in intervals]))


@pytest.mark.parametrize("problems", [60, 100, 500])
def test_interval_of_one_sample_per_problem_has_its_coverage(problems: int) -> None:
    """Sums the binomial distribution over every number of right answers."""
    right = np.arange(problems + 1)
    ends = np.array(
        [statistics.compute_interval(np.array([k / problems] * problems), 1) for k in right]
    )
    for mean in np.arange(0.1, 0.9, 0.005):
        holds = (ends[:, 0] <= mean) & (mean <= ends[:, 1])
        covers = stats.binom.pmf(right, problems, mean)[holds].sum()
        assert 0.93 <= covers <= 0.97, mean


@pytest.mark.parametrize("samples", [2, 4, 64])
@pytest.mark.parametrize("problems", [60, 200])
@pytest.mark.parametrize("alike", [1.0, 0.9, 0.5, 0.1])
def test_interval_of_several_samples_has_its_coverage(
    problems: int, samples: int, alike: float
) -> None:
    """Ranges from problems of equal difficulty to problems that are always or never solved."""
    for mean in (0.2, 0.5, 0.7):
        assert 0.93 <= covered(problems, samples, mean, alike) <= 0.97, mean


@pytest.mark.parametrize("samples", [4, 64])
def test_interval_of_few_problems_has_its_coverage(samples: int) -> None:
    """30 problems with one or two in twenty solved: AIME with a small model."""
    for mean, alike in itertools.product((0.05, 0.1), (1.0, 0.8, 0.4, 0.1)):
        assert 0.92 <= covered(30, samples, mean, alike) <= 0.985, (mean, alike)


@pytest.mark.parametrize(("samples", "gain"), [(1, 0.0), (1, 0.1), (4, 0.05)])
def test_paired_interval_has_its_coverage(samples: int, gain: float) -> None:
    draw = np.random.default_rng([samples, 7])
    covered = 0
    for _ in range(1500):
        rates = draw.beta(0.6, 0.6, 80) * (1 - gain)
        ours, theirs = (draw.binomial(samples, r) / samples for r in (rates, rates + gain))
        low, high = statistics.compute_difference(ours.tolist(), theirs.tolist())[1]
        covered += low <= gain <= high
    assert 0.93 <= covered / 1500 <= 0.97


def test_p_value_of_single_samples_is_mcnemars_exact_test() -> None:
    a = [1] * 40 + [0] * 9 + [1] * 2 + [0] * 49
    b = [1] * 40 + [1] * 9 + [0] * 2 + [0] * 49
    mean, (low, high) = statistics.compute_difference(a, b)
    assert mean == pytest.approx(0.07) and low < 0.07 < high
    coins = list(itertools.product((0, 1), repeat=11))
    extreme = np.mean([sum(c) >= 9 or sum(c) <= 2 for c in coins])
    assert (
        statistics.compute_p_value(a, b)
        == statistics.compute_p_value(b, a)
        == pytest.approx(extreme)
    )
    assert statistics.compute_difference(b, a)[1] == pytest.approx((-high, -low))
    mean, (low, high) = statistics.compute_difference(a, a)
    assert mean == 0 and low < 0 < high and statistics.compute_p_value(a, a) == 1


def test_p_value_of_several_samples_is_a_sign_flip_test() -> None:
    """With several samples per problem, compares with all 2^8 sign flips."""
    a = np.array([0.25, 0.5, 0.5, 0.75, 0.25, 1.0, 0.5, 0.0])
    d = np.array([0.25, 0.25, 0.5, 0.0, 0.5, -0.25, 0.25, 0.25])
    flips = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = np.mean(np.abs(flips @ d) >= abs(d.sum()))
    assert statistics.compute_p_value(a.tolist(), (a + d).tolist()) == pytest.approx(
        exact, abs=0.015
    )


def graded_row(name: str, outcome: str, **fields: Any) -> statistics.Record:
    row = {"id": name, "correct": outcome == "correct", "outcome": outcome}
    return {**row, "formatted": outcome != "no_answer", "repeats": False, **fields}


def test_summary_of_graded_rows() -> None:
    rows = [
        graded_row("a", "correct", found="1", length=3, finish_reason="stop"),
        graded_row("a", "wrong", found="2", length=5, finish_reason="stop"),
        graded_row("b", "correct", found="1", length=4, finish_reason="stop"),
        graded_row("b", "correct", found="1.0", length=4, finish_reason="stop"),
        graded_row("c", "wrong", found="7", length=8, finish_reason="stop"),
        graded_row("c", "no_answer", found=None, length=9, finish_reason="length", repeats=True),
    ]
    summary = statistics.summarise_rows(rows, [1, 2, 3])
    assert summary == {
        "problems": 3,
        "responses": 6,
        "accuracy": pytest.approx(0.5),
        "avg@2": pytest.approx(0.5),
        "interval": pytest.approx(
            statistics.compute_accuracy([[True, False], [True] * 2, [False] * 2])[1]
        ),
        "outcomes": {"correct": 3, "wrong": 2, "no_answer": 1},
        "format_rate": pytest.approx(5 / 6),
        "repetition_rate": pytest.approx(1 / 6),
        "pass@1": pytest.approx(0.5),
        "pass@2": pytest.approx(2 / 3),  # and no pass@3, because there are too few samples
        "maj@2": pytest.approx((0.5 + 1 + 0) / 3),
        "k_intervals": {
            "pass@1": statistics.wilson_interval(1.5, 3),
            "pass@2": statistics.wilson_interval(2, 3),
        },
        "mean_length": 5.5,
        "mean_length_finished": 4.8,
        "truncation_rate": pytest.approx(1 / 6),
    }
    stored = [{k: v for k, v in row.items() if k not in ("length", "found")} for row in rows]
    fewer = statistics.summarise_rows(stored, [1, 2]).keys()
    assert not {"mean_length", "mean_length_finished", "truncation_rate", "maj@2"} & fewer


def test_instruction_summary_has_four_accuracies() -> None:
    rows = [
        graded_row("a", "correct", strict=[True, True], loose=[True, True]),
        graded_row("b", "wrong", strict=[True, False], loose=[True, True]),
        graded_row("c", "error", strict=[True, None], loose=[True, None]),
    ]
    assert ifeval.summarise(rows)["ifeval"] == {
        "prompt_strict": 0.5,
        "instruction_strict": pytest.approx(4 / 5),
        "prompt_loose": 1.0,
        "instruction_loose": 1.0,
        "unchecked": 1,
    }


def test_equal_answers_share_votes_whatever_their_spelling() -> None:
    same = [r"\dfrac{1}{2}", r"\frac{1}{2}", r"\tfrac{1}{2}.", r" \left \frac{1}{2}\right "]
    assert len({statistics.normalise_answer(text) for text in same}) == 1
    assert (
        statistics.normalise_answer("1,000")
        == statistics.normalise_answer(r"1{,}000".replace("{,}", ","))
        == "1000"
    )
    assert statistics.normalise_answer(r"\text{ east }") == "east"
    assert (
        len({statistics.normalise_answer(text) for text in ("−60°.", r"-60^\circ", "$-60$")}) == 1
    )
    assert statistics.normalise_answer("BCA") != statistics.normalise_answer("ABC")
    assert statistics.normalise_answer("(1,2)") != statistics.normalise_answer("(12)")
    assert statistics.normalise_answer(None) is statistics.normalise_answer(" ") is None


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("The area is πr², so α = 3.", "How large?", False),
        ("所以答案是 5", "How many?", True),
        ("So 答案 is 5", "How many?", False),  # two letters may be a name
        ("所以答案是 5", "多少？", False),
        ("Значит, 5", "How many?", True),
        ("ответ 5, 答案是五", "Сколько?", True),
        ("La réponse est 5", "How many?", False),
    ],
)
def test_language_mixing_is_detected(text: str, prompt: str, expected: bool) -> None:
    assert statistics.has_mixed_languages(text, prompt) == expected


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("所以答案是八。" * 12, True),
        ("だから答えは八です" * 12, True),
        ("ดังนั้นคำตอบคือแปด" * 12, True),
        ("그래서 답은 팔입니다 " * 12, True),
        ("哈" * 40, True),
        ("!" * 400, True),  # no space in a long loop
        ("一列火车每小时行驶八十公里，三个半小时一共行驶二百八十公里，所以答案是二百八十。", False),
        ("แม่ค้ามีส้มอยู่สามสิบผลขายไปแล้วสิบสองผลตอนนี้เหลือส้มสิบแปดผล", False),
        (f"{7**350}", False),
        ("哈" * 14, False),  # too short to tell
    ],
)
def test_a_loop_is_found_where_words_have_no_spaces(text: str, repeats: bool) -> None:
    assert statistics.is_repetitive(text) is repeats
