"""Generates requests with constraints that IFEval's checkers verify, and responses that keep them.

Name animals. Put 2 words in [ ]. No commas.

owl [cat] [pig] fox

Rows have IFEval's published form (arXiv 2311.07911: `prompt`, `instruction_id_list`, `kwargs`), so
the benchmark `ifeval` grades responses to them, and besides that `question` and `response`, so
they can be trained on. A request leaves free which words are named, how many and in which order.
A row is a pure function of (seed, index, split).
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.rewards import ifeval
from models.errors import UserError

# Pairs of constraints are of train, valid or test. `seen` has other prompts with those of train.
SPLITS = ("train", "valid", "test", "seen")
TOPICS = {
    "animals": ("cat", "cow", "dog", "fox", "hen", "owl", "pig", "rat"),
    "colours": ("blue", "gold", "gray", "green", "lime", "pink", "red", "teal"),
    "foods": ("bean", "corn", "fig", "ham", "nut", "pea", "pie", "rice"),
}
KEYWORDS = ("ice", "moon", "sea", "sky", "star", "sun")
ENDINGS = ("bye", "done", "end", "over", "stop")
# Constraints by IFEval's names, each with the ways to ask for it.
CONSTRAINTS = {
    "punctuation:no_comma": ("No commas.", "Do not use commas."),
    "startend:end_checker": ("End with {end_phrase}.", "The last word is {end_phrase}."),
    "startend:quotation": ("Use quotes.", "Put it in quotes."),
    "keywords:existence": ("Use the word {keywords}.", "Say {keywords} too."),
    "keywords:forbidden_words": ("Do not say {forbidden_words}.", "Never say {forbidden_words}."),
    "keywords:frequency": ("Say {keyword} {frequency} times.", "Use {keyword} {frequency} times."),
    "detectable_format:number_bullet_lists": ("Use {num_bullets} bullets.",),
    "detectable_format:title": ("Add a title in << >>.", "Use a title in << >>."),
    "detectable_content:number_placeholders": ("Put {num_placeholders} words in [ ].",),
    "detectable_format:number_highlighted_sections": ("Put {num_highlights} words in * *.",),
    "detectable_content:postscript": ("Add a {postscript_marker}", "Use a {postscript_marker}"),
    "length_constraints:number_words": ("Use at least {num_words} words.",),
}


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: a topic, constraints by name, and how many words to name."""

    topic: str
    constraints: dict[str, dict[str, Any]]  # IFEval's name: its arguments
    named: int  # words of the topic
    prompt: str


def make_row(seed: int, index: int, split: str) -> dict[str, Any]:
    """Makes request number `index` of a split: prompt, its constraints, response, level.

    The level is the number of constraints: 1 or 2, equally often, in train and seen, and 2 in the
    other splits, whose pairs of constraints train does not have (`assign_split`).

    Raises:
      UserError: for an unknown split, or a negative seed or index.
    """
    if split not in SPLITS:
        raise UserError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise UserError(f"seed: seed {seed} and index {index} must not be negative")
    rng = np.random.default_rng((seed, index, SPLITS.index(split)))
    level = 2 if split in ("valid", "test") else int(rng.integers(1, 3))
    request = draw_request(rng, level)
    while assign_split(tuple(request.constraints), request.prompt) != split:
        request = draw_request(rng, level)
    return {
        "id": f"instructions-{split}-{seed}-{index}",
        "prompt": request.prompt,
        "question": request.prompt,
        "instruction_id_list": list(request.constraints),
        "kwargs": list(request.constraints.values()),
        "response": draw_response(rng, request),
        "thinking": False,
        "level": level,
    }


def check(row: dict[str, Any], response: str) -> list[bool]:
    """Returns for each constraint of a row whether a response keeps it, by IFEval's strict rule.

    Raises:
      UserError: if the checkers are not installed.
    """
    ifeval.require_checkers()
    verdicts = ifeval.grade_instructions(response, ifeval.make_answer(row, str(row["id"])))
    return list(verdicts["strict"])  # pyright: ignore[reportArgumentType]


def assign_split(constraints: tuple[str, ...], prompt: str) -> str:
    """Returns the split of a request with one or two constraints.

    Of the 66 pairs of constraints 12 are test, neighbours on a ring of all, and 6 are valid,
    opposites on it: each constraint is in two of the former and in one of the latter. Of the other
    pairs and of single constraints, one prompt in ten is seen, and the others are train.
    """
    if len(constraints) == 2:
        left, right = map(tuple(CONSTRAINTS).index, constraints)
        distance = abs(left - right)
        if distance == len(CONSTRAINTS) // 2:
            return "valid"
        if distance in (1, len(CONSTRAINTS) - 1):
            return "test"
    return "train" if zlib.crc32(prompt.encode()) % 10 else "seen"


def draw_request(rng: np.random.Generator, level: int) -> Request:
    """Draws a topic and `level` different constraints."""
    topic = _draw(rng, tuple(TOPICS), 1)[0]
    names = _draw(rng, tuple(CONSTRAINTS), level)
    constraints, named = draw_arguments(rng, topic, names)
    return Request(topic, constraints, named, write_prompt(rng, topic, constraints))


def draw_arguments(
    rng: np.random.Generator, topic: str, names: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Draws arguments with which constraints can be kept together.

    Returns:
      The constraints with them, and how many words of the topic a response is to name.
    """
    keywords = _draw(rng, KEYWORDS, 2)
    added = {"keywords:existence": 1, "keywords:frequency": int(rng.integers(2, 4))}
    extra = sum(added[name] for name in names if name in added)
    named = int(rng.integers(3, 6)) if extra < 2 else int(rng.integers(1, 3))
    total = named + extra
    arguments: dict[str, dict[str, Any]] = {
        "startend:end_checker": {"end_phrase": _draw(rng, ENDINGS, 1)[0]},
        "keywords:existence": {"keywords": [keywords[0]]},
        "keywords:forbidden_words": {"forbidden_words": _draw(rng, TOPICS[topic], 2)},
        "keywords:frequency": {
            "keyword": keywords[1],
            "frequency": added["keywords:frequency"],
            "relation": "at least",
        },
        "detectable_format:number_bullet_lists": {"num_bullets": total},
        "detectable_content:number_placeholders": {"num_placeholders": int(rng.integers(2, 4))},
        "detectable_format:number_highlighted_sections": {
            "num_highlights": int(rng.integers(2, 4))
        },
        "detectable_content:postscript": {"postscript_marker": "P.S."},
        "length_constraints:number_words": {
            "num_words": total - int(rng.integers(0, 2)),
            "relation": "at least",
        },
    }
    return {name: arguments.get(name, {}) for name in names}, named


def write_prompt(
    rng: np.random.Generator, topic: str, constraints: Mapping[str, Mapping[str, Any]]
) -> str:
    """Returns the words of a request, of which there are several ways."""
    parts = [f"{_draw(rng, ('Name', 'List'), 1)[0]} {topic}."]
    return " ".join([*parts, *write_constraints(rng, constraints)])


def write_constraints(
    rng: np.random.Generator, constraints: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Returns a sentence for each constraint, in one of the ways to ask for it."""
    sentences = []
    for name, values in constraints.items():
        shown = {k: " or ".join(v) if isinstance(v, list) else v for k, v in values.items()}
        sentences.append(_draw(rng, CONSTRAINTS[name], 1)[0].format(**shown))
    return sentences


def draw_response(rng: np.random.Generator, request: Request) -> str:
    """Draws one of the responses that keep all constraints of a request."""
    asked = request.constraints
    forbidden = asked.get("keywords:forbidden_words", {}).get("forbidden_words", ())
    words = [word for word in TOPICS[request.topic] if word not in forbidden]
    groups = [[word] for word in _draw(rng, tuple(words), request.named)]
    if "keywords:existence" in asked:
        groups.append(asked["keywords:existence"]["keywords"])
    if "keywords:frequency" in asked:
        repeated = asked["keywords:frequency"]
        groups.append([repeated["keyword"]] * repeated["frequency"])
    items = [word for i in rng.permutation(len(groups)) for word in groups[i]]
    for name, argument, form in (
        ("detectable_content:number_placeholders", "num_placeholders", "[{}]"),
        ("detectable_format:number_highlighted_sections", "num_highlights", "*{}*"),
    ):
        if name in asked:
            for i in rng.permutation(len(items))[: asked[name][argument]]:
                items[i] = form.format(items[i])
    return _lay_out(rng, request, items)


def _lay_out(rng: np.random.Generator, request: Request, items: list[str]) -> str:
    """Joins items to a text, with the parts around them."""
    asked = request.constraints
    in_lines = "detectable_format:number_bullet_lists" in asked
    if in_lines:
        items = [f"- {item}" for item in items]
    comma = " " if "punctuation:no_comma" in asked else ", "
    parts = [("\n" if in_lines else comma).join(items)]
    if "detectable_format:title" in asked:
        parts.insert(0, f"<<{request.topic}>>")
    if "detectable_content:postscript" in asked:
        parts.append(f"P.S. {_draw(rng, KEYWORDS, 1)[0]}")
    if "startend:end_checker" in asked:
        parts.append(asked["startend:end_checker"]["end_phrase"])
    text = ("\n" if in_lines else " ").join(parts)
    if "startend:quotation" in asked:
        # A word on the line before the last is not the last word to IFEval's checker.
        end = "" if "startend:end_checker" in asked else "\n"
        return f'"\n{text}{end}"' if in_lines else f'"{text}"'
    return text


def _draw(rng: np.random.Generator, choices: tuple[str, ...], count: int) -> list[str]:
    """Draws `count` different choices."""
    return [choices[i] for i in rng.permutation(len(choices))[:count]]
