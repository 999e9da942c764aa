"""Where prompts and traces come from. What a step reads is a function of the step alone."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from distill import arithmetic, chat
from distill.batch import Batch
from models.errors import RowError, UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as token ids: a prompt, perhaps a response (with its stop token) and an answer."""

    prompt: list[int]
    response: list[int]
    answer: str
    where: str  # names the row in an error


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples by number; `size` of them, or without end where size is 0."""

    size: int
    example: Callable[[int], Example]


def read_jsonl(path: str | Path) -> list[tuple[str, dict]]:
    """The objects of a jsonl file, each with its name "path:line"; blank lines are skipped.

    Raises:
      UserError: if the file is missing, empty, not UTF-8, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode()
            if not text.strip():
                continue
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object")
        rows.append((where, row))
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def prompt_tokens(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase | None, thinking: bool | None
) -> list[int]:
    """Prompt ids of a row: `tokens` as they are, `prompt` as plain text, `messages` or `question`
    through the chat template.

    Raises:
      RowError: naming the row, if the prompt is empty.
      UserError: naming the row, if it has none of these or they cannot be used.
    """
    if "tokens" in row:
        ids = _ids(row, "tokens", where)
    elif tokenizer is None:
        raise UserError(f"{where}: the model has no tokenizer, so the row needs tokens")
    elif "prompt" in row:
        ids = chat.encode(tokenizer, _text(row, "prompt", where))
    else:
        ids = chat.render(tokenizer, _messages(row, where), thinking=thinking)
    if not ids:
        raise RowError(f"{where}: the prompt is empty")
    return ids


def _messages(row: dict, where: str) -> list[dict]:
    if "messages" in row:
        return chat.parse_messages(row, where)
    if "question" in row:
        return [{"role": "user", "content": _text(row, "question", where)}]
    raise UserError(
        f"{where}: none of tokens, prompt, messages, question among its fields {sorted(row)}"
    )


def _ids(row: dict, field: str, where: str) -> list[int]:
    ids = row[field]
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{where}: {field} is not a list of token ids")
    return ids


def _text(row: dict, field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise UserError(f"{where}: {field} is not a text")
    return row[field]


def _trace(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase | None, thinking: bool
) -> Example:
    """A row with what is to be learned: `response_tokens` after `tokens`, or a text: `response`,
    `solution`, or the last message of an assistant."""
    if "tokens" in row and "response_tokens" in row:
        prompt, response = _ids(row, "tokens", where), _ids(row, "response_tokens", where)
    elif tokenizer is None:
        raise UserError(f"{where}: the model has no tokenizer: needs tokens, response_tokens")
    else:
        if "messages" in row and "response" not in row:
            *turns, last = chat.parse_messages(row, where, prompt=False)
            if not turns:
                raise UserError(f"{where}: messages: nothing before the assistant's turn")
            prompt, text = chat.render(tokenizer, turns, thinking=thinking), last.get("content")
        else:
            prompt = prompt_tokens(row, where, tokenizer, thinking)
            field = "response" if "response" in row else "solution"
            if field not in row:
                raise UserError(f"{where}: neither response nor solution among {sorted(row)}")
            text = _text(row, field, where)
        response = chat.written(tokenizer, text) if text else []
    if not prompt:
        raise UserError(f"{where}: the prompt is empty")
    if not response:
        raise UserError(f"{where}: the response is empty")
    return Example(prompt, response, str(row.get("answer", "")), where)


def load(
    c: ConfigDict, tokenizer: PreTrainedTokenizerBase | None, seed: int, traces: bool
) -> Source:
    """The source that a stage's `data` names; with `traces`, examples carry responses.

    Every row of a file is read and tokenised here, so that a bad one is met before training.
    """
    if c.size < 0:
        raise UserError(f"config.data.size={c.size}: not a number of rows")
    if c.source == "arithmetic":
        if tokenizer is None:
            raise UserError("config.data.source: arithmetic needs a model with a tokenizer")

        def generate(index: int) -> Example:
            problem = arithmetic.problem(seed, index, c.split, tuple(c.operations))
            ids, mask = chat.trace(
                tokenizer,
                arithmetic.messages(problem),
                arithmetic.response(problem),
                thinking=c.thinking,
            )
            start = len(mask) - sum(mask)
            where = f"arithmetic problem {index}"
            return Example(ids[:start], ids[start:], problem.answer, where)

        generate(0)  # a bad split or range is an error now
        return Source(c.size, generate)
    rows = read_jsonl(c.source)
    if c.size:
        rows = rows[: c.size]
    if traces:
        examples = [_trace(row, where, tokenizer, c.thinking) for where, row in rows]
    else:
        examples = [
            Example(
                prompt_tokens(row, where, tokenizer, c.thinking),
                [],
                str(row.get("answer", "")),
                where,
            )
            for where, row in rows
        ]
    return Source(len(examples), examples.__getitem__)


def check(source: Source, limit: int, field: str, vocab_size: int, sample: int = 1000) -> None:
    """Raises UserError naming the first example whose prompt is longer than `limit` tokens or
    that has ids outside the vocabulary (all rows of a file, the first `sample` of an endless one).
    """
    for index in range(source.size or sample):
        example = source.example(index)
        require_fit(example, limit, field)
        require_ids(example.prompt + example.response, vocab_size, example.where)


def require_fit(example: Example, limit: int, field: str) -> None:
    """Raises UserError if a prompt is longer than `limit` tokens; `field` says what sets it."""
    if len(example.prompt) > limit:
        raise UserError(
            f"{example.where}: prompt of {len(example.prompt)} tokens, {field} allows {limit}"
        )


def require_ids(ids: list[int], vocab_size: int, where: str) -> None:
    """Raises UserError naming the first token id that a vocabulary of `vocab_size` lacks: an
    embedding would be looked up for it all the same."""
    unknown = next((i for i in ids if i >= vocab_size), None)
    if unknown is not None:
        raise UserError(f"{where}: token id {unknown} is outside the vocabulary of {vocab_size}")


def at(source: Source, step: int, count: int, seed: int) -> list[Example]:
    """The `count` examples of a step: consecutive ones of a source without end; of a finite one,
    an order drawn anew for each epoch, so that each example comes once an epoch."""
    ordinals = range(step * count, (step + 1) * count)
    if not source.size:
        return [source.example(i) for i in ordinals]
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(source.size)
        for epoch in {i // source.size for i in ordinals}
    }
    return [source.example(int(orders[i // source.size][i % source.size])) for i in ordinals]


def left_pad(prompts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_BP, segments_BP) int32 with prompts at the right end, segment 0 before them."""
    tokens = np.zeros((len(prompts), length), np.int32)
    segments = np.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, length - len(ids) :] = ids
        segments[row, length - len(ids) :] = 1
    return tokens, segments


def trace_batch(examples: list[Example], max_prompt: int, max_response: int) -> Batch:
    """Prompts and responses as one right-padded Batch of T = max_prompt + max_response.

    A response longer than max_response is cut, and then has no stop token to learn.
    """
    T = max_prompt + max_response
    tokens = np.zeros((len(examples), T), np.int32)
    segments, mask = np.zeros_like(tokens), np.zeros(tokens.shape, bool)
    for row, example in enumerate(examples):
        start, response = len(example.prompt), example.response[:max_response]
        tokens[row, : start + len(response)] = example.prompt + response
        segments[row, : start + len(response)] = 1
        mask[row, start : start + len(response)] = True
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    arrays: Any = (tokens, positions, segments, mask)  # host arrays, until they are put on a mesh
    return Batch(*arrays)
