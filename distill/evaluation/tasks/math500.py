"""MATH-500: the 500 test problems of arXiv 2305.20050, from MATH (arXiv 2103.03874)."""

from distill.evaluation.tasks.task import BOXED_PROMPT, Task
from distill.rewards import graders

TASK = Task(
    graders.MATH,
    BOXED_PROMPT,
    hf="hf:HuggingFaceH4/MATH-500::test",
)
