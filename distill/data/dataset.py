"""Reads a stage's examples by number, and decides which of them a step reads.

The order is a function of (seed, step) alone: not of what was read before, nor of which process
reads it. So a resumed run reads what the uninterrupted run would have read.
"""

import concurrent.futures
import dataclasses
import functools
from array import array
from collections import abc
from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from distill.data import answers, canonical, columns, curriculum, sources, teacher_context
from distill.data.examples import Encoding, Example, make_example
from distill.data.template import describe_template
from distill.runtime import run_files
from models import checks
from models.errors import PromptTooLong, SourceFailure, UserError, name_key

ENDLESS_SAMPLE = 1000  # examples of a source without end that are read before step 0
MIXTURE_BLOCK = 1000  # in each run of so many examples a mixture's sources have their exact shares

BOUNDS: dict[str, checks.Rule] = {
    **dict.fromkeys(("max_rows", "check_rows", "shuffle_window"), checks.Range(0)),
    "thinking": checks.Range(0, 1),
    "on_bad_row": ("fail", "skip"),
    "turns": ("last", "all"),
    "keep_samples": ("all", "finished", "correct"),
    "curriculum": curriculum.CURRICULA,
}

ExampleCheck = Callable[[Example], None]  # raises UserError naming an example that cannot be used


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples by number; `size` of them, or without end if size is 0.

    window: above 0, an epoch goes from window to window of so many rows, shuffled within each, as
      a stream needs it.
    skip_reasons: why a bad row was skipped, by the row's name.
    thinking_share: of the examples that have both modes, the share read in thinking mode.
    order: a curriculum's, in place of a new order each epoch.
    """

    size: int
    read_example: Callable[[int], Example]
    window: int = 0
    skip_reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    thinking_share: float = 1.0
    order: curriculum.Order | None = None


def load_source(
    c: ConfigDict,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    with_responses: bool,
    check_example: ExampleCheck = lambda example: None,
    context: teacher_context.TeacherContext | None = None,
    adapt_row: Callable[[dict, str], dict] = lambda row, where: row,
) -> Source:
    """Opens the source or the mixture of sources that a stage's `data` config names.

    Reads and encodes the first `check_rows` rows of each, so that a bad row among them shows before
    training; one further on shows when it is read. on_bad_row="fail" then ends the run with the
    row's name, "skip" leaves the row out and counts it.

    Args:
      with_responses: examples carry responses to learn; else prompts only.
      context: adds the prompt that a teacher reads.
      adapt_row: (row, its location) -> the row with columns that `columns` knows.

    Raises:
      UserError: naming the key, file or row at fault.
    """
    _check_config(c, tokenizer)
    encoding = Encoding(tokenizer, with_responses, c.thinking, c.turns)
    find_difficulty = curriculum.make_difficulty_fn(c.difficulty)
    skip_reasons: dict[str, str] = {}

    def encode_row(source_id: int, row: dict, where: str) -> Example:
        canonical.refuse_weights(row, where)
        row = adapt_row(row, where)
        row = canonical.canonicalize_row(row, c.columns, where, with_responses)
        row = canonical.apply_template(row, c.template)
        is_document = with_responses and "text" in row
        reason = columns.explain_missing_prompt(row, by_config=True)
        if reason and not is_document:
            raise UserError(f"{where}: {reason}")
        row["answer"] = answers.to_text(row.get("answer"))
        example = make_example(row, where, encoding)
        if context is not None:
            example = teacher_context.add_context(context, row, example, encoding)
        example = example.with_difficulty(find_difficulty(row, example))
        for mode in (example, example.non_thinking_example):
            if mode:
                check_example(dataclasses.replace(mode, source_id=source_id))
        return example

    components = []
    key = "config.data.mixture" if c.mixture else "config.data.source"
    for source_id, name in enumerate(list_source_names(c)):
        with name_key(key, name):
            rows = _open_rows(c, name, encoding, seed, skip_reasons)
        encode = functools.partial(encode_row, source_id)
        components.append(_make_source(c, rows, encode, skip_reasons))
    if not c.mixture:
        return components[0]
    return mix_sources(components, [float(weight) for _, weight in c.mixture], seed)


def _check_config(c: ConfigDict, tokenizer: PreTrainedTokenizerBase | None) -> None:
    checks.check_fields(c, BOUNDS, "config.data.")
    if "{question}" not in c.template:
        raise UserError(f"config.data.template={c.template!r}: has no {{question}}")
    if c.streaming and not c.shuffle_window:
        raise UserError("config.data.shuffle_window=0: a stream is shuffled in windows of rows")
    template = describe_template(tokenizer)
    if tokenizer and c.thinking == 0 and template.always_thinks:
        raise UserError(
            f"config.data.thinking=0: the chat template of {tokenizer.name_or_path} opens a think "
            "block in every prompt"
        )
    if tokenizer and 0 < c.thinking < 1 and not template.has_switch:
        raise UserError(
            f"config.data.thinking={c.thinking}: the chat template of {tokenizer.name_or_path} has "
            "no switch between modes; 1 leaves it as it is"
        )
    list_source_names(c)


def list_source_names(c: ConfigDict) -> list[str]:
    """Returns the names of the sources in a stage's `data` config.

    Raises UserError for a mixture that holds anything but pairs of a source and a weight.
    """
    for pair in c.mixture:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
        if not (is_pair and pair[1] in checks.Range(above=True)):
            raise UserError(
                f"config.data.mixture: {pair!r} is no pair of a source and a weight, as in "
                "mixture=(('a.jsonl', 1.0), ('b.jsonl', 1.0))"
            )
    return [name for name, _ in c.mixture] or [c.source]


def _open_rows(
    c: ConfigDict, name: str, encoding: Encoding, seed: int, skip_reasons: dict[str, str]
) -> sources.Rows:
    if name == "arithmetic":
        if encoding.tokenizer is None:
            raise UserError("config.data.source: arithmetic needs a model with a tokenizer")
        return sources.make_arithmetic_rows(c, seed)
    window = c.shuffle_window if c.streaming else 0
    rows = sources.open_rows(name, size=c.max_rows, window=window)
    if encoding.with_responses and not window and sources.has_samples(rows):
        skips = c.on_bad_row == "skip"
        rows = sources.expand_samples(rows, c.keep_samples, skip_reasons if skips else None)
    return rows


def _make_source(
    c: ConfigDict,
    rows: sources.Rows,
    encode_row: Callable[[dict, str], Example],
    skip_reasons: dict[str, str],
) -> Source:
    """Makes the examples of rows, after reading the first `check_rows` of them.

    Bad rows among those are no part of a source that skips; the next good row takes the place of
    one that shows later.
    """

    def read_example(index: int) -> Example:
        return encode_row(rows.read_row(index), rows.locate_row(index))

    num_checked = min(c.check_rows, rows.size) if rows.size else ENDLESS_SAMPLE
    source = Source(rows.size, read_example, rows.window, skip_reasons, c.thinking)
    if c.on_bad_row == "fail":
        _require_good_rows(read_example, num_checked, rows.name)
        return source

    def try_example(index: int) -> Example | None:
        where = rows.locate_row(index)
        if where in skip_reasons:
            return None
        try:
            return read_example(index)
        except SourceFailure:  # not the row's fault
            raise
        except UserError as error:
            skip_reasons[where] = str(error)
            run_files.log_skipped(error, len(skip_reasons))
            return None

    def read_next_good_example(index: int) -> Example:
        for other in range(index, index + rows.size):
            example = try_example(other % rows.size)
            if example is not None:
                return example
        raise UserError(f"{rows.name}: no good row; {next(iter(skip_reasons.values()))}")

    good = [index for index in range(num_checked) if try_example(index) is not None]
    if num_bad := num_checked - len(good):
        run_files.log_line(f"{rows.name}: {num_bad} of the first {num_checked} rows are skipped")
    if num_checked and not good:
        raise UserError(f"{rows.name}: no good row; {next(iter(skip_reasons.values()))}")
    if not rows.size:
        return source
    if num_checked < rows.size:
        return dataclasses.replace(source, read_example=read_next_good_example)
    return dataclasses.replace(
        source, size=len(good), read_example=lambda index: read_example(good[index])
    )


def _require_good_rows(read_example: Callable[[int], object], count: int, name: str) -> None:
    """Reads the first `count` examples. Raises UserError for the first that cannot be used; if its
    prompt is too long, with the number of those that are, so that one setting mends all."""
    first, lengths = None, []
    for index in range(count):
        try:
            read_example(index)
        except PromptTooLong as error:
            first = first or error
            lengths.append(error.tokens)
    if first:
        raise UserError(
            f"{first}; of {name}, {len(lengths):,} of {count:,} prompts are longer, the longest "
            f"{max(lengths):,} tokens: raise the limit, or leave them out with "
            "config.data.on_bad_row=skip"
        )


def mix_sources(components: list[Source], weights: list[float], seed: int) -> Source:
    """Mixes sources into one without end, each in its own shuffled order.

    Each run of MIXTURE_BLOCK examples holds a share of each source in proportion to its weight
    (rounded down, at least one; the largest takes the rest), in an order drawn for that block.
    """
    shares = np.array(weights) / sum(weights) * MIXTURE_BLOCK
    counts = np.maximum(1, shares.astype(int))
    counts[np.argmax(counts)] += MIXTURE_BLOCK - counts.sum()
    source_ids = np.repeat(np.arange(len(components)), counts)

    def read_example(index: int) -> Example:
        block, place = divmod(index, MIXTURE_BLOCK)
        order = source_ids[_draw_permutation(MIXTURE_BLOCK, (seed, block))]
        source_id = order[place]
        ordinal = block * counts[source_id] + np.count_nonzero(order[:place] == source_id)
        example = get_example(components[source_id], int(ordinal), seed)
        return dataclasses.replace(example, source_id=int(source_id))

    return Source(0, read_example, 0, components[0].skip_reasons)


def open_canonical_rows(
    source: str, size: int = 0, *, with_responses: bool = False
) -> sources.Rows:
    """Opens the first `size` rows (0: all) of anything that `sources` reads, with the canonical
    columns added."""
    rows = sources.open_rows(source, size=size)

    def read_row(index: int) -> dict:
        where = rows.locate_row(index)
        return canonical.canonicalize_row(rows.read_row(index), "", where, with_responses)

    return dataclasses.replace(rows, read_row=read_row)


def require_valid_example(example: Example, limit: int, field: str, vocab_size: int) -> None:
    """Raises PromptTooLong if the prompt is longer than `limit` tokens (which `field` sets), and
    UserError if the example has ids outside a vocabulary of `vocab_size`."""
    if len(example.prompt) > limit:
        raise PromptTooLong(
            f"{example.where}: prompt of {len(example.prompt)} tokens, {field} allows {limit}",
            len(example.prompt),
        )
    require_ids(example.prompt + example.response, vocab_size, example.where)


def require_ids(ids: list[int], vocab_size: int, where: str) -> None:
    """Raises UserError naming the first id outside a vocabulary of `vocab_size`, for which JAX
    would look up some other embedding without an error."""
    unknown = next((i for i in ids if i >= vocab_size), None)
    if unknown is not None:
        raise UserError(f"{where}: token id {unknown} is outside the vocabulary of {vocab_size}")


def get_example(source: Source, ordinal: int, seed: int) -> Example:
    """Returns the example that is read as number `ordinal`.

    A source without end is read in its own order; a finite one in an order drawn for each epoch, so
    that each example comes once an epoch. An example with both modes comes in that of its ordinal.
    """
    return _read_in_mode(source, _find_index(source, ordinal, seed), ordinal, seed)


def get_step_examples(
    source: Source,
    step: int,
    count: int,
    seed: int,
    row_indices: Sequence[int] | None = None,
    curriculum_step: int | None = None,
) -> list[Example]:
    """Returns the `count` examples of a step, or those of its places `row_indices`: a process reads
    those that feed its own rows of the batch.

    A curriculum gives them the difficulty of `curriculum_step`, by default the step's own.
    """
    places = range(count) if row_indices is None else row_indices
    if not source.order:
        return [get_example(source, step * count + place, seed) for place in places]
    indices = source.order(step, step if curriculum_step is None else curriculum_step, count)
    return [_read_in_mode(source, indices[place], step * count + place, seed) for place in places]


def _read_in_mode(source: Source, index: int, ordinal: int, seed: int) -> Example:
    example = source.read_example(index)
    if curriculum.is_thinking(source.thinking_share, ordinal, seed):
        return example
    return example.non_thinking_example or example


def _find_index(source: Source, ordinal: int, seed: int) -> int:
    if not source.size:
        return ordinal
    epoch, place = divmod(ordinal, source.size)
    if not source.window:
        return int(_draw_permutation(source.size, (seed, epoch))[place])
    window, place = divmod(place, source.window)
    start = window * source.window
    size = min(source.window, source.size - start)
    return start + int(_draw_permutation(size, (seed, epoch, window))[place])


@functools.lru_cache(maxsize=16)
def _draw_permutation(size: int, seeds: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seeds).permutation(size)


class TokenLists(abc.Sequence[list[int]]):
    """Lists of token ids in 4 bytes a token. Indexing makes a new list, so that a caller who
    iterates holds one at a time."""

    def __init__(self, lists: abc.Iterable[abc.Sequence[int]] = ()) -> None:
        self._tokens, self._ends = array("i"), array("q", [0])
        for ids in lists:
            self.append(ids)

    def append(self, ids: abc.Sequence[int]) -> None:
        self._tokens.extend(ids)
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenLists": ...
    def __getitem__(self, index: int | slice) -> "list[int] | TokenLists":
        number = range(len(self))[index]
        if isinstance(number, range):
            return TokenLists(self[i] for i in number)
        return self._tokens[self._ends[number] : self._ends[number + 1]].tolist()


T = TypeVar("T")


def prefetch_next(make: Callable[[int], T], end: int) -> Callable[[int], T]:
    """Returns `make` with prefetching: a thread makes the next number's result, if it is below
    `end`, while the caller uses this one's. Results must depend on the number alone.

    Numbers may come in any order and repeatedly, also from `end` on. One thread makes all results,
    so that `make` need not be thread-safe; at most one result waits.
    """
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    pending: dict[int, concurrent.futures.Future[T]] = {}

    def get_result(number: int) -> T:
        # A number that is not pending queues behind the result in progress.
        result = (pending.pop(number, None) or pool.submit(make, number)).result()
        following = number + 1
        if following < end and following not in pending:
            for skipped in [*pending]:
                pending.pop(skipped).cancel()
            pending[following] = pool.submit(make, following)
        return result

    return get_result
