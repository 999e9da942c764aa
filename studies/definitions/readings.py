"""Why claims came out as they did, and what more computing would settle.

Each reading names the verdict that it was written for. If the results come to give another one, the
page says that the reading is out of date.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """A reading of a claim's result.

    Args:
      verdict: that it explains, as the page words it, up to a colon.
      settle: what more computing would settle.
    """

    verdict: str
    why: str
    settle: str


READINGS: dict[tuple[str, str], Reading] = {
    ("a", "steps to equal accuracy"): Reading(
        "not reproduced",
        "In 300 steps of 32 responses the tuned GRPO raised sampled accuracy by 5 points and "
        "greedy accuracy by 4, so the accuracy to be equalled is close to the start's. "
        "Distillation first falls below the start, and then passes it. The interval is so wide "
        "that it also holds the claimed ratio.",
        "A curve of sampled accuracy, and GRPO with the hundreds of responses a step that it has "
        "in practice.",
    ),
    ("a", "cost to equal accuracy, against RL"): Reading(
        "not reproduced",
        "GRPO raised greedy accuracy by only 4 points, as above; the teacher's passes make a step "
        "of distillation dearer than one of GRPO.",
        "As above.",
    ),
    ("a", "cost to equal accuracy, against SFT"): Reading(
        "reversed",
        "The teacher is only 2.5 times the student's size, so its traces are cheap. They are "
        "sampled, where it is right 80% of the time, and yet SFT on them reaches 95 to 98.5% "
        "greedy. Why distillation stops at 81% greedy is not known: its best rate was the highest "
        "that was tried. In sampled accuracy the order is the opposite. The ratio takes the cost "
        "of SFT as proportional to its traces.",
        "A teacher that costs far more than the student; higher rates and more steps for "
        "distillation.",
    ),
    ("a", "accuracy against RL"): Reading(
        "reproduced",
        "Every token of a response has a gradient under the teacher; under the reward a response "
        "has one number, and this GRPO, at 32 responses a step, gained only 5 points.",
        "GRPO at larger batches and many more steps.",
    ),
    ("a", "accuracy against SFT on the most traces"): Reading(
        "reproduced",
        "A student that samples needs to be right in its own states. SFT on 16,000 traces gives "
        "the better greedy model, 98.5% against 81%, and the less reliable sampler, 70% against "
        "78%, although it is nearer to the teacher by the reverse KL.",
        "More traces, as SFT's sampled accuracy still rises with them.",
    ),
    ("b", "distillation widens"): Reading(
        "reversed",
        "The student's samples probably became more alike, as reverse KL favours the teacher's "
        "likeliest solutions: from 1 to 64 samples the share solved grows 5-fold, and 15-fold "
        "before training.",
        "Problems of the trained length that the student before hardly ever solves.",
    ),
    ("b", "RL does not widen"): Reading(
        "not reproduced",
        "The interval holds both 0 and a gain above the margin of one point; this GRPO changed the "
        "student little.",
        "More seeds, and an RL run that learns more.",
    ),
    ("b", "distillation against RL"): Reading(
        "reversed",
        "Distillation lowered pass@64 by 7 points; RL raised it by 4, though not beyond doubt.",
        "As for the two claims above.",
    ),
}
"""(study, claim) -> reading"""
