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

FLOPs are those of the formula, without recomputation. Bytes are a lower bound: weights are read
twice, the gradient is written, and AdamW reads four numbers a weight and writes three, all in
float32; a teacher's weights are read once.
"""

from absl import flags

from benchmarks import contest
from distill.runtime import cli
from models import families
from models.qwen3.config import Config

OPTIONS = contest.define_flags(rounds=2)
contest.define_model_flags(OPTIONS, rows=2, tokens=256)
KNOWN = ["reverse_kl", "sft"]
CASES = flags.DEFINE_multi_enum("case", KNOWN, KNOWN, "Cases to run.", flag_values=OPTIONS)
REMAT = flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.", OPTIONS)


def count_weights(config: Config) -> float:
    """Counts the weights in a token's matrix products (two FLOPs each), including the head."""
    return families.count_forward_flops(config, 1, 0, with_head=True) / 2


def count_costs(case: str) -> contest.JsonDict:
    """Returns the tokens of a step and the FLOPs and bytes that it needs at least."""
    student, teacher = (contest.make_config(OPTIONS, name) for name in ("student", "teacher"))
    M, mean = OPTIONS.rows * OPTIONS.tokens, (OPTIONS.tokens + 1) / 2
    itemsize = 4 if OPTIONS.dtype == "float32" else 2
    flop = 3 * families.count_forward_flops(student, M, mean, with_head=True)
    moved = count_weights(student) * (2 * itemsize + 8 * 4)
    if case == "reverse_kl":
        flop += families.count_forward_flops(teacher, M, mean, with_head=True)
        moved += count_weights(teacher) * itemsize
    return {"tokens": M, "flop": flop, "bytes": moved, "remat": REMAT.value}


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
