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
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from absl import flags
from transformers import PreTrainedTokenizerBase

from distill import chat, cli, columns, data, metrics, pod, policy, rollout, sources
from distill.policy import Policy
from distill.sampling import Sampling
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
pod.define(OPTIONS)

Rows = Iterable[tuple[str, dict]]  # (where the row stands, its fields)


def limit_of(row: dict, where: str, default: int) -> int:
    """How many new tokens a row may have: its own `max_new_tokens`, or the default.

    Raises:
      UserError: naming the row if its own is none.
    """
    limit = row.get("max_new_tokens", default)
    if type(limit) is not int or limit < 1:
        raise UserError(f"{where}: max_new_tokens={limit!r}: must be a whole number from 1")
    return limit


def prompt(subject: Policy, row: dict, where: str, thinking: bool, limit: int) -> list[int]:
    """The prompt of a row as token ids. Reads no parameters of `subject`.

    Raises:
      RowError: if it is empty, or with `limit` new tokens exceeds the model's positions.
      UserError: if the row has none that can be read. Both begin with `where`.
    """
    ids = data.prompt_tokens(row, where, subject.tokenizer, thinking)
    data.require_ids(ids, subject.config.vocab_size, where)
    positions = subject.config.context_length
    if len(ids) + limit > positions:
        raise RowError(
            f"{where}: prompt of {len(ids)} tokens and {limit} new ones (max_new_tokens) exceed "
            f"the model's {positions} positions"
        )
    return ids


def prompts(subject: Policy, rows: Rows, thinking: bool, max_new_tokens: int) -> data.TokenLists:
    """The prompt of each row; raises UserError naming the first that cannot be gone on from."""
    return data.TokenLists(
        prompt(subject, row, where, thinking, max_new_tokens) for where, row in rows
    )


def sample(
    tokenizer: PreTrainedTokenizerBase | None, done: rollout.Sequence, stops: Sequence[str]
) -> dict:
    """A completion as it is written: cut after the first stop string."""
    count, reason, text = len(done.tokens), done.reason, None
    if tokenizer is not None:
        finder = chat.StopStrings(tokenizer, stops)
        found = finder.feed(done.tokens[:count]) if stops else None
        if found is not None:
            count, reason = found, "stop"
        text = finder.cut(chat.decode(tokenizer, done.tokens[:count]))
    row = {"tokens": done.tokens[:count], "text": text, "logprobs": done.logprobs[:count]}
    if done.model_logprobs is not None and done.top_logprobs is not None:
        row["model_logprobs"] = done.model_logprobs[:count]
        row["top_logprobs"] = done.top_logprobs[:count]
    return {**row, "finish_reason": reason}


def generate(
    subject: Policy,
    rows: sources.Rows,
    prompts: data.TokenLists,
    *,
    samples: int,
    seed: int,
    limits: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    stops: Sequence[str],
    top_logprobs: int,
    errors: dict[int, str],
    first: int = 0,
) -> Iterator[dict]:
    """Yields each row from number `first` on with its `prompt_tokens` and `samples`; within
    `policy.use(subject)`. What a row draws does not depend on where one begins. Rows are read again
    as they are written, and none is held for longer.

    `errors` are those of rows, by number, and come to hold those that are found here: such a row
    has an `error` and no samples.
    """
    if first == len(rows):
        return
    completions = rollout.complete(
        subject,
        prompts[first:],
        samples=samples,
        key=jax.random.key(seed),
        limits=limits[first:],
        sampling=sampling,
        batch_size=batch_size,
        top_logprobs=top_logprobs,
        ended=_finder(subject.tokenizer, stops, batch_size),
        first=first,
    )
    with metrics.progress(len(rows), first, "generate") as bar:
        for number, group in enumerate(completions, start=first):
            where, row = rows.where(number), rows.row(number)
            written = [sample(subject.tokenizer, c, stops) for c in group]
            bad = [len(s["tokens"]) for s in written if s["finish_reason"] == "error"]
            if bad and number not in errors:
                errors[number] = f"{where}: the logits are nan after {bad[0]} sampled tokens"
            result = {"samples": written}
            if number in errors:
                result = {"samples": [], "error": errors[number]}
            yield {**row, "prompt_tokens": prompts[number], **result}
            bar.update(number + 1, {})


def _finder(
    tokenizer: PreTrainedTokenizerBase | None, stops: Sequence[str], batch_size: int
) -> Callable[[rollout.Sequence], bool] | None:
    """Whether a response that goes on has a stop string by now.

    Of the responses that were asked about last, twice as many as decode together, it knows how far
    they were read. The others have ended; one that was parked for long is read from its start.
    """
    if tokenizer is None or not stops:
        return None
    finders: dict[tuple[int, int], tuple[chat.StopStrings, int]] = {}  # by the row's key

    def ended(row: rollout.Sequence) -> bool:
        finder, read = finders.pop(row.key, None) or (chat.StopStrings(tokenizer, stops), 0)
        found = finder.feed(row.tokens[read:]) is not None
        finders[row.key] = finder, len(row.tokens)
        if len(finders) > 2 * batch_size:
            del finders[next(iter(finders))]
        return found

    return ended


def _checked_sampling(subject: Policy) -> Sampling:
    """What the flags say of sampling; raises UserError naming the flag that cannot be."""
    try:
        sampling = Sampling(
            TEMPERATURE.value, TOP_K.value, TOP_P.value, MIN_P.value, PRESENCE_PENALTY.value
        )
        sampling.require(subject.config.vocab_size)
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
    with pod.joined(OPTIONS):
        run()


def run() -> None:
    found = data.read(PROMPTS.value)
    rows = dataclasses.replace(found, row=lambda i: columns.put(found.row(i), TEMPLATE.value))
    subject = policy.reader(MODEL.value, DTYPE.value or "")
    out = cli.output(OUT.value)
    sampling, allowed, ids = _checked_sampling(subject), array("i"), data.TokenLists()
    errors: dict[int, str] = {}
    read = hashlib.sha256()
    for number, (where, row) in enumerate(rows):
        allowed.append(limit_of(row, where, MAX_NEW_TOKENS.value))
        try:
            ids.append(prompt(subject, row, where, THINKING.value == "on", allowed[number]))
        except RowError as error:
            errors[number] = str(error)
            ids.append([])
        read.update(f"{', ' if number else '['}{metrics.dumps(row)}".encode())
    read.update(b"]")
    if len(errors) == len(rows):
        raise UserError(errors[0])
    options = (MAX_NEW_TOKENS, TEMPERATURE, TOP_P, TOP_K, MIN_P, PRESENCE_PENALTY, STOP)
    options += (TOP_LOGPROBS, SAMPLES, SEED, THINKING)
    about = {
        "model": subject.path,
        "step": policy.newest_step(subject.path),
        "prompts_sha256": read.hexdigest(),  # as one list of JSON
        "dtype": jnp.dtype(subject.model.dtype).name,
        **{option.name: option.value for option in options},
    }
    first = pod.from_primary(lambda: metrics.begun_jsonl(out, about))
    with policy.use(subject):
        subject = policy.load(subject, jnp.dtype(subject.model.dtype).name)
        done = generate(
            subject,
            rows,
            ids,
            samples=SAMPLES.value,
            seed=SEED.value,
            limits=allowed,
            sampling=sampling,
            batch_size=BATCH_SIZE.value,
            stops=STOP.value,
            top_logprobs=TOP_LOGPROBS.value,
            errors=errors,
            first=first,
        )
        metrics.extend_jsonl(out, done)
    if errors:
        more = f" (and {len(errors) - 1} more rows)" if len(errors) > 1 else ""
        raise UserError(f"{errors[min(errors)]}{more}; the other rows are in {OUT.value}")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
