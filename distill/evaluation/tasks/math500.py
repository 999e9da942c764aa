"""MATH-500: the 500 problems of MATH (arXiv 2103.03874) that arXiv 2305.20050 tests on."""

from distill.evaluation.tasks.task import BOXED_PROMPT, Task
from distill.rewards import graders

TASK = Task(
    graders.MATH,
    BOXED_PROMPT,
    hf="hf:HuggingFaceH4/MATH-500::test",
)
