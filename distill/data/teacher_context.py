"""What a teacher reads and the student does not: a text in front of the same response.

The prompt that the teacher reads is made by the code that makes the student's, of the same row with
the context among its messages. So the two differ by the context alone, and the response is theirs
token by token.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from distill.data import chat, columns
from distill.data.examples import Example, prompt_tokens
from models.errors import UserError

PLACES = ("system", "question")


@dataclasses.dataclass(frozen=True)
class Context:
    """A text of every row, a column of the rows, or one before the other."""

    text: str
    column: str
    place: str


def describe(c: ConfigDict, at: str) -> Context | None:
    """The context that `c`, the sub-config named `at`, asks for, its file read; None: none.

    Raises:
      UserError: naming the key or the file at fault.
    """
    if not c.text and not c.column:
        return None
    if c.place not in PLACES:
        raise UserError(f"{at}.place: {c.place!r} is none of {', '.join(PLACES)}")
    if c.max_tokens < 1:
        raise UserError(f"{at}.max_tokens={c.max_tokens}: must be at least 1")
    text = ""
    if c.text:
        try:
            text = Path(c.text).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{at}.text={c.text}: cannot be read: {error}") from None
        if not text:
            raise UserError(f"{at}.text={c.text}: the file is empty")
    return Context(text, c.column, c.place)


def add(
    context: Context,
    row: dict,
    made: Example,
    make: Callable[[dict], Example],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Example:
    """`made`, which `make` made of `row`, with the prompt that the teacher reads. An empty column
    is no context.

    Raises:
      UserError: naming the row, if it lacks the column, or the context finds no place in it.
    """
    where = made.where
    known = {**row.get("asked", {}), **row}
    if context.column and context.column not in known:
        raise UserError(f"{where}: no {context.column} among its columns {sorted(known)}")
    words = known.get(context.column, "")
    if "tokens" in row and "asked" not in row:
        if context.text or not _are_ids(words):
            raise UserError(
                f"{where}: a prompt of tokens takes its context as token ids, in a column"
            )
        return dataclasses.replace(made, told=[*words, *made.prompt])
    if not isinstance(words, str):
        raise UserError(f"{where}: {context.column} is not a text")
    text = "\n\n".join(part for part in (context.text, words.strip()) if part)
    if not text:
        return made
    if "asked" in row:
        return dataclasses.replace(made, told=_beside(row, made, text, context, tokenizer))
    other = make(_with(row, text, context.place, where))
    if other.response != made.response:
        raise UserError(f"{where}: the response is another behind the context")
    if (other.thinking, other.other is None) != (made.thinking, made.other is None):
        raise UserError(f"{where}: the context says /think or /no_think, and so changes the mode")
    return _told(made, other)


def _told(made: Example, behind: Example) -> Example:
    """`made`, in each of its modes, with the prompt of `behind` for the teacher."""
    other = made.other and behind.other and _told(made.other, behind.other)
    return dataclasses.replace(made, told=behind.prompt, other=other)


def _are_ids(words: object) -> bool:
    return isinstance(words, list) and all(type(i) is int and i >= 0 for i in words)


def _beside(
    row: dict,
    made: Example,
    text: str,
    context: Context,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[int]:
    """Of a written sample, whose prompt is known by its tokens: in the mode that gives them."""
    where = made.where
    asked = columns.canonical(row["asked"], "", where, False)
    for thinking in (True, False, None):
        if (
            "tokens" not in asked
            and prompt_tokens(asked, where, tokenizer, thinking) == made.prompt
        ):
            told = _with(asked, text, context.place, where)
            return prompt_tokens(told, where, tokenizer, thinking)
    raise UserError(
        f"{where}: its prompt_tokens are not what the chat template renders, so a context finds no "
        "place in them"
    )


def _with(row: dict, text: str, place: str, where: str) -> dict:
    """The row with the text in its prompt."""
    if isinstance(row.get("prompt"), str):
        row = {**row, "prompt": f"{text}\n\n{row['prompt']}"}
    if "messages" in row:
        messages = chat.parse_messages(row, where, prompt=None)
        return {**row, "messages": _placed(messages, text, place, where)}
    if "question" in row and "prompt" not in row:
        asked = [{"role": "user", "content": row["question"]}]
        # A row of messages is learned from its last, unless it has a response.
        learned = {"response": row["solution"]} if "solution" in row else {}
        return {**learned, **row, "messages": _placed(asked, text, place, where)}
    if "prompt" not in row:
        raise UserError(f"{where}: no prompt to put a context into among {sorted(row)}")
    return row


def _placed(messages: list[dict], text: str, place: str, where: str) -> list[dict]:
    first = messages[0]
    if place == "question":
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise UserError(f"{where}: messages: no user's turn to put a context before")
        at = users[-1]
        said = {**messages[at], "content": f"{text}\n\n{messages[at]['content']}"}
        return [*messages[:at], said, *messages[at + 1 :]]
    if first["role"] == "system":
        return [{**first, "content": f"{text}\n\n{first['content']}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
