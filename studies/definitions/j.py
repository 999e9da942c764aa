"""Study j: what may be added to on-policy distillation, at equal steps."""

from typing import Any

from studies.definitions import a, common
from studies.jobs import Job
from studies.study import Arm

STEPS = a.STEPS
SAMPLES, SCORES = "rows/student_samples", "rows/student_scores"
JOBS = (
    *common.JOBS,
    common.make_samples(SAMPLES, common.STUDENT, 32 * STEPS, "samples"),
    Job(
        SCORES,
        (
            (
                *("-m", "distill.score", f"--model={{{common.TEACHER}}}/model"),
                *(f"--tokens={{{SAMPLES}}}/samples.jsonl", "--output=hidden", "--dtype=float32"),
                "--out={out}/scores",
            ),
        ),
    ),
)


def make_arm(name: str, about: str, changes: dict[str, Any]) -> Arm:
    """Returns an arm that trains at the rate of on-policy distillation."""
    return common.make_arm(name, about, "opd", {"steps": STEPS} | changes, tuned_as=a.OPD)


ARMS = (
    make_arm(
        "ordered",
        "problems from the easiest to the hardest, by their number of statements",
        {"data.difficulty": "level", "data.curriculum": "ordered"},
    ),
    make_arm(
        "widening",
        "problems from the easiest share, which grows to all",
        {"data.difficulty": "level", "data.curriculum": "widening"},
    ),
    make_arm(
        "half traces",
        "half of the rows are the teacher's responses",
        {"data.source": f"{{{common.TRACES}}}/traces.jsonl", "on_policy_share": 0.5},
    ),
    make_arm("hybrid", "with a reward for the right answer", {"objective": "hybrid", "samples": 8}),
    make_arm(
        "stored",
        "the student's first responses, scored by the teacher in advance",
        {
            "objective": "distill",
            "loss.divergence": "reverse",
            "data.source": f"{{{SAMPLES}}}/samples.jsonl",
            ".teacher.path": f"{{{SCORES}}}/scores",
        },
    ),
)
GAINS = {
    "ordered": (
        "on-policy distillation learns more from problems in order, the easiest first",
        "curricula of SFT and RL",
    ),
    "widening": (
        "on-policy distillation learns more from easy problems, to which harder ones are added",
        "curricula of SFT and RL",
    ),
    "half traces": (
        "a mixture of the teacher's and the student's responses beats the student's alone",
        "GKD, arXiv 2306.13649",
    ),
    "hybrid": (
        "a reward for the right answer beside the teacher beats the teacher alone",
        "a reward may lead past the teacher",
    ),
}
"""arm -> (claim, source)"""


def claim_gain(name: str) -> dict[str, Any]:
    """Returns the claim that an arm is better than plain on-policy distillation."""
    claimed, source = GAINS[name]
    return common.make_contrast(f"{name} helps", claimed, source, {name: 1, "opd": -1})


STUDY = common.make_study(
    name="j",
    title="Curricula, mixtures, a reward beside the teacher, and a teacher that is gone",
    question=(
        "Do problems in order, a mixture with the teacher's responses, a reward, or stored scores "
        "teach as much as plain on-policy distillation does in as many steps, or more? All run at "
        "the rate that was chosen for the plain form."
    ),
    jobs=JOBS,
    arms=(common.START, a.OPD, *ARMS, common.JUDGE),
    curves=common.make_curves("step", "flops", "seconds"),
    tuning=a.TUNING,
    claims=(
        *map(claim_gain, GAINS),
        common.make_contrast(
            "a stored teacher is as good",
            "distillation on responses of the start, scored in advance, reaches the live teacher's "
            "result at a quarter of its cost",
            "Lightning OPD, arXiv 2604.13010",
            {"opd": 1, "stored": -1},
            expected="none",
        ),
    ),
)
