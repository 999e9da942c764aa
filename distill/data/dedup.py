"""What a training set should not hold: evaluation problems, duplicates, other scripts.

Texts are compared by their tokens, which here are lower-case words, numbers and single symbols: of
LaTeX much is symbols, and n-grams of words alone would pass over formulas.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable

import numpy as np

_TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")
# What LaTeX can leave out, or write in two ways, without a change of what it shows.
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|q?quad)(?![a-z])|\\[,;!:()\[\]]|[${}]")
_FRACTION = re.compile(r"\\[dt]frac")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing

SHINGLE = 5  # tokens in the n-grams by which near duplicates are found
_BANDS, _ROWS = 16, 4  # of MinHash: at Jaccard 0.8 a pair is missed once in 4,000


def split_tokens(text: str) -> list[str]:
    """The tokens that texts are compared by."""
    return _TOKEN.findall(text.casefold())


def split_plain_tokens(text: str) -> list[str]:
    """`tokens` without what is only layout in LaTeX: $, braces, \\left, \\dfrac for \\frac."""
    return split_tokens(_LAYOUT.sub(" ", _FRACTION.sub(r"\\frac", text.casefold())))


TOKENIZERS = (split_tokens, split_plain_tokens)


def hash_ngrams(words: list[str], n: int) -> np.ndarray:
    """A 64-bit hash of each run of n tokens, in order, uint64; of the whole where it is shorter."""
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
    """A bijection of 64-bit integers that mixes their bits (two rounds of splitmix64's kind)."""
    for shift in (31, 29):
        x = (x ^ (x >> np.uint64(shift))) * _MIX
    return x ^ (x >> np.uint64(32))


class NgramIndex:
    """The n-grams of evaluation problems, to be looked for in training rows."""

    def __init__(self, texts: Iterable[str], n: int) -> None:
        self._n = n
        self._owners: tuple[dict[int, list[int]], ...] = tuple({} for _ in TOKENIZERS)
        self.ngram_counts: list[
            int
        ] = []  # of each problem, its different n-grams: a short one has few
        for number, text in enumerate(texts):
            for form, owners in zip(TOKENIZERS, self._owners, strict=True):
                grams = set(hash_ngrams(form(text), n).tolist())
                for gram in grams:
                    owners.setdefault(gram, []).append(number)
            self.ngram_counts.append(max(1, len(grams)))

    def find_matches(self, text: str) -> dict[int, tuple[int, str]]:
        """Problem → (how many different n-grams it shares with `text`, the first one of them), in
        whichever of the FORMS it shares more."""
        best: dict[int, tuple[int, str]] = {}
        for form, owners in zip(TOKENIZERS, self._owners, strict=True):
            words = form(text)
            found: dict[int, tuple[int, str]] = {}
            seen: set[int] = set()
            for start, gram in enumerate(hash_ngrams(words, self._n).tolist()):
                if gram in seen:
                    continue
                seen.add(gram)
                for owner in owners.get(gram, ()):
                    count, first = found.get(owner, (0, " ".join(words[start : start + self._n])))
                    found[owner] = (count + 1, first)
            for owner, (count, first) in found.items():
                if count > best.get(owner, (0, ""))[0]:
                    best[owner] = (count, first)
        return best


def compute_signature(text: str) -> np.ndarray:
    """uint64 [16]: texts are candidates for near duplicates where one of these is equal.

    MinHash of the text's 5-grams (Broder 1997) in bands of four.
    """
    grams = np.unique(hash_ngrams(split_tokens(text), SHINGLE))
    if not len(grams):
        return np.zeros(_BANDS, np.uint64)
    keys = _mix_bits(np.arange(1, _BANDS * _ROWS + 1, dtype=np.uint64) * _MIX)
    least = np.array([_mix_bits(grams ^ key).min() for key in keys]).reshape(_BANDS, _ROWS)
    bands = np.zeros(_BANDS, np.uint64)
    for column in least.T:
        bands = _mix_bits(bands + column)
    return bands


def compute_jaccard(a: str, b: str) -> float:
    """Shared over all 5-grams of two texts; 1 of two without any."""
    x, y = (np.unique(hash_ngrams(split_tokens(text), SHINGLE)) for text in (a, b))
    both = len(np.intersect1d(x, y, assume_unique=True))
    return both / max(1, len(x) + len(y) - both) if len(x) or len(y) else 1.0


def find_candidates(signatures: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of rows of signatures [N, 16] that agree somewhere: each later row
    with the first that has its value, band by band."""
    pairs: set[tuple[int, int]] = set()
    for band in signatures.T:
        order = np.argsort(band, kind="stable")
        fresh = np.r_[True, band[order][1:] != band[order][:-1]]
        firsts = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
        pairs.update((int(a), int(b)) for a, b in zip(firsts[~fresh], order[~fresh], strict=True))
    return sorted(pairs)


def compute_script_share(text: str, scripts: tuple[str, ...]) -> float:
    """The share of a text's letters that are of these scripts (latin, cyrillic, cjk, ... as Unicode
    names its characters); 1 for a text without letters. Scripts, not languages: French passes for
    English here."""
    letters = [c for c in text if c.isalpha()]
    names = tuple(script.strip().upper() for script in scripts)
    known = {c: unicodedata.name(c, "").startswith(names) for c in set(letters)}
    return sum(known[c] for c in letters) / len(letters) if letters else 1.0
