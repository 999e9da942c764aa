"""python -m benchmarks.train_step [--dtype=bfloat16] [--tunix_python=PATH]: training speed.

Random Qwen3s of released widths, full rows, AdamW with gradient clipping:

reverse_kl  this project's exact reverse KL from a teacher, including the teacher's forward pass,
            against TRL's GKD divergence of all logits and google-tunix's DistillationTrainer,
            which only has the forward KL
sft         cross-entropy, against transformers' loss and google-tunix's PeftTrainer

The other libraries hold all logits. In bfloat16, this project, google-tunix and "autocast" keep
weights and moments in float32; the other torch contenders keep them in bfloat16 only. Each turn of
a contender is a process of its own: one step to compile, then --steps measured ones. Writes a table
(.md), all numbers (.json) and a plot (.svg) to --out.

FLOPs and bytes are the least that a step needs (benchmarks/costs.py).
"""

from absl import flags

from benchmarks import contest, costs
from distill.runtime import cli

OPTIONS = contest.define_flags(rounds=2)
contest.define_model_flags(OPTIONS, rows=2, tokens=256)
KNOWN = ["reverse_kl", "sft"]
CASES = flags.DEFINE_multi_enum("case", KNOWN, KNOWN, "Cases to run.", flag_values=OPTIONS)
REMAT = flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.", OPTIONS)


def count_costs(case: str) -> contest.JsonDict:
    """Returns the tokens of a step and the FLOPs and bytes that it needs at least."""
    student, teacher = (contest.make_config(OPTIONS, name) for name in ("student", "teacher"))
    shape = OPTIONS.rows, OPTIONS.tokens, OPTIONS.dtype
    return costs.count_train(case, student, teacher, *shape) | {"remat": REMAT.value}


def main() -> None:
    cases = {case: count_costs(case) for case in CASES.value}
    remarks = ["Layers are recomputed in the backward pass."] if REMAT.value else []
    contest.run_benchmark(
        contest.name_results("train_step", KNOWN, cases),
        "Training steps side by side",
        OPTIONS,
        cases,
        remarks,
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
