"""Study g: divergences, estimators, and fewer or weighted tokens, at equal steps and costs."""

from typing import Any

from studies.definitions import common
from studies.study import Arm

STEPS = 100
TOP_K = 4
MANY = "many/contents@16"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 1e-4)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "reverse": ("reverse KL, exact", {}),
    "forward": ("forward KL, exact", {"loss.divergence": "forward"}),
    "jsd": ("generalised Jensen-Shannon divergence, beta 0.5", {"loss.divergence": "jsd"}),
    "top 4": (
        "reverse KL of the teacher's four likeliest tokens and the rest",
        {"loss.estimator": "topk", "loss.k": TOP_K},
    ),
    "sampled": (
        "reverse KL by the sampled token, as a policy gradient",
        {"objective": "opd_sampled"},
    ),
    "prefixes": ("responses of 15, 30, then 60 tokens", {}),
    "drift stop": (
        "responses end where 12 tokens have a mean KL above 0.6 nats",
        {"drift.kl": 0.6, "drift.every": 12},
    ),
    "entropy weights": (
        "tokens at which the teacher is uncertain count more",
        {"loss.entropy_weight": 1.0, "loss.entropy_from": "teacher"},
    ),
    "position weights": (
        "tokens count half as much every 20 tokens",
        {"loss.position_half_life": 20.0},
    ),
}
"""name -> (what it is, changes to the stage)"""


def make_schedule(steps: int) -> tuple[tuple[int, int], ...]:
    """Returns a `response_schedule` of prefixes: (step, tokens), in thirds of a training."""
    return ((0, 15), (steps // 3, 30), (2 * steps // 3, 60))


def make_arm(name: str) -> Arm:
    """Returns an arm with five trials of the rate."""
    about, changes = FORMS[name]
    changes, trial_changes = {"steps": STEPS} | changes, {"opd.steps": STEPS // 2}
    if name == "prefixes":
        changes |= {"response_schedule": make_schedule(STEPS)}
        trial_changes |= {"opd.response_schedule": make_schedule(STEPS // 2)}
    return common.make_arm(
        name,
        about,
        "opd",
        changes,
        trials=tuple({"opd.optim.learning_rate": rate} for rate in RATES),
        trial_changes=trial_changes,
    )


def against_reverse(name: str, claimed: str, source: str, expected: str = "above") -> dict:
    """Returns the claim that a form is better than the plain one."""
    weights = {name: 1, "reverse": -1}
    return common.make_contrast(f"{name} against reverse", claimed, source, weights, expected)


STUDY = common.make_study(
    name="g",
    title="Divergence, estimator, and which tokens count",
    question=(
        "Which divergence, and which estimate of it, teaches most at equal steps, and do shorter "
        "responses or weighted tokens teach as much for less? Pass@16 is the share of 120 problems "
        "of six statements for which one of 16 samples gets all three boxes right."
    ),
    arms=(common.START, *map(make_arm, FORMS), common.JUDGE),
    measures=(common.GREEDY, common.SAMPLED, common.FEWER_PASS),
    figures=(
        *common.ACCURACY,
        {"key": MANY, "title": "pass@16, harder problems", "format": "percent"},
    ),
    curves=common.make_curves("step", "seconds"),
    tuning=f"five trials of {STEPS // 2} steps for each arm, by the accuracy of four samples",
    claims=(
        against_reverse(
            "sampled",
            "the sampled token's noisier estimate teaches less than the exact divergence",
            "arXiv 2306.13649; benchmarks/results/objectives.md",
            "below",
        ),
        common.make_contrast(
            "forward covers, reverse seeks",
            "forward KL keeps more of what the teacher may say: a higher pass@k",
            "MiniLLM, arXiv 2306.08543",
            {"forward": 1, "reverse": -1},
            figure=MANY,
        ),
        against_reverse(
            "entropy weights",
            "+1.4 to +5.1 points with weights by entropy",
            "arXiv 2603.07079; not reproduced in redai-studio/Relax#244",
        ),
        against_reverse(
            "position weights",
            "early tokens matter most",
            "arXiv 2602.15260",
        ),
        common.make_contrast(
            "prefixes lose nothing",
            "distillation on prefixes is as good, for 2 to 47 times fewer operations",
            "arXiv 2602.15260",
            {"reverse": 1, "prefixes": -1},
            expected="none",
        ),
        common.make_contrast(
            "drift stops lose nothing",
            "pruning responses that have drifted saves 38 to 68% of the time at equal accuracy",
            "arXiv 2605.07804",
            {"reverse": 1, "drift stop": -1},
            expected="none",
        ),
    ),
)
