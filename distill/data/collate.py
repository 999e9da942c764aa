"""Examples as the arrays of a batch: one behind the other in rows, as segments 1, 2, ..."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.batch import Batch
from distill.data.examples import Example, require_top


@dataclasses.dataclass(frozen=True)
class Written(Example):
    """An example whose response the student wrote, with what is known of that."""

    logprobs: Sequence[float] = ()  # of the response, in the distribution drawn from
    finished: bool = False  # by a stop token
    experts: Sequence[np.ndarray] = ()  # int16 [tokens, L, A], pieces of prompt and response
    advantage: float | None = None  # of its reward


def traces(examples: list[Example], max_prompt: int, max_response: int) -> Batch:
    """Prompts and responses as one right-padded Batch of T = max_prompt + max_response.

    A response longer than max_response is cut, and then has no stop token to learn.
    """
    return batch([[example] for example in examples], max_prompt + max_response, max_response)


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """What batches hold. All of a stage have one form, whatever examples are in them, so that one
    program reads them all.

    tokens: of a row. max_response: where responses are cut. top_k: of the teacher's stored top.
    room: the most tokens of a context; above 0, there are rows of tokens + room that teachers read.
    written: all examples are `Written`, and the sampler's log-probabilities are known. rewarded:
    these have advantages. routing: layers and experts a token (Config.routing) of what the sampler
    chose, -1 where it is not known. shares: [kinds, N], what each of N teachers counts for the
    examples of a kind.
    """

    tokens: int
    max_response: int
    top_k: int = 0
    room: int = 0
    written: bool = False
    rewarded: bool = False
    routing: tuple[int, int] | None = None
    shares: np.ndarray | None = None


def batch(
    rows: Sequence[Sequence[Example]], T: int, max_response: int, top_k: int = 0, room: int = 0
) -> Batch:
    """`lay` of read examples."""
    return lay(rows, Form(T, max_response, top_k, room))


def lay(rows: Sequence[Sequence[Example]], form: Form) -> Batch:
    """Rows, each with its examples one behind the other; arrays on the host.

    Positions begin at 0 in each segment, and attention does not leave one (models.qwen3.model), so
    examples are trained as if each had a row of its own. UserError names an example that lacks the
    teacher's stored top.
    """
    T, max_response = form.tokens, form.max_response
    tokens = np.zeros((len(rows), T), np.int32)
    segments, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    thinking = np.zeros(tokens.shape, bool)
    begins = np.zeros_like(tokens)  # of each token's segment; padding goes on with the last one's
    for row, number, example, at, start, end in _places(rows, max_response):
        response = example.response[:max_response]
        tokens[row, at:start], tokens[row, start:end] = example.prompt, response
        segments[row, at:end] = number
        mask[row, start:end] = (example.trained or [True] * len(response))[: len(response)]
        begins[row, at:], thinking[row, at:] = at, example.thinking
    found: dict[str, Any] = {
        "tokens_BT": tokens,
        "positions_BT": np.arange(T, dtype=np.int32)[None] - begins,
        "segments_BT": segments,
        "mask_BT": mask,
        "thinking_BT": thinking,
    }
    if form.top_k:
        found["teacher_top_BTK"] = _top(rows, form)
    if form.shares is not None:
        found["teacher_share_BTN"] = np.zeros((*tokens.shape, form.shares.shape[1]), np.float32)
        for row, _, example, at, _, end in _places(rows, max_response):
            found["teacher_share_BTN"][row, at:end] = form.shares[example.kind]
    if form.room:
        found |= _told(rows, form)
    return Batch(**found, **_written(rows, form))


def _places(rows: Sequence[Sequence[Example]], max_response: int):
    """(row, segment, example, where it, its response, and what follows it begin) of each."""
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples, start=1):
            start = at + len(example.prompt)
            end = start + min(len(example.response), max_response)
            yield row, number, example, at, start, end
            at = end


def _written(rows: Sequence[Sequence[Example]], form: Form) -> dict[str, Any]:
    """What is known of responses that the student wrote."""
    shape, found = (len(rows), form.tokens), {}
    if form.written:
        found["sampler_logp_BT"] = np.zeros(shape, np.float32)
        found["finished_BT"] = np.zeros(shape, bool)
    if form.rewarded:
        found["advantages_BT"] = np.zeros(shape, np.float32)
    if form.routing:
        found["experts_BTLA"] = np.full((*shape, *form.routing), -1, np.int16)
    for row, _, example, at, start, end in _places(rows, form.max_response):
        if not isinstance(example, Written):
            continue  # whose tokens choose their experts for themselves
        if form.written:
            found["sampler_logp_BT"][row, start:end] = example.logprobs
            found["finished_BT"][row, at:end] = example.finished
        if form.rewarded:
            found["advantages_BT"][row, start:end] = example.advantage
        for piece in example.experts if form.routing else ():
            found["experts_BTLA"][row, at : at + len(piece)] = piece
            at += len(piece)
    return found


def _told(rows: Sequence[Sequence[Example]], form: Form) -> dict[str, Any]:
    """The rows that teachers read, which have the same examples behind other prompts, and where in
    them the tokens of ours lie."""
    behind = [
        [dataclasses.replace(e, prompt=e.told or e.prompt, told=None) for e in row] for row in rows
    ]
    read = batch(behind, form.tokens + form.room, form.max_response)
    told_at = np.zeros((len(rows), form.tokens), np.int32)
    pairs = zip(_places(rows, form.max_response), _places(behind, form.max_response), strict=True)
    for (row, _, _, at, start, end), (*_, begin, response, _) in pairs:
        # Of a prompt's tokens only the last is of use, which predicts the response's first.
        told_at[row, at:end] = np.maximum(np.arange(at, end) + response - start, begin)
    told = Batch(read.tokens_BT, read.positions_BT, read.segments_BT, read.mask_BT)
    return {"told": told, "told_at_BT": told_at}


def _top(rows: Sequence[Sequence[Example]], form: Form) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities [B, T, K] of the likeliest in the place of each response token."""
    ids = np.zeros((len(rows), form.tokens, form.top_k), np.int32)
    logp = np.zeros(ids.shape, np.float32)
    for row, _, example, _, start, end in _places(rows, form.max_response):
        require_top(example, form.top_k)
        if start < end:
            top = np.array([place[: form.top_k] for place in (example.top or [])[: end - start]])
            ids[row, start:end], logp[row, start:end] = top[..., 0], top[..., 1]
    return ids, logp


def measure(
    examples: Sequence[Example], places: int, max_response: int
) -> dict[str, tuple[float, float]]:
    """Metrics of examples that were read, as sums and counts: the share of the `places` of their
    rows that tokens fill, that of responses that were cut, the mean difficulty where it is known.
    """
    filled = sum(len(x.prompt) + min(len(x.response), max_response) for x in examples)
    known = [x.difficulty for x in examples if x.difficulty is not None]
    return {
        "data/efficiency": (filled, places),
        "data/truncated": (sum(len(x.response) > max_response for x in examples), len(examples)),
        "data/difficulty": (sum(known), len(known)),
    }
