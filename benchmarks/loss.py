"""python -m benchmarks.loss [--dtype=bfloat16]: the exact reverse KL, without the models.

From random hidden states and output heads of student and teacher, computes the mean divergence and
its gradients by the student's hidden states and head: with this project's streamed head, which
holds a chunk of the logits, and with TRL's `generalized_jsd_loss`, which holds all of them. Each
turn of a contender is a process of its own. Writes a table (.md), all numbers (.json) and a plot
(.svg) to --out.

FLOPs and bytes are the least that a call needs (benchmarks/costs.py).
"""

from benchmarks import contest, costs
from distill.runtime import cli

OPTIONS = contest.define_flags(rounds=2)
contest.define_model_flags(OPTIONS, rows=1, tokens=1024)


def count_costs() -> contest.JsonDict:
    """Returns the tokens of a call and the FLOPs and bytes that it needs at least."""
    student, teacher = (contest.make_config(OPTIONS, name) for name in ("student", "teacher"))
    return costs.count_loss(student, teacher, OPTIONS.rows, OPTIONS.tokens, OPTIONS.dtype)


def main() -> None:
    vocab_size = contest.make_config(OPTIONS, "student").vocab_size
    remark = f"A vocabulary of {vocab_size}; layers play no part."
    contest.run_benchmark(
        "loss", "The divergence alone", OPTIONS, {"loss": count_costs()}, [remark]
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
