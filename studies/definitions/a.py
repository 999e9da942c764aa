"""Study a: distillation on and off the student's own responses, and reinforcement learning.

Study b measures the same runs, by pass@k.
"""

from typing import Any

from studies.definitions import common
from studies.definitions.common import make_arm
from studies.study import Arm, Study

STEPS = 150
GRPO_RESPONSES = 128  # a step, four times those of the others
AMOUNTS = {250: 60, 1000: 100, 4000: 200, 16_000: 500}  # traces -> steps of 32
TUNED_AMOUNT = 4000
TRIAL_STEPS, GRPO_TRIAL_STEPS = 100, 50  # of similar cost

RATES = (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)


def make_grpo_trials() -> tuple[dict[str, float], ...]:
    """Returns six trials: rates, then groups of 16 and a KL to the student before."""
    rate, samples, reference = ("grpo.optim.learning_rate", "grpo.samples", "grpo.loss.reference")
    return (
        {rate: 1e-4},
        {rate: 3e-4},
        {rate: 3e-4, samples: 16},
        {rate: 1e-3, samples: 16},
        {rate: 3e-4, samples: 16, reference: 0.02},
        {rate: 1e-3, samples: 16, reference: 0.02},
    )


def make_sft_arm(amount: int, **fields: Any) -> Arm:
    """Returns SFT on so many responses of the teacher."""
    return make_arm(
        f"sft {amount}",
        f"SFT on {amount:,} responses of the teacher, {AMOUNTS[amount]} steps",
        "sft",
        {"steps": AMOUNTS[amount], "data.max_rows": amount},
        traces=amount,
        teacher=common.TEACHER,
        **fields,
    )


TUNED_SFT = make_sft_arm(
    TUNED_AMOUNT,
    trials=tuple({"sft.optim.learning_rate": rate} for rate in RATES),
    trial_changes={"sft.steps": TRIAL_STEPS},
)
OPD = make_arm(
    "opd",
    "on-policy distillation: exact reverse KL at every token of the student's responses",
    "opd",
    {"steps": STEPS},
    trials=tuple({"opd.optim.learning_rate": rate} for rate in RATES),
    trial_changes={"opd.steps": TRIAL_STEPS},
)
GRPO = make_arm(
    "grpo",
    "GRPO with a reward for the right answer",
    "grpo",
    {"steps": STEPS, "batch_size": GRPO_RESPONSES},
    trials=make_grpo_trials(),
    trial_changes={"grpo.steps": GRPO_TRIAL_STEPS},
)
SFT = tuple(
    TUNED_SFT if amount == TUNED_AMOUNT else make_sft_arm(amount, tuned_as=TUNED_SFT)
    for amount in AMOUNTS
)
LARGEST = f"sft {max(AMOUNTS)}"
TUNING = (
    f"six trials for each method, of {TRIAL_STEPS} steps of 32 responses, or, of GRPO, "
    f"{GRPO_TRIAL_STEPS} steps of {GRPO_RESPONSES}; compared by the "
    "accuracy of four samples of each problem"
)
POST = "On-Policy Distillation, Thinking Machines Lab, October 2025, as quoted by other texts"
REPORT = "Qwen3 report, arXiv 2505.09388, table 21"

STUDY = common.make_study(
    name="a",
    title="SFT on more and more responses of the teacher, GRPO, on-policy distillation: one start",
    question=(
        "How many steps, operations and seconds does each method need from the same student to the "
        "same accuracy? Each method has the same budget to choose its rate and, for GRPO, groups "
        "and the KL to the student before."
    ),
    arms=(common.START, *SFT, GRPO, OPD, common.JUDGE),
    curves=common.make_curves("step", "trained_tokens", "flops", "seconds"),
    tuning=TUNING,
    claims=(
        common.make_reach(
            "steps to equal accuracy",
            "on-policy distillation needs 7 to 10 times fewer steps than RL",
            POST,
            *("opd", "grpo", "step", (7, 10)),
        ),
        common.make_reach(
            "cost to equal accuracy, against RL",
            "a tenth of the GPU hours of RL: 1,800 against 17,920",
            REPORT,
            *("opd", "grpo", "flops", (9, 11)),
        ),
        common.make_reach(
            "time to equal accuracy, against RL",
            "a tenth of the GPU hours of RL: 1,800 against 17,920",
            REPORT,
            *("opd", "grpo", "seconds", (9, 11)),
        ),
        common.make_slope(
            "cost to equal accuracy, against SFT",
            "on-policy distillation is 9 to 30 times cheaper than SFT, by the line through its "
            "curve",
            POST,
            {f"sft {amount}": amount for amount in AMOUNTS},
            *("opd", (9, 30)),
        ),
        common.make_contrast(
            "accuracy against RL",
            "on-policy distillation beats RL from the same start: 74.4 against 67.6 on AIME'24",
            REPORT,
            {"opd": 1, "grpo": -1},
        ),
        common.make_contrast(
            "accuracy against SFT on the most traces",
            "on-policy distillation, there after off-policy, beats off-policy: 74.4 against 55.0 "
            "on AIME'24",
            REPORT,
            {"opd": 1, LARGEST: -1},
        ),
        common.make_contrast(
            "the same, greedily",
            "on-policy distillation, there after off-policy, beats off-policy: 74.4 against 55.0 "
            "on AIME'24",
            REPORT,
            {"opd": 1, LARGEST: -1},
            figure="greedy",
        ),
        common.make_contrast(
            "the same by all three boxes",
            "on-policy distillation, there after off-policy, beats off-policy: 74.4 against 55.0 "
            "on AIME'24",
            REPORT,
            {"opd": 1, LARGEST: -1},
            figure="sampled/contents@1",
        ),
    ),
)

KS = (1, 4, 16, 64)
MANY = f"many/contents@{max(KS)}"

STUDY_B = Study(
    name="b",
    title="pass@k: which method widens what the student can solve",
    question=(
        "The models of study a, on 120 problems of six statements, one more than any model was "
        "trained on: the share of which at least one of k samples at temperature 1 is right. A "
        "method that only makes right responses likelier raises pass@1 and leaves pass@64 where it "
        "was. A response is right if it ends with the contents of all three boxes, since one digit "
        "is often right by chance."
    ),
    jobs=common.JOBS,
    of=STUDY,
    arms=(common.START, *SFT, GRPO, OPD, common.JUDGE),
    measures=(common.PASS,),
    figures=tuple(
        {"key": f"many/contents@{k}", "title": f"pass@{k}", "format": "percent"} for k in KS
    ),
    curves=({"x": "k", "y": "many/contents@", "title": "pass@k by k", "log_x": True},),
    tune_by=common.TUNE_BY,
    tuning=TUNING,
    claims=(
        common.make_contrast(
            "distillation widens",
            "on-policy distillation widens: pass@64 on AIME'24 rises from 90.0 to 93.3",
            REPORT,
            {"opd": 1, "start": -1},
            figure=MANY,
        ),
        common.make_contrast(
            "RL does not widen",
            "RL does not widen: pass@64 on AIME'24 stays at 90.0",
            REPORT,
            {"grpo": 1, "start": -1},
            expected="none",
            figure=MANY,
        ),
        common.make_contrast(
            "distillation against RL",
            "pass@64 on AIME'24 is 93.3 against 90.0",
            REPORT,
            {"opd": 1, "grpo": -1},
            figure=MANY,
        ),
    ),
)
