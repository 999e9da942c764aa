"""Encodes a canonical row (distill/data/columns.py) as token ids: a prompt and its response."""

import dataclasses
import re

from transformers import PreTrainedTokenizerBase

from distill.data import chat, values
from models.errors import RowError, UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """A row as token ids: a prompt, and perhaps a response (with its stop token) and an answer."""

    prompt: list[int]
    response: list[int]
    answer: str
    where: str  # names the row in an error
    trained_mask: list[bool] | None = None  # over the response; None: all of it is trained
    # the teacher's likeliest tokens in place of each response token: [[id, logprob], ...]
    teacher_top: list | None = None
    teacher_prompt: list[int] | None = None  # the prompt that a teacher reads; None: the same
    source_id: int = 0  # of a mixture's sources
    thinking: bool = True  # the mode of the prompt
    # the same row without thinking, if both modes suit it
    non_thinking_example: "Example | None" = None
    difficulty: float | None = None  # more is harder

    def with_difficulty(self, difficulty: float | None) -> "Example":
        """Returns the example with its difficulty, in both modes."""
        other = self.non_thinking_example and self.non_thinking_example.with_difficulty(difficulty)
        return dataclasses.replace(self, non_thinking_example=other, difficulty=difficulty)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Settings by which the rows of a stage become examples."""

    tokenizer: PreTrainedTokenizerBase | None  # None: rows hold token ids
    with_responses: bool = True  # rows are traces to learn from; False: prompts only
    thinking_share: float = 1.0  # config.data.thinking
    turns: str = "last"  # config.data.turns


# The think block at the start of a response: its content, and its end unless it is cut off.
_BLOCK = re.compile(r"\s*<think>(.*?)(</think>\s*|\Z)", re.DOTALL)
_FLAG = re.compile(r"(?<!\S)/(no_)?think(?!\S)")  # a user's words that switch Qwen3's mode


def make_example(row: dict, where: str, encoding: Encoding) -> Example:
    """Encodes a row in its thinking mode: its own if it has one (find_thinking_mode), else the one
    that a thinking_share of 0 or 1 gives to all rows, else the one that a trace's response shows.

    A row that suits both modes, which is a prompt without a mode of its own or a trace with a
    `direct` response too, holds the other one as `non_thinking_example`.

    Raises:
      RowError: naming the row, if the prompt is empty.
      UserError: naming the row, if it lacks a prompt or response, or they cannot be used.
    """
    share, mode = encoding.thinking_share, find_thinking_mode(row)
    encode = _encode_trace if encoding.with_responses else _encode_prompt_only
    non_thinking_row = None
    if mode is None and encoding.with_responses and isinstance(row.get("direct"), str):
        non_thinking_row = {**row, "response": row["direct"]}
    elif mode is None and not encoding.with_responses and not {"tokens", "prompt"} & row.keys():
        non_thinking_row = row
    if non_thinking_row is None or share == 1:
        if mode is None:
            follows_share = share in (0, 1) or not encoding.with_responses
            mode = share > 0 if follows_share else _has_think_block(row)
        return encode(row, where, encoding, mode)
    non_thinking_example = encode(non_thinking_row, where, encoding, False)
    if share == 0:
        return non_thinking_example
    example = encode(row, where, encoding, True)
    return dataclasses.replace(example, non_thinking_example=non_thinking_example)


def find_thinking_mode(row: dict) -> bool | None:
    """Returns the mode that a row asks for: its `thinking`, or the last /think or /no_think in its
    system's and user's words; None if it has neither."""
    if isinstance(row.get("thinking"), bool):  # a text is one of a set's own columns
        return row["thinking"]
    messages = row.get("messages") or [{"role": "user", "content": row.get("question")}]
    texts = [
        message.get("content")
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict) and message.get("role") in ("system", "user")
    ]
    flags = [flag for text in texts if isinstance(text, str) for flag in _FLAG.findall(text)]
    return not flags[-1] if flags else None


def encode_prompt(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase | None, thinking: bool | None
) -> list[int]:
    """Returns the prompt's ids: `tokens` as they are, `prompt` as plain text, `messages` or
    `question` through the chat template.

    Raises:
      RowError: naming the row, if the prompt is empty.
      UserError: naming the row, if it has none of these or they cannot be used.
    """
    if "tokens" in row:
        ids = _get_token_ids(row, "tokens", where)
    elif tokenizer is None:
        raise UserError(f"{where}: the model has no tokenizer, so the row needs tokens")
    elif "prompt" in row:
        ids = chat.encode(tokenizer, _get_text(row, "prompt", where))
    elif "messages" in row:
        messages = chat.parse_messages(row, where)
        ids = chat.render_messages(tokenizer, messages, thinking=thinking)
    elif "question" in row:
        messages = [{"role": "user", "content": _get_text(row, "question", where)}]
        ids = chat.render_messages(tokenizer, messages, thinking=thinking)
    else:
        raise UserError(
            f"{where}: none of tokens, prompt, messages, question among its fields {sorted(row)}"
        )
    if not ids:
        raise RowError(f"{where}: the prompt is empty")
    return ids


def is_id_list(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _get_token_ids(row: dict, field: str, where: str) -> list[int]:
    if not is_id_list(row[field]):
        raise UserError(f"{where}: {field} is not a list of token ids")
    return row[field]


def _get_text(row: dict, field: str, where: str) -> str:
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: {field} is not a text")
    values.require_characters(text, f"{where}: {field}")
    return text


def _encode_prompt_only(row: dict, where: str, encoding: Encoding, thinking: bool) -> Example:
    prompt = encode_prompt(row, where, encoding.tokenizer, thinking)
    if find_thinking_mode(row) is None and ("tokens" in row or "prompt" in row):
        thinking = thinking and not chat.has_empty_think(encoding.tokenizer, prompt)
    return Example(prompt, [], str(row.get("answer", "")), where, thinking=thinking)


def _encode_trace(row: dict, where: str, encoding: Encoding, thinking: bool) -> Example:
    """Encodes a row with a response to learn: `response_tokens` after `tokens`, or a text:
    `response`, `solution`, the last message of an assistant, or the whole of a document's `text`.

    An empty think block moves from the response to the prompt, and turns `thinking` off.
    """
    tokenizer, trained_mask = encoding.tokenizer, None
    row, has_empty_block = _strip_empty_think(row, where)
    thinking = thinking and not has_empty_block
    if "tokens" in row and "response_tokens" in row:
        prompt = _get_token_ids(row, "tokens", where)
        response = _get_token_ids(row, "response_tokens", where)
        thinking = thinking and not chat.has_empty_think(tokenizer, prompt)
    elif tokenizer is None:
        raise UserError(f"{where}: the model has no tokenizer: needs tokens, response_tokens")
    elif "messages" in row and "response" not in row:
        prompt, response, trained_mask = _encode_conversation(row, where, encoding, thinking)
    elif "text" in row and not {"prompt", "question", "tokens"} & row.keys():
        prompt, response = [], []
        if _get_text(row, "text", where):  # a document's first token has nothing to follow
            first, *response = chat.encode_response(tokenizer, row["text"])
            prompt = [first]
    else:
        field = "response" if "response" in row else "solution"
        prompt = encode_prompt(row, where, tokenizer, thinking)
        if field not in row:
            raise UserError(f"{where}: neither response nor solution among {sorted(row)}")
        text = _get_text(row, field, where)
        response = chat.encode_response(tokenizer, text) if text.strip() else []
    if has_empty_block and tokenizer is not None and not chat.has_empty_think(tokenizer, prompt):
        prompt = prompt + chat.encode(tokenizer, chat.EMPTY_THINK)
    if not prompt:
        raise UserError(f"{where}: the prompt is empty")
    if not response:
        raise UserError(f"{where}: the response is empty")
    top = row.get("top_logprobs")
    if top is not None and len(top) != len(response):
        raise UserError(f"{where}: top_logprobs of {len(top)} tokens, response of {len(response)}")
    answer = str(row.get("answer", ""))
    return Example(prompt, response, answer, where, trained_mask, top, thinking=thinking)


def _encode_conversation(
    row: dict, where: str, encoding: Encoding, thinking: bool
) -> tuple[list[int], list[int], list[bool] | None]:
    """Returns (prompt, response, trained_mask) of messages that end with an assistant's turn.

    turns="last": the last turn, with its reasoning, after a prompt exactly as at inference. "all":
    every assistant turn, as the template renders it within the whole conversation; the template
    drops the reasoning of turns before the last user's, which is then not learned.
    """
    tokenizer = encoding.tokenizer
    assert tokenizer is not None
    messages = chat.parse_messages(row, where, prompt=False)
    *before, last = messages
    if not before:
        raise UserError(f"{where}: messages: nothing before the assistant's turn")
    for message in messages:
        if message.get("content"):
            _get_text(message, "content", where)
    if encoding.turns == "last":
        text = chat.to_assistant_text(last)
        prompt = chat.render_messages(tokenizer, before, thinking=thinking)
        return prompt, chat.encode_response(tokenizer, text) if text.strip() else [], None
    ids, mask = chat.encode_conversation(tokenizer, messages)
    start = mask.index(1) if 1 in mask else len(ids)
    stop = len(mask) - mask[::-1].index(1) if 1 in mask else len(ids)
    return ids[:start], ids[start:stop], [m == 1 for m in mask[start:stop]]


def _has_think_block(row: dict) -> bool:
    text = row.get("response", row.get("solution"))
    if text is None and isinstance(row.get("messages"), list) and row["messages"]:
        last = row["messages"][-1]
        text = chat.to_assistant_text(last) if isinstance(last, dict) else ""
    return "</think>" in str(text) or bool(_BLOCK.match(str(text)))


def _strip_empty_think(row: dict, where: str) -> tuple[dict, bool]:
    """Returns the row without an empty think block at the start of its response, and True if it
    had one. Raises UserError if the block contradicts the row's own `thinking`."""
    field = next((name for name in ("response", "solution") if name in row), "")
    text, messages = row.get(field), row.get("messages")
    if not field and isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        text = messages[-1].get("content")
    block = _BLOCK.match(text) if isinstance(text, str) else None
    if not block or not isinstance(text, str):
        return row, False
    is_empty = bool(block[2] and not block[1].strip())
    if row.get("thinking") is is_empty:
        kind = "an empty" if is_empty else "a"
        raise UserError(f"{where}: thinking={row['thinking']}, but it has {kind} think block")
    if not is_empty:
        return row, False
    rest = text[block.end() :]
    if field:
        return {**row, field: rest}, True
    assert isinstance(messages, list)
    return {**row, "messages": [*messages[:-1], {**messages[-1], "content": rest}]}, True


def require_top(example: Example, K: int) -> None:
    """Raises UserError unless the teacher's K likeliest are stored for each response token."""
    if example.teacher_top is None:
        raise UserError(f"{example.where}: no top_logprobs beside its tokens")
    for candidates in example.teacher_top:
        if len(candidates) < K:
            raise UserError(f"{example.where}: top_logprobs has {len(candidates)}, not {K}")
