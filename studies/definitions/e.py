"""Study e: many samples of one prompt."""

from typing import Any

from studies.definitions import a, common
from studies.study import Arm

STEPS = 60


def make_arm(prompts: int, objective: str = "opd") -> Arm:
    """Returns an arm that trains on the first `prompts` prompts only."""
    changes: dict[str, Any] = {"steps": STEPS, "data.max_rows": prompts}
    tuned = a.OPD if objective == "opd" else a.GRPO
    responses = tuned.trainings[0].changes.get(f"{objective}.batch_size", 32)
    changes["batch_size"] = responses  # of each step: that for which the rate was chosen
    prompt = f"{prompts:,} prompt{'s' if prompts > 1 else ''}"
    about = f"{objective} on {prompt}, {STEPS} steps of {responses} responses"
    return common.make_arm(f"{objective} on {prompts}", about, objective, changes, tuned_as=tuned)


PROMPTS = (1, 8, 64, common.NUM_PROMPTS)
MANY = PROMPTS[-1]

STUDY = common.make_study(
    name="e",
    title="One prompt, many samples",
    question=(
        "A single prompt, sampled thousands of times, is said to carry nearly the teacher's "
        "ability in on-policy distillation, while reinforcement learning memorises its answer. How "
        "far do 1, 8 and 64 prompts carry, in the same number of steps?"
    ),
    arms=(common.START, *map(make_arm, PROMPTS), make_arm(1, "grpo"), common.JUDGE),
    curves=common.make_curves("step"),
    tuning=a.TUNING,
    claims=(
        common.make_contrast(
            "one prompt teaches",
            "training on one prompt comes near the teacher's accuracy",
            a.POST,
            {"opd on 1": 1, "start": -1},
        ),
        common.make_contrast(
            "one prompt is as good as many",
            "training on one prompt is nearly as good as on all",
            a.POST,
            {f"opd on {MANY}": 1, "opd on 1": -1},
            expected="none",
            margin=0.03,
        ),
        common.make_contrast(
            "distillation transfers from one prompt where RL does not",
            "RL on one prompt memorises its answer",
            a.POST,
            {"opd on 1": 1, "grpo on 1": -1},
        ),
    ),
)
