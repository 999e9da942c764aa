"""python -m distill.score --model=DIR --tokens=FILE.jsonl --out=FILE.jsonl: log-probabilities.

Each row of FILE has `tokens` (ids). OUT has the same rows in the same order, with `logprobs`: one
number a token, the log-probability (temperature 1) of that token after those before it; the first
is null. With --top_k=K also `top`: for each token the K most likely ones at its place, a list of
[id, logprob] from the most likely down; the first is null.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from absl import flags

from distill.data import sources
from distill.evaluation import scoring
from distill.policy import policy
from distill.runtime import cli, run_files
from models.errors import UserError

OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", None, "Model directory, hub id or run directory.", OPTIONS, required=True
)
TOKENS = flags.DEFINE_string("tokens", None, "jsonl of token ids.", OPTIONS, required=True)
OUT = flags.DEFINE_string("out", None, "jsonl to write.", OPTIONS, required=True)
TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Most likely tokens to list at each place.", lower_bound=0, flag_values=OPTIONS
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Rows scored together.", lower_bound=1, flag_values=OPTIONS
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    policy.PARAM_DTYPES,
    "Of parameters and computation; 8 bits are those of the layers' kernels alone. "
    "Default: bfloat16, but float32 on CPU, where it is faster.",
    flag_values=OPTIONS,
)


def main() -> None:
    rows = sources.open_rows(TOKENS.value)
    subject = policy.make_abstract_for_inference(
        MODEL.value, DTYPE.value if DTYPE.value in policy.DTYPES else ""
    )
    out = cli.check_output(OUT.value)
    if TOP_K.value > subject.config.vocab_size:
        raise UserError(
            f"--top_k={TOP_K.value}: the model's vocabulary has {subject.config.vocab_size} tokens"
        )
    ids = scoring.read_token_ids(subject, rows)

    def iter_scored_rows() -> Iterator[dict]:
        scores = scoring.score_sequences(
            subject, ids, batch_size=BATCH_SIZE.value, top_k=TOP_K.value
        )
        with run_files.show_progress(len(rows), 0, "score") as bar:
            for number, ((_, row), (logprobs, top)) in enumerate(zip(rows, scores, strict=True)):
                yield {**row, "logprobs": logprobs, **({"top": top} if TOP_K.value else {})}
                bar.update(number + 1, {})

    with policy.use(subject):
        subject = policy.load(subject, DTYPE.value or jnp.dtype(subject.model.dtype).name)
        run_files.write_jsonl(out, iter_scored_rows())


if __name__ == "__main__":
    cli.run(main, OPTIONS)
