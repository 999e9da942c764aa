"""Study i: context distillation, a manual that the teacher reads and the student has to know."""

from typing import Any

from studies.definitions import common, f
from studies.jobs import Job
from studies.study import Arm, Study, Training

ROWS, TEACHER, SAMPLES = "rows/manual", "models/reader", "rows/manual_samples"
MANUAL = 0  # seed of the manual to learn
PROMPT, READING, RESPONSE = 48, 64, 44  # tokens of the longest prompt, of one with a manual, ...
STEPS, BATCH = 150, 32
LONGER = 4  # times as many steps of SFT, which cost about the same
NUM_SAMPLES = BATCH * STEPS
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def find_rows(name: str) -> str:
    """Returns the path of a file of rows, as commands name it."""
    return f"{{{ROWS}}}/{name}.jsonl"


TRACES = f"{{{SAMPLES}}}/traces.jsonl"


def make_rows(name: str, split: str, count: int, *flags: str) -> tuple[str, ...]:
    """Returns the command that writes a file of requests."""
    return (
        *("-m", "studies.tasks", "--task=manual", f"--split={split}", f"--count={count}"),
        *("--seed=0", *flags, f"--out={{out}}/{name}.jsonl"),
    )


def make_jobs() -> tuple[Job, ...]:
    """Returns the rows; the teacher, which is study f's assistant and learns to read any manual;
    and its responses to requests with one, which then stand beside the requests alone."""
    fixed, shown = f"--manual={MANUAL}", "--show_manual"
    reading = {
        "student.path": f"{{{f.ASSISTANT}}}/model",
        "student.random_init": "false",
        "sft.steps": 600,
        "sft.data.source": find_rows("train"),
        "sft.max_prompt_tokens": READING,
        "sft.max_response_tokens": RESPONSE,
        "sft.optim.learning_rate": 3e-3,
    }
    return (
        Job(
            ROWS,
            (
                make_rows("train", "train", 20_000),
                make_rows("others", "test", 300),
                make_rows(
                    *("requests", "train", NUM_SAMPLES, fixed), "--manual_out={out}/manual.txt"
                ),
                make_rows("requests_shown", "train", NUM_SAMPLES, fixed, shown),
                make_rows("valid", "valid", 300, fixed),
                make_rows("test", "test", 300, fixed),
                make_rows("test_shown", "test", 300, fixed, shown),
            ),
        ),
        common.make_pretraining(TEACHER, "assistant", 0, reading),
        Job(
            SAMPLES,
            (
                (
                    *("-m", "distill.generate", f"--model={{{TEACHER}}}/model"),
                    *(f"--prompts={find_rows('requests_shown')}", "--out={out}/samples.jsonl"),
                    *("--temperature=1", "--thinking=off", f"--max_new_tokens={RESPONSE}"),
                    *("--batch_size=256", "--seed=7"),
                ),
                (
                    *("-m", "studies.traces", "--samples={out}/samples.jsonl"),
                    *(f"--rows={find_rows('requests')}", "--out={out}/traces.jsonl"),
                ),
            ),
        ),
    )


def make_training(objective: str, steps: int) -> Training:
    """Returns a training on requests without the manual, from the teacher's own weights."""
    changes: dict[str, Any] = {
        "steps": steps,
        "batch_size": BATCH,
        "max_prompt_tokens": PROMPT,
        "max_response_tokens": RESPONSE,
        "data.source": TRACES if objective == "sft" else find_rows("requests"),
        ".eval.data": "",
        ".eval.every": 0,
    }
    if objective == "opd":
        changes |= {
            ".teacher.path": f"{{{TEACHER}}}/model",
            "data.thinking": 0.0,
            "context.text": f"{{{ROWS}}}/manual.txt",
            "context.place": "question",
            "context.max_tokens": READING - PROMPT,
        }
    return common.make_training(objective, changes, TEACHER)


def measure(name: str, rows: str, samples: int) -> str:
    """Returns a measurement of the share of responses that keep every rule."""
    return f"{name}:ifeval:{find_rows(rows)}:{samples}:{RESPONSE}:no_think"


def make_measures(rows: str) -> tuple[str, ...]:
    """Returns the measurements on the manual to learn."""
    return measure("greedy", rows, 0), measure("sampled", rows, 2)


WITHOUT_MANUAL = make_measures("test")


def make_tuned_arm(objective: str, about: str) -> Arm:
    """Returns an arm with trials of its rate."""
    return Arm(
        objective,
        about,
        (make_training(objective, STEPS),),
        measures=WITHOUT_MANUAL,
        trials=tuple({f"{objective}.optim.learning_rate": rate} for rate in RATES),
        trial_changes={f"{objective}.steps": STEPS // 2},
        traces=NUM_SAMPLES if objective == "sft" else 0,
        teacher=TEACHER if objective == "sft" else "",
    )


OPD = make_tuned_arm("opd", "on-policy distillation from the teacher that reads the manual")
SFT = make_tuned_arm(
    "sft", f"SFT on the teacher's responses to {NUM_SAMPLES:,} requests, each once"
)
MORE_SFT = Arm(
    f"sft, {LONGER} epochs",
    f"SFT on the same responses, {LONGER} times each",
    (make_training("sft", LONGER * STEPS),),
    measures=WITHOUT_MANUAL,
    tuned_as=SFT,
    traces=NUM_SAMPLES,
    teacher=TEACHER,
)


OPCD = "On-Policy Context Distillation, arXiv 2602.12275"

STUDY = Study(
    name="i",
    title="A manual by heart",
    question=(
        "A model keeps the rules of any manual in its prompt. It is trained to keep those of one "
        "manual without seeing it; the teacher is the same model, with the manual in its prompt. "
        "Does distillation on the student's own responses do this better than SFT on the "
        "teacher's, and can the student still follow other manuals? A response counts if it keeps "
        "all rules, of the manual and of the request."
    ),
    jobs=(*f.JOBS, *make_jobs()),
    arms=(
        Arm(
            "start",
            "the student before, without the manual",
            model=TEACHER,
            measures=WITHOUT_MANUAL,
        ),
        SFT,
        MORE_SFT,
        OPD,
        Arm(
            "reader",
            "the same model, with the manual in its prompt",
            model=TEACHER,
            measures=make_measures("test_shown"),
        ),
    ),
    measures=(measure("others", "others", 0),),
    figures=(
        {"key": "greedy", "title": "greedy", "format": "percent"},
        {"key": "sampled", "title": "sampled, T = 1", "format": "percent"},
        {"key": "others", "title": "other manuals, in the prompt", "format": "percent"},
    ),
    start="start",
    tune_by="sampled",
    tune_measures=(measure("sampled", "valid", 4),),
    tuning=(
        f"four trials of {STEPS // 2} steps for each method, by the share of four samples that "
        "keep every rule on validation requests"
    ),
    claims=(
        common.make_contrast(
            "the manual is learned",
            "the student keeps to the manual without reading it",
            OPCD,
            {"opd": 1, "start": -1},
        ),
        common.make_contrast(
            "as good as reading",
            "the student keeps to a manual nearly as well as the teacher that reads it",
            OPCD,
            {"reader": 1, "opd": -1},
            "none",
            margin=0.03,
        ),
        common.make_contrast(
            "distillation against SFT, equal steps",
            "on-policy context distillation is more accurate than off-policy",
            OPCD,
            {"opd": 1, "sft": -1},
        ),
        common.make_contrast(
            "distillation against SFT, more steps",
            "on-policy context distillation is more accurate than off-policy",
            OPCD,
            {"opd": 1, MORE_SFT.name: -1},
        ),
        common.make_contrast(
            "other manuals suffer less",
            "off-policy context distillation costs more of what the context is not about",
            OPCD,
            {"opd": 1, "sft": -1},
            figure="others",
        ),
    ),
)
