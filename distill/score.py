"""python -m distill.score --model=DIR --tokens=FILE.jsonl --out=FILE.jsonl: scores tokens.

Each row of FILE has `tokens` (ids). OUT has the same rows in the same order, with `logprobs`: the
log-probability (temperature 1) of each token given the ones before it; the first is null. With
--top_k=K a row also has `top`: the K most likely tokens at each position, a list of [id, logprob],
most likely first; the first is null.

With --output, what a model says of responses is stored in the directory OUT, and a run learns from
it with config.teacher.path=OUT, without the model:

    python -m distill.score --model=DIR --tokens=FILE.jsonl --output=hidden --out=DIRECTORY

FILE is then what `generate` wrote, of which all samples are scored, or has `tokens`, a prompt, and
`response_tokens`. Traces of text become tokens as a stage of a config says, with its template,
thinking mode, student's tokenizer and context; --config=FILE.py --stage=NAME in place of --tokens
scores the traces of that stage. --output says what is stored of each response token:
hidden, its final hidden state, and the output head once: the exact distribution; top, the --top_k
most likely tokens; token, its log-probability, which the others store too. The same command goes on
after the last whole file of a job that was stopped.
"""

from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from distill.runtime import cli, console, paths
from models.errors import UserError

if TYPE_CHECKING:
    from distill.evaluation.storing import Responses
    from distill.policy.policy import Policy

OPTIONS = flags.FlagValues()
DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
MODEL, DTYPE = cli.define_model_flags(OPTIONS, dtypes=DTYPES)
TOKENS = flags.DEFINE_string("tokens", "", "jsonl of token ids.", OPTIONS)
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
STAGE = flags.DEFINE_string(
    "stage", "", "With --config: name of the stage; default: the last.", OPTIONS
)
OUT = flags.DEFINE_string(
    "out", None, "jsonl, or with --output a directory, to write.", OPTIONS, required=True
)
OUTPUT = flags.DEFINE_enum(
    "output", "", ["", "hidden", "top", "token"], "Stores scores for a run.", flag_values=OPTIONS
)
TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Most likely tokens to list at each position.", 0, flag_values=OPTIONS
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows scored together.", 1, flag_values=OPTIONS)


def main() -> None:
    from distill.policy import policy
    from distill.runtime import xla

    xla.init_compilation_cache()
    _check_flags()
    subject = policy.make_abstract_for_inference(MODEL.value, DTYPE.value)
    if TOP_K.value > subject.config.vocab_size:
        raise UserError(
            f"--top_k={TOP_K.value}: the model's vocabulary has {subject.config.vocab_size} tokens"
        )
    if OUTPUT.value:
        store_scores(subject)
    else:
        write_scores(subject)


def _check_flags() -> None:
    if bool(TOKENS.value) == (CONFIG.value is not None):
        raise UserError(
            "--tokens: name a file of tokens, or a stage's traces by --config, not both"
        )
    if CONFIG.value is not None and not OUTPUT.value:
        raise UserError("--config: is read with --output=hidden, top or token")
    if STAGE.value and CONFIG.value is None:
        raise UserError(f"--stage={STAGE.value}: is read with --config only")
    if OUTPUT.value and (OUTPUT.value == "top") != (TOP_K.value > 0):
        raise UserError(
            f"--top_k={TOP_K.value}: --output=top needs it above 0, others do not read it"
        )


def write_scores(subject: "Policy") -> None:
    """Writes each row of tokens with its log-probabilities."""
    from distill.data import sources
    from distill.evaluation import scoring
    from distill.policy import policy
    from distill.runtime import outputs, run_files

    rows = sources.open_rows(TOKENS.value)
    out = paths.check_output(OUT.value, TOKENS.value)
    ids = scoring.read_token_ids(subject, rows)
    with outputs.own_output(out, "score", OPTIONS), policy.use(subject):
        subject = policy.load(subject, DTYPE.value)
        scored_rows = scoring.score_rows(
            subject, rows, ids, batch_size=BATCH_SIZE.value, top_k=TOP_K.value
        )
        run_files.write_jsonl(out, scored_rows)
    console.print_end([f"wrote {OUT.value}: {len(rows):,} rows with log-probabilities"])


def _open_responses() -> "Responses":
    from distill.evaluation import storing
    from distill.training import stage_responses

    if CONFIG.value is not None:
        return stage_responses.open_stage_responses(CONFIG.value, STAGE.value)
    return storing.open_token_rows(TOKENS.value)


def store_scores(subject: "Policy") -> None:
    """Stores what the model says of each response in a directory."""
    from distill.evaluation import storing
    from distill.runtime import locks, run_files, stop_signals

    flag = f"--out={OUT.value}"
    # The directory's own name, with what is written beside files checked by one that is not made.
    out = paths.check_output(f"{OUT.value.rstrip('/')}/scores.json", creates_folder=False).parent
    config = subject.config
    selection = storing.select_responses(
        _open_responses(), config.vocab_size, config.context_length
    )
    settings = storing.make_settings(
        subject, selection, OUTPUT.value, TOP_K.value, DTYPE.value or subject.dtype
    )
    with (
        run_files.explain_write_errors(out, flag),
        stop_signals.advise_interrupted(
            lambda: (
                f"the files that were finished are in {OUT.value}, and the same command goes on"
                if any(out.glob("shard-*"))
                else "no file was finished yet; the same command begins anew"
            )
        ),
        locks.hold_lock(out / "lock", flag),
    ):
        manifest = storing.store_scores(subject, selection, settings, out, BATCH_SIZE.value)
    size = sum(shard.bytes for shard in manifest.shards)
    console.print_end(
        [
            f"wrote {OUT.value}: {OUTPUT.value} of {settings.responses:,} responses, "
            f"{settings.tokens:,} tokens, {size / 2**20:,.1f} MiB in {len(manifest.shards):,} files"
        ],
        [
            console.format_command(
                "train",
                **{"config": "CONFIG.py", "config.teacher.path": OUT.value, "workdir": "runs/x"},
            )
        ],
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
