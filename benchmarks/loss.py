"""python -m benchmarks.loss [--dtype=bfloat16]: the exact reverse KL of given hidden states alone.

Hidden states of student and teacher and their output heads, random, to the mean divergence and its
gradients in the student's two: this project's streamed head, which holds a chunk of logits, against
TRL's `generalized_jsd_loss` on all of them. Each turn of each is a process of its own. Writes a
table (.md), all numbers (.json) and a plot (.svg) to --out.

Operations are those of the formula: three products with the student's head, one with the teacher's.
Bytes are what it cannot do without: heads and hidden states read, the student's twice, and its
gradients written.
"""

from benchmarks import contest
from distill.runtime import cli

OPTIONS = contest.define_flags(rounds=2)
contest.define_model_flags(OPTIONS, rows=1, tokens=1024)


def count_costs() -> contest.JsonDict:
    """What a call cannot do without."""
    student, teacher = (contest.make_config(OPTIONS, name) for name in ("student", "teacher"))
    M, V = OPTIONS.rows * OPTIONS.tokens, student.vocab_size
    D, E = student.hidden_size, teacher.hidden_size
    wide = 4 if OPTIONS.dtype == "float32" else 2
    moved = D * (V * 12 + M * 3 * wide) + E * (V + M) * wide  # the student's head is float32
    return {"tokens": M, "flop": 2 * M * V * (3 * D + E), "bytes": moved}


def main() -> None:
    vocab_size = contest.make_config(OPTIONS, "student").vocab_size
    remark = f"A vocabulary of {vocab_size}; layers play no part."
    contest.run_benchmark(
        "loss", "The divergence alone", OPTIONS, {"loss": count_costs()}, [remark]
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
