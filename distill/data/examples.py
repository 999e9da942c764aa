"""A row of ours as token ids: a prompt, and the response that is learned after it."""

import dataclasses
import re

from transformers import PreTrainedTokenizerBase

from distill.data import chat
from models.errors import RowError, UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as token ids: a prompt, perhaps a response (with its stop token) and an answer."""

    prompt: list[int]
    response: list[int]
    answer: str
    where: str  # names the row in an error
    trained_mask: list[bool] | None = None  # of the response; None: all of it
    teacher_top: list | None = (
        None  # for each response token the teacher's likeliest, [[id, logprob], ...]
    )
    teacher_prompt: list[int] | None = None  # the prompt that a teacher reads; None: the same
    source_id: int = 0  # which source of a mixture it is from
    thinking: bool = True  # the mode that it is asked in
    non_thinking_example: "Example | None" = (
        None  # the same without thinking, where either mode will do
    )
    difficulty: float | None = None  # more is harder

    def with_difficulty(self, difficulty: float | None) -> "Example":
        """The same with its difficulty."""
        other = self.non_thinking_example and self.non_thinking_example.with_difficulty(difficulty)
        return dataclasses.replace(self, non_thinking_example=other, difficulty=difficulty)


def require_top(example: Example, K: int) -> None:
    """Raises UserError if the teacher's K likeliest are not stored for each response token."""
    if example.teacher_top is None:
        raise UserError(f"{example.where}: no top_logprobs beside its tokens")
    for place in example.teacher_top:
        if len(place) < K:
            raise UserError(f"{example.where}: top_logprobs has {len(place)}, not {K}")


# What a response shows of its mode: no think block, an empty one, or one with something in it.
_BLOCK = re.compile(r"\s*<think>(.*?)(</think>\s*|\Z)", re.DOTALL)
_FLAG = re.compile(r"(?<!\S)/(no_)?think(?!\S)")  # the words by which a user switches Qwen3


def encode_prompt(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase | None, thinking: bool | None
) -> list[int]:
    """Prompt ids of a row: `tokens` as they are, `prompt` as plain text, `messages` or `question`
    through the chat template.

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
    else:
        ids = chat.render_messages(tokenizer, _get_prompt_messages(row, where), thinking=thinking)
    if not ids:
        raise RowError(f"{where}: the prompt is empty")
    return ids


def make_prompt_example(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase | None, thinking_share: float
) -> Example:
    """A row's prompt in its own mode, or else in the one that all have by `share` (0 or 1), or else
    in both, one as `other` of the other. Raises as `prompt_tokens`."""
    own, answer = find_thinking_mode(row, where), str(row.get("answer", ""))

    def make_in_mode(thinking: bool) -> Example:
        ids = encode_prompt(row, where, tokenizer, thinking)
        return Example(ids, [], answer, where, thinking=thinking)

    if own is None and ("tokens" in row or "prompt" in row):
        example = make_in_mode(thinking_share > 0)
        closed = chat.has_empty_think(tokenizer, example.prompt)
        return dataclasses.replace(example, thinking=thinking_share > 0 and not closed)
    if own is not None or thinking_share in (0, 1):
        return make_in_mode(thinking_share == 1 if own is None else own)
    return dataclasses.replace(make_in_mode(True), non_thinking_example=make_in_mode(False))


def find_thinking_mode(row: dict, where: str) -> bool | None:
    """Whether a row says by itself to think: its `thinking`, or the last /think or /no_think of its
    user's words (with which Qwen3 is switched); None: neither."""
    if isinstance(row.get("thinking"), bool):  # a text is one of a set's own columns
        return row["thinking"]
    messages = row.get("messages") or [{"role": "user", "content": row.get("question")}]
    said = [
        message.get("content")
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, dict) and message.get("role") in ("system", "user")
    ]
    flags = [flag for text in said if isinstance(text, str) for flag in _FLAG.findall(text)]
    return not flags[-1] if flags else None


def _get_prompt_messages(row: dict, where: str) -> list[dict]:
    if "messages" in row:
        return chat.parse_messages(row, where)
    if "question" in row:
        return [{"role": "user", "content": _get_text(row, "question", where)}]
    raise UserError(
        f"{where}: none of tokens, prompt, messages, question among its fields {sorted(row)}"
    )


def _get_token_ids(row: dict, field: str, where: str) -> list[int]:
    ids = row[field]
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{where}: {field} is not a list of token ids")
    return ids


def _get_text(row: dict, field: str, where: str) -> str:
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: {field} is not a text")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where}: {field} holds half a surrogate pair, which is no character")
    return text


def make_trace_example(
    row: dict,
    where: str,
    tokenizer: PreTrainedTokenizerBase | None,
    thinking_share: float,
    turns: str,
) -> Example:
    """A row with what is to be learned: `response_tokens` after `tokens`, or a text: `response`,
    `solution`, the last message of an assistant, or the whole of a document's `text`.

    Its mode is its own, or else the one that all have by `share` (0 or 1), or else the one that the
    response shows. An empty think block is moved from the response to the prompt. A row with a
    `direct` response too comes in both modes, one as `other` of the other.
    """
    own = find_thinking_mode(row, where)
    if own is None and isinstance(row.get("direct"), str) and thinking_share < 1:
        direct = {**row, "response": row["direct"]}
        off = _make_trace_in_mode(direct, where, tokenizer, False, turns)
        if thinking_share == 0:
            return off
        return dataclasses.replace(
            _make_trace_in_mode(row, where, tokenizer, True, turns), non_thinking_example=off
        )
    if own is None:
        own = thinking_share == 1 if thinking_share in (0, 1) else _has_think_block(row)
    return _make_trace_in_mode(row, where, tokenizer, own, turns)


def _has_think_block(row: dict) -> bool:
    """Whether a trace has a think block."""
    text = row.get("response", row.get("solution"))
    if text is None and isinstance(row.get("messages"), list) and row["messages"]:
        last = row["messages"][-1]
        text = chat.to_assistant_text(last) if isinstance(last, dict) else ""
    return "</think>" in str(text) or bool(_BLOCK.match(str(text)))


def _strip_empty_think(row: dict, where: str) -> tuple[dict, bool]:
    """The row without an empty think block at the begin of what is learned, and whether it had one.
    Raises UserError where a row says to think and shows that it does not, or the reverse."""
    field = next((name for name in ("response", "solution") if name in row), "")
    text, messages = row.get(field), row.get("messages")
    if not field and isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        text = messages[-1].get("content")
    block = _BLOCK.match(text) if isinstance(text, str) else None
    empty = bool(block and block[2] and not block[1].strip())
    if block and row.get("thinking") is empty:
        shows = "an empty" if empty else "a"
        raise UserError(f"{where}: thinking={row['thinking']}, but it has {shows} think block")
    if not (block and empty and isinstance(text, str)):
        return row, False
    rest = text[block.end() :]
    if field:
        return {**row, field: rest}, True
    assert isinstance(messages, list)
    return {**row, "messages": [*messages[:-1], {**messages[-1], "content": rest}]}, True


def _make_trace_in_mode(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase | None, thinking: bool, turns: str
) -> Example:
    """`trace` in a mode that is decided; but an empty think block decides for itself."""
    trained = None
    row, empty = _strip_empty_think(row, where)
    thinking = thinking and not empty
    if "tokens" in row and "response_tokens" in row:
        prompt, response = (
            _get_token_ids(row, "tokens", where),
            _get_token_ids(row, "response_tokens", where),
        )
        thinking = thinking and not chat.has_empty_think(tokenizer, prompt)
    elif tokenizer is None:
        raise UserError(f"{where}: the model has no tokenizer: needs tokens, response_tokens")
    elif "messages" in row and "response" not in row:
        prompt, response, trained = _encode_conversation(row, where, tokenizer, thinking, turns)
    elif "text" in row and not {"prompt", "question", "tokens"} & row.keys():
        prompt, response = [], []
        if _get_text(row, "text", where):  # the first token of a document has nothing to follow
            first, *response = chat.encode_response(tokenizer, row["text"])
            prompt = [first]
    else:
        field = "response" if "response" in row else "solution"
        if field not in row:
            encode_prompt(row, where, tokenizer, thinking)
            raise UserError(f"{where}: neither response nor solution among {sorted(row)}")
        text = _get_text(row, field, where)
        prompt = encode_prompt(row, where, tokenizer, thinking)
        response = chat.encode_response(tokenizer, text) if text.strip() else []
    if empty and tokenizer is not None and not chat.has_empty_think(tokenizer, prompt):
        prompt = prompt + chat.encode(tokenizer, chat.EMPTY_THINK)
    if not prompt:
        raise UserError(f"{where}: the prompt is empty")
    if not response:
        raise UserError(f"{where}: the response is empty")
    top = row.get("top_logprobs")
    if top is not None and len(top) != len(response):
        raise UserError(f"{where}: top_logprobs of {len(top)} tokens, response of {len(response)}")
    answer = str(row.get("answer", ""))
    return Example(prompt, response, answer, where, trained, top, thinking=thinking)


def _encode_conversation(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase, thinking: bool, turns: str
) -> tuple[list[int], list[int], list[bool] | None]:
    """(prompt, response, trained) of messages that end with an assistant's turn.

    turns="last": the last turn, with its reasoning, after a prompt exactly as at inference. "all":
    every assistant turn, in the form that the template gives it within the whole conversation; it
    drops the reasoning of turns before the last user's, which is then not learned.
    """
    messages = chat.parse_messages(row, where, prompt=False)
    *before, last = messages
    if not before:
        raise UserError(f"{where}: messages: nothing before the assistant's turn")
    for message in messages:
        if message.get("content"):
            _get_text(message, "content", where)
    if turns == "last":
        text = chat.to_assistant_text(last)
        prompt = chat.render_messages(tokenizer, before, thinking=thinking)
        return prompt, chat.encode_response(tokenizer, text) if text.strip() else [], None
    ids, mask = chat.encode_conversation(tokenizer, messages)
    start = mask.index(1) if 1 in mask else len(ids)
    stop = len(mask) - mask[::-1].index(1) if 1 in mask else len(ids)
    return ids[:start], ids[start:stop], [m == 1 for m in mask[start:stop]]
