"""Sampled completions of rows, as rows."""

from collections import abc
from collections.abc import Callable, Iterable, Iterator

import jax
from transformers import PreTrainedTokenizerBase

from distill.data import chat, dataset, sources
from distill.data.examples import encode_prompt
from distill.policy.policy import Policy
from distill.rollout import sampler
from distill.rollout.sampling import Sampling
from distill.rollout.sequence import Sequence
from distill.runtime import run_files
from models.errors import RowError, UserError

LocatedRows = Iterable[tuple[str, dict]]  # (where the row stands, its fields)


def get_max_new_tokens(row: dict, where: str, default: int) -> int:
    """How many new tokens a row may have: its own `max_new_tokens`, or the default.

    Raises:
      UserError: naming the row if its own is none.
    """
    limit = row.get("max_new_tokens", default)
    if type(limit) is not int or limit < 1:
        raise UserError(f"{where}: max_new_tokens={limit!r}: must be a whole number from 1")
    return limit


def encode_row_prompt(
    subject: Policy, row: dict, where: str, thinking: bool, limit: int
) -> list[int]:
    """The prompt of a row as token ids. Reads no parameters of `subject`.

    Raises:
      RowError: if it is empty, or with `limit` new tokens exceeds the model's positions.
      UserError: if the row has none that can be read. Both begin with `where`.
    """
    ids = encode_prompt(row, where, subject.tokenizer, thinking)
    dataset.require_ids(ids, subject.config.vocab_size, where)
    positions = subject.config.context_length
    if len(ids) + limit > positions:
        raise RowError(
            f"{where}: prompt of {len(ids)} tokens and {limit} new ones (max_new_tokens) exceed "
            f"the model's {positions} positions"
        )
    return ids


def encode_row_prompts(
    subject: Policy, rows: LocatedRows, thinking: bool, max_new_tokens: int
) -> dataset.TokenLists:
    """The prompt of each row; raises UserError naming the first that cannot be gone on from."""
    return dataset.TokenLists(
        encode_row_prompt(subject, row, where, thinking, max_new_tokens) for where, row in rows
    )


def format_completion(
    tokenizer: PreTrainedTokenizerBase | None, sequence: Sequence, stop_strings: abc.Sequence[str]
) -> dict:
    """A completion as it is written: cut after the first stop string."""
    count, reason, text = len(sequence.tokens), sequence.finish_reason, None
    if tokenizer is not None:
        finder = chat.StopStringMatcher(tokenizer, stop_strings)
        stop_index = finder.feed(sequence.tokens[:count]) if stop_strings else None
        if stop_index is not None:
            count, reason = stop_index, "stop"
        text = finder.cut_text(chat.decode(tokenizer, sequence.tokens[:count]))
    row = {"tokens": sequence.tokens[:count], "text": text, "logprobs": sequence.logprobs[:count]}
    if sequence.model_logprobs is not None and sequence.top_logprobs is not None:
        row["model_logprobs"] = sequence.model_logprobs[:count]
        row["top_logprobs"] = sequence.top_logprobs[:count]
    return {**row, "finish_reason": reason}


def generate_rows(
    subject: Policy,
    rows: sources.Rows,
    prompts: dataset.TokenLists,
    *,
    samples: int,
    seed: int,
    limits: abc.Sequence[int],
    sampling: Sampling,
    batch_size: int,
    stop_strings: abc.Sequence[str],
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
        ended=_make_stop_check(subject.tokenizer, stop_strings, batch_size),
        first=first,
    )
    with run_files.show_progress(len(rows), first, "generate") as bar:
        for number, group in enumerate(completions, start=first):
            where, row = rows.locate_row(number), rows.read_row(number)
            written = [format_completion(subject.tokenizer, c, stop_strings) for c in group]
            bad = [len(s["tokens"]) for s in written if s["finish_reason"] == "error"]
            if bad and number not in errors:
                errors[number] = f"{where}: the logits are nan after {bad[0]} sampled tokens"
            result = {"samples": written}
            if number in errors:
                result = {"samples": [], "error": errors[number]}
            yield {**row, "prompt_tokens": prompts[number], **result}
            bar.update(number + 1, {})


def _make_stop_check(
    tokenizer: PreTrainedTokenizerBase | None, stop_strings: abc.Sequence[str], batch_size: int
) -> Callable[[Sequence], bool] | None:
    """Whether a response that goes on has a stop string by now.

    Of the responses that were asked about last, twice as many as decode together, it knows how far
    they were read. The others have ended; one that was parked for long is read from its start.
    """
    if tokenizer is None or not stop_strings:
        return None
    finders: dict[tuple[int, int], tuple[chat.StopStringMatcher, int]] = {}  # by the row's key

    def has_stop_string(row: Sequence) -> bool:
        finder, num_read = finders.pop(row.key, None) or (
            chat.StopStringMatcher(tokenizer, stop_strings),
            0,
        )
        found = finder.feed(row.tokens[num_read:]) is not None
        finders[row.key] = finder, len(row.tokens)
        if len(finders) > 2 * batch_size:
            del finders[next(iter(finders))]
        return found

    return has_stop_string
