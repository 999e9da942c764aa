"""Study d: what a LoRA loses, under SFT and under on-policy distillation."""

from typing import Any

from studies.definitions import a, common
from studies.study import Arm

STEPS = 150
RANKS = (1, 4, 16)
FULL_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TUNED_RANK = 4


def make_arm(objective: str, rank: int, **fields: Any) -> Arm:
    """Returns an arm that trains all weights (rank 0) or a LoRA."""
    changes: dict[str, Any] = {"steps": STEPS}
    if objective == "sft":
        changes |= {"data.max_rows": 32 * STEPS}
        fields |= {"traces": 32 * STEPS, "teacher": common.TEACHER}
    if rank:
        changes |= {".student.lora.rank": rank, ".student.lora.alpha": float(2 * rank)}
    name = f"{objective} {f'rank {rank}' if rank else 'full'}"
    about = f"{objective}, {f'LoRA of rank {rank}' if rank else 'all weights'}, {STEPS} steps of 32"
    return common.make_arm(name, about, objective, changes, **fields)


def make_arms(objective: str) -> tuple[Arm, ...]:
    """Returns the arms of an objective; one rank is tuned for all."""

    def make_trials(rates: tuple[float, ...]) -> tuple[dict[str, float], ...]:
        return tuple({f"{objective}.optim.learning_rate": rate} for rate in rates)

    short = {f"{objective}.steps": STEPS // 2}
    full = make_arm(objective, 0, trials=make_trials(FULL_RATES), trial_changes=short)
    tuned = make_arm(objective, TUNED_RANK, trials=make_trials(LORA_RATES), trial_changes=short)
    others = {rank: make_arm(objective, rank, tuned_as=tuned) for rank in RANKS}
    return (*({**others, TUNED_RANK: tuned}[rank] for rank in RANKS), full)


GAP = {"sft full": 1, f"sft rank {RANKS[0]}": -1, "opd full": -1, f"opd rank {RANKS[0]}": 1}

STUDY = common.make_study(
    name="d",
    title="LoRA: its gap to full training, under SFT and under on-policy distillation",
    question=(
        "A LoRA of low rank falls behind training all weights. Does it fall behind less when it "
        "learns from the teacher's distribution on its own responses?"
    ),
    arms=(common.START, *make_arms("sft"), *make_arms("opd"), common.JUDGE),
    curves=common.make_curves("step"),
    tuning=f"four trials of {STEPS // 2} steps for each objective, full and rank {TUNED_RANK}",
    claims=(
        common.make_contrast(
            "the gap narrows",
            "the gap of rank 32 falls from 13 points under SFT to 6 under on-policy distillation",
            a.POST,
            GAP,
        ),
        common.make_contrast(
            "the gap narrows, greedily",
            "the gap of rank 32 falls from 13 points under SFT to 6 under on-policy distillation",
            a.POST,
            GAP,
            figure="greedy",
        ),
        common.make_contrast(
            "a LoRA falls behind under SFT",
            "a LoRA of rank 32 is 13 points behind full training",
            a.POST,
            {"sft full": 1, f"sft rank {RANKS[0]}": -1},
        ),
        common.make_contrast(
            "a LoRA falls behind under on-policy distillation",
            "a LoRA of rank 32 is 6 points behind full training",
            a.POST,
            {"opd full": 1, f"opd rank {RANKS[0]}": -1},
        ),
    ),
)
