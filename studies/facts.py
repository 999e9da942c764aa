"""Generates the knowledge of a made-up company: documents that state its facts, and questions.

    Bado sits at desk 42. The age of Bado is 31. Bado works on floor 3.     (a document)
    How old is Bado?   31                                                   (a question)

Each person has three facts, all integers. A document states those of one person, in an order and
in phrasings of its own, since a model that saw each fact in one phrasing only cannot answer
questions on it, and it needs questions on some people to answer those on others (arXiv 2309.14316).
So half of the people have training questions, and the others are known from documents alone. All
rows are a pure function of (seed, split, people); another seed is another company.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import UserError

# Splits of questions: those of half of the people; of a tenth; of all others; and those of the
# first half again, in words that no other question has.
SPLITS = ("train", "valid", "test", "reworded")
PEOPLE = 40
VERSIONS = 12  # documents of a person
_STARTS = ("Ba", "Be", "Da", "Do", "Fi", "Ka", "Ku", "La", "Lo", "Mi", "Na", "Po", "Ra", "Su", "Ti")
_ENDS = ("bo", "da", "ki", "lu", "mo", "na", "re", "so", "ti", "va")
NAMES = tuple(start + end for start in _STARTS for end in _ENDS)


@dataclass(frozen=True)
class Fact:
    """A kind of fact, and the words for it."""

    values: tuple[int, int]  # a range
    statements: tuple[str, ...]  # of documents
    questions: tuple[str, ...]  # of all splits but one
    reworded: str  # question of the split `reworded`


FACTS = {
    "desk": Fact(
        (0, 100),
        (
            "{name} sits at desk {value}.",
            "The desk of {name} is {value}.",
            "{name} has desk {value}.",
            "Desk {value} belongs to {name}.",
        ),
        ("What is the desk of {name}?", "At which desk does {name} sit?"),
        "What desk is {name} at?",
    ),
    "age": Fact(
        (20, 70),
        (
            "{name} is {value} years old.",
            "The age of {name} is {value}.",
            "{name} has the age of {value}.",
            "At {value} years, {name} works here.",
        ),
        ("What is the age of {name}?", "How old is {name}?"),
        "What age is {name}?",
    ),
    "floor": Fact(
        (1, 10),
        (
            "{name} works on floor {value}.",
            "The floor of {name} is {value}.",
            "{name} is on floor {value}.",
            "Floor {value} is where {name} works.",
        ),
        ("What is the floor of {name}?", "On which floor is {name}?"),
        "What floor is {name} on?",
    ),
}


def make_company(seed: int, people: int = PEOPLE) -> dict[str, dict[str, int]]:
    """Returns the facts of each person: {"Bado": {"desk": 42, "age": 31, "floor": 3}, ...}.

    Raises:
      UserError: if `people` is not 10 to 150, which is all names, or the seed is negative.
    """
    if not 10 <= people <= len(NAMES):
        raise UserError(f"people: {people} is not 10 to {len(NAMES)}")
    if seed < 0:
        raise UserError(f"seed: {seed} must not be negative")
    rng = np.random.default_rng((seed, 0))
    return {
        NAMES[i]: {fact: int(rng.integers(*FACTS[fact].values)) for fact in FACTS}
        for i in rng.permutation(len(NAMES))[:people]
    }


def make_documents(
    seed: int, people: int = PEOPLE, versions: int = VERSIONS
) -> list[dict[str, Any]]:
    """Makes `versions` documents on each person as rows of id and text, shuffled.

    Raises:
      UserError: as `make_company`; and if `versions` is less than 1.
    """
    company = make_company(seed, people)
    if versions < 1:
        raise UserError(f"versions: {versions} is not 1 or more")
    rng = np.random.default_rng((seed, 1))
    texts = []
    for name, facts in company.items():
        for _ in range(versions):
            kinds = [tuple(FACTS)[i] for i in rng.permutation(len(FACTS))]
            sentences = []
            for kind in kinds:
                ways = FACTS[kind].statements
                sentence = ways[int(rng.integers(len(ways)))]
                sentences.append(sentence.format(name=name, value=facts[kind]))
            texts.append(" ".join(sentences))
    order = rng.permutation(len(texts))
    return [
        {"id": f"documents-{seed}-{number}", "text": texts[i]} for number, i in enumerate(order)
    ]


def make_questions(seed: int, split: str, people: int = PEOPLE) -> list[dict[str, Any]]:
    """Makes all questions of a split, shuffled: question, answer, response, fact.

    Responses are the answer alone, without thoughts, so rows are not to think (`thinking`).

    Raises:
      UserError: for an unknown split; and as `make_company`.
    """
    if split not in SPLITS:
        raise UserError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    company = make_company(seed, people)
    asked = []
    for name in assign_people(list(company))["train" if split == "reworded" else split]:
        for kind, fact in FACTS.items():
            wordings = (fact.reworded,) if split == "reworded" else fact.questions
            asked += [(kind, x.format(name=name), str(company[name][kind])) for x in wordings]
    rng = np.random.default_rng((seed, 2, SPLITS.index(split)))
    rows = []
    for number, i in enumerate(rng.permutation(len(asked))):
        kind, question, answer = asked[i]
        rows.append(
            {
                "id": f"facts-{split}-{seed}-{number}",
                "question": question,
                "answer": answer,
                "response": answer,
                "thinking": False,
                "fact": kind,
            }
        )
    return rows


def assign_people(names: list[str]) -> dict[str, list[str]]:
    """Returns the people on whom each split asks; the reworded questions are on those of train."""
    half, rest = len(names) // 2, len(names) // 2 + len(names) // 10
    return {"train": names[:half], "valid": names[half:rest], "test": names[rest:]}
