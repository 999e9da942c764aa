"""Mathematics problems from any rows of question and answer; has no data set of its own."""

from distill.evaluation.tasks.task import BOXED_PROMPT, Task
from distill.rewards import graders

TASK = Task(graders.MATH, BOXED_PROMPT)
