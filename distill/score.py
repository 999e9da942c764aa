"""python -m distill.score --model=DIR --tokens=FILE.jsonl --out=FILE.jsonl: scores tokens.

Each row of FILE has `tokens` (ids). OUT has the same rows in the same order, with `logprobs`: the
log-probability (temperature 1) of each token given the ones before it; the first is null. With
--top_k=K a row also has `top`: the K most likely tokens at each position, a list of [id, logprob],
most likely first; the first is null.
"""

from absl import flags

from distill.runtime import cli, console, paths
from models.errors import UserError

OPTIONS = flags.FlagValues()
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
MODEL, DTYPE = cli.define_model_flags(OPTIONS, dtypes=DTYPES)
TOKENS = flags.DEFINE_string("tokens", None, "jsonl of token ids.", OPTIONS, required=True)
OUT = flags.DEFINE_string("out", None, "jsonl to write.", OPTIONS, required=True)
TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Most likely tokens to list at each position.", 0, flag_values=OPTIONS
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows scored together.", 1, flag_values=OPTIONS)


def main() -> None:
    import jax.numpy as jnp

    from distill.data import sources
    from distill.evaluation import scoring
    from distill.policy import policy
    from distill.runtime import outputs, run_files, xla

    xla.init_compilation_cache()

    rows = sources.open_rows(TOKENS.value)
    subject = policy.make_abstract_for_inference(
        MODEL.value, DTYPE.value if DTYPE.value in policy.DTYPES else ""
    )
    out = paths.check_output(OUT.value, TOKENS.value)
    if TOP_K.value > subject.config.vocab_size:
        raise UserError(
            f"--top_k={TOP_K.value}: the model's vocabulary has {subject.config.vocab_size} tokens"
        )
    ids = scoring.read_token_ids(subject, rows)
    with outputs.own_output(out, "score", OPTIONS), policy.use(subject):
        subject = policy.load(subject, DTYPE.value or jnp.dtype(subject.model.dtype).name)
        scored_rows = scoring.score_rows(
            subject, rows, ids, batch_size=BATCH_SIZE.value, top_k=TOP_K.value
        )
        run_files.write_jsonl(out, scored_rows)
    console.print_end([f"wrote {OUT.value}: {len(rows):,} rows with log-probabilities"])


if __name__ == "__main__":
    cli.run(main, OPTIONS)
