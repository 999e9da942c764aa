"""Which examples a step reads, and how they lie in a batch: a function of the step alone."""

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

from distill.data import chat, columns, curriculum, sources, teacher_context
from distill.data.examples import (
    Example,
    encode_prompt,  # noqa: F401
    make_prompt_example,
    make_trace_example,
    require_top,  # noqa: F401
)
from distill.runtime import run_files
from models.errors import UserError

ENDLESS_SAMPLE = 1000  # problems of a source without end that are looked at before step 0
MIXTURE_BLOCK = 1000  # in so many rows of a mixture each source has its share exactly


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples by number; `size` of them, or without end where size is 0.

    `window` > 0: an epoch's order goes from window to window of so many rows, shuffled within each,
    as a stream needs it. `skipped` holds why a bad row was left out, by the row's name. `thinking`
    is the share of examples that are read in thinking mode, of those that come in both.
    """

    size: int
    read_example: Callable[[int], Example]
    window: int = 0
    skip_reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    thinking_share: float = 1.0
    order: curriculum.Order | None = None  # in place of a new order each epoch


def open_canonical_rows(
    source: str, size: int = 0, *, with_responses: bool = False
) -> sources.Rows:
    """The first `size` rows (0: all) of anything that `sources` reads, with our columns."""
    rows = sources.open_rows(source, size=size)

    def read_row(index: int) -> dict:
        return columns.canonicalize_row(
            rows.read_row(index), "", rows.locate_row(index), with_responses
        )

    return dataclasses.replace(rows, read_row=read_row)


class TokenLists(abc.Sequence[list[int]]):
    """Lists of token ids in 4 bytes a token. Each is made anew when it is asked for, so that
    whoever goes through them holds one at a time."""

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
        places = range(len(self))[index]
        if isinstance(places, range):
            return TokenLists(self[place] for place in places)
        return self._tokens[self._ends[places] : self._ends[places + 1]].tolist()


ExampleCheck = Callable[[Example], None]  # raises UserError naming an example that cannot be used


def load_source(
    c: ConfigDict,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    with_responses: bool,
    check_example: ExampleCheck = lambda example: None,
    context: teacher_context.TeacherContext | None = None,
) -> Source:
    """The source, or the mixture of sources, that a stage's `data` names; with `traces`, examples
    carry responses; with a context, the prompt that a teacher reads.

    The first `data.check_rows` rows of each are read and tokenised here, so that a bad one
    among them is met before training; those of a larger set are met when they are read.
    What `data.on_bad_row` says holds for both: "fail" ends the run with the row's name, "skip"
    leaves it out, counted.

    Raises:
      UserError: naming the key, file or row at fault.
    """
    for field in ("max_rows", "check_rows", "shuffle_window"):
        if c[field] < 0:
            raise UserError(f"config.data.{field}={c[field]}: not a number of rows")
    if "{question}" not in c.template:
        raise UserError(f"config.data.template={c.template!r}: has no {{question}}")
    if c.streaming and not c.shuffle_window:
        raise UserError("config.data.shuffle_window=0: a stream is shuffled in windows of rows")
    for field, known in CHOICES.items():
        if c[field] not in known:
            raise UserError(f"config.data.{field}={c[field]!r}: is none of {', '.join(known)}")
    if not 0 <= c.thinking <= 1:
        raise UserError(f"config.data.thinking={c.thinking}: is a share, from 0 to 1")
    if 0 < c.thinking < 1 and tokenizer and not chat.has_thinking_switch(tokenizer):
        raise UserError(
            f"config.data.thinking={c.thinking}: the chat template of {tokenizer.name_or_path} has "
            "no switch between modes; 1 or 0 leave it as it is"
        )
    skip_reasons: dict[str, str] = {}
    if not c.mixture:
        return _load_single_source(
            c, c.source, tokenizer, seed, with_responses, check_example, context, skip_reasons
        )
    for part in c.mixture:
        pair = isinstance(part, tuple | list) and len(part) == 2
        if not (pair and isinstance(part[0], str) and _is_positive_weight(part[1])):
            raise UserError(f"config.data.mixture: {part!r} is no pair of a source and a weight")
    components = [
        _load_single_source(
            c, name, tokenizer, seed, with_responses, check_example, context, skip_reasons
        )
        for name, _ in c.mixture
    ]
    return mix_sources(components, [float(weight) for _, weight in c.mixture], seed)


def _is_positive_weight(weight: object) -> bool:
    return isinstance(weight, int | float) and 0 < weight < float("inf")


CHOICES = {
    "on_bad_row": ("fail", "skip"),
    "turns": ("last", "all"),
    "keep_samples": ("all", "finished", "correct"),
    "curriculum": curriculum.CURRICULA,
}


def _load_single_source(
    c: ConfigDict,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    with_responses: bool,
    check_example: ExampleCheck,
    context: teacher_context.TeacherContext | None,
    skip_reasons: dict[str, str],
) -> Source:
    if name == "arithmetic":
        if tokenizer is None:
            raise UserError("config.data.source: arithmetic needs a model with a tokenizer")
        rows = sources.make_arithmetic_rows(c, seed)
    else:
        window = c.shuffle_window if c.streaming else 0
        rows = sources.open_rows(name, size=c.max_rows, window=window)
        if with_responses and not window and sources.has_samples(rows):
            rows = sources.expand_samples(
                rows, c.keep_samples, skip_reasons if c.on_bad_row == "skip" else None
            )

    difficulty_of = curriculum.make_difficulty_fn(c.difficulty)

    def make_example(row: dict, where: str) -> Example:
        if with_responses:
            return make_trace_example(row, where, tokenizer, c.thinking, c.turns)
        return make_prompt_example(row, where, tokenizer, c.thinking)

    def read_example(index: int) -> Example:
        where = rows.locate_row(index)
        row = columns.apply_template(
            columns.canonicalize_row(rows.read_row(index), c.columns, where, with_responses),
            c.template,
        )
        made = make_example(row, where)
        if context is not None:
            again = functools.partial(make_example, where=where)
            made = teacher_context.add_context(context, row, made, again, tokenizer)
        made = made.with_difficulty(difficulty_of(row, made))
        for each in (made, made.non_thinking_example):
            if each:
                check_example(each)
        return made

    if c.on_bad_row == "fail":
        for index in range(min(c.check_rows, rows.size) if rows.size else ENDLESS_SAMPLE):
            read_example(index)
        source = Source(rows.size, read_example, rows.window, skip_reasons)
    else:
        source = _skip_bad_rows(rows, read_example, c.check_rows, skip_reasons)
    return dataclasses.replace(source, thinking_share=c.thinking)


def _skip_bad_rows(
    rows: sources.Rows,
    read_example: Callable[[int], Example],
    num_checked: int,
    skip_reasons: dict[str, str],
) -> Source:
    """A source that leaves bad rows out. Those found before training are no part of it; the place
    of one that is met later is taken by the next good row."""

    def try_example(index: int) -> Example | None:
        where = rows.locate_row(index)
        if where in skip_reasons:
            return None
        try:
            return read_example(index)
        except UserError as error:
            skip_reasons[where] = str(error)
            run_files.log_line(f"skipped: {error}")
            return None

    count = min(num_checked, rows.size) if rows.size else ENDLESS_SAMPLE
    good = [index for index in range(count) if try_example(index) is not None]
    if count - len(good):
        run_files.log_line(
            f"{rows.name}: {count - len(good)} of the first {count} rows are skipped"
        )
    if not good and count:
        raise UserError(f"{rows.name}: no good row; {next(iter(skip_reasons.values()))}")

    def read_good_example(index: int) -> Example:
        for other in range(index, index + rows.size):
            found = try_example(other % rows.size)
            if found is not None:
                return found
        raise UserError(f"{rows.name}: no good row; {next(iter(skip_reasons.values()))}")

    if rows.size and count == rows.size:
        return Source(len(good), lambda index: read_example(good[index]), rows.window, skip_reasons)
    return Source(
        rows.size, read_good_example if rows.size else read_example, rows.window, skip_reasons
    )


def mix_sources(components: list[Source], weights: list[float], seed: int) -> Source:
    """One source without end, in which sources have their shares, each in its own shuffled order.

    Every MIXTURE_BLOCK examples hold a share of each source in proportion to its weight (rounded
    down, at least one; the rest is of the largest), in an order drawn for that block.
    """
    shares = np.array(weights) / sum(weights) * MIXTURE_BLOCK
    counts = np.maximum(1, shares.astype(int))
    counts[np.argmax(counts)] += MIXTURE_BLOCK - counts.sum()
    source_ids = np.repeat(np.arange(len(components)), counts)

    def read_example(index: int) -> Example:
        block, place = divmod(index, MIXTURE_BLOCK)
        order = source_ids[_draw_permutation(MIXTURE_BLOCK, (seed, block))]
        kind = order[place]
        ordinal = block * counts[kind] + np.count_nonzero(order[:place] == kind)
        found = get_example(components[kind], int(ordinal), seed)
        return dataclasses.replace(found, source_id=int(kind))

    return Source(0, read_example, 0, components[0].skip_reasons)


def require_valid_example(example: Example, limit: int, field: str, vocab_size: int) -> None:
    """Raises UserError if a prompt is longer than `limit` tokens (`field` says what sets it), or
    the example has ids outside a vocabulary of `vocab_size`."""
    if len(example.prompt) > limit:
        raise UserError(
            f"{example.where}: prompt of {len(example.prompt)} tokens, {field} allows {limit}"
        )
    require_ids(example.prompt + example.response, vocab_size, example.where)


def require_ids(ids: list[int], vocab_size: int, where: str) -> None:
    """Raises UserError naming the first token id that a vocabulary of `vocab_size` lacks: an
    embedding would be looked up for it all the same."""
    unknown = next((i for i in ids if i >= vocab_size), None)
    if unknown is not None:
        raise UserError(f"{where}: token id {unknown} is outside the vocabulary of {vocab_size}")


@functools.lru_cache(maxsize=16)
def _draw_permutation(size: int, seeds: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seeds).permutation(size)


def get_example(source: Source, ordinal: int, seed: int) -> Example:
    """The example that comes as number `ordinal` of all that are read: that very one of a source
    without end; of a finite one, by an order drawn anew for each epoch, so that each example comes
    once an epoch. One that comes in both modes is in the mode of that number."""
    return _get_example_in_mode(source, _compute_index(source, ordinal, seed), ordinal, seed)


def _get_example_in_mode(source: Source, index: int, ordinal: int, seed: int) -> Example:
    example = source.read_example(index)
    return (
        example
        if curriculum.is_thinking(source.thinking_share, ordinal, seed)
        else example.non_thinking_example or example
    )


def _compute_index(source: Source, ordinal: int, seed: int) -> int:
    if not source.size:
        return ordinal
    epoch, place = divmod(ordinal, source.size)
    if not source.window:
        return int(_draw_permutation(source.size, (seed, epoch))[place])
    window, place = divmod(place, source.window)
    begin = window * source.window
    size = min(source.window, source.size - begin)
    return begin + int(_draw_permutation(size, (seed, epoch, window))[place])


def get_step_examples(
    source: Source,
    step: int,
    count: int,
    seed: int,
    row_indices: Sequence[int] | None = None,
    curriculum_step: int | None = None,
) -> list[Example]:
    """The `count` examples of a step, or those of its places that `share` lists: what a process
    reads that feeds these rows of the batch. The order does not depend on who reads it. By a
    curriculum they are of the difficulty of the step `now`, where that is another."""
    places = range(count) if row_indices is None else row_indices
    if not source.order:
        return [get_example(source, step * count + place, seed) for place in places]
    drawn = source.order(step, step if curriculum_step is None else curriculum_step, count)
    return [
        _get_example_in_mode(source, drawn[place], step * count + place, seed) for place in places
    ]


T = TypeVar("T")


def prefetch_next(make: Callable[[int], T], end: int) -> Callable[[int], T]:
    """`make`, with the next number's result (below `end`) begun in a thread while this one's is
    used. For functions of their argument alone: what they give does not change, only when.

    Numbers may be asked for in any order, again, and from `end` on, where none is begun. All are
    made in the one thread, so that `make` need not bear to be called twice at once; no more than
    one result waits to be asked for.
    """
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=1)
    pending: dict[int, concurrent.futures.Future[T]] = {}

    def get_result(number: int) -> T:
        # The first, a jump or one that was asked for before comes after what the thread is at.
        made = (pending.pop(number, None) or pool.submit(make, number)).result()
        following = number + 1
        if following < end and following not in pending:
            for passed in [*pending]:
                pending.pop(passed).cancel()
            pending[following] = pool.submit(make, following)
        return made

    return get_result
