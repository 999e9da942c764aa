"""AIME 2025: 30 problems with integer answers from 0 to 999."""

from distill.evaluation.tasks.task import BOXED_PROMPT, Task
from distill.rewards import graders

TASK = Task(
    graders.MATH,
    BOXED_PROMPT,
    hf="hf:math-ai/aime25::test",
    qwen3={"samples": 64, "max_new_tokens": 38_912},
)
