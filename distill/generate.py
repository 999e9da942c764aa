"""python -m distill.generate --model=DIR --prompts=FILE --out=FILE.jsonl: sampled responses.

FILE is jsonl, or anything that a config's data.source may be; a row has `prompt` (plain text),
`messages` (a chat), `question` (a chat of one turn) or `tokens` (ids). OUT has the same rows in the
same order, with two more fields: `prompt_tokens`, and `samples`, a list of {tokens, text, logprobs,
finish_reason: "stop" | "length"}. The tokens of a sample end in its stop token, if it came; the
text leaves special tokens out and is null for a model without a tokenizer. A log-probability is
that of the distribution the token was drawn from; of a greedy one (temperature 0), the model's own.

Rows are written to OUT.partial as they come; stopped, the same command goes on with the next one.
"""

import hashlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from absl import flags

from distill import cli, data, metrics, policy, rollout
from distill.policy import Policy
from models.errors import UserError

OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", None, "Model directory, hub id or run directory.", OPTIONS, required=True
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "jsonl of prompts, or hf:..., tfds:...", OPTIONS, required=True
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

Rows = list[tuple[str, dict]]  # (where the row stands, its fields), as data.read_jsonl gives them


def prompts(subject: Policy, rows: Rows, thinking: bool, max_new_tokens: int) -> list[list[int]]:
    """The prompt of each row as token ids. Reads no parameters of `subject`.

    Raises:
      UserError: naming the first row that has none, or one that the model cannot go on from.
    """
    limit = subject.config.context_length
    found = []
    for where, row in rows:
        ids = data.prompt_tokens(row, where, subject.tokenizer, thinking)
        data.require_ids(ids, subject.config.vocab_size, where)
        if len(ids) + max_new_tokens > limit:
            raise UserError(
                f"{where}: prompt of {len(ids)} tokens and --max_new_tokens={max_new_tokens} "
                f"exceed the model's {limit} positions"
            )
        found.append(ids)
    return found


def generate(
    subject: Policy,
    rows: Rows,
    prompts: list[list[int]],
    *,
    samples: int,
    seed: int,
    max_new_tokens: int,
    sampling: rollout.Sampling,
    batch_size: int,
    first: int = 0,
) -> Iterator[dict]:
    """Yields each row from number `first` on with its `prompt_tokens` and `samples`; within
    `policy.use(subject)`. What a row draws does not depend on where one begins."""
    if first == len(rows):
        return
    completions = rollout.complete(
        subject,
        prompts[first:],
        samples=samples,
        key=jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        batch_size=batch_size,
        first=first,
    )
    with metrics.progress(len(rows), first, "generate") as bar:
        for number, group in enumerate(completions, start=first):
            written = [
                {
                    "tokens": c.tokens,
                    "text": subject.tokenizer.decode(c.tokens, skip_special_tokens=True)
                    if subject.tokenizer
                    else None,
                    "logprobs": c.logprobs,
                    "finish_reason": c.reason,
                }
                for c in group
            ]
            yield {**rows[number][1], "prompt_tokens": prompts[number], "samples": written}
            bar.update(number + 1, {})


def main() -> None:
    if not 0 < TOP_P.value <= 1:
        raise UserError(f"--top_p={TOP_P.value}: not in (0, 1]")
    if not TEMPERATURE.value < float("inf"):  # nor nan, which passes a flag's bounds
        raise UserError(f"--temperature={TEMPERATURE.value}: not a finite number")
    rows = data.read(PROMPTS.value)
    out = cli.output(OUT.value)
    subject = policy.reader(MODEL.value, DTYPE.value or "")
    ids = prompts(subject, rows, THINKING.value == "on", MAX_NEW_TOKENS.value)
    options = (MAX_NEW_TOKENS, TEMPERATURE, TOP_P, TOP_K, SAMPLES, SEED, THINKING)
    about = {
        "model": subject.path,
        "step": policy.newest_step(subject.path),
        "prompts_sha256": hashlib.sha256(metrics.dumps([r for _, r in rows]).encode()).hexdigest(),
        "dtype": jnp.dtype(subject.model.dtype).name,
        **{option.name: option.value for option in options},
    }
    first = metrics.begun_jsonl(out, about)
    with policy.use(subject):
        subject = policy.load(subject, jnp.dtype(subject.model.dtype).name)
        done = generate(
            subject,
            rows,
            ids,
            samples=SAMPLES.value,
            seed=SEED.value,
            max_new_tokens=MAX_NEW_TOKENS.value,
            sampling=rollout.Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value),
            batch_size=BATCH_SIZE.value,
            first=first,
        )
        metrics.extend_jsonl(out, done)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
