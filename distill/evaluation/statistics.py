"""What graded responses amount to: rates with honest intervals, and how the text was written.

Numbers in, numbers out: no file, no model. A problem's samples are one witness, not many, so every
interval is over problems.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import special

from distill.runtime import run_files

Record = dict[str, object]

Z_95 = 1.959964  # of a 95% interval
_NGRAM_WORDS = 8  # words; shorter runs repeat in honest text too

# Scripts that an English answer has no use for. Greek is mathematics.
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


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) of arXiv 2107.03374, eq. 1."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(counts: Sequence[int], abstentions: int, k: int) -> float:
    """The chance that the right answer wins the vote of k of a problem's samples, drawn without
    replacement, where ties are decided by lot (maj@k; self-consistency, arXiv 2203.11171).

    Args:
      counts: samples that gave each answer, the right one's first (0 where nobody gave it).
      none: samples without an answer, which do not vote.
    """
    total = 0.0
    for votes in range(1, min(counts[0], k) + 1):
        # ways[t, d]: to draw d votes for others, none with more than `votes`, t with as many
        ways = {(0, 0): math.comb(counts[0], votes)}
        for count in counts[1:]:
            after: dict[tuple[int, int], int] = {}
            for (ties, drawn), n in ways.items():
                for more in range(min(count, votes, k - votes - drawn) + 1):
                    at = (ties + (more == votes), drawn + more)
                    after[at] = after.get(at, 0) + n * math.comb(count, more)
            ways = after
        for (ties, drawn), n in ways.items():
            total += n * math.comb(abstentions, k - votes - drawn) / (ties + 1)
    return total / math.comb(sum(counts) + abstentions, k)


def compute_accuracy(hits: Sequence[Sequence[bool]]) -> tuple[float, tuple[float, float]]:
    """Mean over problems of the share of correct samples, and its 95% interval (`interval`)."""
    shares = np.array([np.mean(h) for h in hits])
    return float(np.mean(shares)), compute_interval(shares, max(len(h) for h in hits))


def compute_interval(shares_P: np.ndarray, samples: int) -> tuple[float, float]:
    """The 95% interval of the mean share, over all problems that these are a sample of.

    Wilson's interval, for one sample a problem. For more, Wilson's for as many independent answers
    as the samples are worth: P / r, where r = var(shares) / (m (1 - m)) falls from 1, where a
    problem's samples agree, to 1 / samples, where they are independent. The effective sample size
    is that of Korn and Graubard 1998, and so is the quantile of Student's t, in so far as the
    variance is not known from the mean: wholly for many samples, not at all for one.

    The variance of what is rare is unknown: two hits of 30 problems of 64 samples may come from
    problems that are all a little possible, or from easy ones that are rare. So one problem all
    right is added with weight 1 / E², where E = (Σ share)² / Σ share² is the number of problems
    that the hits come from (Kish's effective number; 1 without a hit), and one all wrong likewise.
    Both fade where hits and misses are spread over problems.

    Covers about 95%: 93 to 97 from 60 problems on, 93 to 98 with 30 (LOG.md). With one sample a
    problem there are only P + 1 intervals, so the coverage jumps with the true rate whatever they
    are; and where P times the rate (or one minus it) is below about 3, no interval can tell what
    the few hits stand for.
    """
    problems, mean = len(shares_P), float(np.mean(shares_P))
    if samples == 1:
        return run_files.wilson_interval(float(shares_P.sum()), problems)
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
    return run_files.wilson_interval(mean * effective_samples, effective_samples)


def _compute_unseen_weight(shares_P: np.ndarray) -> float:
    """1 / E², the weight of a problem that was not seen and whose share is 1."""
    return float(np.sum(shares_P**2) ** 2 / shares_P.sum() ** 4) if shares_P.any() else 1.0


def compute_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean of b - a over the same problems (shares of correct samples), and its 95% interval.

    That of Agresti and Min (2005, doi 10.1002/sim.1781): half a problem is added that b alone
    solves, half that a alone does, and one that says nothing. It has a width even where a and b
    never differ.
    """
    d = np.asarray(b, float) - np.asarray(a, float)
    n = len(d) + 2
    middle = d.sum() / n
    half = Z_95 * math.sqrt(max(0.0, (np.sum(d**2) + 1) / n - middle**2) / n)
    return float(d.mean()), (max(-1.0, float(middle - half)), min(1.0, float(middle + half)))


def compute_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """The probability of a difference as large as that of b and a if they were equally good.

    McNemar's exact test where there is one sample a problem; else the test that it is a case of:
    the sign of each problem's difference is thrown anew, 10,000 times.
    """
    d = np.asarray(b, float) - np.asarray(a, float)
    if set(np.abs(d)) <= {0.0, 1.0}:
        minority, discordant = int(min(np.sum(d > 0), np.sum(d < 0))), int(np.sum(d != 0))
        return min(
            1.0, 2 * sum(math.comb(discordant, i) for i in range(minority + 1)) / 2**discordant
        )
    draws = np.random.default_rng(0)
    extreme = 1  # what was seen is one of the throws
    for _ in range(100):
        signs = draws.integers(0, 2, (100, len(d))) * 2 - 1
        extreme += int(np.sum(np.abs(signs @ d) >= abs(d.sum()) - 1e-9))
    return extreme / 10_001


def is_repetitive(text: str) -> bool:
    """Whether a text loops: most of its runs of eight words have been said before."""
    words = text.split()
    ngrams = [tuple(words[i : i + _NGRAM_WORDS]) for i in range(len(words) - _NGRAM_WORDS + 1)]
    return len(ngrams) >= _NGRAM_WORDS and len(set(ngrams)) < len(ngrams) / 2


def has_mixed_languages(text: str, prompt: str) -> bool:
    """Whether a text has letters of a script that its prompt does not: three at least, so that a
    name does not count; Latin never counts, in which all notation is written."""
    return any(
        len(letters.findall(text)) >= _MIN_FOREIGN_LETTERS and not letters.search(prompt)
        for letters in _SCRIPT_PATTERNS
    )


def normalise_answer(answer: object) -> str | None:
    """An answer as it is counted in a vote: without spaces and other ways of writing the same."""
    if not isinstance(answer, str) or not answer.strip():
        return None
    text = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", answer)
    text = re.sub(r"\\(?:left|right|[!,;:])|[\s$]|(?<=\d),(?=\d\d\d)", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).removesuffix(".") or None


def _count_votes(rows: Sequence[Record]) -> tuple[list[int], int]:
    """Votes for each answer to one problem, the right one's first, and samples without a vote.

    All that is graded correct is one answer, however it is written; wrong ones are one where
    `vote` makes the same text of them.
    """
    votes = Counter(
        "" if row["correct"] else normalise_answer(row.get("found"))
        for row in rows
        if row["correct"] or normalise_answer(row.get("found"))
    )
    right = votes.pop("", 0)
    return [right, *votes.values()], len(rows) - right - sum(votes.values())


def summarise_rows(rows: Sequence[Record], ks: Sequence[int]) -> Record:
    """What graded rows amount to: accuracy, pass@k, maj@k, rates and lengths.

    maj@k where the rows say which answer they `found`; the figures of a field that some rows lack
    are left out.
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
    for k in ks:
        if min(sizes) < k:
            continue
        hits = [(sum(bool(row["correct"]) for row in group), len(group)) for group in groups]
        summary[f"pass@{k}"] = float(np.mean([pass_at_k(c, n, k) for c, n in hits]))
        if k > 1 and all("found" in row for row in rows):
            votes = [majority_at_k(*_count_votes(group), k) for group in groups]
            summary[f"maj@{k}"] = float(np.mean(votes))
    for name, field in (
        ("format_rate", "formatted"),
        ("repetition_rate", "repeats"),
        ("think_rate", "well_formed"),
        ("language_mixing_rate", "mixed"),
    ):
        if all(field in row for row in rows):
            summary[name] = float(np.mean([bool(row[field]) for row in rows]))
    if all("length" in row for row in rows):
        summary |= _summarise_lengths(rows)
    return summary


def _summarise_lengths(rows: Sequence[Record]) -> Record:
    lengths = np.array([row["length"] for row in rows], float)
    cut = np.array([row["finish_reason"] == "length" for row in rows])
    return {
        "mean_length": float(lengths.mean()),
        # What was cut has no length of its own: the mean with it depends on the cap.
        "mean_length_finished": float(lengths[~cut].mean()) if not cut.all() else None,
        "truncation_rate": float(cut.mean()),
    }


def compute_problem_scores(rows: Sequence[Record]) -> dict[str, float]:
    """The share of correct samples of each problem, by its id."""
    hits: dict[str, list[bool]] = {}
    for row in rows:
        hits.setdefault(str(row["id"]), []).append(bool(row["correct"]))
    return {name: float(np.mean(h)) for name, h in hits.items()}
