"""IFEval (arXiv 2311.07911): does a response follow instructions that a program can check?

The checkers are the official ones, as lm_eval keeps them (`pip install -r requirements-eval.txt`;
the PyPI package named ifeval is something else). They see what a model wrote, so they run where
the other graders do, in processes that can be killed, and this module does without jax.
"""

import contextlib
import functools
import importlib.util
import json
import os
import random
from collections.abc import Iterator, Sequence

from distill.rewards.graders import GradingRule
from models.errors import UserError

# Only these read data that nltk fetches apart from itself.
NEED_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
PUNKT_COMMAND = "python -m nltk.downloader punkt_tab"


def require_checkers() -> None:
    """Raises UserError if the checkers are not installed; imports none of them."""
    missing = [n for n in ("lm_eval", "langdetect", "nltk") if not importlib.util.find_spec(n)]
    if missing:
        raise UserError(
            f"--benchmark=ifeval: {missing[0]} is not installed: "
            "pip install -r requirements-eval.txt"
        )


def make_answer(row: dict, where: str) -> str:
    """What `grade` compares with, as JSON, of a row in the published form: prompt,
    instruction_id_list, kwargs. Raises UserError if the row is of another form."""
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(row.get("prompt"), str) or not isinstance(ids, list) or not ids:
        raise UserError(f"{where}: no prompt, instruction_id_list among {sorted(row)}")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        raise UserError(f"{where}: kwargs is not a list of one object for each instruction")
    # On the hub every row names every argument there is, those of others as null.
    known_kwargs = [{k: v for k, v in (one or {}).items() if v is not None} for one in kwargs]
    return json.dumps({"prompt": row["prompt"], "ids": ids, "kwargs": known_kwargs})


def count_unchecked(answers: Sequence[str]) -> int:
    """How many of these rows have an instruction whose nltk data is not on this machine."""
    rows = sum(any(i in NEED_PUNKT for i in json.loads(a)["ids"]) for a in answers)
    return rows if rows and not _has_punkt() else 0


def grade_instructions(response: str, answer: str) -> dict[str, object]:
    """`outcome`, and for each instruction whether it was followed: `strict`, and `loose` (in any
    of the eight forms without first line, last line, asterisks); null where nltk's data is absent.

    "correct" if all were followed, strictly (prompt-level strict accuracy); "no_answer" for
    thinking that never ended; "error" where it depends on what could not be checked. Like the other
    graders it reads what comes after thinking; a response without think tags is read as it is.
    """
    checkers = _load_checkers()
    instructions = json.loads(answer)
    _, closed, tail = response.rpartition("</think>")
    text = tail.lstrip("\n") if closed else tail
    unfinished = "<think>" in text
    text = "" if unfinished else text
    strict: list[bool | None] = []
    loose: list[bool | None] = []
    for name, kwargs in zip(instructions["ids"], instructions["kwargs"], strict=True):
        if name in NEED_PUNKT and not _has_punkt():
            strict.append(None)
            loose.append(None)
            continue
        # Two published prompts ask for a "letter" that is none ("#", "!"), instead of which the
        # checkers draw one each time: always the same two.
        random.seed(0)
        undrawn = random.getstate()
        example = checkers.InputExample(0, [name], instructions["prompt"], [kwargs])
        followed = checkers.test_instruction_following_strict(example, text)
        strict.append(bool(followed.follow_all_instructions))
        if strict[-1] and random.getstate() == undrawn:
            loose.append(True)  # the text as it stands is one of the eight forms
            continue
        followed = checkers.test_instruction_following_loose(example, text)
        loose.append(bool(followed.follow_all_instructions))
    outcome = "wrong" if False in strict else "error" if None in strict else "correct"
    return {"outcome": "no_answer" if unfinished else outcome, "strict": strict, "loose": loose}


@functools.cache
def _load_checkers():
    with _block_downloads():
        import langdetect  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks.ifeval import utils  # pyright: ignore[reportMissingImports]
    langdetect.DetectorFactory.seed = 0  # it guesses at random otherwise
    langdetect.detector_factory.init_factory()  # reads 55 languages: not within an answer's time
    return utils


@contextlib.contextmanager
def _block_downloads() -> Iterator[None]:
    """lm_eval fetches nltk's data when it is imported, but by the first local process only."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


@functools.cache
def _has_punkt() -> bool:
    import nltk  # pyright: ignore[reportMissingImports]

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


INSTRUCTIONS = GradingRule(grade_instructions)
