"""Finds evaluation problems and near duplicates in texts, and measures the scripts they are in.

Texts are compared by tokens, which here are lower-case words, numbers and single symbols: LaTeX is
largely symbols, and n-grams of words alone would miss formulas.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable

import numpy as np

_TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")
# Parts of LaTeX that can be left out, or written in two ways, and render the same.
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|q?quad)(?![a-z])|\\[,;!:()\[\]]|[${}]")
_FRACTION = re.compile(r"\\[dt]frac")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing

SHINGLE = 5  # tokens in the n-grams by which near duplicates are found
_BANDS, _ROWS = 16, 4  # of MinHash: at Jaccard 0.8 a pair is missed once in 4,000


def split_tokens(text: str) -> list[str]:
    """Splits a text into the tokens that it is compared by."""
    return _TOKEN.findall(text.casefold())


def split_plain_tokens(text: str) -> list[str]:
    """Splits as `split_tokens`, without layout of LaTeX: $, braces, \\left, \\dfrac for \\frac."""
    return split_tokens(_LAYOUT.sub(" ", _FRACTION.sub(r"\\frac", text.casefold())))


TOKENIZERS = (split_tokens, split_plain_tokens)


def hash_ngrams(words: list[str], n: int) -> np.ndarray:
    """Returns a hash of each run of n tokens, uint64, in order; one of all if they are fewer."""
    codes = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    n = min(n, len(codes))
    if not n:
        return codes
    codes = _mix_bits(codes + np.uint64(1))
    hashes = np.zeros(len(codes) - n + 1, np.uint64)
    for i in range(n):
        hashes = _mix_bits(hashes + codes[i : len(codes) - n + 1 + i])
    return hashes


def _mix_bits(x: np.ndarray) -> np.ndarray:
    """Mixes the bits of 64-bit integers by a bijection (two rounds in the manner of splitmix64)."""
    for shift in (31, 29):
        x = (x ^ (x >> np.uint64(shift))) * _MIX
    return x ^ (x >> np.uint64(32))


class NgramIndex:
    """The n-grams of evaluation problems, to look for in training rows."""

    def __init__(self, texts: Iterable[str], n: int) -> None:
        self._n = n
        self._owners: tuple[dict[int, list[int]], ...] = tuple({} for _ in TOKENIZERS)
        self.ngram_counts: list[int] = []  # different n-grams of each problem: a short one has few
        for number, text in enumerate(texts):
            for split, owners in zip(TOKENIZERS, self._owners, strict=True):
                grams = set(hash_ngrams(split(text), n).tolist())
                for gram in grams:
                    owners.setdefault(gram, []).append(number)
            self.ngram_counts.append(max(1, len(grams)))

    def find_matches(self, text: str) -> dict[int, tuple[int, str]]:
        """Returns, by the number of the problem, how many different n-grams it shares with `text`
        and the first of them, by whichever of TOKENIZERS shares more."""
        best: dict[int, tuple[int, str]] = {}
        for split, owners in zip(TOKENIZERS, self._owners, strict=True):
            words = split(text)
            matches: dict[int, tuple[int, str]] = {}
            first_starts: dict[int, int] = {}
            for start, gram in enumerate(hash_ngrams(words, self._n).tolist()):
                first_starts.setdefault(gram, start)
            for gram, start in first_starts.items():
                for owner in owners.get(gram, ()):
                    first_gram = " ".join(words[start : start + self._n])
                    count, first = matches.get(owner, (0, first_gram))
                    matches[owner] = (count + 1, first)
            for owner, (count, first) in matches.items():
                if count > best.get(owner, (0, ""))[0]:
                    best[owner] = (count, first)
        return best


def compute_signature(text: str) -> np.ndarray:
    """Returns a signature, uint64 [16]; texts are candidates for near duplicates if they agree in
    any of its values. It is MinHash of the text's 5-grams (Broder 1997) in bands of four."""
    grams = np.unique(hash_ngrams(split_tokens(text), SHINGLE))
    if not len(grams):
        return np.zeros(_BANDS, np.uint64)
    keys = _mix_bits(np.arange(1, _BANDS * _ROWS + 1, dtype=np.uint64) * _MIX)
    least = _mix_bits(grams ^ keys[:, None]).min(axis=1).reshape(_BANDS, _ROWS)
    bands = np.zeros(_BANDS, np.uint64)
    for column in least.T:
        bands = _mix_bits(bands + column)
    return bands


def compute_jaccard(a: str, b: str) -> float:
    """Returns the Jaccard similarity of two texts' 5-grams; 1 if neither has any."""
    x, y = (np.unique(hash_ngrams(split_tokens(text), SHINGLE)) for text in (a, b))
    both = len(np.intersect1d(x, y, assume_unique=True))
    return both / max(1, len(x) + len(y) - both) if len(x) or len(y) else 1.0


def find_candidates(signatures: np.ndarray) -> list[tuple[int, int]]:
    """Returns pairs (earlier, later) of rows of signatures [N, 16] that agree in some value: band
    by band, each row with the first that has its value. So pairs are at most 16 N."""
    pairs: set[tuple[int, int]] = set()
    for band in signatures.T:
        order = np.argsort(band, kind="stable")
        fresh = np.r_[True, band[order][1:] != band[order][:-1]]
        firsts = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
        pairs.update((int(a), int(b)) for a, b in zip(firsts[~fresh], order[~fresh], strict=True))
    return sorted(pairs)


def compute_script_share(text: str, scripts: tuple[str, ...]) -> float:
    """Returns the share of a text's letters that are of these scripts (latin, cyrillic, cjk, ... as
    Unicode names characters); 1 without letters. French passes for English: both are latin."""
    letters = [c for c in text if c.isalpha()]
    names = tuple(script.strip().upper() for script in scripts)
    is_known = {c: unicodedata.name(c, "").startswith(names) for c in set(letters)}
    return sum(is_known[c] for c in letters) / len(letters) if letters else 1.0
