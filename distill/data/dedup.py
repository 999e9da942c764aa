"""Finds evaluation problems and near duplicates in texts, and measures the scripts they are in.

Texts are compared by tokens, which here are lower-case words, numbers and single symbols: LaTeX is
largely symbols, and n-grams of words alone would miss formulas. Scripts without spaces between
words (Chinese, Japanese, Thai, ...) have a token for each character, with its marks.
"""

import hashlib
import re
import unicodedata
import zlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import regex

# Of ASCII. Other texts need `regex`: to `re`, the marks of Thai or Hindi are no part of a word.
_ASCII_TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")
_NO_SPACES = r"\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{Line_Break=SA}"
_CHARACTER_SET = rf"[[{_NO_SPACES}]&&[\p{{L}}\p{{N}}]]"
_CHARACTER = rf"{_CHARACTER_SET}\p{{M}}*"
_WORD = regex.compile(rf"(?V1){_CHARACTER}|[\S--{_CHARACTER_SET}]+|\S")
_TOKEN = regex.compile(rf"(?V1){_CHARACTER}|[[\p{{L}}\p{{N}}\p{{M}}]--[{_NO_SPACES}]]+|\S")
_INVISIBLE = regex.compile(r"[\p{Cf}\p{Variation_Selector}]+")
# Without superscripts, subscripts and fractions: as plain digits, 10² would be 102.
_FOLDABLE = re.compile("[^²³¹¼-¾⁰-ₜ⅐-⅟↉]+")
# Parts of LaTeX that can be left out, or written in two ways, and render the same.
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|q?quad)(?![a-z])|\\[,;!:()\[\]]|[${}]")
_FRACTION = re.compile(r"\\[dt]frac")
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing

_PART = np.uint64(0x5851F42D4C957F2D)  # tells hashes of parts of a problem from those of wholes

LONGEST_WORD = 200  # characters; formulas without spaces are shorter
SHINGLE = 5  # tokens in the n-grams by which near duplicates are found
BANDS, _ROWS = 16, 4  # of MinHash: at Jaccard 0.8 a pair is missed once in 4,000
DIGEST_BYTES = 16


def split_tokens(text: str) -> list[str]:
    """Splits a text into the tokens that it is compared by.

    Case, the width of letters and digits (Ａ１), invisible characters and the encoding of accents
    make no difference.
    """
    return _split_folded(_fold(text))


def split_plain_tokens(text: str) -> list[str]:
    """Splits as `split_tokens`, without layout of LaTeX: $, braces, \\left, \\dfrac for \\frac."""
    return _split_folded(_LAYOUT.sub(" ", _FRACTION.sub(r"\\frac", _fold(text))))


def split_words(text: str) -> list[str]:
    """Splits a text at white space; where there is none, into characters.

    These are characters of scripts that have no spaces, and of a word too long to be one, such as a
    loop of one symbol.
    """
    words: list[str] = []
    for word in text.split() if text.isascii() else _WORD.findall(text):
        words.extend(word if len(word) > LONGEST_WORD else (word,))
    return words


def _fold(text: str) -> str:
    if not text.isascii():
        text = _FOLDABLE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text)
        text = _INVISIBLE.sub("", text)
    return text.casefold()


def _split_folded(text: str) -> list[str]:
    return (_ASCII_TOKEN if text.isascii() else _TOKEN).findall(text)


TOKENIZERS = (split_tokens, split_plain_tokens)


def hash_ngrams(words: list[str], n: int) -> np.ndarray:
    """Returns a hash of each run of n tokens, uint64, in order; one of all if they are fewer."""
    # surrogatepass: halves of a character may stand in a row.
    codes = np.array([zlib.crc32(w.encode("utf-8", "surrogatepass")) for w in words], np.uint64)
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


_KEYS = _mix_bits(np.arange(1, BANDS * _ROWS + 1, dtype=np.uint64) * _MIX)


class NgramIndex:
    """The n-grams of evaluation problems, to look for in training rows.

    A problem of m < n tokens is looked for as a whole, in texts of at most 3^(m - 1) tokens: the
    shorter it is, the likelier a long text contains it by chance. A text that is itself shorter
    than n matches too if it is at least half of such a problem.

    The n-grams are held in two sorted arrays, 12 bytes for each.
    """

    def __init__(self, texts: Iterable[str], n: int) -> None:
        self._n = n
        self.ngram_counts = array("l")  # different n-grams of each problem: a short one has few
        self._counts = tuple(array("l") for _ in TOKENIZERS)  # the same, as each splits a text
        self._short_sizes: tuple[set[int], ...] = tuple(set() for _ in TOKENIZERS)
        grams: list[list[np.ndarray]] = [[] for _ in TOKENIZERS]
        owners: list[list[np.ndarray]] = [[] for _ in TOKENIZERS]
        for number, text in enumerate(texts):
            for split, sizes, counts, *lists in zip(
                TOKENIZERS, self._short_sizes, self._counts, grams, owners, strict=True
            ):
                words = split(text)
                found = np.unique(hash_ngrams(words, n))
                count = max(1, len(found))
                counts.append(count)
                if 0 < len(words) < n:
                    sizes.add(len(words))
                    found = np.concatenate([found, *_hash_parts(words)])
                lists[0].append(found)
                lists[1].append(np.full(len(found), number, np.int32))
            self.ngram_counts.append(count)
        self._tables = [_sort_table(*lists) for lists in zip(grams, owners, strict=True)]

    def find_matches(self, text: str) -> dict[int, tuple[int, str, float]]:
        """Returns, by the number of the problem, how many different n-grams it shares with `text`,
        the first of them, and the share of all its n-grams that they are; by whichever of
        TOKENIZERS shares more."""
        best: dict[int, tuple[int, str, float]] = {}
        for split, sizes, counts, table in zip(
            TOKENIZERS, self._short_sizes, self._counts, self._tables, strict=True
        ):
            words = split(text)
            for owner, (count, start, size) in self._match(words, sizes, table).items():
                shared, ngram, share = best.get(owner, (0, "", 0.0))
                if count > shared:
                    shared, ngram = count, " ".join(words[start : start + size])
                best[owner] = shared, ngram, max(share, min(1.0, count / counts[owner]))
        return best

    def _match(
        self, words: list[str], short_sizes: set[int], table: tuple[np.ndarray, np.ndarray]
    ) -> dict[int, tuple[int, int, int]]:
        """Returns {problem: (n-grams shared, the first one's start, its tokens)}."""
        whole = hash_ngrams(words, self._n)
        lookups = [(self._n, whole)]
        if len(words) < self._n:
            lookups.append((self._n, whole ^ _PART))
        for size in sorted(short_sizes):
            if size < len(words) <= 3 ** (size - 1):
                lookups.append((size, hash_ngrams(words, size)))
        matches: dict[int, tuple[int, int, int]] = {}
        for size, grams in lookups:
            unique, starts = np.unique(grams, return_index=True)
            first, last = (np.searchsorted(table[0], unique, side) for side in ("left", "right"))
            for hit in np.nonzero(first < last)[0]:
                for owner in table[1][first[hit] : last[hit]].tolist():
                    count, start, _ = matches.get(owner, (0, len(words), size))
                    matches[owner] = count + 1, min(start, int(starts[hit])), size
        return matches


def _hash_parts(words: list[str]) -> Iterator[np.ndarray]:
    """Yields the hashes of all runs of at least half of the words, but not of all of them."""
    for size in range((len(words) + 1) // 2, len(words)):
        yield np.unique(hash_ngrams(words, size)) ^ _PART


def _sort_table(grams: list[np.ndarray], owners: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    all_grams = np.concatenate([np.zeros(0, np.uint64), *grams])
    order = np.argsort(all_grams, kind="stable")
    return all_grams[order], np.concatenate([np.zeros(0, np.int32), *owners])[order]


def compute_digest(words: list[str]) -> bytes:
    """Returns 16 bytes, which are those of another list of tokens only if that is equal."""
    text = " ".join(words).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


def compute_signature(words: list[str]) -> np.ndarray:
    """Returns a signature, uint32 [16]; texts are candidates for near duplicates if they agree in
    any of its values. It is MinHash of the tokens' 5-grams (Broder 1997) in bands of four."""
    grams = np.unique(hash_ngrams(words, SHINGLE))
    if not len(grams):
        return np.zeros(BANDS, np.uint32)
    least = np.full(len(_KEYS), np.iinfo(np.uint64).max)
    for start in range(0, len(grams), 256):  # few at a time fit a processor's cache
        hashes = _mix_bits(grams[start : start + 256] ^ _KEYS[:, None])
        least = np.minimum(least, hashes.min(axis=1))
    bands = np.zeros(BANDS, np.uint64)
    for column in least.reshape(BANDS, _ROWS).T:
        bands = _mix_bits(bands + column)
    return bands.astype(np.uint32)


def compute_jaccard(a: str, b: str) -> float:
    """Returns the Jaccard similarity of two texts' 5-grams; 1 if neither has any."""
    x, y = (np.unique(hash_ngrams(split_tokens(text), SHINGLE)) for text in (a, b))
    both = len(np.intersect1d(x, y, assume_unique=True))
    return both / max(1, len(x) + len(y) - both) if len(x) or len(y) else 1.0


def find_firsts(digests: np.ndarray) -> np.ndarray:
    """Returns, for each row of digests, bytes [N, 16], the first row that is equal to it, [N]."""
    high, low = np.ascontiguousarray(digests).view(np.uint64).T
    order = np.lexsort((low, high))  # stable: equal rows stay in order
    fresh = np.ones(len(order), bool)
    fresh[1:] = (np.diff(high[order]) != 0) | (np.diff(low[order]) != 0)
    firsts = np.empty(len(order), np.int64)
    firsts[order] = order[fresh][np.cumsum(fresh) - 1]
    return firsts


def find_candidates(bands: Iterable[np.ndarray]) -> Iterator[tuple[int, int]]:
    """Yields pairs (earlier, later) of rows that agree in some band of their signatures, sorted:
    band by band, each row with the first that has its value. So pairs are at most 16 N.

    Args:
      bands: one value of each row's signature, [N], at a time.
    """
    codes, count = np.zeros(0, np.int64), 1
    for band in bands:
        count = max(1, len(band))
        order = np.argsort(band, kind="stable")
        fresh = np.ones(count, bool)[: len(band)]
        fresh[1:] = np.diff(band[order]) != 0
        firsts = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
        codes = np.union1d(codes, firsts[~fresh] * count + order[~fresh])
    return (divmod(int(code), count) for code in codes)


def compute_script_share(text: str, scripts: tuple[str, ...]) -> float:
    """Returns the share of a text's letters that are of these scripts (latin, cyrillic, cjk, ... as
    Unicode names characters); 1 without letters. French passes for English: both are latin."""
    letters = [c for c in text if c.isalpha()]
    names = tuple(script.strip().upper() for script in scripts)
    is_known = {c: unicodedata.name(c, "").startswith(names) for c in set(letters)}
    return sum(is_known[c] for c in letters) / len(letters) if letters else 1.0
