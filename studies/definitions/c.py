"""Study c: the seven conditions of configs/conditions.py, in miniature."""

from studies.definitions import a, common
from studies.definitions.common import make_training
from studies.jobs import Job
from studies.study import Arm, Training

SOURCE = "MaxiRuess/reasoning-distillation-grpo, GSM8K greedy, and configs/conditions.py"
TRACES, STEPS = 1000, 100
VERIFIED_ROWS = "rows/verified"
VERIFY = Job(
    VERIFIED_ROWS,
    (
        (
            *("-m", "distill.verify", f"--data={{{common.TRACES}}}/traces.jsonl"),
            *("--benchmark=arithmetic", "--out={out}/traces.jsonl"),
        ),
    ),
)


def make_sft(changes: dict) -> Training:
    """Returns SFT on a thousand rows in about three epochs."""
    return make_training("sft", {"steps": STEPS, "data.max_rows": TRACES} | changes, common.STUDENT)


def chain(name: str, about: str, first: Training, then: Arm) -> Arm:
    """Returns an arm that trains `first`, and goes on as another arm does, with its tuned rate."""
    (training,) = then.trainings
    second = Training(training.objective, training.changes)
    return Arm(name, about, (first, second), tuned_as=then, traces=TRACES, teacher=common.TEACHER)


ANSWERS = {"data.source": common.TRAIN, "data.columns": "question=question,response=answer"}
BASELINE = make_sft(ANSWERS)  # at once, though asked to think, as it is asked in the test
ALL = make_sft({"data.keep_samples": "finished"})
VERIFIED = make_sft({"data.source": f"{{{VERIFIED_ROWS}}}/traces.jsonl"})

ARMS = (
    common.START,
    Arm("baseline", "SFT on 1,000 answers without reasoning", (BASELINE,), tuned_as=a.TUNED_SFT),
    Arm(
        "sft_traces",
        "SFT on 1,000 responses of the teacher",
        (ALL,),
        tuned_as=a.TUNED_SFT,
        traces=TRACES,
        teacher=common.TEACHER,
    ),
    Arm(
        "re_distill",
        "SFT on 1,000 right responses of the teacher",
        (VERIFIED,),
        tuned_as=a.TUNED_SFT,
        traces=TRACES * 5 // 4,  # of which four in five are right
        teacher=common.TEACHER,
    ),
    a.GRPO,
    chain("sft_then_grpo", "sft_traces, then grpo", ALL, a.GRPO),
    a.OPD,
    chain("sft_then_opd", "sft_traces, then opd", ALL, a.OPD),
    common.JUDGE,
)

STUDY = common.make_study(
    name="c",
    title="Seven ways to teach reasoning, from one start",
    question=(
        "Which of the seven conditions of configs/conditions.py makes the best student? All start "
        "from the same model and are measured on the same problems."
    ),
    jobs=(*common.JOBS, VERIFY),
    arms=ARMS,
    curves=common.make_curves("step", "flops"),
    tuning=a.TUNING,
    claims=(
        common.make_contrast(
            "answers alone do harm",
            "SFT on answers without reasoning does harm: 69.2 against 72.2 untrained",
            SOURCE,
            {"baseline": 1, "start": -1},
            "below",
        ),
        common.make_contrast(
            "verified traces",
            "verified traces beat others: 78.5 against 73.8",
            SOURCE,
            {"re_distill": 1, "sft_traces": -1},
        ),
        common.make_contrast(
            "RL after SFT",
            "SFT before GRPO is worse than GRPO alone: 69.7 against 75.7",
            SOURCE,
            {"sft_then_grpo": 1, "grpo": -1},
            "below",
        ),
        common.make_contrast(
            "distillation after SFT",
            "SFT first, then on-policy distillation, as in the Qwen3 report's two phases, beats "
            "on-policy distillation alone",
            a.REPORT,
            {"sft_then_opd": 1, "opd": -1},
        ),
    ),
)
