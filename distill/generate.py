"""python -m distill.generate --model=DIR --prompts=FILE --out=FILE.jsonl: sampled responses.

FILE is jsonl, or anything that a config's data.source may be; a row has `prompt` (plain text),
`messages` (a chat), `question` (a chat of one turn) or `tokens` (ids), and may have a
`max_new_tokens` of its own. OUT has the same rows in the same order, with two more fields:
`prompt_tokens`, and `samples`, a list of {tokens, text, logprobs, finish_reason: "stop" |
"length"}. The tokens of a sample end in its stop token, if it came, or with the token that
completed a stop string; the text leaves special tokens out, is cut before the stop string, and is
null for a model without a tokenizer. A log-probability is that of the distribution the token was
drawn from; of a greedy one (temperature 0), the model's own. With --top_logprobs=K a sample also
has the model's own (temperature 1, nothing cut or penalised): `model_logprobs` of its tokens, and
`top_logprobs`, at each place the K likeliest as [id, log-probability].

A row that the model cannot go on from (an empty prompt, one too long, logits that are nan) has no
samples but an `error`; the others are written, and the exit code is 2. Rows are written to
OUT.partial as they come; stopped, the same command goes on with the next one.
"""

import dataclasses
import hashlib
from array import array

import jax.numpy as jnp
from absl import flags

from distill.data import columns, dataset
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rollout import completions
from distill.rollout.sampling import Sampling
from distill.runtime import cli, distributed, run_files
from models.errors import RowError, UserError

OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", None, "Model directory, hub id or run directory.", OPTIONS, required=True
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "jsonl of prompts, or hf:..., tfds:...", OPTIONS, required=True
)
TEMPLATE = flags.DEFINE_string(
    "template", "{question}", "How a row's question is put, as config.data.template.", OPTIONS
)
OUT = flags.DEFINE_string("out", None, "jsonl to write.", OPTIONS, required=True)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 1024, "Tokens at most in a response.", lower_bound=1, flag_values=OPTIONS
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "0: greedy.", lower_bound=0.0, flag_values=OPTIONS
)
TOP_P = flags.DEFINE_float("top_p", 1.0, "In (0, 1]; 1: off.", flag_values=OPTIONS)
TOP_K = flags.DEFINE_integer("top_k", 0, "0: off.", lower_bound=0, flag_values=OPTIONS)
MIN_P = flags.DEFINE_float("min_p", 0.0, "Of the likeliest token's; 0: off.", flag_values=OPTIONS)
PRESENCE_PENALTY = flags.DEFINE_float(
    "presence_penalty",
    0.0,
    "Off the logits of tokens already in the response.",
    flag_values=OPTIONS,
)
STOP = flags.DEFINE_multi_string(
    "stop", [], "Text that ends a response; may be given again.", flag_values=OPTIONS
)
TOP_LOGPROBS = flags.DEFINE_integer(
    "top_logprobs",
    0,
    "Likeliest tokens to report at each place.",
    lower_bound=0,
    flag_values=OPTIONS,
)
SAMPLES = flags.DEFINE_integer(
    "samples", 1, "Responses to each prompt.", lower_bound=1, flag_values=OPTIONS
)
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0, flag_values=OPTIONS)
THINKING = flags.DEFINE_enum(
    "thinking", "on", ["on", "off"], "The chat template's switch.", flag_values=OPTIONS
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Responses sampled together.", lower_bound=1, flag_values=OPTIONS
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16"],
    "Of parameters and computation. Default: bfloat16, but float32 on CPU, where it is faster.",
    flag_values=OPTIONS,
)
distributed.define_flags(OPTIONS)


def _make_sampling(subject: Policy) -> Sampling:
    """What the flags say of sampling; raises UserError naming the flag that cannot be."""
    try:
        sampling = Sampling(
            TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, PRESENCE_PENALTY.value
        )
        sampling.check_vocab_size(subject.config.vocab_size)
    except UserError as error:
        raise UserError(f"--{error}") from None
    if TOP_LOGPROBS.value > subject.config.vocab_size:
        size = subject.config.vocab_size
        raise UserError(f"--top_logprobs={TOP_LOGPROBS.value}: the vocabulary has {size} tokens")
    if "" in STOP.value:
        raise UserError("--stop=: an empty text is in every response")
    if STOP.value and subject.tokenizer is None:
        raise UserError(f"--stop={STOP.value[0]}: {subject.path} has no tokenizer to find it with")
    return sampling


def main() -> None:
    with distributed.join_processes(OPTIONS):
        run_generation()


def run_generation() -> None:
    prompt_rows = dataset.open_canonical_rows(PROMPTS.value)
    rows = dataclasses.replace(
        prompt_rows,
        read_row=lambda i: columns.apply_template(prompt_rows.read_row(i), TEMPLATE.value),
    )
    subject = policy.make_abstract_for_inference(MODEL.value, DTYPE.value or "")
    out = cli.check_output(OUT.value)
    sampling, limits, ids = _make_sampling(subject), array("i"), dataset.TokenLists()
    errors: dict[int, str] = {}
    prompts_hash = hashlib.sha256()
    for number, (where, row) in enumerate(rows):
        limits.append(completions.get_max_new_tokens(row, where, MAX_NEW_TOKENS.value))
        try:
            ids.append(
                completions.encode_row_prompt(
                    subject, row, where, THINKING.value == "on", limits[number]
                )
            )
        except RowError as error:
            errors[number] = str(error)
            ids.append([])
        prompts_hash.update(f"{', ' if number else '['}{run_files.to_json(row)}".encode())
    prompts_hash.update(b"]")
    if len(errors) == len(rows):
        raise UserError(errors[0])
    options = (MAX_NEW_TOKENS, TEMPERATURE, TOP_P, TOP_K, MIN_P, PRESENCE_PENALTY, STOP)
    options += (TOP_LOGPROBS, SAMPLES, SEED, THINKING)
    header = {
        "model": subject.path,
        "step": policy.find_newest_step(subject.path),
        "prompts_sha256": prompts_hash.hexdigest(),  # as one list of JSON
        "dtype": jnp.dtype(subject.model.dtype).name,
        **{option.name: option.value for option in options},
    }
    first_row = distributed.broadcast_from_primary(lambda: run_files.resume_jsonl(out, header))
    with policy.use(subject):
        subject = policy.load(subject, jnp.dtype(subject.model.dtype).name)
        results = completions.generate_rows(
            subject,
            rows,
            ids,
            completions.SampleSpec(
                SAMPLES.value,
                MAX_NEW_TOKENS.value,
                sampling,
                SEED.value,
                BATCH_SIZE.value,
                tuple(STOP.value),
                TOP_LOGPROBS.value,
            ),
            limits=limits,
            errors=errors,
            first=first_row,
        )
        run_files.extend_jsonl(out, results)
    if errors:
        more = f" (and {len(errors) - 1} more rows)" if len(errors) > 1 else ""
        raise UserError(f"{errors[min(errors)]}{more}; the other rows are in {OUT.value}")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
