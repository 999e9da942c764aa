r"""Compares two final answers: same value, however they are written.

Marks that change nothing are removed from both (`MARKS`). What is then an integer, a word or a
number in a base is compared here; math-verify compares everything else. Its known errors that would
make a wrong answer right are caught here, each with a comment that says what goes wrong.
"""

import fractions
import itertools
import logging
import re
from collections.abc import Callable
from typing import Any

# Longer answers are not parsed.
MAX_ANSWER_CHARACTERS = 1000
INTEGER = re.compile(r"-?[0-9]{1,18}")

_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63", "-")
    | dict.fromkeys("\u00a0\u2002\u2003\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " ")
    | dict.fromkeys("\u200b\u2060\ufeff", "")
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width ASCII
    | {"。": ".", "’": "'", "…": r"\ldots", "⁄": "/", "∕": "/", "×": r"\times ", "÷": r"\div "}
    | {"·": r"\cdot ", "⋅": r"\cdot ", "±": r"\pm ", "≈": r"\approx ", "→": r"\to "}
    | {"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "}
    | {"π": r"\pi ", "∞": r"\infty ", "∅": r"\emptyset ", "°": r"^\circ ", "½": r"\frac{1}{2}"}
    | {"⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"}
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_UNITS = r"(?:[mcdk]?m|k?g|s|h|ft|in|yd|mi|miles?|feet|inch(?:es)?|units?|meters?|hours?)"
_CURRENCIES = "USD|EUR|GBP|CNY|RMB|INR|JPY"
_NOT_UNITS = (
    "and|or|(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt)[a-z]?|mod|abc|percent|percentage|hundred"
    "|thousand|million|billion|trillion|dozen|times|infinity|for|where|otherwise"
)


def _join_groups(match: re.Match[str]) -> str:
    return match[1] + "".join(re.findall(r"\d{3}", match[2]))


def _write_as_fraction(match: re.Match[str]) -> str:
    """Writes a recurring decimal as a fraction: 0.1\\overline{6} is (16 - 1) / 90."""
    whole, fixed = match[1], match[2]
    period = "".join(part for part in match.groups()[2:] if part)
    numerator = int(whole + fixed + period) - int(whole + fixed or 0)
    fraction = fractions.Fraction(numerator, int("9" * len(period) + "0" * len(fixed)))
    return rf"\frac{{{fraction.numerator}}}{{{fraction.denominator}}}"


Replacement = str | Callable[[re.Match[str]], str]

# (pattern, replacement, why), in this order, for both answers.
MARKS: tuple[tuple[str, Replacement, str], ...] = (
    (r"(?:\b(?:US|AU|CA|HK|NZ))?\\?\$|(?<!\\)\\[()\[\]]", "", "delimiters of mathematics; dollars"),
    (r"[€£¥₹₩₽₪₫฿¢]|\\(?:euro|pounds|texteuro|textdollar)(?![a-z])", "", "other currencies"),
    (
        rf"(?:\\text\s*\{{\s*)?(?<![A-Za-z])(?:{_CURRENCIES}|Rs\.?)\s*\}}?\s*(?=\d)",
        "",
        "currencies by their codes",
    ),
    (r"\\!|\\displaystyle|\\(?:large|Large|LARGE|huge)\b|\\color\s*\{\w+\}", "", "layout"),
    (r"~|\\q?quad(?![a-z])", " ", "spaces that LaTeX does not break"),
    (r"^(?:[\s*`=]|\\approx)+|(?:[\s*`]|\\\\|\\[,;: ])+$", "", "markup and spaces around"),
    (r"\\(?:boldsymbol|bm|pmb|underline|textcolor\s*\{\w+\})\s*\{([^{}]*)\}", r"\1", "emphasis"),
    (r"\{\\(?:bf|rm|it|em)\s+([^{}]*)\}|^\\left\\\{([^&]*)\\right\.$", r"\1\2", "groups of one"),
    (r"\\[dt]binom(?![a-z])", r"\\binom", "sizes of binomials"),
    (r"\\text(?:up|sf|tt|sc|md)\b", r"\\text", "fonts that math-verify does not know"),
    (
        r"\\math(?:bf|rm|it|sf)\s*\{(-?[\d.,]+)\}|\\text\s*\{(-?[\d.,]+)\}",
        r"\1\2",
        "numbers in a font",
    ),
    (r"\s*(?<!\\right)(?<!\.)[.,;:]\s*(\}*)\s*$", r"\1", "the sentence's punctuation"),
    (
        r"(?<![\d.,])(\d{1,3})((?:(?:\\[,;: ]|\\thinspace\s|\{,\}| )\d{3})+)(?!\d)",
        _join_groups,
        "spaces between thousands",
    ),
    (r"^(-?\d{1,3})((?:,\d{3})+)(?=(?:\.\d+)?$)", _join_groups, "commas between thousands"),
    (r"^(-?\d{1,3})((?:\.\d{3}){2,})$", _join_groups, "full stops between thousands"),
    (r"(\d)\.(\d*?)(\d)\3\3+(?:\.\.\.|\\[lcd]?dots)$", r"\1.\2\\overline{\3}", "0.333..."),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?", _write_as_fraction, "recurring decimals"),
    (r"^(\d+)\.(\d*)\((\d+)\)$", _write_as_fraction, "recurring decimals, 0.1(6)"),
    (
        r"(\d*)\.(\d*)\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?",
        _write_as_fraction,
        "recurring decimals, first and last digit dotted",
    ),
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", "superscripts"),
    (r"(?:√|(?<![\\a-z])sqrt)\s*(\d+(?:\.\d+)?)|√\s*([a-zA-Z])", r"\\sqrt{\1\2}", "square roots"),
    (r"√", r"\\sqrt", "square roots of groups"),
    (r"\\degree(?![a-z])|\^\s*\{\s*\\circ\s*\}", r"^\\circ", "one way to write degrees"),
    (r"\^\\circ\s*(?:\\?(?:text|mathrm))?\s*\{?\s*[CF]?\s*\}?$", "", "degrees, as a unit"),
    (r"\\varnothing(?![a-z])|\\\{\s*\\\}", r"\\emptyset", "the empty set"),
    (r"(?<!\\)\bsqrt\s*(?=[({])|\\sqrt\s*(?=\()", r"\\sqrt", "square roots without LaTeX"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", "square roots of brackets"),
    (r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])", "^", "powers of Python"),
    (
        r"(?<![a-zA-Z\\{])(sin|cos|tan|log|ln|exp)(?=\s|\d|\()",
        r"\\\1",
        "functions without LaTeX",
    ),
    (r"(?<![a-zA-Z\\{])pi(?![a-zA-Z}])", r"\\pi ", "pi without LaTeX"),
    (r"^(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)$", r"\1\\times 10^{\2}", "1.5e3"),
    (r"(?<![\d.}])(\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", "mixed numbers, 3 1/2"),
    (r"^(?![a-zA-Z]\()([^=<>]*[^=<>\sa-zA-Z][^=<>]*)=\s*([a-zA-Z])$", r"\2=\1", "5 = x"),
    (r"\\text\s*\{\s*(\d{1,2}:\d\d)\s*([^{}]*)\}", r"\1\\text{ \2}", "times of the day"),
    (r"^0(?=\d:\d\d)", "", "zeros before hours"),
    (
        r"(\d)\s*(?:\\text)?\s*\{?\s*([aApP])\.?\s?[mM]\b\.?\s*\}?$",
        lambda m: rf"{m[1]}\text{{ {m[2].lower()}m}}",
        "a.m. and p.m.",
    ),
    (r"\\text\s*\{\s*(-?\d[\d.,]*)\s+([a-zA-Z ]+)\}$", r"\1\\text{ \2}", "units in one text"),
    # math-verify drops all from the first \text on: 5\text{ or }7\text{ cm} would be 5.
    (
        r"(?<=[\d}])(?:(?:\\[,;: ]|\s)*\\(?:text|mbox|mathrm)\s*\{(?!\s?[ap]m\}|\s*per)[^{}]*\}"
        r"(?:\^(?:\{-?\d\}|\d))?)+$",
        "",
        "units in texts",
    ),
    (rf"(?<=[\d}}])(?:\\[,;: ]\s*)+(?={_UNITS}$)", " ", "thin spaces before units"),
    (rf"(?<=[\d}}])(?:\\[,;: ]|\s)+{_UNITS}(?:\^\{{?-?\d\}}?)+$", "", "units with a power, 5 cm^2"),
    (
        rf"(?<=[\d}}])(?:\\[,;: ]|\s)*{_UNITS}\s?/\s?{_UNITS}(?:\^\{{?\d\}}?)?$",
        "",
        "units of a rate, 5 m/s",
    ),
    (
        rf"(?<=[\d}}])\s+(?!(?:{_NOT_UNITS})\b)"
        rf"(?=[A-Z]?[a-z]*[aeiou]|[AEIOU][a-z]|{_CURRENCIES})[a-zA-Z]{{3,}}"
        rf"(?:\s+(?!(?:{_NOT_UNITS})\b)[a-zA-Z]+)*$",
        "",
        "units and things counted, 18 eggs",
    ),
)
_MARKS = tuple((re.compile(pattern), replacement) for pattern, replacement, _ in MARKS)

_TEXT = re.compile(r"\\(?:text(?:rm|bf|it)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[\s,;.'])*")
_SEPARATOR = re.compile(r"\s*(?:[,;]\s*(?:(?:and|or)\s)?|\s(?:and|or)\s)\s*")
_BASED = re.compile(
    r"(-?)\\?(?:text\s*\{|\()?0*([0-9][0-9A-Za-z.]*)[})]?"
    r"_\s*\{?(?:\\text\s*\{)?\s*(?:base\s*\}?)?\s*(\w+)\s*\}*"
)
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"}
_BASES |= {"eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16"}
_LETTER = re.compile(r"\(?([A-J])\)?")
_OPTION = re.compile(r"\(?([A-J])[).:]\s*[^\s(].*")  # a letter with what stands for it: (C) 18
_DATE = re.compile(r"\d{4}-\d\d?-\d\d?")
_NAME = re.compile(r"[A-Z]{2,}")
_CODE = re.compile(r"(?=.*[A-Z].*[A-Z])[A-Z0-9\s]+")
_HALF_OF_DAY = re.compile(r"\d\\text\{ ([ap]m)\}$")
_INNER_SPACE = re.compile(r"\s+(?![0-9])|(?<![0-9])\s+")  # not that of 1 2
_PERCENT = re.compile(r"^([1-9][\d.]*)\\?%$")  # math-verify compares only whole ones
_LAST_VARIABLES = re.compile(r"(?<=[\d})\s])(?:[thoclsgmd]|ab|bc|st|[a-hqs] [a-z])$")
_UNIT_LETTERS = frozenset("mshgl")


class NoAnswerError(ValueError):
    """The right answer cannot be parsed, so nothing can be compared with it."""


def is_gradable(answer: str) -> bool:
    """Returns True if answers can be compared with this one, judged by its form.

    It must be short, have balanced braces, and hold more than markup; NaN is the trace of a value
    that was missing. Running math-verify instead would take minutes on a large data set and tell no
    more.
    """
    depth, least = 0, 0
    for brace in re.findall(r"\\.|[{}]", answer, re.DOTALL):
        depth += (brace == "{") - (brace == "}")
        least = min(least, depth)
    if depth or least or len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    text = normalise(answer).strip(" ${}\\")
    return bool(text) and text.casefold() != "nan"


def normalise(answer: str) -> str:
    """Removes from an answer, or writes in one way, what does not change its value.

    One that is too long to be compared stays as it is: the time of some patterns grows with the
    square of the length.
    """
    text = answer.translate(_CHARACTERS)
    if len(text) > MAX_ANSWER_CHARACTERS:
        return text.strip()
    for pattern, replacement in _MARKS:
        text = pattern.sub(replacement, text)
    return text.strip()


def compare_without_algebra(gold: str, answer: str) -> bool | None:
    """Compares two normalised answers; None if that takes algebra."""
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    if gold and _squeeze(gold) == _squeeze(answer):
        return True
    if _DATE.fullmatch(gold) or _DATE.fullmatch(answer):
        return False  # math-verify subtracts: 2020-01-02 would be 2020-02-01 and 2017
    # math-verify multiplies letters: \angle ABC would be \angle BCA. Capitals in a row are a name.
    names = [_NAME.findall(text) for text in (gold, answer)]
    if sorted(names[0]) != sorted(names[1]):
        letters = [sorted(map(sorted, group)) for group in names]
        if letters[0] == letters[1]:
            return False
    if _CODE.fullmatch(gold) and _CODE.fullmatch(answer):
        return False  # math-verify multiplies: 1A2B would be 2A1B
    halves = [_HALF_OF_DAY.search(text) for text in (gold, answer)]
    if halves[0] and halves[1] and halves[0][1] != halves[1][1]:
        return False  # math-verify drops the unit: 3:30 a.m. would be 3:30 p.m.
    # math-verify ignores an index: 1010_2 would be 1010_3. One without a base may still be either.
    based = [_BASED.fullmatch(text) for text in (gold, answer)]
    if based[0] and based[1]:
        return _read_base(based[0]) == _read_base(based[1])
    if based[0] or based[1]:
        digits = [
            _read_base(m)[0] if m else text.lower().lstrip("0")
            for m, text in zip(based, (gold, answer), strict=True)
        ]
        return True if digits[0] == digits[1] else None
    choices = [_LETTER.fullmatch(_plain(text)) for text in (gold, answer)]
    options = [_OPTION.fullmatch(_plain(text)) for text in (gold, answer)]
    for choice, option in zip(choices, reversed(options), strict=True):
        if choice and option:
            return choice[1] == option[1]
    return _compare_words(gold, answer)


def _plain(text: str) -> str:
    return _TEXT.sub(r"\1", text).strip()


def _squeeze(text: str) -> str:
    text = _PERCENT.sub(r"\1", _INNER_SPACE.sub("", _plain(text)))
    return text if "\\" in text else text.casefold()  # \Delta is not \delta


def _read_base(match: re.Match[str]) -> tuple[str, str]:
    base = match[3].lower()
    return match[1] + match[2].lower(), _BASES.get(base, base)


def _compare_words(gold: str, answer: str) -> bool | None:
    """Compares two answers that consist of words; None if one does not.

    math-verify multiplies the letters of words outside \\text, so "seat" would be "east" and ABC
    would be BCA.
    """
    expected, found = _split_words(gold), _split_words(answer)
    if expected is None or found is None:
        return None
    if [word.casefold() for word in expected] == [word.casefold() for word in found]:
        return True
    listed_in_text = any("," in inner for text in (gold, answer) for inner in _TEXT.findall(text))
    if listed_in_text and any(len(word) > 1 for word in expected + found):
        return False  # in a text, "b, a" is an order
    return sorted(map(_sort_product, expected)) == sorted(map(_sort_product, found))


def _split_words(text: str) -> list[str] | None:
    text = re.sub(r"^\((\w)\)$", r"\1", _plain(text).removesuffix("."))
    if not _WORDS.fullmatch(text):
        return None
    return [" ".join(item.split()) for item in _SEPARATOR.split(text)]


def _sort_product(word: str) -> str:
    """Returns the key by which words are compared: letters in any order for a product of variables.

    Such a product is xy, x y or abc: lower-case letters without a vowel, or neighbours.
    """
    letters = word.replace(" ", "")
    spaced = " " in word and all(len(part) == 1 for part in word.split())
    variables = letters.isascii() and letters.islower() and letters.isalpha()
    if not variables or len(letters) < 2:
        return word.casefold()
    ordered = sorted(letters)
    neighbours = all(ord(b) - ord(a) == 1 for a, b in itertools.pairwise(ordered))
    is_word = re.search("[eio]", letters) or (re.search("[au]", letters) and not neighbours)
    return word.casefold() if is_word and not spaced else "".join(ordered)


def compare_with_algebra(gold: str, answer: str) -> bool | None:
    """Compares two normalised answers by math-verify; None if it cannot parse `answer`.

    Time and memory are unbounded. Raises NoAnswerError if `gold` does not parse.
    """
    from math_verify import LatexExtractionConfig, parse, verify  # slow to import

    # Silences the warning that its own timeouts are off: the pool has one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    gold, answer = _keep_variables(gold, answer)
    # By default it takes a number or a fraction out of a box that is no valid LaTeX.
    boxes_only = [LatexExtractionConfig(boxed_match_priority=0)]
    how: Any = {"extraction_config": boxes_only, "extraction_mode": "first_match"}
    how["parsing_timeout"] = 0
    expected = parse(f"\\boxed{{{gold}}}", **how)
    if not expected:
        raise NoAnswerError(gold)
    found = parse(f"\\boxed{{{answer}}}", **how)
    if verify(expected, found, timeout_seconds=0):
        return not _differ_by_rounding(expected[0], found[0])
    # math-verify returns strings alone for what it cannot parse.
    return None if all(isinstance(part, str) for part in found) else False


def _keep_variables(gold: str, answer: str) -> tuple[str, str]:
    """Puts braces around variables at the end that math-verify would drop as units.

    It drops t of 2t, s of 2s, h of \\pi r^2h and a b of 2 a b. 2m remains 2 metres unless the right
    answer has the m.
    """
    if "\\text" in gold + answer:
        return gold, answer
    kept = _LAST_VARIABLES.sub(r"{\g<0>}", gold) if _ends_in_variable(gold, True) else gold
    if kept != gold or _ends_in_variable(answer, False):
        answer = _LAST_VARIABLES.sub(r"{\g<0>}", answer)
    return kept, answer


def _ends_in_variable(text: str, is_gold: bool) -> bool:
    match = _LAST_VARIABLES.search(text)
    if match is None:
        return False
    number = re.fullmatch(r"-?[\d.,]+(\s*)", text[: match.start()])
    return not (number and match[0] in _UNIT_LETTERS and (number[1] or not is_gold))


_ROUNDING = 1e-5  # math-verify rounds decimals to 6 places
_DECIMAL_TOLERANCE = 2e-4  # relative, of decimals


def _differ_by_rounding(gold: Any, answer: Any) -> bool:
    """Returns True for two answers whose numbers differ, but by less than math-verify sees.

    It rounds decimals to six places, and exact differences to 15, whatever the size of the numbers,
    so 1/2004! would be 1/2006! and 1.6e-19 would be 1.7e-19.
    """
    from sympy import Float, default_sort_key

    numbers = [_list_numbers(gold), _list_numbers(answer)]
    if len(numbers[0]) != len(numbers[1]):
        return False
    for group in numbers:
        group.sort(key=lambda number: default_sort_key(number.evalf(15)))
    for a, b in zip(*numbers, strict=True):
        difference = abs((a - b).doit()) if a != b else 0
        if difference == 0 or not difference.is_comparable or difference.evalf(15) > _ROUNDING:
            continue  # equal, not known to differ, or equal for another reason (50% is 50)
        if not (a.has(Float) or b.has(Float)):
            return True
        if difference.evalf(15) > _DECIMAL_TOLERANCE * max(abs(a.evalf(15)), abs(b.evalf(15))):
            return True
    return False


def _list_numbers(answer: Any) -> list[Any]:
    """Lists the numbers of an answer: itself, or those of a set, a tuple, an interval, a matrix, or
    of x = 5 and x < 5."""
    from sympy import Expr, MatrixBase, Set, Tuple
    from sympy.core.relational import Relational

    if isinstance(answer, MatrixBase):
        return [number for part in answer.flat() for number in _list_numbers(part)]
    is_bound = isinstance(answer, Relational) and (answer.lhs.is_Symbol or answer.rhs.is_Symbol)
    if is_bound or isinstance(answer, Set | Tuple):
        return [number for part in answer.args for number in _list_numbers(part)]
    return [answer] if isinstance(answer, Expr) else []
