"""Samples completions of prompts, and of rows and files of prompts."""

import dataclasses
import hashlib
from array import array
from collections import Counter, abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerBase

from distill.data import chat, dataset, sources
from distill.data.examples import encode_prompt
from distill.policy import identity, policy
from distill.policy.policy import Policy
from distill.rollout import sampler
from distill.rollout.options import RolloutOptions
from distill.rollout.sampling import Sampling
from distill.rollout.sequence import Sequence
from distill.runtime import distributed, run_files
from distill.runtime.progress import show_progress
from models.checks import SEEDS, Range, check_fields
from models.errors import RowError, UserError

_MAX_LIMIT = 2**31 - 1  # limits are held in 4 bytes each

LocatedRows = Iterable[tuple[str, dict]]  # (location of the row, its fields)


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """Settings for completing prompts. batch_size does not affect the completions.

    Raises:
      UserError: naming the field that is out of bounds, and its value.
    """

    samples: int = 1  # completions of each prompt
    max_new_tokens: int = 1024  # of a completion
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    batch_size: int = 32  # completions that decode together
    stop_strings: tuple[str, ...] = ()  # strings that end a completion
    top_logprobs: int = 0  # most likely tokens to record at each position

    def __post_init__(self) -> None:
        count = Range(1, whole=True)
        limit = Range(1, _MAX_LIMIT, whole=True)
        check_fields(self, {"samples": count, "max_new_tokens": limit, "batch_size": count})
        check_fields(self, {"seed": SEEDS, "top_logprobs": Range(whole=True)})
        texts = self.stop_strings
        if not isinstance(texts, list | tuple) or not all(x and isinstance(x, str) for x in texts):
            raise UserError(f"stop_strings={texts!r}: must be a list of texts that are not empty")


def make_sample_spec(settings: Mapping[str, Any]) -> SampleSpec:
    """Builds a spec from settings that are named like its fields or those of Sampling.

    Ignores other settings.

    Raises:
      UserError: naming a field that is out of range.
    """

    def pick(cls: type) -> dict[str, Any]:
        return {f.name: settings[f.name] for f in dataclasses.fields(cls) if f.name in settings}

    return SampleSpec(**pick(SampleSpec), sampling=Sampling(**pick(Sampling)))


def complete(
    subject: Policy,
    prompts: abc.Sequence[list[int]],
    spec: SampleSpec,
    *,
    first: int = 0,
    limits: abc.Sequence[int] | None = None,
    counts: Counter[str] | None = None,
    warm_up: bool = False,
    check_stop: Callable[[], None] = lambda: None,
) -> Iterator[list[Sequence]]:
    """Yields a list of `spec.samples` completions for each prompt, in order.

    An empty prompt gets no completions.

    Args:
      first: number of the first prompt. A call that resumes at prompt `first` gives the same
        completions as a call with all prompts.
      limits: each prompt's limit of new tokens; None: `spec.max_new_tokens` for all.
      counts: see `sampler.sample`.
      warm_up: compile every program before returning.
      check_stop: see `sampler.sample`.
    """
    if limits is None:
        limits = [spec.max_new_tokens] * len(prompts)
    numbers_B, samples_B = np.divmod(np.arange(len(prompts) * spec.samples), spec.samples)
    keys = sampler.make_row_keys(jax.random.key(spec.seed), numbers_B + first, samples_B)
    max_length = max((len(p) + n for p, n in zip(prompts, limits, strict=True) if p), default=1)
    completed = sampler.sample(
        sampler.SamplingModel(subject.model, subject.params, subject.stop_ids),
        (
            Sequence(prompts[p], key, limits[p])
            for p, key in zip(numbers_B, keys, strict=True)
            if prompts[p]
        ),
        sampling=spec.sampling,
        options=RolloutOptions(
            spec.batch_size,
            max_length=sampler.bucket_length(max_length),
            top_logprobs=spec.top_logprobs,
            warm_up=warm_up,
        ),
        counts=counts,
        ended=_make_stop_check(subject.tokenizer, spec),
        check_stop=check_stop,
    )
    return ([next(completed) for _ in range(spec.samples if prompt else 0)] for prompt in prompts)


def get_max_new_tokens(row: dict, where: str, default: int) -> int:
    """Returns the row's own `max_new_tokens`, or the default.

    Raises:
      UserError: naming the row if its value is not a positive integer.
    """
    limit = row.get("max_new_tokens", default)
    if type(limit) is not int or not 1 <= limit <= _MAX_LIMIT:
        raise UserError(
            f"{where}: max_new_tokens={limit!r}: must be a whole number from 1 to {_MAX_LIMIT:,}"
        )
    return limit


def encode_row_prompt(
    subject: Policy, row: dict, where: str, thinking: bool, limit: int
) -> list[int]:
    """Encodes the prompt of a row as token ids. Reads no parameters of `subject`.

    Raises:
      RowError: if it is empty, or exceeds the model's positions with `limit` new tokens.
      UserError: if the row has no valid prompt. Both messages begin with `where`.
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


def fit_limit(subject: Policy, prompt: list[int], limit: int) -> int:
    """Returns the limit of new tokens, or fewer if the model's positions leave fewer."""
    return min(limit, subject.config.context_length - len(prompt))


def encode_row_prompts(
    subject: Policy, rows: LocatedRows, thinking: bool, max_new_tokens: int
) -> dataset.TokenLists:
    """Encodes the prompt of each row. Raises UserError naming the first that cannot be encoded."""
    return dataset.TokenLists(
        encode_row_prompt(subject, row, where, thinking, max_new_tokens) for where, row in rows
    )


def format_completion(
    tokenizer: PreTrainedTokenizerBase | None,
    sequence: Sequence,
    stop_strings: abc.Sequence[str],
) -> dict:
    """Converts a completion to its output format, cut after its first stop string.

    The text begins with the think tag that the prompt opened, if it did.
    """
    count, reason, text = len(sequence.tokens), sequence.finish_reason, None
    if tokenizer is not None:
        matcher = chat.StopStringMatcher(tokenizer, stop_strings)
        stop_index = matcher.feed(sequence.tokens[:count]) if stop_strings else None
        if stop_index is not None:
            count, reason = stop_index, "stop"
        opened = chat.find_opened_block(tokenizer, sequence.prompt)
        text = opened + matcher.cut_text(chat.decode(tokenizer, sequence.tokens[:count]))
    row = {"tokens": sequence.tokens[:count], "text": text, "logprobs": sequence.logprobs[:count]}
    if sequence.model_logprobs is not None and sequence.top_logprobs is not None:
        row["model_logprobs"] = sequence.model_logprobs[:count]
        row["top_logprobs"] = sequence.top_logprobs[:count]
    return {**row, "finish_reason": reason}


def generate_rows(
    subject: Policy,
    rows: sources.Rows,
    prompts: dataset.TokenLists,
    spec: SampleSpec,
    *,
    limits: abc.Sequence[int],
    errors: dict[int, str],
    first: int = 0,
) -> Iterator[dict]:
    """Yields each row from number `first` on with its `prompt_tokens` and `samples`.

    Call within `policy.use(subject)`. A row's samples do not depend on `first`. Rows are read again
    as they are written, so that they are not all held in memory.

    Args:
      limits: each row's limit of new tokens.
      errors: row number → error. Rows that fail here are added. Such a row gets an `error` and no
        samples.
    """
    if first == len(rows):
        return
    completions = complete(subject, prompts[first:], spec, first=first, limits=limits[first:])
    with show_progress(len(rows), first, "generate", spec.batch_size) as bar:
        for number, group in enumerate(completions, start=first):
            where, row = rows.locate_row(number), rows.read_row(number)
            samples = [format_completion(subject.tokenizer, c, spec.stop_strings) for c in group]
            failed = [len(s["tokens"]) for s in samples if s["finish_reason"] == "error"]
            if failed and number not in errors:
                errors[number] = f"{where}: the logits are nan after {failed[0]} sampled tokens"
            result = {"samples": samples}
            if number in errors:
                result = {"samples": [], "error": errors[number]}
            yield {**row, "prompt_tokens": prompts[number], **result}
            bar.update(number + 1)


def generate_file(
    subject: Policy,
    rows: sources.Rows,
    spec: SampleSpec,
    thinking: bool,
    path: epath.Path,
    *,
    fits: bool = False,
) -> dict[int, str]:
    """Loads the abstract policy `subject`, completes the rows and writes them to `path`.

    Resumes an earlier call for `path`. Returns the errors of rows by number.

    Args:
      fits: where `spec.max_new_tokens` are more than the model's positions leave after a prompt,
        take what they leave, and say so. A row's own limit is no such default.

    Raises:
      UserError: if an earlier call had other arguments, or no row can be completed.
    """
    limits, prompts, errors = array("i"), dataset.TokenLists(), {}
    lowered: list[int] = []  # the limits of rows that have less than the default
    prompts_hash = hashlib.sha256()
    for number, (where, row) in enumerate(rows):
        limits.append(get_max_new_tokens(row, where, spec.max_new_tokens))
        is_default = fits and "max_new_tokens" not in row
        least = 1 if is_default else limits[number]
        try:
            prompts.append(encode_row_prompt(subject, row, where, thinking, least))
            if is_default:
                limits[number] = fit_limit(subject, prompts[number], limits[number])
                lowered += [limits[number]] * (limits[number] < spec.max_new_tokens)
        except RowError as error:
            errors[number] = str(error)
            prompts.append([])
        prompts_hash.update(f"{', ' if number else '['}{run_files.to_json(row)}".encode())
    prompts_hash.update(b"]")  # of all rows as one JSON list
    if len(errors) == len(rows):
        raise UserError(errors[0])
    if lowered:
        run_files.log_line(
            f"max_new_tokens: {len(lowered):,} of {len(rows):,} rows have less than "
            f"{spec.max_new_tokens:,} new tokens, the shortest {min(lowered):,}: the model has "
            f"{subject.config.context_length:,} positions"
        )
    dtype = jnp.dtype(subject.model.dtype).name
    header = {
        "model": subject.path,
        "step": policy.find_newest_step(subject.path),
        "rows": len(rows),
        "prompts_sha256": prompts_hash.hexdigest(),
        "dtype": dtype,
        "max_new_tokens": spec.max_new_tokens,
        **dataclasses.asdict(spec.sampling),
        "stop": spec.stop_strings,
        "top_logprobs": spec.top_logprobs,
        "samples": spec.samples,
        "seed": spec.seed,
        "thinking": "on" if thinking else "off",
        # Of the rows alone: with the flag, and the same number, others would fail.
        **({"limits": "fitted"} if fits else {}),
    }

    def resume() -> int:
        files = identity.hash_parts(identity.describe_model(subject.path))
        return run_files.resume_jsonl(path, {**header, "model_files": files})

    first = distributed.broadcast_from_primary(resume)
    with policy.use(subject):
        loaded = policy.load(subject, dtype)
        if loaded.step != header["step"]:
            raise UserError(
                f"{subject.path}: the arrays of checkpoint {header['step']} are damaged; move it "
                "away to sample from the one before"
            )
        results = generate_rows(
            loaded, rows, prompts, spec, limits=limits, errors=errors, first=first
        )
        run_files.extend_jsonl(path, results)
    return errors


def _make_stop_check(
    tokenizer: PreTrainedTokenizerBase | None, spec: SampleSpec
) -> Callable[[Sequence], bool] | None:
    """Returns a function that finds stop strings in an unfinished sequence; None without any.

    It remembers how far it read the sequences that it checked most recently, twice as many as
    decode together. Older ones have usually ended; one that was not is read again from its start.
    """
    if tokenizer is None or not spec.stop_strings:
        return None
    matchers: dict[tuple[int, int], tuple[chat.StopStringMatcher, int]] = {}  # by sequence key

    def has_stop_string(sequence: Sequence) -> bool:
        matcher, num_read = matchers.pop(sequence.key, None) or (
            chat.StopStringMatcher(tokenizer, spec.stop_strings),
            0,
        )
        is_matched = matcher.feed(sequence.tokens[num_read:]) is not None
        matchers[sequence.key] = matcher, len(sequence.tokens)
        if len(matchers) > 2 * spec.batch_size:
            del matchers[next(iter(matchers))]
        return is_matched

    return has_stop_string
