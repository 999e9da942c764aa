"""python -m benchmarks.train_step [--dtype=bfloat16] [--tunix_python=PATH]: training steps.

Random Qwen3s of released widths, every row full, AdamW and a clipped gradient in every step:

reverse_kl  this project's exact reverse KL from a teacher, whose forward pass is included, against
            TRL's GKD divergence of all logits, and google-tunix's DistillationTrainer (which has
            the forward KL alone)
sft         cross-entropy, against transformers' own loss and google-tunix's PeftTrainer

The peers hold all logits. In bfloat16 this project, google-tunix and "autocast" keep weights and
moments in float32; the other rows of torch have them in bfloat16 alone. Each turn of each is a
process of its own: a step to compile, then --steps that are measured. Writes a table (.md), all
numbers (.json) and a plot (.svg) to --out.

Operations are those of the formula, without recomputation. Bytes are what a step cannot do without:
weights read twice, the gradient written, AdamW's four numbers read and three written, in float32;
a teacher's weights read once.
"""

from absl import flags

from benchmarks import contest
from distill.runtime import cli
from models import families
from models.qwen3.config import Config

OPTIONS = contest.define_flags(rounds=2)
contest.define_model_flags(OPTIONS, rows=2, tokens=256)
KNOWN = ["reverse_kl", "sft"]
CASES = flags.DEFINE_multi_enum("case", KNOWN, KNOWN, "Which.", flag_values=OPTIONS)
REMAT = flags.DEFINE_bool("remat", False, "Recompute layers in the backward pass.", OPTIONS)


def count_weights(config: Config) -> float:
    """Of weights that a token is multiplied by, two operations each; embeddings among them."""
    return families.count_forward_flops(config, 1, 0, with_head=True) / 2


def count_costs(case: str) -> contest.JsonDict:
    """What a step cannot do without."""
    student, teacher = (contest.make_config(OPTIONS, name) for name in ("student", "teacher"))
    M, mean = OPTIONS.rows * OPTIONS.tokens, (OPTIONS.tokens + 1) / 2
    wide = 4 if OPTIONS.dtype == "float32" else 2
    flop = 3 * families.count_forward_flops(student, M, mean, with_head=True)
    moved = count_weights(student) * (2 * wide + 8 * 4)
    if case == "reverse_kl":
        flop += families.count_forward_flops(teacher, M, mean, with_head=True)
        moved += count_weights(teacher) * wide
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
