"""GSM8K (arXiv 2110.14168): grade school mathematics."""

from distill.evaluation.tasks.task import BOXED_PROMPT, Task
from distill.rewards import graders

TASK = Task(
    graders.MATH,
    BOXED_PROMPT,
    hf="hf:openai/gsm8k:main:test",
    tfds="tfds:gsm8k::test",  # has the same fields as on the hub
)
