"""Why claims came out as they did, and what more computing would settle.

Each reading names the verdict that it explains: if results change, the page says that the sentence
explains another one.
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
        "greedy accuracy hardly at all, so the accuracy to be equalled is the start's own, which "
        "distillation first loses, and then passes within 60 steps.",
        "A curve of sampled accuracy, and GRPO with the hundreds of responses a step that it has "
        "in practice.",
    ),
    ("a", "cost to equal accuracy, against RL"): Reading(
        "not reproduced",
        "GRPO did not raise greedy accuracy, as above; the teacher's passes make a step of "
        "distillation dearer than one of GRPO.",
        "As above.",
    ),
    ("a", "cost to equal accuracy, against SFT"): Reading(
        "reversed",
        "The teacher is three times the student's size, not twenty times, and right 99.8% of the "
        "time when greedy, so its traces are cheap and good; on-policy distillation follows its "
        "distribution, whose samples are right 80% of the time, and ends at 81% greedy. Sampled "
        "accuracy tells the opposite.",
        "A teacher that costs far more than the student, and traces that are not nearly all right.",
    ),
    ("a", "accuracy against RL"): Reading(
        "reproduced",
        "Every token of a response has a gradient under the teacher; under the reward a response "
        "has one number.",
        "GRPO at larger batches and many more steps.",
    ),
    ("a", "accuracy against SFT on the most traces"): Reading(
        "reproduced",
        "A student that samples needs to be right in its own states. SFT on 16,000 traces gives "
        "the better greedy model, 98% against 81%, and the less reliable sampler, 70% against 78%.",
        "More traces, as SFT's sampled accuracy still rises with them.",
    ),
    ("b", "distillation widens"): Reading(
        "reversed",
        "Reverse KL seeks the likeliest ways of the teacher: the student's samples become more "
        "alike (in study a one solves 78% of the problems, and two 82%), and what one sample "
        "cannot do, more cannot do either.",
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
        "Distillation narrowed what k samples reach, and RL hardly changed it.",
        "As for the two claims above.",
    ),
}
"""(study, claim) -> reading"""
