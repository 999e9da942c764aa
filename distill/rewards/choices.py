r"""Finds the option that a response chooses, and reads multiple-choice answers.

A response states its choice in a box, \boxed{C}; after a marker, "The answer is (C)", "Answer: C",
"answer": "C"; or before one, "(C) is correct". Of several statements the last that names an option
counts. Without a statement the text must be a choice itself: "C", "C) Paris", "Paris"; or begin
just one line with an option's letter, or mention just one, "(C)" or "option C". An option is named
by its letter or by its text. Where the statement that counts names two options, or a text without a
statement several, the response is "unparsed": it is not guessed which one is meant.

Responses are hostile input: every search here takes time linear in the text.
"""

import json
import re
from collections.abc import Iterator, Sequence

from distill.rewards.answers import find_boxes, strip_thinking
from distill.rewards.graders import Grade, GradingRule

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_MARKER = re.compile(
    r"""
      \banswer\b ["'*_`]{0,4} \s? [:=] | \b(?:answer|choice|option)\b [*_ ]{0,4} [:=]
    | \b(?:answer|choice|option)\b (?:[ ]\w{1,20}){0,6}? [*_ ]{1,4} (?:is|are|be|was)\b :?
    | ^[ \t\#*_>]*+ (?:the\ |my\ )? (?:final\ |correct\ )? answer [*_ \t]*+ $
    | \bI(?:'d|['’]ll|\ will|\ would|\ have)? \ (?:choose|chose|pick|select|go\ with|answer)\b
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_NEGATION = re.compile(r"\b(?:not|never|cannot|can't|isn't|eliminate[ds]?)\b|n't\b", re.IGNORECASE)
# "(C) is correct", "option C is the right answer".
_BEFORE = re.compile(
    r"(?<![\w'’])[(*_`$]{0,4}(?P<letter>[A-Z])[)*_`$]{0,4}\s"
    r"(?:(?:is|must\ be|would\ be)\s(?:indeed\s|therefore\s|thus\s)?(?:the\s)?"
    r"(?:correct|right|best|most\s\w{1,20}))\b"
)
# "Hence, C." at the end of a line.
_CONCLUSION = re.compile(
    r"\b(?:[Tt]herefore|[Tt]hus|[Hh]ence|[Ss]o),?\s(?:it\sis\s|it's\s)?"
    r"[(*_`$]{0,4}(?P<letter>[A-Z])[)*_`$]{0,4}\.?[ \t]*+$",
    re.MULTILINE,
)
_LEAD = re.compile(
    r"(?:[\s:*_`\"'“”‘’\[{$>~=]|[-–](?=\s)|\\[(\[]|\\(?:text|mathrm|mathbf|textbf|boxed|fbox|rm|bf)\s*+\{"
    r"|(?i:(?:option|choice|letter|answer|the|most|likely|clearly|therefore|definitely)\b))*+"
)
_CLOSING = r"[\s*_`\"'“”’$)\]}.\\]*+"
_LETTER = re.compile(r"(?P<open>\(\s*)?(?P<letter>[A-Za-z])(?![\w'’])(?P<close>\s*\))?")
_AFTER_ARTICLE = re.compile(  # after a bare "A" or "I" that is a letter, not a word
    rf"{_CLOSING}(?:$|[,;:/&\n—–-]|\()|\s(?:because|since|as|and|or|due|which|with|for|is|by)\b"
)
_SECOND = re.compile(
    r"[\s*_`\"'$)\]}]*+(?:(?P<joint>/|&|\b(?:and|or|and/or)\b)|(?P<comma>,))"
    r"(?:[\s*_`\"'$(\[{]|\\text\{|(?:and|or|also|option|choice)\b)*+(?P<letter>[A-Z])(?![\w'’])"
    rf"(?P<end>{_CLOSING}(?:$|[.,;:\n]))?"
)
_LINE = re.compile(r"^[ \t>*_`#-]*+(?:\((?P<a>[A-Z])\)|(?P<b>[A-Z])[).:](?=[\s*]|$))", re.MULTILINE)
_MENTION = re.compile(r"\((?P<a>[A-Z])\)|\b(?:[Oo]ption|[Cc]hoice)\s+(?P<b>[A-Z])(?![\w'’])")
_MARKUP = re.compile(r"\\(?:text|mathrm|mathbf|textbf|left|right)\b|\\[,;:!()\[\]]|[\s$*_`{}\"]+")
_MAX_TAIL = 2000  # characters after a marker that are read
_MAX_MARKERS = 40  # that are tried, from the last
_MAX_SHORT = 300  # characters of an answer without a statement that may name an option by its text

Options = Sequence[str]  # their texts; their letters are A, B, ... in order


class AmbiguousError(Exception):
    """Raised where a response names several options and says of none that it is the answer."""


def make_answer(letter: str, options: Options) -> str:
    """Returns the JSON answer that `grade_choice` reads."""
    return json.dumps({"letter": letter, "options": list(options)}, ensure_ascii=False)


def read_answer(answer: str) -> tuple[str, list[str]] | None:
    """Reads an answer of `make_answer`, or a letter alone, whose options are not known (any letter
    up to J may be chosen, and their texts are empty). None if it is neither."""
    if re.fullmatch(r"\(?[A-J]\)?", answer.strip()):
        return answer.strip().strip("()"), [""] * 10
    try:
        fields = json.loads(answer)
        letter, options = fields["letter"], fields["options"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    is_list = isinstance(options, list) and all(isinstance(text, str) for text in options)
    if not is_list or not isinstance(letter, str) or len(letter) != 1:
        return None
    return (letter, options) if letter in LETTERS[: len(options)] else None


def is_gradable(answer: str) -> bool:
    """Returns True if responses can be compared with this answer."""
    return read_answer(answer) is not None


def grade_choice(response: str, answer: str) -> Grade:
    """Grades the choice of a response.

    Returns `outcome`, `found`, the letter that it chooses (None if none, or several), and `right`,
    the right one. The outcome is "unparsed" where several options are named.
    """
    read = read_answer(answer)
    if read is None:
        return {"outcome": "error"}
    right, options = read
    try:
        found = find_choice(response, options)
    except AmbiguousError:
        return {"outcome": "unparsed", "found": None, "right": right}
    outcome = "no_answer" if found is None else "correct" if found == right else "wrong"
    return {"outcome": outcome, "found": found, "right": right}


def find_choice(response: str, options: Options) -> str | None:
    """Returns the letter of the option that a response chooses; None if it chooses none.

    Raises AmbiguousError if it names several.
    """
    final = strip_thinking(response)
    if not final:
        return None
    for letters in _read_statements(final, options):
        if letters:
            return _require_one(letters)
    return _find_unstated(final, options)


def _require_one(letters: set[str]) -> str:
    if len(letters) > 1:
        raise AmbiguousError
    return next(iter(letters))


def _read_statements(text: str, options: Options) -> Iterator[set[str]]:
    """Yields the options that each statement names, from the last statement to the first."""
    statements: list[tuple[int, str]] = []
    for start, _, content in find_boxes(text) or []:
        statements.append((start, (content or "")[:_MAX_TAIL]))
    for match in _MARKER.finditer(text):
        tail = text[match.end() :][:_MAX_TAIL]
        if not _NEGATION.search(match[0]) and not _NEGATION.match(tail.lstrip()):
            statements.append((match.start(), tail))
    letters = LETTERS[: len(options)]
    for pattern in (_BEFORE, _CONCLUSION):
        for match in pattern.finditer(text):
            if match["letter"] in letters:
                statements.append((match.start("letter"), f"({match['letter']})"))
    for _, tail in sorted(statements, reverse=True)[:_MAX_MARKERS]:
        yield _read_named(tail, options)


def _read_named(tail: str, options: Options) -> set[str]:
    """Returns the letters of the options that a text names at its start; none if it names none."""
    tail = _LEAD.sub("", tail, count=1)
    match = _LETTER.match(tail)
    by_text = _match_text(tail, options)
    if match is None or not _is_letter(match, tail[match.end() :]):
        return by_text
    letter = match["letter"].upper()
    if letter not in LETTERS[: len(options)]:
        return by_text
    named, rest = {letter}, tail[match.end() :]
    while (second := _SECOND.match(rest)) and (second["joint"] or second["end"] is not None):
        if second["letter"] not in LETTERS[: len(options)]:
            break
        named.add(second["letter"])
        rest = rest[second.end("letter") :]
    return named


def _is_letter(match: re.Match[str], rest: str) -> bool:
    """Returns True if a single character is the name of an option, not a word."""
    if match["open"] and match["close"]:
        return True
    if match["letter"].islower():
        return bool(re.match(rf"{_CLOSING}(?:$|\n|[,;:)])", rest))
    if match["letter"] in "AI" and not match["close"]:
        return bool(_AFTER_ARTICLE.match(rest))
    return not re.match(r"\s*[=+^<>]", rest)  # C = 5 is an equation


def _normalise(text: str) -> str:
    return _MARKUP.sub(" ", text).strip(" .,;:").casefold()


def _match_text(tail: str, options: Options) -> set[str]:
    """Returns the options whose text stands at the start of `tail`: of those, the longest."""
    start = _normalise(tail[: 2 * max(map(len, options), default=0) + 80])
    best, found = 0, set()
    for letter, option in zip(LETTERS, options, strict=False):
        text = _normalise(option)
        if not text or not start.startswith(text) or len(text) < best:
            continue
        if re.match(r"\w|\.\d|\s?[-+*/^=]", start[len(text) :]) and len(start) > len(text):
            continue
        found = {letter} if len(text) > best else found | {letter}
        best = len(text)
    return found


def _find_unstated(text: str, options: Options) -> str | None:
    """Returns the choice of a text that states none by a marker."""
    letters = LETTERS[: len(options)]
    alone = _LEAD.sub("", text, count=1)
    match = _LETTER.match(alone)
    is_alone = match and not re.sub(_CLOSING, "", alone[match.end() :], count=1)
    if match and is_alone and match["letter"].upper() in letters:
        return match["letter"].upper()
    whole = {
        x for x, o in zip(letters, options, strict=True) if o and _normalise(o) == _normalise(text)
    }
    if whole:
        return _require_one(whole)
    for pattern in (_LINE, _MENTION):
        named = {match["a"] or match["b"] for match in pattern.finditer(text)} & {*letters}
        if named:
            return _require_one(named)
    if len(text) > _MAX_SHORT or "\n" in text:
        return None
    return next(iter(_find_contained(text, options)), None)


def _find_contained(text: str, options: Options) -> set[str]:
    """Returns the only option whose text a short answer contains, if there is one.

    Raises AmbiguousError if it contains several, unless one of them contains the others.
    """
    plain = f" {_normalise(text)} "
    found = {}
    for letter, option in zip(LETTERS, options, strict=False):
        words = _normalise(option)
        if words and re.search(rf"(?<!\w){re.escape(words)}(?!\w|\.\d)", plain):
            found[letter] = words
    longest = max(found.values(), key=len, default="")
    found = {x: words for x, words in found.items() if words == longest or words not in longest}
    if len(found) > 1:
        raise AmbiguousError
    return {*found}


CHOICES = GradingRule(grade_choice, grade_choice, is_gradable, right_response="")
