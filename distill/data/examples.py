"""Encodes a canonical row (distill/data/columns.py) as token ids: a prompt and its response."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.data import chat, columns, values
from distill.data import messages as chats
from distill.data.template import describe_template
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
    # From each teacher of the stage that is not run here, in order, the future of its
    # teachers.outputs.ResponseOutput; None if it does not teach this row.
    teacher_outputs: tuple[Any, ...] = ()
    source_id: int = 0  # of a mixture's sources
    thinking: bool = True  # the mode of the prompt
    # the same row without thinking, if both modes suit it
    non_thinking_example: "Example | None" = None
    difficulty: float | None = None  # more is harder
    # of the response's tokens, in the distribution that they were drawn from; (): not known
    logprobs: Sequence[float] = ()
    finished: bool = False  # a sampled response ended with a stop token

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


_FLAG = re.compile(r"(?<!\S)/(no_)?think(?!\S)")  # a user's words that switch Qwen3's mode


def make_example(row: dict, where: str, encoding: Encoding) -> Example:
    """Encodes a row in its thinking mode: its own if it has one (find_thinking_mode), else the one
    that a thinking_share of 0 or 1 gives to all rows, else the one that a trace's response shows.
    The chat template has the last word: one without a think block asks nobody to think, and one
    that opens it in every prompt always does.

    A row that suits both modes, which is a prompt without a mode of its own or a trace with a
    `direct` response too, holds the other one as `non_thinking_example`.

    Raises:
      RowError: naming the row, if the prompt is empty.
      UserError: naming the row, if it lacks a prompt or response, they cannot be used, or its
        response contradicts its mode.
    """
    with _name_row(where):
        share = encoding.thinking_share
        row = _read_chat(row, where, encoding)
        mode = find_thinking_mode(row, describe_template(encoding.tokenizer).has_switch)
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


@contextlib.contextmanager
def _name_row(where: str) -> Iterator[None]:
    """Makes the message of a user's mistake begin with the name of its row."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error


def find_thinking_mode(row: dict, has_switch: bool = True) -> bool | None:
    """Returns the mode that a row asks for: its `thinking`, or the last /think or /no_think in its
    system's and user's words, which only models with both modes obey; None if it has neither."""
    if isinstance(row.get("thinking"), bool):  # a text has become the think block
        return row["thinking"]
    messages = row.get("messages") or [{"role": "user", "content": row.get("question")}]
    texts = [
        message.get("content")
        for message in (messages if isinstance(messages, list) and has_switch else [])
        if isinstance(message, dict) and message.get("role") in ("system", "developer", "user")
    ]
    flags = [flag for text in texts if isinstance(text, str) for flag in _FLAG.findall(text)]
    return not flags[-1] if flags else None


def encode_prompt(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase | None, thinking: bool | None
) -> list[int]:
    """Returns the prompt's ids: `tokens` as they are, `prompt` as plain text, `messages` or
    `question` through the chat template, with the row's `tools`.

    Raises:
      RowError: naming the row, if the prompt is empty.
      UserError: naming the row, if it has none of these or they cannot be used.
    """
    if "tokens" in row:
        ids = _get_token_ids(row, "tokens", where)
    elif tokenizer is None:
        raise UserError(f"{where}: the model has no tokenizer, so the row needs tokens")
    else:
        with _name_row(where):
            ids = _encode_text_prompt(row, where, tokenizer, thinking)
    if not ids:
        raise RowError(f"{where}: the prompt is empty")
    return ids


def _encode_text_prompt(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase, thinking: bool | None
) -> list[int]:
    tools = chats.parse_tools(row, where)
    if "prompt" in row:
        if tools:
            raise UserError("tools: a prompt of plain text has no place for them; use messages")
        return chat.encode(tokenizer, _get_text(row, "prompt", where))
    if "messages" in row:
        messages = chats.parse_messages(row, where)
    elif "question" in row:
        messages = [{"role": "user", "content": _get_text(row, "question", where)}]
    else:
        raise UserError(columns.explain_missing_prompt(row))
    if thinking is False and describe_template(tokenizer).always_thinks:
        raise UserError(
            f"it is not to think, but the chat template of {tokenizer.name_or_path} opens a think "
            "block in every prompt"
        )
    return chat.render_messages(tokenizer, messages, thinking=thinking, tools=tools)


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
    tokenizer = encoding.tokenizer
    prompt = encode_prompt(row, where, tokenizer, thinking)
    about = describe_template(tokenizer)
    if find_thinking_mode(row, about.has_switch) is None:
        is_rendered = not {"tokens", "prompt"} & row.keys()
        thinking = _find_prompt_mode(
            tokenizer, prompt, about.find_mode(thinking) if is_rendered else thinking
        )
    return Example(prompt, [], str(row.get("answer", "")), where, thinking=thinking)


def _find_prompt_mode(
    tokenizer: PreTrainedTokenizerBase | None, prompt: list[int], thinking: bool
) -> bool:
    """Returns the mode that the end of a prompt shows, else `thinking`."""
    if chat.find_opened_block(tokenizer, prompt):
        return True
    return thinking and not chat.has_empty_think(tokenizer, prompt)


def _read_chat(row: dict, where: str, encoding: Encoding) -> dict:
    """Returns the row with its messages parsed; of a trace whose last turn is trained, the turn is
    the `response`, and the messages end before it."""
    tokenizer = encoding.tokenizer
    has_ids = "tokens" in row and ("response_tokens" in row or not encoding.with_responses)
    if tokenizer is None or "messages" not in row or has_ids:
        return row
    if not encoding.with_responses or "response" in row:
        return {**row, "messages": chats.parse_messages(row, where, prompt=None)}
    messages = chats.parse_messages(row, where, prompt=False)
    if len(messages) == 1:
        raise UserError(f"{where}: messages: nothing before the assistant's turn")
    names = [f"{where}: messages[{i}]" for i in range(len(messages))]
    trained = [chats.is_trained(m, name) for m, name in zip(messages, names, strict=True)]
    row = {key: value for key, value in row.items() if key != "prompt"}
    if encoding.turns == "all":
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and trained[i]]
        if not turns:
            raise UserError(f"{where}: messages: no turn of the assistant is to be trained")
        for i in turns:
            if not (chats.to_assistant_text(messages[i]).strip() or messages[i].get("tool_calls")):
                raise UserError(f"{names[i]} is empty, so only its end would be trained")
        return {**row, "messages": messages}
    if not trained[-1]:
        raise UserError(f"{names[-1]} is not to be trained, but config.data.turns=last does")
    text = chat.render_last_turn(tokenizer, messages, chats.parse_tools(row, where))
    return {**row, "messages": messages[:-1], "response": text}


def _encode_trace(row: dict, where: str, encoding: Encoding, thinking: bool) -> Example:
    """Encodes a row with a response to learn: `response_tokens` after `tokens`, or a text:
    `response`, `solution`, all turns of an assistant, or the whole of a document's `text`.

    An empty think block moves from the response to the prompt, and turns `thinking` off.
    """
    tokenizer, trained_mask = encoding.tokenizer, None
    if "tokens" in row and "response_tokens" in row:
        prompt = _get_token_ids(row, "tokens", where)
        response = _get_token_ids(row, "response_tokens", where)
        thinking = _find_prompt_mode(tokenizer, prompt, thinking)
    elif tokenizer is None:
        raise UserError(f"{where}: the model has no tokenizer: needs tokens, response_tokens")
    elif "messages" in row and "response" not in row:
        text = chats.to_assistant_text(row["messages"][-1])
        thinking = _check_mode(row, text, thinking, describe_template(tokenizer).has_modes)
        prompt, response, trained_mask = _encode_conversation(row, where, tokenizer)
        thinking = _find_prompt_mode(tokenizer, prompt, thinking)
    elif "text" in row and not {"prompt", "question", "tokens"} & row.keys():
        prompt, response = [], []
        if _get_text(row, "text", where):  # a document's first token has nothing to follow
            first, *response = chat.encode_response(tokenizer, row["text"])
            prompt = [first]
    else:
        prompt, response, thinking = _encode_response(row, where, tokenizer, thinking)
    if not prompt:
        raise UserError(f"{where}: the prompt is empty")
    if not response:
        raise UserError(f"{where}: the response is empty")
    top = row.get("top_logprobs")
    if top is not None and len(top) != len(response):
        raise UserError(f"{where}: top_logprobs of {len(top)} tokens, response of {len(response)}")
    answer = str(row.get("answer", ""))
    example = Example(prompt, response, answer, where, trained_mask, top, thinking=thinking)
    if not isinstance(row.get("logprobs"), list) or "response_tokens" not in row:
        return example
    is_finished = row.get("finish_reason") == "stop"
    return dataclasses.replace(example, logprobs=row["logprobs"], finished=is_finished)


def _encode_response(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase, thinking: bool
) -> tuple[list[int], list[int], bool]:
    """Returns (prompt, response, thinking) of a row with a response in the form of text.

    The prompt and the response together have one think block at most, of which the model writes
    what the prompt has not: nothing of an empty one.
    """
    field = "response" if "response" in row else "solution"
    text = _get_text(row, field, where) if field in row else ""
    text = chat.strip_end_tokens(tokenizer, text)
    about, is_raw = describe_template(tokenizer), bool({"tokens", "prompt"} & row.keys())
    thoughts, final = chats.split_thinking(text)
    is_empty = thoughts is not None and not thoughts.strip()
    prompt = encode_prompt(
        row, where, tokenizer, about.always_thinks or (thinking and not is_empty)
    )
    if field not in row:
        raise UserError(f"neither response nor solution among {sorted(row)}")
    if is_raw:  # the prompt itself shows the mode
        thinking = is_empty or _find_prompt_mode(tokenizer, prompt, thinking)
    thinking = _check_mode(row, text, thinking, is_raw or about.has_modes)
    opened = chat.find_opened_block(tokenizer, prompt)
    if opened and thoughts is None and text.strip():
        raise UserError("the prompt opens a think block, but the response does not close one")
    if is_empty:
        text = final
        if opened or ((is_raw or about.has_switch) and not chat.has_empty_think(tokenizer, prompt)):
            prompt = chat.add_empty_think(tokenizer, prompt)
    elif opened and text.lstrip().startswith("<think>"):
        space = opened.removeprefix("<think>")
        text = text.lstrip().removeprefix("<think>").removeprefix(space)
    elif not opened:
        text = chats.restore_think_tag(text)
    response = chat.encode_response(tokenizer, text) if text.strip() else []
    return prompt, response, thinking


def _check_mode(row: dict, text: str, thinking: bool, has_modes: bool) -> bool:
    """Returns the mode of a trace with the response `text` that was asked for with `thinking`.

    An empty think block turns it off; if the template has no modes, only a block turns it on.
    Raises UserError if the response contradicts the mode, or its think block is never closed.
    """
    thoughts, _ = chats.split_thinking(text)
    own_mode = row.get("thinking")
    if thoughts is None:
        return thinking and (has_modes or own_mode is True)
    if "</think>" not in text:
        raise UserError("the think block of the response is never closed")
    is_empty = not thoughts.strip()
    if isinstance(own_mode, bool) and own_mode == is_empty:
        kind = "an empty" if is_empty else "a"
        raise UserError(f"thinking={own_mode}, but it has {kind} think block")
    if not thinking and not is_empty:
        raise UserError(
            "its response has a think block, but it is not to think (/no_think, an empty block in "
            "its prompt, or config.data.thinking=0)"
        )
    return not is_empty


def _encode_conversation(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[bool]]:
    """Returns (prompt, response, trained_mask) of messages whose assistant's turns are all learned,
    as the template renders them within the whole conversation.

    The template drops the thoughts of turns before the last user's, which are then not learned.
    """
    tools = chats.parse_tools(row, where)
    ids, mask = chat.encode_conversation(tokenizer, row["messages"], tools)
    start = mask.index(1) if 1 in mask else len(ids)
    stop = len(mask) - mask[::-1].index(1) if 1 in mask else len(ids)
    return ids[:start], ids[start:stop], [m == 1 for m in mask[start:stop]]


def _has_think_block(row: dict) -> bool:
    text = row.get("response", row.get("solution"))
    if text is None and isinstance(row.get("messages"), list) and row["messages"]:
        text = chats.to_assistant_text(row["messages"][-1])
    return chats.split_thinking(str(text))[0] is not None


def require_top(example: Example, K: int) -> None:
    """Raises UserError unless the teacher's K likeliest are stored for each response token."""
    if example.teacher_top is None:
        raise UserError(f"{example.where}: no top_logprobs beside its tokens")
    for candidates in example.teacher_top:
        if len(candidates) < K:
            raise UserError(f"{example.where}: top_logprobs has {len(candidates)}, not {K}")


def require_logprobs(example: Example) -> None:
    """Raises UserError unless the sampler's log-probability of each response token is stored."""
    count = len(example.logprobs)
    if count != len(example.response):
        has = f"logprobs of {count} tokens" if count else "no logprobs"
        raise UserError(
            f"{example.where}: {has} beside its {len(example.response)} response_tokens, of which "
            "this loss reads each one's, as it was sampled (generate writes them)"
        )
    for x in example.logprobs:
        if not isinstance(x, int | float) or not -math.inf < x < 1e-3:
            raise UserError(f"{example.where}: logprobs has {x!r}, which is none")
