"""IFEval (arXiv 2311.07911): checks that a response follows its instructions.

The checkers are the official ones, from lm_eval (`pip install -r requirements-eval.txt`; the PyPI
package named ifeval is unrelated). They read model output, so they run like the other graders in
processes that can be killed, and this module must not import jax.
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

# The instructions whose checkers need nltk data, a separate download.
NEED_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
PUNKT_COMMAND = "python -m nltk.downloader punkt_tab"


def require_checkers() -> None:
    """Raises UserError if the checkers are not installed. Imports none of them."""
    missing = [n for n in ("lm_eval", "langdetect", "nltk") if not importlib.util.find_spec(n)]
    if missing:
        raise UserError(
            f"--benchmark=ifeval: {missing[0]} is not installed: "
            "pip install -r requirements-eval.txt"
        )


def make_answer(row: dict, where: str) -> str:
    """Converts a published row (prompt, instruction_id_list, kwargs) to the JSON answer that
    `grade_instructions` reads.

    Raises UserError if the row has another form.
    """
    ids, kwargs = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(row.get("prompt"), str) or not isinstance(ids, list) or not ids:
        raise UserError(f"{where}: no prompt, instruction_id_list among {sorted(row)}")
    if (
        not isinstance(kwargs, list)
        or len(kwargs) != len(ids)
        or not all(isinstance(x or {}, dict) for x in kwargs)
    ):
        raise UserError(f"{where}: kwargs is not a list of one object for each instruction")
    # On the hub every row has all arguments of all instructions; the unused ones are null.
    known_kwargs = [{k: v for k, v in (x or {}).items() if v is not None} for x in kwargs]
    return json.dumps({"prompt": row["prompt"], "ids": ids, "kwargs": known_kwargs})


def count_unchecked(answers: Sequence[str]) -> int:
    """Counts the answers with an instruction whose nltk data is not installed."""
    rows = sum(any(i in NEED_PUNKT for i in json.loads(a)["ids"]) for a in answers)
    return rows if rows and not _has_punkt() else 0


def grade_instructions(response: str, answer: str) -> dict[str, object]:
    """Checks each instruction of `answer`, and returns `outcome` and two lists of verdicts.

    `strict` checks the response as it is; `loose` passes if any of eight variants does, without
    first line, last line, asterisks. A verdict is None if nltk's data is missing.

    The outcome is "correct" if all instructions are followed strictly (prompt-level strict
    accuracy), "no_answer" if thinking never ended, and "error" if it depends on an instruction that
    could not be checked. Like the other graders, this one reads only the text after thinking; a
    response without think tags is read whole.
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
        # For two published prompts, whose "letter" is none ("#", "!"), the checkers draw a random
        # letter. The seed makes it the same each time.
        random.seed(0)
        undrawn = random.getstate()
        example = checkers.InputExample(0, [name], instructions["prompt"], [kwargs])
        followed = checkers.test_instruction_following_strict(example, text)
        strict.append(bool(followed.follow_all_instructions))
        if strict[-1] and random.getstate() == undrawn:
            loose.append(True)  # the unchanged text is one of the eight variants
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
    langdetect.DetectorFactory.seed = 0  # detection is random otherwise
    langdetect.detector_factory.init_factory()  # slow: reads 55 languages
    return utils


@contextlib.contextmanager
def _block_downloads() -> Iterator[None]:
    """Context in which importing lm_eval does not download nltk's data."""
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


def is_gradable(answer: str) -> bool:
    """Returns True for an answer that `make_answer` wrote."""
    try:
        fields = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.keys() == {"prompt", "ids", "kwargs"}


INSTRUCTIONS = GradingRule(grade_instructions, is_gradable=is_gradable, right_response="")
