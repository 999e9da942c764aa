"""Examples as the arrays of a batch: prompts on the left, responses on the right, or packed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill import context
from distill.batch import Batch
from distill.examples import Example, require_top


def left_pad(prompts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BP, segments_BP) int32 with prompts at the right end, segment 0 before them."""
    tokens = np.zeros((len(prompts), length), np.int32)
    segments = np.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, length - len(ids) :] = ids
        segments[row, length - len(ids) :] = 1
    return tokens, segments


def traces(examples: list[Example], max_prompt: int, max_response: int) -> Batch:
    """Prompts and responses as one right-padded Batch of T = max_prompt + max_response.

    A response longer than max_response is cut, and then has no stop token to learn.
    """
    return batch([[example] for example in examples], max_prompt + max_response, max_response)


def batch(
    rows: Sequence[Sequence[Example]], T: int, max_response: int, top_k: int = 0, room: int = 0
) -> Batch:
    """Rows of T tokens, each with its examples one behind the other as segments 1, 2, ...

    Positions begin at 0 in each segment, and attention does not leave one (models.qwen3.model), so
    examples are trained as if each had a row of its own. Responses are cut at max_response. With
    top_k the batch has the teacher's stored top; UserError names an example that lacks it. With
    `room`, the most tokens of a context, it has what the teachers read; of rows of one example.
    """
    tokens = np.zeros((len(rows), T), np.int32)
    segments, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    thinking = np.zeros(tokens.shape, bool)
    begins = np.zeros_like(tokens)  # of each token's segment; padding goes on with the last one's
    for row, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples, start=1):
            response = example.response[:max_response]
            start = at + len(example.prompt)
            end = start + len(response)
            tokens[row, at:end] = example.prompt + response
            segments[row, at:end] = number
            mask[row, start:end] = (example.trained or [True] * len(response))[: len(response)]
            begins[row, at:], thinking[row, at:] = at, example.thinking
            at = end
    positions = np.arange(T, dtype=np.int32)[None] - begins
    arrays: Any = (tokens, positions, segments, mask)  # host arrays, until they are put on a mesh
    top: Any = _top(rows, T, max_response, top_k) if top_k else None
    kinds: Any = np.array([row[0].kind if row else 0 for row in rows], np.int32)
    modes: Any = thinking
    laid = Batch(*arrays, thinking_BT=modes, teacher_top_BTK=top, kind_B=kinds)
    if not room:
        return laid
    alone = [row[0] for row in rows]
    behind = [dataclasses.replace(e, prompt=e.told or e.prompt, told=None) for e in alone]
    told = batch([[e] for e in behind], T + room, max_response)
    further = np.array(
        [[len(b.prompt) - len(e.prompt)] for e, b in zip(alone, behind, strict=True)]
    )
    return context.lay(laid, told, further)


def _top(
    rows: Sequence[Sequence[Example]], T: int, max_response: int, K: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities [B, T, K] of the likeliest in the place of each response token."""
    ids = np.zeros((len(rows), T, K), np.int32)
    logp = np.zeros(ids.shape, np.float32)
    for row, examples in enumerate(rows):
        at = 0
        for example in examples:
            at += len(example.prompt)
            require_top(example, K)
            top = np.array([place[:K] for place in (example.top or [])[:max_response]])
            ids[row, at : at + len(top)], logp[row, at : at + len(top)] = top[..., 0], top[..., 1]
            at += len(top)
    return ids, logp


def measure(
    batch: Batch, rows: Sequence[Sequence[Example]], max_response: int
) -> dict[str, tuple[float, float]]:
    """Metrics of what was read here, as sums and counts: the share of the batch that tokens fill,
    that of responses that were cut, the mean difficulty where it is known."""
    examples = [example for row in rows for example in row]
    filled = np.asarray(batch.segments_BT) > 0
    known = [x.difficulty for x in examples if x.difficulty is not None]
    return {
        "data/efficiency": (float(filled.sum()), filled.size),
        "data/truncated": (sum(len(x.response) > max_response for x in examples), len(examples)),
        "data/difficulty": (sum(known), len(known)),
    }
