"""Statistics of graded responses: rates with confidence intervals, and properties of the text.

Pure functions of rows: no files, no models. Samples of one problem are correlated, so intervals
treat problems, not samples, as independent.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import special

from distill.data import dedup
from distill.rewards import equality

Record = dict[str, object]

Z_95 = 1.959964  # of a 95% interval
_NGRAM_WORDS = 8  # words; shorter runs repeat in ordinary text too

# Scripts that do not occur in an English answer. Greek does, in mathematics.
_SCRIPTS = {
    "han": "\u2e80-\u2fdf\u3005-\u3007\u31c0-\u31ef\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",
    "kana": "\u3041-\u30ff",
    "hangul": "\u1100-\u11ff\uac00-\ud7af",
    "cyrillic": "\u0400-\u052f",
    "arabic": "\u0600-\u06ff\u0750-\u077f",
    "hebrew": "\u0590-\u05ff",
    "devanagari": "\u0900-\u097f",
    "thai": "\u0e01-\u0e5b",
}
_SCRIPT_PATTERNS = tuple(re.compile(f"[{letters}]") for letters in _SCRIPTS.values())
_MIN_FOREIGN_LETTERS = 3  # letters of a foreign script; one or two may be a name or a symbol


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of the rate successes / n; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = Z_95
    rate = successes / n
    scale = 1 + z * z / n
    middle = (rate + z * z / (2 * n)) / scale
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / scale
    # The interval contains the rate, but rounding may exclude it at 0 and at 1.
    return max(0.0, min(rate, middle - half)), min(1.0, max(rate, middle + half))


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Computes the unbiased estimate 1 - C(n-c, k) / C(n, k) of arXiv 2107.03374, eq. 1."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(counts: Sequence[int], abstentions: int, k: int) -> float:
    """Computes maj@k: the probability that the right answer wins a vote of k samples of a problem,
    drawn without replacement, with ties broken at random (self-consistency, arXiv 2203.11171).

    Args:
      counts: number of samples with each answer, the right one's first (0 if no sample has it).
      abstentions: number of samples without an answer, which do not vote.
    """
    total = 0.0
    for votes in range(1, min(counts[0], k) + 1):
        # ways[t, d]: ways to draw d votes for other answers, t of which tie and none wins
        ways = {(0, 0): math.comb(counts[0], votes)}
        for count in counts[1:]:
            after: dict[tuple[int, int], int] = {}
            for (ties, drawn), n in ways.items():
                for more in range(min(count, votes, k - votes - drawn) + 1):
                    state = (ties + (more == votes), drawn + more)
                    after[state] = after.get(state, 0) + n * math.comb(count, more)
            ways = after
        for (ties, drawn), n in ways.items():
            total += n * math.comb(abstentions, k - votes - drawn) / (ties + 1)
    return total / math.comb(sum(counts) + abstentions, k)


def compute_accuracy(hits: Sequence[Sequence[bool]]) -> tuple[float, tuple[float, float]]:
    """Returns the mean over problems of the share of correct samples, and its 95% interval."""
    shares = np.array([np.mean(h) for h in hits])
    return float(np.mean(shares)), compute_interval(shares, max(len(h) for h in hits))


def compute_interval(shares_P: np.ndarray, samples: int) -> tuple[float, float]:
    """Computes the 95% interval of the mean share over the population that the problems sample.

    With one sample per problem this is Wilson's interval. With more, it is Wilson's interval for an
    effective number of independent answers, P / r, where r = var(shares) / (m (1 - m)) falls from
    1, if the samples of a problem always agree, to 1 / samples, if they are independent. The
    effective sample size follows Korn and Graubard 1998, and so does the quantile of Student's t,
    used to the extent that the variance does not follow from the mean: fully for many samples, not
    at all for one.

    The variance of rare events is poorly estimated: two hits in 30 problems of 64 samples may come
    from problems that are all slightly solvable, or from a few easy ones. So one fully solved
    problem is added with weight 1 / E², where E = (Σ share)² / Σ share² is the number of problems
    that the hits come from (Kish's effective number; 1 without a hit), and likewise one unsolved
    problem. Both weights vanish as hits and misses spread over problems.

    Coverage is about 95%: 93 to 97 from 60 problems on, 93 to 98 with 30 (LOG.md). With one sample
    per problem only P + 1 intervals exist, so the coverage of any method jumps with the true rate;
    and if P times the rate (or one minus it) is below about 3, no interval is reliable.
    """
    problems, mean = len(shares_P), float(np.mean(shares_P))
    if samples == 1:
        return wilson_interval(float(shares_P.sum()), problems)
    if problems == 1:
        return 0.0, 1.0
    right, wrong = _compute_unseen_weight(shares_P), _compute_unseen_weight(1 - shares_P)
    total = problems + right + wrong
    middle = (shares_P.sum() + right) / total
    squares = np.sum(shares_P**2) + right - total * middle**2
    ratio = squares / (total - 1) / (middle * (1 - middle))
    ratio = min(1.0, max(1 / samples, float(ratio)))
    t = Z_95 + (float(special.stdtrit(problems - 1, 0.975)) - Z_95) * (1 - 1 / samples)
    effective_samples = problems / ratio * (Z_95 / t) ** 2
    return wilson_interval(mean * effective_samples, effective_samples)


def _compute_unseen_weight(shares_P: np.ndarray) -> float:
    """Computes 1 / E², the weight of an unseen problem whose share is 1."""
    return float(np.sum(shares_P**2) ** 2 / shares_P.sum() ** 4) if shares_P.any() else 1.0


def compute_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Returns the mean of b - a over problems (shares of correct samples), and its 95% interval.

    Follows Agresti and Min (2005, doi 10.1002/sim.1781), who add half a problem that only b solves,
    half a problem that only a solves, and one without a difference. So the interval has a width
    even if a and b never differ.
    """
    d = np.asarray(b, float) - np.asarray(a, float)
    n = len(d) + 2
    middle = d.sum() / n
    half = Z_95 * math.sqrt(max(0.0, (np.sum(d**2) + 1) / n - middle**2) / n)
    return float(d.mean()), (max(-1.0, float(middle - half)), min(1.0, float(middle + half)))


def compute_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Computes the two-sided p-value of the difference between a and b, paired by problem.

    This is McNemar's exact test if there is one sample per problem; otherwise its generalisation, a
    permutation test that draws the sign of each problem's difference at random, 10,000 times.
    """
    d = np.asarray(b, float) - np.asarray(a, float)
    if set(np.abs(d)) <= {0.0, 1.0}:
        minority, discordant = int(min(np.sum(d > 0), np.sum(d < 0))), int(np.sum(d != 0))
        return min(
            1.0, 2 * sum(math.comb(discordant, i) for i in range(minority + 1)) / 2**discordant
        )
    draws = np.random.default_rng(0)
    extreme = 1  # the observed signs count as one draw
    for _ in range(100):
        signs = draws.integers(0, 2, (100, len(d))) * 2 - 1
        extreme += int(np.sum(np.abs(signs @ d) >= abs(d.sum()) - 1e-9))
    return extreme / 10_001


def is_repetitive(text: str) -> bool:
    """Returns True if a text loops: most of its runs of eight words (characters, where a script has
    no spaces) occurred before."""
    words = dedup.split_words(text)
    ngrams = [tuple(words[i : i + _NGRAM_WORDS]) for i in range(len(words) - _NGRAM_WORDS + 1)]
    return len(ngrams) >= _NGRAM_WORDS and len(set(ngrams)) < len(ngrams) / 2


def has_mixed_languages(text: str, prompt: str) -> bool:
    """Returns True if a text has letters of a script that its prompt does not use.

    At least three are needed, so that a name does not count. Latin never counts, since notation is
    written in it.
    """
    return any(
        len(letters.findall(text)) >= _MIN_FOREIGN_LETTERS and not letters.search(prompt)
        for letters in _SCRIPT_PATTERNS
    )


def normalise_answer(answer: object) -> str | None:
    """Normalises an answer for voting: removes spaces and variants of notation; None if empty."""
    if not isinstance(answer, str):
        return None
    text = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", equality.normalise(answer))
    text = re.sub(r"\\(?:left|right|[!,;:])|\s|(?<=\d),(?=\d\d\d)", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text) or None


def _count_votes(rows: Sequence[Record]) -> tuple[list[int], int]:
    """Counts the votes for each answer to a problem, the right one's first, and the abstentions.

    All correct answers count as one, however they are written. Wrong answers count as one if
    `normalise_answer` gives the same text.
    """
    votes = Counter(
        "" if row["correct"] else normalise_answer(row.get("found"))
        for row in rows
        if row["correct"] or normalise_answer(row.get("found"))
    )
    right = votes.pop("", 0)
    return [right, *votes.values()], len(rows) - right - sum(votes.values())


def summarise_rows(rows: Sequence[Record], ks: Sequence[int]) -> Record:
    """Summarises graded rows: accuracy, pass@k, maj@k, rates and lengths.

    maj@k needs the field `found`, the extracted answer. Statistics of a field that some rows lack
    are omitted.
    """
    problems: dict[str, list[Record]] = {}
    for row in rows:
        problems.setdefault(str(row["id"]), []).append(row)
    groups = list(problems.values())
    sizes = {len(group) for group in groups}
    mean, interval = compute_accuracy([[bool(row["correct"]) for row in group] for group in groups])
    summary: Record = {
        "problems": len(groups),
        "responses": len(rows),
        "accuracy": mean,
        "interval": interval,
        "outcomes": dict(Counter(str(row["outcome"]) for row in rows)),
    }
    if len(sizes) == 1:
        summary[f"avg@{max(sizes)}"] = mean
    intervals: dict[str, tuple[float, float]] = {}
    for k in ks:
        if min(sizes) < k:
            continue
        hits = [(sum(bool(row["correct"]) for row in group), len(group)) for group in groups]
        shares_P = np.array([pass_at_k(c, n, k) for c, n in hits])
        summary[f"pass@{k}"] = float(np.mean(shares_P))
        # A share of 0 or 1 where k is all samples; else Wilson's interval is too wide, not too
        # narrow.
        intervals[f"pass@{k}"] = wilson_interval(float(shares_P.sum()), len(shares_P))
        if k > 1 and all("found" in row for row in rows):
            votes = [majority_at_k(*_count_votes(group), k) for group in groups]
            summary[f"maj@{k}"] = float(np.mean(votes))
    if any(k > 1 for k in ks):
        summary["k_intervals"] = intervals
    for name, field in (
        ("format_rate", "formatted"),
        ("repetition_rate", "repeats"),
        ("think_rate", "well_formed"),
        ("language_mixing_rate", "mixed"),
    ):
        if all(field in row for row in rows):
            summary[name] = float(np.mean([bool(row[field]) for row in rows]))
    summary |= _summarise_scores(rows, groups)
    for name in ("exact", "contained"):
        if all(name in row for row in rows):
            hits = [[bool(row[name]) for row in group] for group in groups]
            summary[name], summary[f"{name}_interval"] = compute_accuracy(hits)
    if all("right" in row and "found" in row for row in rows):
        summary |= summarise_choices(groups)
    if all("length" in row for row in rows):
        summary |= _summarise_lengths(rows)
    return summary


def _summarise_scores(rows: Sequence[Record], groups: Sequence[Sequence[Record]]) -> Record:
    """Returns the mean of the graders' scores over problems, and its 95% interval (Student's t)."""
    if not all("score" in row for row in rows):
        return {}
    shares_P = np.array([np.mean([_to_float(row["score"]) for row in group]) for group in groups])
    mean, count = float(shares_P.mean()), len(shares_P)
    half = 1.0
    if count > 1:
        half = special.stdtrit(count - 1, 0.975) * shares_P.std(ddof=1) / math.sqrt(count)
    return {
        "score": mean,
        "score_interval": (max(0.0, float(mean - half)), min(1.0, float(mean + half))),
    }


def _to_float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def summarise_choices(groups: Sequence[Sequence[Record]]) -> Record:
    """Measures how much the place of an option decides whether it is chosen.

    Args:
      groups: rows of each problem, with `right` and `found`, the letters of the right and of the
        chosen option (None: none).

    Returns:
      Of each letter the number of problems whose right option it is, the share of these that are
      answered correctly (`accuracy`, the recall of the letter) and the share of all responses that
      choose it, with 95% intervals. `recall_std` is the standard deviation of the recalls: of a
      model without a preference it is 0 but for chance (RStd of arXiv 2309.03882). Of choices by
      likelihood also the accuracy of those that allow for the options' lengths.
    """
    rights = [str(group[0]["right"]) for group in groups]
    samples = max(len(group) for group in groups)
    letters, recalls = {}, []
    for letter in sorted({*rights} | {str(r["found"]) for g in groups for r in g if r["found"]}):
        own = [g for g, right in zip(groups, rights, strict=True) if right == letter]
        chosen_P = np.array([np.mean([row["found"] == letter for row in g]) for g in groups])
        own_result: Record = {
            "problems": len(own),
            "chosen": float(chosen_P.mean()),
            "chosen_interval": compute_interval(chosen_P, samples),
        }
        if own:
            hits = [[bool(row["correct"]) for row in group] for group in own]
            recall, own_result["interval"] = compute_accuracy(hits)
            own_result["accuracy"] = recall
            recalls.append(recall)
        letters[letter] = own_result
    silent = float(np.mean([row["found"] is None for group in groups for row in group]))
    spread = float(np.std(recalls)) if len(recalls) > 1 else None
    result: Record = {"choices": {"letters": letters, "no_choice": silent, "recall_std": spread}}
    rows = [row for group in groups for row in group]
    if all("found_normalised" in row for row in rows):
        hits = [[row["found_normalised"] == row["right"] for row in group] for group in groups]
        mean, interval = compute_accuracy(hits)
        result |= {"accuracy_normalised": mean, "interval_normalised": interval}
    return result


def _summarise_lengths(rows: Sequence[Record]) -> Record:
    lengths = np.array([row["length"] for row in rows], float)
    cut = np.array([row["finish_reason"] == "length" for row in rows])
    return {
        "mean_length": float(lengths.mean()),
        # Without truncated responses, whose length depends on the limit.
        "mean_length_finished": float(lengths[~cut].mean()) if not cut.all() else None,
        "truncation_rate": float(cut.mean()),
    }


def compute_problem_scores(rows: Sequence[Record]) -> dict[str, float]:
    """Returns the share of correct samples of each problem, by its id."""
    hits: dict[str, list[bool]] = {}
    for row in rows:
        hits.setdefault(str(row["id"]), []).append(bool(row["correct"]))
    return {name: float(np.mean(h)) for name, h in hits.items()}
