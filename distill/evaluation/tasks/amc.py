"""AMC 2023: 40 problems."""

from distill.evaluation.tasks.task import BOXED_PROMPT, Task
from distill.rewards import graders

TASK = Task(
    graders.MATH,
    BOXED_PROMPT,
    hf="hf:math-ai/amc23::test",
)
