"""GPQA-Diamond (arXiv 2311.12022): 198 questions of physics, chemistry and biology for experts.

The authors' script (baselines/utils.py of github.com/idavidrein/gpqa) seeds Python's generator
once, by default with 0, and shuffles [Incorrect Answer 1, 2, 3, Correct Answer] of one row after
another. So do we: the order of a row's options depends on its number in the set alone.
"""

import functools
import random

from distill.evaluation.tasks import choice
from distill.evaluation.tasks.task import CHOICE_PROMPT, ROW_NUMBER, Record, Task
from distill.rewards import choices
from models.errors import UserError

SEED = 0  # of the order of options
# In the order in which the authors shuffle them.
_OPTIONS = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Correct Answer")


@functools.lru_cache(maxsize=1)
def _shuffle_rows(count: int) -> list[tuple[int, ...]]:
    """Returns the shuffled places of the options of the first `count` rows."""
    generator, orders = random.Random(SEED), []
    for _ in range(count):
        order = [0, 1, 2, 3]
        generator.shuffle(order)
        orders.append(tuple(order))
    return orders


def shuffle_options(number: int) -> tuple[int, ...]:
    """Returns the order of the options of a row, as places in [incorrect 1, 2, 3, correct]."""
    return _shuffle_rows(max(1024, -(-(number + 1) // 1024) * 1024))[number]


def adapt_row(row: Record, where: str) -> Record:
    """Reads a published row. One without a number in its set, as in training, is shuffled by a
    number that its question gives.

    Raises UserError naming the row if it has another form.
    """
    if "Correct Answer" not in row:
        return choice.adapt_row(row, where)
    if "response" in row:
        raise UserError(
            f"{where}: options are shuffled, so a response to them belongs to a problem of --data: "
            "leave out Correct Answer, and give its Record ID as id"
        )
    texts = [row.get(name) for name in _OPTIONS]
    if not all(isinstance(x, str) and x.strip() for x in texts):
        raise UserError(f"{where}: not all of {', '.join(_OPTIONS)} among its fields {sorted(row)}")
    number = row.get(ROW_NUMBER)
    if not isinstance(number, int):
        number = random.Random(str(row.get("Question"))).randrange(1024)
    order = shuffle_options(number)
    options = [str(texts[place]).strip() for place in order]
    problem = choice.make_problem(
        row.get("Question"), options, choices.LETTERS[order.index(3)], where
    )
    name = row.get("Record ID")
    return {**({"id": name} if isinstance(name, str) else {}), **problem}


TASK = Task(
    choices.CHOICES,
    CHOICE_PROMPT,
    hf="hf:Idavidrein/gpqa:gpqa_diamond:train",
    adapt_row=adapt_row,
    answer_field="Correct Answer",
    qwen3={"samples": 10},
)
