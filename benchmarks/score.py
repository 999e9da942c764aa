"""python -m benchmarks.score [--dtype=bfloat16] [--tunix_python=PATH]: speed of scoring rows.

A random Qwen3 (--student) reads full rows and computes

hidden   final hidden states, as a teacher does, against transformers' model without its head
logp     the log-probability of each token, streamed over the vocabulary, against transformers and
         google-tunix, which hold all logits

Each turn of a contender is a process of its own. Writes a table (.md), all numbers (.json) and a
plot (.svg) to --out. FLOPs and bytes are the least that a call needs (benchmarks/costs.py).
"""

from absl import flags

from benchmarks import contest, costs
from distill.runtime import cli

OPTIONS = contest.define_flags(rounds=2)
contest.define_model_flags(OPTIONS, rows=1, tokens=4096)
KNOWN = ["hidden", "logp"]
CASES = flags.DEFINE_multi_enum("case", KNOWN, KNOWN, "Cases to run.", flag_values=OPTIONS)


def count_costs(case: str) -> contest.JsonDict:
    """Returns the tokens of a call and the FLOPs and bytes that it needs at least."""
    config = contest.make_config(OPTIONS, "student")
    return costs.count_score(case, config, OPTIONS.rows, OPTIONS.tokens, OPTIONS.dtype)


def main() -> None:
    cases = {case: count_costs(case) for case in CASES.value}
    contest.run_benchmark(
        contest.name_results("score", KNOWN, cases), "Scoring side by side", OPTIONS, cases, []
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
