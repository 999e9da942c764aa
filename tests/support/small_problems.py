"""Small solved problems, in the form of HumanEval's, for programs that are right and mutated."""

import inspect
from collections.abc import Callable
from typing import Any


def add_all(xs):
    total = 0
    for x in xs:
        total += x
    return total


def is_prime(n):
    if n < 2:
        return False
    d = 2
    while d * d <= n:
        if n % d == 0:
            return False
        d += 1
    return True


def count_vowels(s):
    return sum(1 for c in s.lower() if c in "aeiou")


def reverse_words(s):
    return " ".join(s.split()[::-1])


def fib(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def running_max(xs):
    out = []
    best = None
    for x in xs:
        if best is None or x > best:
            best = x
        out.append(best)
    return out


def digits_sum(n):
    n = abs(n)
    total = 0
    while n > 0:
        total += n % 10
        n = n // 10
    return total


def merge_counts(a, b):
    out = dict(a)
    for k in b:
        out[k] = out.get(k, 0) + b[k]
    return out


def min_max(xs):
    lo, hi = xs[0], xs[0]
    for x in xs[1:]:
        if x < lo:
            lo = x
        elif x > hi:
            hi = x
    return (lo, hi)


def common(a, b):
    return set(a) & set(b)


def mean(xs):
    if not xs:
        return 0.0
    return sum(xs) / len(xs)


def rotate(xs, k):
    if not xs:
        return xs
    k = k % len(xs)
    return xs[-k:] + xs[:-k]


def balanced(s):
    depth = 0
    for c in s:
        if c == "(":
            depth += 1
        elif c == ")":
            depth -= 1
            if depth < 0:
                return False
    return depth == 0


def gcd(a, b):
    while b:
        a, b = b, a % b
    return a


def flatten(x):
    out = []
    for y in x:
        if isinstance(y, list):
            out.extend(flatten(y))
        else:
            out.append(y)
    return out


def to_binary(n):
    if n == 0:
        return "0"
    out = ""
    while n > 0:
        out = str(n % 2) + out
        n //= 2
    return out


def evens(n):
    for i in range(0, n + 1):
        if i % 2 == 0:
            yield i


def word_lengths(s):
    return {w: len(w) for w in s.split() if len(w) > 1}


def clip(x, lo, hi):
    if x < lo:
        return lo
    if x > hi:
        return hi
    return x


def sorted_by_last(ws):
    return sorted(ws, key=lambda w: (w[-1], w))


# Arguments of the tests.
CALLS: dict[Callable, list[tuple[Any, ...]]] = {
    add_all: [([1, 2, 3],), ([],), ([-4, 4, 9],)],
    is_prime: [(1,), (2,), (9,), (97,), (91,), (0,)],
    count_vowels: [("Hello",), ("",), ("AEIOU",), ("xyz",)],
    reverse_words: [("a b c",), ("",), ("  one   two ",)],
    fib: [(0,), (1,), (10,), (90,)],
    running_max: [([1, 3, 2, 5],), ([],), ([-1, -5],)],
    digits_sum: [(123,), (0,), (-45,), (1000000000000000000000000000007,)],
    merge_counts: [({"x": 1}, {"x": 2, "y": 3}), ({}, {}), ({1: 2}, {1: -2})],
    min_max: [([3, 1, 2],), ([5],), ([-1, 7, -9, 7],)],
    common: [([1, 2, 3], [2, 3, 4]), ([], [1]), ("abc", "cad")],
    mean: [([1, 2],), ([],), ([0.1, 0.2, 0.4],)],
    rotate: [([1, 2, 3, 4], 1), ([], 3), ([1, 2], 5), ([1, 2, 3], 0)],
    balanced: [("(())",), ("())(",), ("",), ("(",)],
    gcd: [(12, 18), (7, 0), (1071, 462)],
    flatten: [([1, [2, [3, []]], 4],), ([],)],
    to_binary: [(0,), (5,), (255,)],
    evens: [(0,), (5,), (6,)],
    word_lengths: [("a bb ccc bb",), ("",)],
    clip: [(5, 0, 3), (-5, 0, 3), (2, 0, 3), (0, 0, 3)],
    sorted_by_last: [(["ab", "ba", "aa"],), ([],)],
}


def make_rows() -> list[dict]:
    """Makes a row in HumanEval's published form of each problem."""
    rows = []
    for number, (function, calls) in enumerate(CALLS.items()):
        lines = []
        for call in calls:
            value, shown = function(*call), f"candidate({', '.join(map(repr, call))})"
            if inspect.isgenerator(value):
                value, shown = list(value), f"list({shown})"
            lines.append(f"    assert {shown} == {value!r}\n")
        head, _, body = inspect.getsource(function).partition("\n")
        rows.append(
            {
                "task_id": f"Small/{number}",
                "prompt": f'import math\n\n\n{head}\n    """Problem {number}."""\n',
                "canonical_solution": body,
                "test": f"METADATA = {{}}\n\n\ndef check(candidate):\n{''.join(lines)}",
                "entry_point": function.__name__,
            }
        )
    return rows
