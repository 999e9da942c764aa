r"""Pairs of a right answer and another one, made from values and the ways to write them.

Each value is written in each of its forms, which are equal to it; and each form of another value
differs from it.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from distill.rewards import equality


class Pair(NamedTuple):
    gold: str
    answer: str
    equal: bool


# Marks that change nothing, around any number.
MARKED = r"""
{}. | {} . | {}, | {}° | {}^\circ | {}^{\circ} | {}\degree | {} degrees | {}^\circ C
{}\text{ cm}^2 | {} cm^2 | {}~\mathrm{km} | {}\,\text{m} | {} m/s | {}\ \mathrm{km/h} | {}\,cm
{}\;cm^2 | {}\,m/s
{}\,\textup{cm} | ${}$ | \({}\) | \text{{}} | \mathbf{{}} | \boldsymbol{{}} | {\bf {}} | \large {}
{}\quad | **{}** | x={} | x = {}. | {} = x | ={} | {}\, | {} eggs | {} blue eggs | {} USD | {}€
{}\text{ dollars} | \boxed{{}} | \displaystyle {} | \textcolor{red}{{}} | \left\{ {} \right.
\text{{} cm} | {}\text{ m}\,\text{s}^{-1} | \text{Area} = {} \text{ cm}^2 | n = {}\text{ eggs}
"""
CURRENCIES = r"""
€{} | £{} | \${} | ${} | US\${} | \text{€}{} | USD {} | \text{USD }{} | Rs. {} | {}¢ | \euro {}
"""

# The forms of one value a line, the first of which is the right answer.
VALUES = r"""
1000000 | 1\,000\,000 | 1 000 000 | 1{,}000{,}000 | 1,000,000 | 1\;000\;000 | 1~000~000 |
    1,\!000,\!000 | 1.000.000 | \$1,000,000 | 1\ 000\ 000 | 10^6 | 1e6 | 1\times10^{6}
1234567.89 | 1,234,567.89 | 1 234 567.89 | \$1,234,567.89 | １２３４５６７.８９
-3 | −3 | –3 | ﹣3 | －3 | ‐3 | - 3 | -3. | x=−3 | -3.0 | -\frac{6}{2}
\frac{1}{3} | 0.\overline{3} | 0.\bar{3} | 0.\bar3 | 0.\dot{3} | 0.\overline{33} | 0.(3) |
    0.333... | 0.333\ldots | 0.333… | 1/3 | \dfrac{1}{3} | \tfrac13 | ⅓ | \frac13 | \frac{2}{6} |
    0.33333333
\frac{1}{6} | 0.1\overline{6} | 0.1\dot{6} | 0.1(6) | \frac16 | 1/6
\frac{1}{7} | 0.\overline{142857} | 0.\dot{1}4285\dot{7}
-\frac{7}{3} | -2.\overline{3} | −\frac{7}{3} | \frac{-7}{3} | -7/3 | -2\frac13
\frac{7}{2} | 3\frac{1}{2} | 3 1/2 | 3½ | 3.5 | 7/2 | 3.50 | \frac{14}{4}
2\sqrt{3} | 2\sqrt3 | 2√3 | 2\sqrt 3 | 2*sqrt(3) | 2 * sqrt(3) | \sqrt{12} | √12 | 2√{3}
2\pi | 2π | 2 \pi | 2pi | 2*pi | \pi\cdot2 | 2\pi\text{ cm}
x^2 | x² | x**2 | x^{2} | y=x^2 | x\cdot x
2t | t\cdot 2 | 2\cdot t | {2}t | y=2t
2ab | 2ba | 2 a b | ab\cdot 2
\pi r^2h | \pi r^2 h | h\pi r^2 | πr²h
50\% | 50% | 50 | 0.5 | \frac12 | 50 percent
(-3,4) | (−3, 4) | \left(-3,4\right) | (–3,4) | (-3, 4).
(1,\infty) | (1, ∞) | \left(1,\infty\right) | x\in(1,\infty)
1,2 | 2,1 | 1 and 2 | 1\text{ and }2 | x=1 or x=2 | \{1,2\} | 1;2 | 1, 2.
3,-3 | \pm 3 | ±3 | -3, 3 | x=3, x=-3 | −3,3
g(x)=x | x | g(x) = x.
y=2x+1 | 2x+1=y | 2x+1 | y = 1 + 2x | y-2x=1
x\le 5 | x≤5 | x\leq5 | 5\ge x | 5≥x
\emptyset | \varnothing | ∅ | \{\} | \{ \}
\infty | ∞ | +\infty | infinity
\text{no} | \text{No.} | no | No | \textbf{no} | \mathrm{No} | \text{ no }
\text{east} | east | East | \text{East.} | \mathbf{east}
BCA | \text{BCA} | \mathrm{BCA} | \text{BCA.}
Tom | \text{Tom} | tom | \textbf{Tom}.
\text{(C)} | C | (C) | \text{C} | \textbf{(C)} | \mathrm{(C)} | \text{C.} | C.
True | \text{true} | true | \text{True}
xy | yx | x y | y x | x\cdot y | \mathit{xy}
abc | cab | bca | a b c
B,A | A,B | A, B | B and A | \text{A},\text{B} | \text{A, B} | \{A,B\}
\text{(B)} | (B) 5 | \textbf{(B)}\ 5 | B. 5 | \text{B) } 5
5,7 | 5\text{ or }7\text{ cm} | x=5\text{ or }x=7
12.5 | 12.5\% | 12.5 % | 12.50 | \frac{25}{2}
1.5\times10^{3} | 1500 | 1.5E3 | 1.5·10³ | 1.5 × 10^3 | 1.5 \cdot 10^{3}\text{ m}
\sqrt{2} | sqrt2 | √2 | 2^{1/2} | \sqrt[2]{2}
\sqrt{x+1} | sqrt(x+1) | √(x+1)
\sin x | sin x | sin(x) | \sin(x)
[0,\infty) | [0,∞) | \left[0,\infty\right)
AF_{16} | AF_{16}. | af_{16}
1011_2 | 1011_{2} | 1011_{\text{two}} | 1011_{\text{base }2} | (1011)_2 | 1011
152A_{11} | 152a_{11} | 152A_{\text{eleven}}
3:4 | 3 : 4 | 6:8 | \frac{3}{4}
4\!:\!51 \text{ p.m.} | 4:51 \text{ PM} | 4:51 p.m. | \text{4:51 pm} | 4:51
\frac{1}{2^{99}} | 2^{-99} | \frac{2}{2^{100}} | 0.5^{99}
\frac{1}{2004!} | \frac{2005}{2005!} | (2004!)^{-1}
1.6\times10^{-19} | 1.6 \cdot 10^{-19} | 1.60\times 10^{-19} | 1.6e-19
10 | \binom{5}{2} | \dbinom{5}{2} | 10.0
05\!:\!00 | 5:00
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
3+4i | 4i+3 | 3 + 4i | z=3+4i
2024-01-02 | 2024-01-02.
"""

# Answers that all differ, in a line.
DIFFERENT = r"""
BCA | ABC | CAB | \text{ACB} | A
east | seat | \text{teas} | eats | \text{west}
no | on | \text{yes}
Tom | Mot | \text{Tim}
HTT | TTH | \text{THT}
left | felt | right
up | pu | down
\text{(B)} | (C) 5 | \textbf{(D)}\ 5
5 | 5\text{ or }7\text{ cm} | (B) 5
A<B<C | A<C<B
east, west | seat, west | east
\text{Ann, Bob} | \text{Bob, Ann}
1A2B | 2A1B | 1B2A
\angle ABC | \angle BCA | \angle CAB
1010_2 | 1010_3 | 1010_{10} | 1011_2 | 10
2516_8 | 2516_9 | 2561_8
\frac{1}{2004!} | \frac{1}{2006!} | \frac{1}{2005!} | 0
\frac{1}{2^{99}} | \frac{1}{2^{98}} | -\frac{1}{2^{99}}
10^{-10} | 2\times10^{-10} | 1e-11 | 0
\frac{1}{1000000} | \frac{1}{1000001} | \frac{1}{999999}
0.0000001 | 0.0000002 | 0.00000011
1.6\times10^{-19} | 1.7\times10^{-19} | 1.6\times10^{-20} | 1.602\times10^{-19}
\frac{\pi}{10^{20}} | \frac{e}{10^{20}} | e^{-50} | e^{-51}
1-\frac{1}{2^{99}} | 1-\frac{1}{2^{98}} | 1
(\frac{1}{2^{99}},1) | (\frac{1}{2^{98}},1) | (0,1)
x=\frac{1}{2^{99}} | x=\frac{1}{2^{98}} | x=0
x>\frac{1}{2^{99}} | x>\frac{1}{2^{98}} | x\ge\frac{1}{2^{99}}
x+10^{-20} | x+10^{-21} | x
10^{100} | 10^{100}+1 | 10^{101}
2t | 2 | 2s | 2h | t
2s | 2t | 3s
\pi r^2h | \pi r^2 | \pi r^2 t
\frac13 | 0.33 | 0.333 | 0.\overline{34} | 33
0.1\overline{6} | 0.1\overline{7} | 0.\overline{16} | 0.16
(-3,4) | (4,-3) | (3,4) | 4 | -3
(1,2) | [1,2] | (1,2] | (2,1)
1,2 | 1 | 2 | 1,3 | 1,2,3 | 12
2\sqrt{3} | 3 | 2 | \sqrt{3} | 3\sqrt{2} | 23
\frac{3}{4} | 3 | 4 | \frac{4}{3} | 34 | 3:4:5
x\le 5 | x<5 | x\ge5 | 5
y=2x+1 | y=2x-1 | y=x+2
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&2\\4&3\end{pmatrix} | 1
3:30\text{ a.m.} | 3:30\text{ p.m.} | 3:40\text{ a.m.}
2024-01-02 | 2024-02-01 | 2021
\text{(A)} | B | (C) | \text{D}
5 ABC | 5 | 5 sinx | 5xy
\infty | -\infty | 0
\pm 3 | 3 | -3
3+4i | 3-4i | 4+3i | 7
"""

SPACES = "\u00a0\u2009\u202f"


def compare(gold: str, answer: str) -> bool | None:
    """Compares two answers as the grader does; None if `answer` cannot be parsed."""
    gold, answer = equality.normalise(gold), equality.normalise(answer)
    known = equality.compare_without_algebra(gold, answer)
    return equality.compare_with_algebra(gold, answer) if known is None else known


def split_lines(block: str) -> list[list[str]]:
    """Splits a block into lines (a line that ends in | goes on) and their forms."""
    lines = block.replace(" |\n", " | ").splitlines()
    return [[form.strip() for form in line.split(" | ")] for line in lines if line]


def list_pairs() -> Iterator[Pair]:
    """Yields all pairs: numbers in marks, values in their forms, and answers that differ."""
    for number, other in (("5", "6"), ("0.25", "0.2"), ("-18", "18")):
        for line in split_lines(MARKED if number[0] == "-" else MARKED + CURRENCIES):
            for form in line:
                yield Pair(number, form.replace("{}", number), True)
                yield Pair(number, form.replace("{}", other), False)
    for space in SPACES:
        yield Pair("1000000", f"1{space}000{space}000", True)
        yield Pair("1000000", f"1{space}000{space}001", False)
    values = split_lines(VALUES)
    for first, *others in values:
        for other in others:
            yield Pair(first, other, True)
            yield Pair(other, first, True)
    for forms, others in itertools.pairwise(values):
        for other in others[:4]:
            yield Pair(forms[0], other, False)
    for first, *others in split_lines(DIFFERENT):
        for other in others:
            yield Pair(first, other, False)
            yield Pair(other, first, False)
