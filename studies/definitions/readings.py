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
        "GRPO rises slowly, from 36% to 43% in 150 steps. Distillation first falls a "
        "little below the start, and passes GRPO's best after 36 to 41 steps. A step of GRPO has "
        "128 responses here, and one of distillation 32, which the count of steps hides.",
        "GRPO until it stops rising. The further it gets, the more steps distillation needs to "
        "equal it, but also the more steps it took itself.",
    ),
    ("a", "cost to equal accuracy, against RL"): Reading(
        "reproduced",
        "Distillation needs about 13 times fewer responses. Each costs more, since the teacher "
        "reads it, too: its scores are two fifths of the FLOPs of distillation.",
        "Larger teachers: this one has only 2.5 times the student's weights, so to ask it is "
        "cheaper than in practice.",
    ),
    ("a", "cost to equal accuracy, against SFT"): Reading(
        "not reproduced",
        "SFT gains 5 points of sampled accuracy with each doubling of its traces, so it would need "
        "about 36,000 of them, beyond the 16,000 that were tried. But the teacher has only 2.5 "
        "times the student's weights, so traces are cheap: at 16,000 they are half of SFT's FLOPs.",
        "A teacher that costs far more than the student, and SFT on 32,000 and 64,000 traces in "
        "place of the line.",
    ),
    ("a", "accuracy against RL"): Reading(
        "reproduced",
        "Every token of a response has a gradient under the teacher; under the reward a response "
        "has one number. GRPO rose by 7 points in as many steps, with four times the responses.",
        "GRPO for many more steps.",
    ),
    ("a", "accuracy against SFT on the most traces"): Reading(
        "reproduced",
        "A student that samples needs to be right in its own states. SFT on 16,000 traces gives "
        "the better greedy model, 99% against 81%, and the less reliable sampler, 71% against "
        "78%, although it is nearer to the teacher by the reverse KL.",
        "More steps of both: distillation still rose at its end, and SFT rises with more traces.",
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
        "The mean moved by a third of a point, as claimed. But the seeds differ by 6 points on 120 "
        "problems, so the interval holds gains above the margin of one point, too.",
        "More problems and more seeds, and an RL run that learns more.",
    ),
    ("b", "distillation against RL"): Reading(
        "reversed",
        "Distillation lowered pass@64 by 7 points, and RL left it where it was, in the mean of "
        "seeds that differ by 6.",
        "As for the two claims above.",
    ),
}
"""(study, claim) -> reading"""
