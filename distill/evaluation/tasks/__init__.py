"""The benchmarks. Each has a file in this folder and a row in the table below."""

from distill.evaluation.tasks import (
    aime24,
    aime25,
    amc,
    arithmetic,
    choice,
    gpqa,
    gsm8k,
    humaneval,
    ifeval,
    livecodebench,
    math,
    math500,
    mbpp,
    mmlu_redux,
    qa,
)
from distill.evaluation.tasks.task import Task

BENCHMARKS: dict[str, Task] = {
    "arithmetic": arithmetic.TASK,
    "gsm8k": gsm8k.TASK,
    "math500": math500.TASK,
    "aime24": aime24.TASK,
    "aime25": aime25.TASK,
    "amc": amc.TASK,
    "math": math.TASK,
    "ifeval": ifeval.TASK,
    "livecodebench": livecodebench.TASK,
    "humaneval": humaneval.TASK,
    "mbpp": mbpp.TASK,
    "gpqa": gpqa.TASK,
    "mmlu_redux": mmlu_redux.TASK,
    "choice": choice.TASK,
    "qa": qa.TASK,
}
