"""Generated arithmetic: held-out problems, the same in every evaluation."""

from distill.data import arithmetic
from distill.evaluation.tasks.task import Record, Task
from distill.rewards import graders

SEED = 20_000


def make_problem(index: int) -> Record:
    """Returns test problem number `index`."""
    p = arithmetic.make_problem(SEED, index, "test", (3, 5))
    return {
        "id": f"arithmetic-test-{index}",
        "question": p.question,
        "answer": p.answer,
        "level": p.operations,
    }


TASK = Task(graders.ARITHMETIC, make_problem=make_problem, num_problems=1000)
