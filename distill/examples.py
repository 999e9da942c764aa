"""A row of ours as token ids: a prompt, and the response that is learned after it."""

import dataclasses

from transformers import PreTrainedTokenizerBase

from distill import chat
from models.errors import RowError, UserError


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as token ids: a prompt, perhaps a response (with its stop token) and an answer."""

    prompt: list[int]
    response: list[int]
    answer: str
    where: str  # names the row in an error
    trained: list[bool] | None = None  # of the response; None: all of it
    top: list | None = None  # for each response token the teacher's likeliest, [[id, logprob], ...]
    told: list[int] | None = None  # the prompt that a teacher reads; None: the same
    kind: int = 0  # which source of a mixture it is from


def require_top(example: Example, K: int) -> None:
    """Raises UserError if the teacher's K likeliest are not stored for each response token."""
    if example.top is None:
        raise UserError(f"{example.where}: no top_logprobs beside its tokens")
    for place in example.top:
        if len(place) < K:
            raise UserError(f"{example.where}: top_logprobs has {len(place)}, not {K}")


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
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: {field} is not a text")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where}: {field} holds half a surrogate pair, which is no character")
    return text


def trace(
    row: dict, where: str, tokenizer: PreTrainedTokenizerBase | None, thinking: bool, turns: str
) -> Example:
    """A row with what is to be learned: `response_tokens` after `tokens`, or a text: `response`,
    `solution`, the last message of an assistant, or the whole of a document's `text`."""
    trained = None
    if "tokens" in row and "response_tokens" in row:
        prompt, response = _ids(row, "tokens", where), _ids(row, "response_tokens", where)
    elif tokenizer is None:
        raise UserError(f"{where}: the model has no tokenizer: needs tokens, response_tokens")
    elif "messages" in row and "response" not in row:
        prompt, response, trained = _conversation(row, where, tokenizer, thinking, turns)
    elif "text" in row and not {"prompt", "question", "tokens"} & row.keys():
        prompt, response = [], []
        if _text(row, "text", where):  # the first token of a document has nothing to follow
            first, *response = chat.written(tokenizer, row["text"])
            prompt = [first]
    else:
        prompt = prompt_tokens(row, where, tokenizer, thinking)
        field = "response" if "response" in row else "solution"
        if field not in row:
            raise UserError(f"{where}: neither response nor solution among {sorted(row)}")
        text = _text(row, field, where)
        response = chat.written(tokenizer, text) if text.strip() else []
    if not prompt:
        raise UserError(f"{where}: the prompt is empty")
    if not response:
        raise UserError(f"{where}: the response is empty")
    top = row.get("top_logprobs")
    if top is not None and len(top) != len(response):
        raise UserError(f"{where}: top_logprobs of {len(top)} tokens, response of {len(response)}")
    return Example(prompt, response, str(row.get("answer", "")), where, trained, top)


def _conversation(
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
            _text(message, "content", where)
    if turns == "last":
        text = chat.spoken(last)
        prompt = chat.render(tokenizer, before, thinking=thinking)
        return prompt, chat.written(tokenizer, text) if text.strip() else [], None
    ids, mask = chat.conversation(tokenizer, messages)
    start = mask.index(1) if 1 in mask else len(ids)
    stop = len(mask) - mask[::-1].index(1) if 1 in mask else len(ids)
    return ids[:start], ids[start:stop], [m == 1 for m in mask[start:stop]]
