r"""Finds the final answer of a response: its last box, or what follows its last "answer is".

Responses are hostile input: every search here takes time linear in the text.
"""

import re

# Opening and closing of groups. \{ and \} are characters, not groups; a doubled backslash before
# boxed is one that was escaped twice.
_BRACES = re.compile(
    r"\\(?=\\(?:boxed|fbox))|(?P<box>\\(?:boxed|fbox)\s*+\{)|\\.|(?P<brace>[{}])", re.DOTALL
)
# \boxed 5 and \boxed\frac{1}{2}, as TeX also allows.
_BARE_BOX = re.compile(
    r"\\(?:boxed|fbox)\s*+(-?\d[\d.,/]*+|-?\\[a-zA-Z][^\s$]*+|[a-zA-Z](?=[$.,\s]|$))"
)
# Between two boxes that are parts of one answer, without markup: a comma, "and" or "or", and
# perhaps "the other is" or "y =".
_MARKUP = re.compile(r"[\s$*{}]|\\[()\[\],;:!]|\\q?quad|\\text")
_JOINT = re.compile(
    r"\s*(?:[,;]|[,;]?\s*(?:and|or))\s*"
    r"(?:(?:the|a|other|second|third|one|root|solution|value|is|are|also)\s+)*"
    r"(?:[A-Za-z](?:_?\d)?\s*=)?\s*"
)
_MAX_JOINT_CHARACTERS = 70

_ANSWER_MARKER = re.compile(
    r"""
      \banswer\b [\s*_`]{0,4} (?:[:=]|[-–—](?=\s))                     # Answer: 18
    | \b(?:answer|(?:correct|right)\ (?:option|choice))\b (?:[ ]\w{1,20}){0,8}?
      [*_ ]{1,4} (?:is|are|be) \b :?                                   # the answer to it is 18
    | ^[ \t\#*_>]*+ (?:the\ |my\ )? (?:final\ )? answer [*_ \t]*+ $     # a heading
    | ^[ \t]*+ (?-i:A:)
    | \#\#\#\# (?![ ]*\d+\.[ ]+\S)  # no heading: #### 2. Add
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
_LEAD = re.compile(r"(?:[\s:*_`<>]|\|\s|(?<=\n)(?:#|[-•] ))*+")  # markup before the answer
_CHOICE = re.compile(
    r"(?i:(?:option|choice)\s+)?\(([A-J])\)(?!\s?[-+*/^=])|([A-J])[).:](?=[\s*]|$)"
    r"|(?i:option|choice)\s+([A-J])\b"
)
_SPACE = re.compile(r"[^\S\n]")
_NEGATIVE = re.compile(
    r"(?:\bnegative|(?:^|(?<=\bis )|(?<=[=:\d] ))minus)\s(?=[$€£¥\\]{0,2}\d)", re.IGNORECASE
)
_BOLD = re.compile(r"(?<![\d)])\*\*|\*\*(?![\d(])")  # not the power of 2**3

_MATH = r"""
    \$\$ [^$]++ \$\$
    | (?<!\\)\$ (?!\s*[\d.,]*\d(?:\s+[a-zA-Z]{2}|[\s,;.—–]+\$)) [^$\n]++ \$  # not $5 and $6
    | \\\[ (?:[^\\]|\\(?!\]))*+ \\\]
    | \\\( (?:[^\\]|\\(?!\)))*+ \\\)
"""
# Outside of mathematics an expression ends at a word, at the end of the sentence, and at a bracket
# behind a number, which explains it: 18 (3 times 6).
_TOKEN = r"""
    \\(?:text|mathrm|mathbf|textbf|mbox|operatorname|begin|end)\s?\{[^{}\n]*+\}
    | \\[a-zA-Z]++ | \\[^a-zA-Z\s]
    | \d | \{,\} | \.(?=\d) | ,(?=\d{3}) | (?<=\d)[a-zA-Z]{1,3}(?![a-zA-Z])
    | [-+*/^=<>_{}~%!|:&'$€£¥₹×÷·⋅√π∞°±≤≥≠≈∪∩½⅓⅔¼¾−–﹣－⁰¹²³⁴⁵⁶⁷⁸⁹⁻]
    | (?<![\d%}!°]\s)[(\[] | [)\]]
    | [,;]\s?(?=[-+\d\\$(\[{−√π∞]|[a-zA-Z]\s?=) | [ ](?=\S)
    | (?<=[ ])(?:and|or)(?=\ (?:[-+\d\\$(−√π∞]|[a-zA-Z]\s?=)) | (?<=[ ])percent\b
    | (?<![a-zA-Z])(?:sqrt|sin|cos|tan|log|ln|exp|pi)(?![a-zA-Z])
    | (?:(?<=[-+*/^=(])|(?<=[-+*/^=(]\s))[b-df-hj-np-tv-z]{2,3}(?![a-zA-Z])
    | (?<=\d\s)(?:[ap]\.m\.|(?:am|pm|AM|PM)\b)
    | (?<![a-zA-Z])(?:[b-zB-HJ-Z]|[aAI](?!\s+[a-zA-Z0-9]))(?![a-zA-Z'])
"""
_SIGNS = r"(?:[-+±−–﹣－(\[{|$€£¥₹]\s?)*+"
_NUMBER_LIKE = r"(?:\d|\.\d|\\(?![()\[\]])|[√π∞∅½⅓⅔¼¾]|(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b)"
_EXPRESSION = re.compile(
    rf"""(?P<math>{_MATH}) | (?P<plain>
    (?<![\w.])(?:[a-zA-Z](?:\([a-zA-Z]\))?\s?=\s?)?{_SIGNS}(?={_NUMBER_LIKE})(?:{_TOKEN})++)""",
    re.VERBOSE,
)
_LETTERED = re.compile(rf"{_SIGNS}[a-zA-Z](?![a-zA-Z'])(?:{_TOKEN})*+", re.VERBOSE)
_DELIMITERS = re.compile(r"^(?:\$\$?|\\[(\[])\s*|\s*(?:\$\$?|\\[)\]])$")
_NEXT_MATH = re.compile(r"\s?(?:[,;]|,?\s?(?:and|or))\s?(?=\$|\\[(\[])")
_TAIL = re.compile(r"(?:\\[,;:! (\[]|[\s+*/=<>^_,;:|&~(\[{!'$−–-])+$")
_ARTICLE = re.compile(r"(?<=\s)[a-zA-Z]\s*+$")
_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|\n|,\s|\s\(")
# A bracket that explains what stands before it, and the left side of 9 * 2 = $18.
_REMARK = re.compile(r"(?<=[\d$}%])\s\([^()]*\)|\s\((?=[^()]*(?<![\\a-z])[a-z]{2})[^()]*\)")
_CALCULATION = re.compile(r"^(?:[^=a-zA-Z\\<>]++=\s*)+(?=[^=]*$)")
_MAX_WORDS = 3  # longer answers in words are sentences
_VERDICTS = re.compile(
    r"(?:(?:in|not|indeed|also|thus|therefore)\s)*"
    r"(?:(?:in)?correct|right|wrong|(?:un)?clear|(?:in)?valid|reasonable|unique|helpful|verified"
    r"|confirmed|consistent|below|unknown)\b",
    re.IGNORECASE,
)
_MAX_CHARACTERS = 2000  # more than an answer may have
_MAX_MARKERS = 20  # that are tried, from the last


def strip_thinking(response: str) -> str | None:
    """Returns the text after the last `</think>` of a response.

    This is the whole text if there is no think block, and None if one is never closed.
    """
    tail = response.rpartition("</think>")[2]
    return None if "<think>" in tail else tail.strip()


def extract_answer(response: str) -> str | None:
    """Extracts the answer of the final text: its last box, else the expression after the last
    marker ("The answer is", "Answer:", "####"), else its last expression. None if there is none, or
    if the box or the thinking is not closed."""
    final = strip_thinking(response)
    if final is None:
        return None
    boxes = find_boxes(final)
    return _find_outside_boxes(final) if boxes is None else _join_boxes(final, boxes)


def extract_boxed(text: str) -> str | None:
    r"""Returns the content of a text's last \boxed{...}; None without one, or if not closed.

    Boxes that only a comma, "and" or "or" separates are one answer, "1, 2".
    """
    boxes = find_boxes(text)
    return None if boxes is None else _join_boxes(text, boxes)


Box = tuple[int, int, str | None]
"""Start and end of a box in the text, and its content (None if it is not closed)."""


def find_boxes(text: str) -> list[Box] | None:
    """Finds the boxes of a text in order. None if there is none."""
    boxes: list[Box] = []
    stack: list[tuple[int, int] | None] = []  # number and content's start of each open box
    for match in _BRACES.finditer(text):
        if match["box"]:
            stack.append((len(boxes), match.end()))
            boxes.append((match.start(), len(text), None))
        elif match["brace"] == "{":
            stack.append(None)
        elif match["brace"] == "}" and stack and (opened := stack.pop()):
            number, start = opened
            boxes[number] = (boxes[number][0], match.end(), text[start : match.start()].strip())
    for match in _BARE_BOX.finditer(text):
        boxes.append((match.start(), match.end(), match[1].rstrip(".,")))
    return sorted(boxes, key=lambda box: box[0]) or None


def _join_boxes(text: str, boxes: list[Box]) -> str | None:
    """Returns the content of the last box, with those of the boxes that it is joined with."""
    if boxes[-1][2] == "":  # "put it into \boxed{}", said again at the end
        boxes = [box for box in boxes if box[2] != ""] or boxes[-1:]
    start, _, content = boxes.pop()
    if content is None:
        return None
    parts = [content]
    while boxes and boxes[-1][2] and 0 <= start - boxes[-1][1] <= _MAX_JOINT_CHARACTERS:
        between = _MARKUP.sub(" ", text[boxes[-1][1] : start])
        if not _JOINT.fullmatch(between):
            break
        start, _, content = boxes.pop()
        assert content is not None
        parts.insert(0, content)
    return ", ".join(dict.fromkeys(parts))


def _find_outside_boxes(text: str) -> str | None:
    markers = list(_ANSWER_MARKER.finditer(text))[: -_MAX_MARKERS - 1 : -1]
    tails = [(m[0], _LEAD.sub("", text[m.end() :][:_MAX_CHARACTERS], count=1)) for m in markers]
    for marker, tail in tails:
        if answer := _read_expression(_clean_text(tail), anywhere=marker != "####"):
            return answer
    for marker, tail in tails:
        if not (marker == "####" and "\n" in tail.strip()) and (answer := _read_words(tail)):
            return answer
    return _find_last_expression(text)


def _read_expression(text: str, anywhere: bool) -> str | None:
    """Reads the expression at the start of a text; if there is none and `anywhere`, the first one
    of its first line."""
    if choice := _CHOICE.match(text):
        return choice[1] or choice[2] or choice[3]
    match = _EXPRESSION.match(text)
    if match is None and (lettered := _LETTERED.match(text)):
        return _trim(lettered[0], text[lettered.end() :])
    if match is None and anywhere and not _VERDICTS.match(text):
        match = _EXPRESSION.search(text.partition("\n")[0])
    if match is None:
        return None
    parts = [_clean_expression(match)]
    while match and match["math"] and (joint := _NEXT_MATH.match(text, match.end())):
        match = _EXPRESSION.match(text, joint.end())
        parts.append(_clean_expression(match) if match else "")
    return ", ".join(filter(None, parts))


def _find_last_expression(text: str) -> str | None:
    """Finds the last expression of a text, that on the right of 6 * 7 = 42, or its only word. None
    if there is none."""
    end = text.rstrip(" .*\n")
    for closing, opening in (("\\]", "\\["), ("$$", "$$")):
        if end.endswith(closing):
            _, displayed, formula = end.removesuffix(closing).rpartition(opening)
            if displayed:
                return formula.strip()
    if "=" not in end and _LETTERED.fullmatch(end):  # (x + 1)^2, and nothing else
        return end
    for line in reversed(text.splitlines()):
        line = _get_last_cell(line)
        clean = _REMARK.sub("", _clean_text(line[-_MAX_CHARACTERS:]))
        for match in reversed(list(_EXPRESSION.finditer(clean))):
            if answer := _clean_expression(match):
                return _CALCULATION.sub("", answer)
    word = text.strip(" *_`")
    return word if re.fullmatch(r"\(?\w+\)?\.?", word) else None


def _get_last_cell(line: str) -> str:
    """Returns the last cell of a table's row, | a | 18 |; any other line as it is."""
    row = line.strip()
    cells = row[1:-1].split("|") if row[:1] == row[-1:] == "|" else []
    return cells[-1] if len(cells) > 1 and cells[-1].strip() else line


def _clean_text(text: str) -> str:
    return _NEGATIVE.sub("-", _BOLD.sub("", _SPACE.sub(" ", text)))


def _clean_expression(match: re.Match[str]) -> str:
    if match["math"]:
        return _DELIMITERS.sub("", match["math"])
    return _trim(match["plain"], match.string[match.end() :])


def _trim(expression: str, behind: str) -> str:
    """Cuts what the text says around an expression: an article before the next word, operators and
    brackets at the end that lack their other half."""
    if re.match(r"\s*[a-zA-Z]{2}", behind):
        expression = _ARTICLE.sub("", expression)
    whole, expression = expression, _TAIL.sub("", expression)
    if expression.count("|") % 2:  # of a table, or the left one of |-5|
        closed = whole.startswith(expression + "|") and expression[-1:] != " "
        expression = expression + "|" if closed else expression.lstrip("| ")
    opened: list[int] = []
    for i, character in enumerate(expression):
        if character in "([":
            opened.append(i)
        elif character in ")]":
            if not opened:
                return _TAIL.sub("", expression[:i])
            opened.pop()
    return _TAIL.sub("", expression[: opened[0]]) if opened else expression


def _read_words(text: str) -> str | None:
    """Reads an answer in words, up to the end of the sentence; None if it is longer than that."""
    words = _SENTENCE_END.split(text, maxsplit=1)[0].strip(" *_`\"'$")
    is_answer = words and len(words.split()) <= _MAX_WORDS and not _VERDICTS.match(words)
    return words if is_answer else None
