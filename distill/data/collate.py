"""Lays examples out as a Batch: one after the other in rows, as segments 1, 2, ..."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill.batch import Batch
from distill.data.examples import Example, require_top


@dataclasses.dataclass(frozen=True)
class SampledExample(Example):
    """An example whose response the student wrote."""

    experts: Sequence[np.ndarray] = ()  # int16 [tokens, L, A], pieces of prompt and response
    reward: float | None = None  # of the response
    advantage: float | None = None  # of the reward, within the prompt's group


@dataclasses.dataclass(frozen=True, eq=False)
class BatchLayout:
    """Shapes and fields of a stage's batches: the same whatever examples they hold, so that one
    compiled program reads them all."""

    row_tokens: int
    max_response: int  # longer responses are cut
    top_k: int = 0  # of the teacher's likeliest tokens, stored or from elsewhere
    # (E, dtype) of the hidden states of each teacher that is not run here
    external_hidden: tuple[tuple[int, Any], ...] = ()
    has_teacher_logp: bool = False  # from teachers that are not run here
    context_tokens: int = 0  # above 0: teachers read rows of row_tokens + context_tokens
    has_sampler_logprobs: bool = False  # all examples have logprobs
    has_advantages: bool = False  # those have advantages
    routing: tuple[int, int] | None = None  # (L, A), to hold the sampler's experts
    teacher_weights: np.ndarray | None = None  # [sources, N]: each of N teachers' weight


def collate_padded(examples: Sequence[Example], max_prompt: int, max_response: int) -> Batch:
    """Lays examples out in a row each, T = max_prompt + max_response.

    A response longer than max_response is cut, and then has no stop token to learn.
    """
    layout = BatchLayout(max_prompt + max_response, max_response)
    return collate_rows([[example] for example in examples], layout)


def collate_rows(rows: Sequence[Sequence[Example]], layout: BatchLayout) -> Batch:
    """Lays out rows, each with its examples one after the other; returns arrays on the host.

    Positions begin at 0 in each segment, and attention stays within it (models.transformer), so
    examples are trained as if each had a row of its own. Raises UserError naming an example that
    lacks the teacher's stored likeliest tokens.
    """
    T, max_response = layout.row_tokens, layout.max_response
    tokens = np.zeros((len(rows), T), np.int32)
    segments, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    thinking = np.zeros(tokens.shape, bool)
    segment_starts = np.zeros_like(tokens)  # of each token's segment; padding continues the last
    for row, segment, example, start, response_start, end in _iterate_spans(rows, max_response):
        response = example.response[:max_response]
        tokens[row, start:response_start] = example.prompt
        tokens[row, response_start:end] = response
        segments[row, start:end] = segment
        trained_mask = example.trained_mask or [True] * len(response)
        mask[row, response_start:end] = trained_mask[: len(response)]
        segment_starts[row, start:], thinking[row, start:] = start, example.thinking
    fields: dict[str, Any] = {
        "tokens_BT": tokens,
        "positions_BT": np.arange(T, dtype=np.int32)[None] - segment_starts,
        "segments_BT": segments,
        "mask_BT": mask,
        "thinking_BT": thinking,
    }
    if layout.top_k:
        fields["teacher_top_BTK"] = _collate_teacher_top(rows, layout)
    if layout.external_hidden:
        fields["teacher_hidden_BTE"] = _collate_teacher_hidden(rows, layout)
    if layout.has_teacher_logp:
        fields["teacher_logp_BT"] = logp = np.zeros(tokens.shape, np.float32)
        for span in _iterate_spans(rows, max_response):
            for output in _list_outputs(span.example):
                logp[span.row, span.response_start : span.end] = output.logp
    if layout.teacher_weights is not None:
        N = layout.teacher_weights.shape[1]
        fields["teacher_weight_BTN"] = weights = np.zeros((*tokens.shape, N), np.float32)
        for span in _iterate_spans(rows, max_response):
            source_weights = layout.teacher_weights[span.example.source_id]
            weights[span.row, span.start : span.end] = source_weights
    if layout.context_tokens:
        fields |= _collate_teacher_inputs(rows, layout)
    return Batch(**fields, **_collate_sampled(rows, layout))


class _Span(NamedTuple):
    """The tokens start:end of an example in a row; the response begins at response_start."""

    row: int
    segment: int
    example: Example
    start: int
    response_start: int
    end: int


def _iterate_spans(rows: Sequence[Sequence[Example]], max_response: int) -> Iterator[_Span]:
    for row, examples in enumerate(rows):
        start = 0
        for segment, example in enumerate(examples, start=1):
            response_start = start + len(example.prompt)
            end = response_start + min(len(example.response), max_response)
            yield _Span(row, segment, example, start, response_start, end)
            start = end


def _collate_sampled(rows: Sequence[Sequence[Example]], layout: BatchLayout) -> dict[str, Any]:
    """Lays out the sampler's fields; those of traces without log-probabilities stay empty."""
    shape, fields = (len(rows), layout.row_tokens), {}
    if layout.has_sampler_logprobs:
        fields["sampler_logp_BT"] = np.zeros(shape, np.float32)
        fields["finished_BT"] = np.zeros(shape, bool)
    if layout.has_advantages:
        fields["advantages_BT"] = np.zeros(shape, np.float32)
    if layout.routing:
        fields["experts_BTLA"] = np.full((*shape, *layout.routing), -1, np.int16)
    for row, _, example, start, response_start, end in _iterate_spans(rows, layout.max_response):
        if layout.has_sampler_logprobs:
            count = end - response_start
            fields["sampler_logp_BT"][row, response_start:end] = example.logprobs[:count]
            is_whole = count == len(example.response)
            fields["finished_BT"][row, start:end] = example.finished and is_whole
        if not isinstance(example, SampledExample):
            continue
        if layout.has_advantages:
            fields["advantages_BT"][row, response_start:end] = example.advantage
        for piece in example.experts if layout.routing else ():
            fields["experts_BTLA"][row, start : start + len(piece)] = piece
            start += len(piece)
    return fields


def _collate_teacher_inputs(
    rows: Sequence[Sequence[Example]], layout: BatchLayout
) -> dict[str, Any]:
    """Lays out the rows that teachers read, the same examples after their teacher_prompts, and the
    index in them of each token of the student's rows."""
    teacher_rows = [
        [
            dataclasses.replace(e, prompt=e.teacher_prompt or e.prompt, teacher_prompt=None)
            for e in row
        ]
        for row in rows
    ]
    batch = collate_rows(
        teacher_rows, BatchLayout(layout.row_tokens + layout.context_tokens, layout.max_response)
    )
    index = np.zeros((len(rows), layout.row_tokens), np.int32)
    for span, teacher_span in zip(
        _iterate_spans(rows, layout.max_response),
        _iterate_spans(teacher_rows, layout.max_response),
        strict=True,
    ):
        # Of a prompt's tokens only the last matters, which predicts the response's first.
        shift = teacher_span.response_start - span.response_start
        index[span.row, span.start : span.end] = np.maximum(
            np.arange(span.start, span.end) + shift, teacher_span.start
        )
    teacher_inputs = Batch(batch.tokens_BT, batch.positions_BT, batch.segments_BT, batch.mask_BT)
    return {"teacher_inputs": teacher_inputs, "teacher_index_BT": index}


def _collate_teacher_top(
    rows: Sequence[Sequence[Example]], layout: BatchLayout
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and log-probabilities [B, T, K] of the teacher's likeliest tokens in the place of
    each response token."""
    ids = np.zeros((len(rows), layout.row_tokens, layout.top_k), np.int32)
    logp = np.zeros(ids.shape, np.float32)
    for row, _, example, _, start, end in _iterate_spans(rows, layout.max_response):
        for output in _list_outputs(example):  # of the one teacher of its source
            ids[row, start:end] = output.top_ids[:, : layout.top_k]
            logp[row, start:end] = output.top_logp[:, : layout.top_k]
        if example.teacher_outputs:
            continue
        require_top(example, layout.top_k)
        if start < end:
            stored = (example.teacher_top or [])[: end - start]
            top = np.array([candidates[: layout.top_k] for candidates in stored])
            ids[row, start:end], logp[row, start:end] = top[..., 0], top[..., 1]
    return ids, logp


def _list_outputs(example: Example) -> list[Any]:
    """Returns what the teachers that are not run here said of an example."""
    return [future.result() for future in example.teacher_outputs if future]


def _collate_teacher_hidden(
    rows: Sequence[Sequence[Example]], layout: BatchLayout
) -> tuple[np.ndarray, ...]:
    """Returns the hidden states [B, T, E] of each teacher that is not run here: at a token those
    that predict the next one, and 0 where none is trained."""
    shape = (len(rows), layout.row_tokens)
    hidden = tuple(np.zeros((*shape, E), dtype) for E, dtype in layout.external_hidden)
    for row, _, example, _, start, end in _iterate_spans(rows, layout.max_response):
        for array, future in zip(hidden, example.teacher_outputs, strict=True):
            if future:
                array[row, start - 1 : end - 1] = future.result().hidden
    return hidden


def measure_examples(
    examples: Sequence[Example], capacity: int, max_response: int
) -> dict[str, tuple[float, float]]:
    """Returns metrics as (sum, count): the share of `capacity` token positions that are filled, the
    share of responses that were cut, and the mean difficulty where it is known."""
    filled = sum(len(x.prompt) + min(len(x.response), max_response) for x in examples)
    known = [x.difficulty for x in examples if x.difficulty is not None]
    return {
        "data/efficiency": (filled, capacity),
        "data/truncated": (sum(len(x.response) > max_response for x in examples), len(examples)),
        "data/difficulty": (sum(known), len(known)),
    }
