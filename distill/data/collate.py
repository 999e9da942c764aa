"""Examples as the arrays of a batch: one behind the other in rows, as segments 1, 2, ..."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.batch import Batch
from distill.data.examples import Example, require_top


@dataclasses.dataclass(frozen=True)
class SampledExample(Example):
    """An example whose response the student wrote, with what is known of that."""

    logprobs: Sequence[float] = ()  # of the response, in the distribution drawn from
    finished: bool = False  # by a stop token
    experts: Sequence[np.ndarray] = ()  # int16 [tokens, L, A], pieces of prompt and response
    reward: float | None = None  # of the response
    advantage: float | None = None  # of the reward, within the prompt's group


def collate_padded(examples: list[Example], max_prompt: int, max_response: int) -> Batch:
    """Prompts and responses as one right-padded Batch of T = max_prompt + max_response.

    A response longer than max_response is cut, and then has no stop token to learn.
    """
    return make_batch([[example] for example in examples], max_prompt + max_response, max_response)


@dataclasses.dataclass(frozen=True, eq=False)
class BatchLayout:
    """What batches hold. All of a stage have one form, whatever examples are in them, so that one
    program reads them all.

    tokens: of a row. max_response: where responses are cut. top_k: of the teacher's stored top.
    room: the most tokens of a context; above 0, there are rows of tokens + room that teachers read.
    written: all examples are `Written`, and the sampler's log-probabilities are known. rewarded:
    these have advantages. routing: layers and experts a token (Config.routing) of what the sampler
    chose, -1 where it is not known. shares: [kinds, N], what each of N teachers counts for the
    examples of a kind.
    """

    row_tokens: int
    max_response: int
    top_k: int = 0
    context_tokens: int = 0
    has_sampler_logprobs: bool = False
    has_advantages: bool = False
    routing: tuple[int, int] | None = None
    teacher_weights: np.ndarray | None = None


def make_batch(
    examples: Sequence[Sequence[Example]],
    T: int,
    max_response: int,
    top_k: int = 0,
    context_tokens: int = 0,
) -> Batch:
    """`lay` of read examples."""
    return collate_rows(examples, BatchLayout(T, max_response, top_k, context_tokens))


def collate_rows(examples: Sequence[Sequence[Example]], layout: BatchLayout) -> Batch:
    """Rows, each with its examples one behind the other; arrays on the host.

    Positions begin at 0 in each segment, and attention does not leave one (models.qwen3.model), so
    examples are trained as if each had a row of its own. UserError names an example that lacks the
    teacher's stored top.
    """
    T, max_response = layout.row_tokens, layout.max_response
    tokens = np.zeros((len(examples), T), np.int32)
    segments, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    thinking = np.zeros(tokens.shape, bool)
    segment_starts = np.zeros_like(
        tokens
    )  # of each token's segment; padding goes on with the last one's
    for row, number, example, at, start, end in _iterate_spans(examples, max_response):
        response = example.response[:max_response]
        tokens[row, at:start], tokens[row, start:end] = example.prompt, response
        segments[row, at:end] = number
        mask[row, start:end] = (example.trained_mask or [True] * len(response))[: len(response)]
        segment_starts[row, at:], thinking[row, at:] = at, example.thinking
    fields: dict[str, Any] = {
        "tokens_BT": tokens,
        "positions_BT": np.arange(T, dtype=np.int32)[None] - segment_starts,
        "segments_BT": segments,
        "mask_BT": mask,
        "thinking_BT": thinking,
    }
    if layout.top_k:
        fields["teacher_top_BTK"] = _collate_teacher_top(examples, layout)
    if layout.teacher_weights is not None:
        fields["teacher_weight_BTN"] = np.zeros(
            (*tokens.shape, layout.teacher_weights.shape[1]), np.float32
        )
        for row, _, example, at, _, end in _iterate_spans(examples, max_response):
            fields["teacher_weight_BTN"][row, at:end] = layout.teacher_weights[example.source_id]
    if layout.context_tokens:
        fields |= _collate_teacher_inputs(examples, layout)
    return Batch(**fields, **_collate_sampled(examples, layout))


def _iterate_spans(rows: Sequence[Sequence[Example]], max_response: int):
    """(row, segment, example, where it, its response, and what follows it begin) of each."""
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples, start=1):
            start = at + len(example.prompt)
            end = start + min(len(example.response), max_response)
            yield row, number, example, at, start, end
            at = end


def _collate_sampled(rows: Sequence[Sequence[Example]], layout: BatchLayout) -> dict[str, Any]:
    """What is known of responses that the student wrote."""
    shape, fields = (len(rows), layout.row_tokens), {}
    if layout.has_sampler_logprobs:
        fields["sampler_logp_BT"] = np.zeros(shape, np.float32)
        fields["finished_BT"] = np.zeros(shape, bool)
    if layout.has_advantages:
        fields["advantages_BT"] = np.zeros(shape, np.float32)
    if layout.routing:
        fields["experts_BTLA"] = np.full((*shape, *layout.routing), -1, np.int16)
    for row, _, example, at, start, end in _iterate_spans(rows, layout.max_response):
        if not isinstance(example, SampledExample):
            continue  # whose tokens choose their experts for themselves
        if layout.has_sampler_logprobs:
            fields["sampler_logp_BT"][row, start:end] = example.logprobs
            fields["finished_BT"][row, at:end] = example.finished
        if layout.has_advantages:
            fields["advantages_BT"][row, start:end] = example.advantage
        for piece in example.experts if layout.routing else ():
            fields["experts_BTLA"][row, at : at + len(piece)] = piece
            at += len(piece)
    return fields


def _collate_teacher_inputs(
    rows: Sequence[Sequence[Example]], layout: BatchLayout
) -> dict[str, Any]:
    """The rows that teachers read, which have the same examples behind other prompts, and where in
    them the tokens of ours lie."""
    teacher_rows = [
        [
            dataclasses.replace(e, prompt=e.teacher_prompt or e.prompt, teacher_prompt=None)
            for e in row
        ]
        for row in rows
    ]
    teacher_batch = make_batch(
        teacher_rows, layout.row_tokens + layout.context_tokens, layout.max_response
    )
    teacher_index = np.zeros((len(rows), layout.row_tokens), np.int32)
    pairs = zip(
        _iterate_spans(rows, layout.max_response),
        _iterate_spans(teacher_rows, layout.max_response),
        strict=True,
    )
    for (row, _, _, at, start, end), (*_, begin, response, _) in pairs:
        # Of a prompt's tokens only the last is of use, which predicts the response's first.
        teacher_index[row, at:end] = np.maximum(np.arange(at, end) + response - start, begin)
    teacher_inputs = Batch(
        teacher_batch.tokens_BT,
        teacher_batch.positions_BT,
        teacher_batch.segments_BT,
        teacher_batch.mask_BT,
    )
    return {"teacher_inputs": teacher_inputs, "teacher_index_BT": teacher_index}


def _collate_teacher_top(
    rows: Sequence[Sequence[Example]], layout: BatchLayout
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities [B, T, K] of the likeliest in the place of each response token."""
    ids = np.zeros((len(rows), layout.row_tokens, layout.top_k), np.int32)
    logp = np.zeros(ids.shape, np.float32)
    for row, _, example, _, start, end in _iterate_spans(rows, layout.max_response):
        require_top(example, layout.top_k)
        if start < end:
            top = np.array(
                [place[: layout.top_k] for place in (example.teacher_top or [])[: end - start]]
            )
            ids[row, start:end], logp[row, start:end] = top[..., 0], top[..., 1]
    return ids, logp


def measure_examples(
    examples: Sequence[Example], capacity: int, max_response: int
) -> dict[str, tuple[float, float]]:
    """Metrics of examples that were read, as sums and counts: the share of the `places` of their
    rows that tokens fill, that of responses that were cut, the mean difficulty where it is known.
    """
    filled = sum(len(x.prompt) + min(len(x.response), max_response) for x in examples)
    known = [x.difficulty for x in examples if x.difficulty is not None]
    return {
        "data/efficiency": (filled, capacity),
        "data/truncated": (sum(len(x.response) > max_response for x in examples), len(examples)),
        "data/difficulty": (sum(known), len(known)),
    }
