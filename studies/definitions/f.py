"""Study f: learn documents, then recall the behaviour that this cost (configs/recall.py)."""

from typing import Any

from studies.definitions import a, common
from studies.jobs import Job
from studies.study import Arm, Study, Training

ROWS, ASSISTANT, CHATS = "rows/assistant", "models/assistant", "rows/chats"
COMPANY, OTHER = 0, 1000  # seeds: of the company to learn, and of one that the assistant knows
OTHER_PEOPLE = 100
PROMPT, RESPONSE = 48, 40  # tokens of the longest request, and of a response or document
STEPS, RECALL_STEPS = 400, 150  # of 32
NUM_CHATS = 32 * STEPS  # so that SFT on them reads each once
RATES = (3e-4, 1e-3, 3e-3, 1e-2)


def find_rows(name: str) -> str:
    """Returns the path of a file of rows, as commands name it."""
    return f"{{{ROWS}}}/{name}.jsonl"


REQUESTS, SAMPLES = find_rows("requests"), f"{{{CHATS}}}/chats.jsonl"
ALL_DOCUMENTS = ((find_rows("documents"), 0.7), (find_rows("train"), 0.3))
WITH_CHATS = ((find_rows("documents"), 0.5), (find_rows("train"), 0.2), (SAMPLES, 0.3))


def make_rows(task: str, name: str, seed: int, *flags: str) -> tuple[str, ...]:
    """Returns the command that writes a file of rows."""
    out = f"--out={{out}}/{name}.jsonl"
    return ("-m", "studies.tasks", f"--task={task}", f"--seed={seed}", *flags, out)


def make_jobs() -> tuple[Job, ...]:
    """Returns the rows, the assistant that knows another company, and its own responses."""
    questions = ("train", "valid", "test", "reworded")
    mixture = (
        (REQUESTS, 0.6),
        (find_rows("other_documents"), 0.25),
        (find_rows("other_questions"), 0.15),
    )
    changes = {"sft.steps": 1500, "sft.data.source": REQUESTS, "sft.data.mixture": mixture}
    people = f"--people={OTHER_PEOPLE}"
    return (
        Job(
            ROWS,
            (
                make_rows("instructions", "requests", 0, "--split=train", "--count=20000"),
                *(
                    make_rows("instructions", f"requests_{x}", 0, f"--split={x}", "--count=300")
                    for x in ("valid", "test", "seen")
                ),
                make_rows("documents", "documents", COMPANY),
                *(make_rows("facts", x, COMPANY, f"--split={x}") for x in questions),
                make_rows("documents", "other_documents", OTHER, people),
                make_rows("facts", "other_questions", OTHER, "--split=train", people),
            ),
        ),
        common.make_size("small", "assistant", "documents,facts,instructions"),
        common.make_pretraining(ASSISTANT, "assistant", 0, changes),
        Job(
            CHATS,
            (
                (
                    *("-m", "distill.generate", f"--model={{{ASSISTANT}}}/model"),
                    *(f"--prompts={REQUESTS}", "--out={out}/chats.jsonl", f"--limit={NUM_CHATS}"),
                    *("--temperature=1", "--thinking=off", f"--max_new_tokens={RESPONSE}"),
                    *("--batch_size=256", "--seed=7"),
                ),
            ),
        ),
    )


def make_training(
    objective: str, steps: int, changes: dict[str, Any] | None = None, base: str = ""
) -> Training:
    """Returns a training on the assistant's requests, or on a mixture that `changes` name."""
    is_sft = objective == "sft"
    own: dict[str, Any] = {
        "steps": steps,
        "max_prompt_tokens": PROMPT,
        "max_response_tokens": RESPONSE,
        "data.source": SAMPLES if is_sft else REQUESTS,
        ".eval.data": "",
        ".eval.every": 0,
    }
    # Of its own samples all count: without those that are cut, they are another distribution's.
    own |= {"data.keep_samples": "all"} if is_sft else {"data.thinking": 0.0}
    own |= {} if is_sft else {".teacher.path": f"{{{ASSISTANT}}}/model"}
    return common.make_training(objective, own | (changes or {}), base)


JOBS = make_jobs()
LEARN = make_training("sft", STEPS, {"data.mixture": ALL_DOCUMENTS}, ASSISTANT)
LEARN_BESIDE_CHATS = make_training("sft", STEPS, {"data.mixture": WITH_CHATS}, ASSISTANT)
RECALL = make_training("opd", RECALL_STEPS)
REPEAT = make_training("sft", RECALL_STEPS)


def make_trials(objective: str) -> dict[str, Any]:
    """Returns an arm's trials of the rate."""
    return {
        "trials": tuple({f"{objective}.optim.learning_rate": rate} for rate in RATES),
        "trial_changes": {f"{objective}.steps": RECALL_STEPS // 2},
    }


START = Arm("start", "the assistant before", model=ASSISTANT)
RECALLED = Arm(
    "documents, recalled",
    "SFT on the documents, then on-policy distillation from the assistant on requests",
    (LEARN, RECALL),
    **make_trials("opd"),
)
REPEATED = Arm(
    "documents, then chats",
    f"SFT on the documents, then on {32 * RECALL_STEPS:,} of the assistant's responses",
    (LEARN, REPEAT),
    traces=32 * RECALL_STEPS,
    teacher=ASSISTANT,
    **make_trials("sft"),
)
ARMS = (
    START,
    Arm("documents", f"SFT on documents and questions, {STEPS} steps of 32", (LEARN,)),
    Arm(
        "documents and chats",
        "the same steps, with 30% responses of the assistant",
        (LEARN_BESIDE_CHATS,),
        traces=int(0.3 * 32 * STEPS),
        teacher=ASSISTANT,
    ),
    RECALLED,
    Arm(
        "documents and chats, recalled",
        "documents and chats, then on-policy distillation from the assistant on requests",
        (LEARN_BESIDE_CHATS, RECALL),
        tuned_as=RECALLED,
        traces=int(0.3 * 32 * STEPS),
        teacher=ASSISTANT,
    ),
    REPEATED,
    Arm(
        "own samples",
        f"SFT of the assistant on {NUM_CHATS:,} of its own responses, each once",
        (make_training("sft", STEPS, base=ASSISTANT),),
        traces=NUM_CHATS,
        teacher=ASSISTANT,
    ),
)


def measure_behaviour(name: str, split: str, samples: int, judged: str = "") -> str:
    """Returns a measurement of whether responses do as they are told."""
    rows = find_rows(f"requests_{split}")
    return f"{name}:ifeval:{rows}:{samples}:{RESPONSE}{judged}:no_think"


def measure_knowledge(name: str, split: str) -> str:
    """Returns a measurement of the answers to questions on the company."""
    return f"{name}:arithmetic:{find_rows(split)}:0:8:no_think"


TUNE_BY = "sampled"
RECALL_NAME = "documents and chats, recalled"

STUDY = Study(
    name="f",
    title="New knowledge, and the behaviour that it costs",
    question=(
        "An assistant learns the facts of a company from documents. How much of its behaviour, "
        "doing what a request says, is lost, how much of it comes back by distillation from the "
        "assistant that it was, on its own responses, and is the knowledge kept? Knowledge is "
        "tested on people with documents but no training questions."
    ),
    jobs=JOBS,
    arms=ARMS,
    measures=(
        measure_behaviour("behaviour", "seen", 0),
        measure_behaviour("sampled", "seen", 4, ":judged"),
        measure_behaviour("unseen", "test", 0),
        measure_knowledge("knowledge", "test"),
        measure_knowledge("asked", "train"),
        measure_knowledge("reworded", "reworded"),
    ),
    figures=(
        {"key": "behaviour", "title": "behaviour, greedy", "format": "percent"},
        {"key": "sampled", "title": "behaviour, T = 1", "format": "percent"},
        {"key": "unseen", "title": "behaviour on unseen pairs of constraints", "format": "percent"},
        {"key": "sampled/reverse_kl", "title": "reverse KL to the start", "format": "number"},
        {"key": "knowledge", "title": "knowledge", "format": "percent"},
        {"key": "asked", "title": "trained questions", "format": "percent"},
        {"key": "reworded", "title": "reworded", "format": "percent"},
    ),
    judge=ASSISTANT,
    tune_by=TUNE_BY,
    tune_measures=(measure_behaviour(TUNE_BY, "valid", 2),),
    tuning=(
        f"four trials of {RECALL_STEPS // 2} steps for each way to get the behaviour back, by the "
        "behaviour at temperature 1 on validation requests, whose pairs of constraints no training "
        "has; documents are learned at one rate by all"
    ),
    claims=(
        common.make_contrast(
            "documents teach",
            "questions on the documents rise from 18 to 43",
            a.POST,
            {"documents": 1, "start": -1},
            figure="knowledge",
        ),
        common.make_contrast(
            "documents cost behaviour",
            "learning documents alone takes IFEval from 85 to 45",
            a.POST,
            {"documents": 1, "start": -1},
            "below",
            figure="behaviour",
        ),
        common.make_contrast(
            "chats keep some behaviour",
            "with 30% of the model's own responses IFEval is 79, against 45",
            a.POST,
            {"documents and chats": 1, "documents": -1},
            figure="behaviour",
        ),
        common.make_contrast(
            "distillation restores behaviour",
            "on-policy distillation brings IFEval from 79 to 83",
            a.POST,
            {RECALL_NAME: 1, "documents and chats": -1},
            figure="behaviour",
        ),
        common.make_contrast(
            "nearly all behaviour comes back",
            "on-policy distillation brings IFEval back to 83, of 85 at the start",
            a.POST,
            {"start": 1, RECALL_NAME: -1},
            "none",
            "behaviour",
            0.03,
        ),
        common.make_contrast(
            "knowledge is kept",
            "questions on the documents go from 36 to 41, and not down",
            a.POST,
            {"documents and chats": 1, RECALL_NAME: -1},
            "none",
            "knowledge",
            0.05,
        ),
        common.make_contrast(
            "own samples do harm",
            "SFT on the model's own samples degrades it, though the gradient is 0 in expectation",
            a.POST,
            {"own samples": 1, "start": -1},
            "below",
        ),
        common.make_contrast(
            "distillation against SFT on the assistant's responses",
            "on-policy distillation restores behaviour where SFT on samples drifts",
            a.POST,
            {"documents, recalled": 1, "documents, then chats": -1},
            figure="behaviour",
        ),
    ),
)
