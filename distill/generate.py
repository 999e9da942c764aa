"""python -m distill.generate --model=DIR --prompts=FILE.jsonl --out=FILE.jsonl: sampled responses.

Each row of FILE has `prompt` (plain text), `messages` (a chat), `question` (a chat of one turn) or
`tokens` (ids). OUT has the same rows in the same order, with two more fields: `prompt_tokens`, and
`samples`, a list of {tokens, text, logprobs, finish_reason: "stop" | "length"}. The tokens of a
sample end in its stop token, if it came; the text leaves special tokens out and is null for a
model without a tokenizer. A log-probability is that of the distribution the token was drawn from;
of a greedy one (temperature 0), the model's own.

A row that cannot be continued (an empty prompt, or one too long for the model) has no samples but
a field `error`; where the model gives NaN, the sample ends there with finish_reason "error". The
other rows are written all the same, and the exit code is 2.
"""

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
PROMPTS = flags.DEFINE_string("prompts", None, "jsonl of prompts.", OPTIONS, required=True)
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


def prompts(
    subject: Policy, rows: Rows, thinking: bool, max_new_tokens: int
) -> list[list[int] | data.UnfitPrompt]:
    """The prompt of each row as token ids, or why it cannot be used. Reads no parameters.

    Raises:
      UserError: naming the first row that has none, or one of unknown tokens.
    """
    limit = subject.config.max_position_embeddings
    found: list[list[int] | data.UnfitPrompt] = []
    for where, row in rows:
        try:
            ids = data.prompt_tokens(row, where, subject.tokenizer, thinking)
            data.require_ids(ids, subject.config.vocab_size, where)
            if len(ids) + max_new_tokens > limit:
                raise data.UnfitPrompt(
                    f"{where}: prompt of {len(ids)} tokens and --max_new_tokens={max_new_tokens} "
                    f"exceed the model's {limit} positions"
                )
            found.append(ids)
        except data.UnfitPrompt as error:
            found.append(error)
    return found


def fit(found: list[list[int] | data.UnfitPrompt]) -> list[list[int]]:
    """What `prompts` found; raises the first that is not fit."""
    for prompt in found:
        if isinstance(prompt, data.UnfitPrompt):
            raise prompt
    return found  # pyright: ignore[reportReturnType]


def generate(
    subject: Policy,
    rows: Rows,
    prompts: list[list[int] | data.UnfitPrompt],
    *,
    samples: int,
    seed: int,
    max_new_tokens: int,
    sampling: rollout.Sampling,
    batch_size: int,
    errors: list[str],
) -> Iterator[dict]:
    """Yields each row with its `prompt_tokens` and `samples`; within `policy.use(subject)`.

    What is wrong with a row stands in its `error`, and is appended to `errors`.
    """
    completions = rollout.complete(
        subject,
        [[] if isinstance(prompt, data.UnfitPrompt) else prompt for prompt in prompts],
        samples=samples,
        key=jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        batch_size=batch_size,
    )
    with metrics.progress(len(rows), 0, "generate") as bar:
        for number, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
            where, row = rows[number]
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
            done = {**row, "prompt_tokens": [], "samples": written}
            done.pop("error", None)  # of an earlier run whose output this is
            if isinstance(prompt, data.UnfitPrompt):
                done["error"] = str(prompt)
            else:
                done["prompt_tokens"] = prompt
            for c in group:
                if c.reason == "error":
                    done["error"] = f"{where}: NaN logits after {len(c.tokens)} sampled tokens"
            if "error" in done:
                errors.append(done["error"])
            yield done
            bar.update(number + 1, {})


def main() -> None:
    if not 0 < TOP_P.value <= 1:
        raise UserError(f"--top_p={TOP_P.value}: not in (0, 1]")
    if not TEMPERATURE.value < float("inf"):  # nor nan, which passes a flag's bounds
        raise UserError(f"--temperature={TEMPERATURE.value}: not a finite number")
    rows = data.read_jsonl(PROMPTS.value)
    out = cli.output(OUT.value)
    subject = policy.reader(MODEL.value, DTYPE.value or "")
    found = prompts(subject, rows, THINKING.value == "on", MAX_NEW_TOKENS.value)
    if all(isinstance(prompt, data.UnfitPrompt) for prompt in found):
        fit(found)
    errors: list[str] = []
    with policy.use(subject):
        subject = policy.load(subject, jnp.dtype(subject.model.dtype).name)
        done = generate(
            subject,
            rows,
            found,
            samples=SAMPLES.value,
            seed=SEED.value,
            max_new_tokens=MAX_NEW_TOKENS.value,
            sampling=rollout.Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value),
            batch_size=BATCH_SIZE.value,
            errors=errors,
        )
        metrics.write_jsonl(out, done)
    if errors:
        others = len(rows) - len(errors)
        raise UserError(f"{errors[0]} (such rows: {len(errors)}; without an error: {others})")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
