"""Study h: /think and /no_think, learned at once and one after another."""

from typing import Any

from studies.definitions import a, common
from studies.jobs import Job
from studies.study import Arm, Study, Training

ROWS, TEACHER = "rows/modes", "models/teacher_modes"
TRAIN, TEST = (f"{{{ROWS}}}/{name}.jsonl" for name in ("train", "test"))
OPERATIONS = "1,2"
STEPS = 120  # of 32 responses
PROMPT, TOKENS = 44, 48  # of the longest prompt and solution of two operations
REPORT = "Qwen3 report, arXiv 2505.09388, sections 4.3 and 4.5"

START_CURVE = f"curve:arithmetic:{TEST}:2:{TOKENS}"


def make_rows(name: str, count: int) -> tuple[str, ...]:
    """Returns the command that writes a file of problems of few operations."""
    return (
        *("-m", "studies.tasks", "--task=graphs", f"--split={name}", f"--count={count}"),
        *(f"--operations={OPERATIONS}", "--seed=2", f"--out={{out}}/{name}.jsonl"),
    )


def make_jobs() -> tuple[Job, ...]:
    """Returns the rows, and the teacher, which learns to answer at once, too."""
    changes = {
        "student.path": f"{{{common.TEACHER}}}/model",
        "student.random_init": "false",
        "sft.steps": 1000,
        "sft.max_prompt_tokens": PROMPT,
        "sft.max_response_tokens": TOKENS,
        "sft.data.source": TRAIN,
        "sft.data.columns": "direct=answer",
        "sft.data.thinking": 0.5,
        "sft.optim.learning_rate": 3e-3,
    }
    return (
        *common.JOBS,
        Job(ROWS, (make_rows("train", 50_000), make_rows("test", 300))),
        common.make_pretraining(TEACHER, "medium", 2, changes),
    )


def make_training(share: float, steps: int = STEPS, base: str = common.STUDENT) -> Training:
    """Returns on-policy distillation with a share of the prompts in thinking mode."""
    changes: dict[str, Any] = {
        "steps": steps,
        "batch_size": 32,
        "max_prompt_tokens": PROMPT,
        "max_response_tokens": TOKENS,
        "data.source": TRAIN,
        "data.thinking": share,
        ".teacher.path": f"{{{TEACHER}}}/model",
        ".eval.data": TEST,
        ".eval.limit": 0,
    }
    return common.make_training("opd", changes, base)


def make_arm(name: str, about: str, *trainings: Training) -> Arm:
    """Returns an arm at the rate that study a chose for on-policy distillation."""
    return Arm(name, about, trainings, tuned_as=a.OPD)


ARMS = (
    Arm("start", "the student before", model=common.STUDENT, measures=(START_CURVE,)),
    make_arm("think", f"thinking alone, {STEPS} steps", make_training(1.0)),
    make_arm("no_think", f"answers alone, {STEPS} steps", make_training(0.0)),
    make_arm("both", f"half of each, {STEPS} steps", make_training(0.5)),
    make_arm("both, twice", f"half of each, {2 * STEPS} steps", make_training(0.5, 2 * STEPS)),
    make_arm(
        "think, then no_think",
        f"{STEPS} steps of each, one after the other",
        make_training(1.0),
        make_training(0.0, base=""),
    ),
    Arm("teacher", "the teacher of both modes", model=TEACHER),
)


def keep_form(name: str, figure: str, mode: str) -> dict[str, Any]:
    """Returns the claim that a mode keeps its form beside the other one."""
    claimed = "one model answers in the mode that the prompt asks for"
    weights: dict[str, float] = {mode: 1, "both, twice": -1}
    return common.make_contrast(name, claimed, REPORT, weights, "none", figure, 0.01)


STUDY = Study(
    name="h",
    title="Thinking and not thinking, in one model",
    question=(
        "The student reasons before each answer. A teacher with both modes teaches it to answer at "
        "once as well, if the prompt says so. Does it learn to think as well beside the other mode "
        "as alone, and does the switch work: a think block where one is asked for, and none where "
        "none is? How often answers at once are right is not judged, as the teacher is hardly "
        "better at them than chance, 10%."
    ),
    jobs=make_jobs(),
    arms=ARMS,
    measures=(
        f"greedy:arithmetic:{TEST}:0:{TOKENS}",
        f"sampled:arithmetic:{TEST}:2:{TOKENS}",
        f"direct:arithmetic:{TEST}:0:{TOKENS}:no_think",
        f"direct_sampled:arithmetic:{TEST}:2:{TOKENS}:no_think",
    ),
    figures=(
        {"key": "greedy", "title": "/think, greedy", "format": "percent"},
        {"key": "sampled", "title": "/think, T = 1", "format": "percent"},
        {"key": "sampled/think_rate", "title": "/think, has a think block", "format": "percent"},
        {"key": "direct", "title": "/no_think, greedy", "format": "percent"},
        {"key": "direct_sampled", "title": "/no_think, T = 1", "format": "percent"},
        {"key": "direct_sampled/think_rate", "title": "/no_think, has none", "format": "percent"},
    ),
    curves=common.make_curves("step"),
    judge=common.TEACHER,  # of study a's trials, whose rate all arms take
    start="start",
    tune_by=common.TUNE_BY,
    tune_measures=(common.TUNE,),
    tuning=f"none of its own: all take the rate of study a, of whose trials these are; {a.TUNING}",
    claims=(
        common.make_contrast(
            "thinking is learned as well beside the other mode",
            "taught in both modes at once, a student thinks as well as one that only thinks",
            REPORT,
            {"think": 1, "both, twice": -1},
            "none",
            "greedy",
            0.03,
        ),
        keep_form("thinking keeps its form", "sampled/think_rate", "think"),
        keep_form("answers keep their form", "direct_sampled/think_rate", "no_think"),
        common.make_contrast(
            "one mode alone costs the other",
            "training in one mode alone undoes the other",
            "this project",
            {"both": 1, "no_think": -1},
            figure="greedy",
        ),
        common.make_contrast(
            "at once against one after another",
            "taught at once, the modes displace each other less than one after another",
            REPORT,
            {"both, twice": 1, "think, then no_think": -1},
            figure="greedy",
        ),
    ),
)
