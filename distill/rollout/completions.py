"""Sampled completions of rows, as rows."""

from collections import abc
from collections.abc import Callable, Iterable, Iterator

import jax
from transformers import PreTrainedTokenizerBase

from distill.data import chat, dataset, sources
from distill.policy.policy import Policy
from distill.rollout import sampler
from distill.rollout.sampling import Sampling
from distill.rollout.sequence import Sequence
from distill.runtime import run_files
from models.errors import RowError, UserError

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
    ids = dataset.prompt_tokens(row, where, subject.tokenizer, thinking)
    dataset.require_ids(ids, subject.config.vocab_size, where)
    positions = subject.config.context_length
    if len(ids) + limit > positions:
        raise RowError(
            f"{where}: prompt of {len(ids)} tokens and {limit} new ones (max_new_tokens) exceed "
            f"the model's {positions} positions"
        )
    return ids


def prompts(subject: Policy, rows: Rows, thinking: bool, max_new_tokens: int) -> dataset.TokenLists:
    """The prompt of each row; raises UserError naming the first that cannot be gone on from."""
    return dataset.TokenLists(
        prompt(subject, row, where, thinking, max_new_tokens) for where, row in rows
    )


def sample(
    tokenizer: PreTrainedTokenizerBase | None, done: Sequence, stops: abc.Sequence[str]
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
    prompts: dataset.TokenLists,
    *,
    samples: int,
    seed: int,
    limits: abc.Sequence[int],
    sampling: Sampling,
    batch_size: int,
    stops: abc.Sequence[str],
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
    completions = sampler.complete(
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
    with run_files.progress(len(rows), first, "generate") as bar:
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
    tokenizer: PreTrainedTokenizerBase | None, stops: abc.Sequence[str], batch_size: int
) -> Callable[[Sequence], bool] | None:
    """Whether a response that goes on has a stop string by now.

    Of the responses that were asked about last, twice as many as decode together, it knows how far
    they were read. The others have ended; one that was parked for long is read from its start.
    """
    if tokenizer is None or not stops:
        return None
    finders: dict[tuple[int, int], tuple[chat.StopStrings, int]] = {}  # by the row's key

    def ended(row: Sequence) -> bool:
        finder, read = finders.pop(row.key, None) or (chat.StopStrings(tokenizer, stops), 0)
        found = finder.feed(row.tokens[read:]) is not None
        finders[row.key] = finder, len(row.tokens)
        if len(finders) > 2 * batch_size:
            del finders[next(iter(finders))]
        return found

    return ended
