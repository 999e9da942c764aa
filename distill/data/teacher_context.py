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
from distill.data.examples import Example, encode_prompt
from models.errors import UserError

PLACEMENTS = ("system", "question")


@dataclasses.dataclass(frozen=True)
class TeacherContext:
    """A text of every row, a column of the rows, or one before the other."""

    text: str
    column: str
    placement: str


def load_context(c: ConfigDict, config_path: str) -> TeacherContext | None:
    """The context that `c`, the sub-config named `at`, asks for, its file read; None: none.

    Raises:
      UserError: naming the key or the file at fault.
    """
    if not c.text and not c.column:
        return None
    if c.place not in PLACEMENTS:
        raise UserError(f"{config_path}.place: {c.place!r} is none of {', '.join(PLACEMENTS)}")
    if c.max_tokens < 1:
        raise UserError(f"{config_path}.max_tokens={c.max_tokens}: must be at least 1")
    text = ""
    if c.text:
        try:
            text = Path(c.text).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{config_path}.text={c.text}: cannot be read: {error}") from None
        if not text:
            raise UserError(f"{config_path}.text={c.text}: the file is empty")
    return TeacherContext(text, c.column, c.place)


def add_context(
    context: TeacherContext,
    row: dict,
    example: Example,
    make_example: Callable[[dict], Example],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Example:
    """`made`, which `make` made of `row`, with the prompt that the teacher reads. An empty column
    is no context.

    Raises:
      UserError: naming the row, if it lacks the column, or the context finds no place in it.
    """
    where = example.where
    known = {**row.get("asked", {}), **row}
    if context.column and context.column not in known:
        raise UserError(f"{where}: no {context.column} among its columns {sorted(known)}")
    words = known.get(context.column, "")
    if "tokens" in row and "asked" not in row:
        if context.text or not _is_id_list(words):
            raise UserError(
                f"{where}: a prompt of tokens takes its context as token ids, in a column"
            )
        return dataclasses.replace(example, teacher_prompt=[*words, *example.prompt])
    if not isinstance(words, str):
        raise UserError(f"{where}: {context.column} is not a text")
    text = "\n\n".join(part for part in (context.text, words.strip()) if part)
    if not text:
        return example
    if "asked" in row:
        return dataclasses.replace(
            example, teacher_prompt=_encode_sample_prompt(row, example, text, context, tokenizer)
        )
    other = make_example(_insert_context(row, text, context.placement, where))
    if other.response != example.response:
        raise UserError(f"{where}: the response is another behind the context")
    if (other.thinking, other.non_thinking_example is None) != (
        example.thinking,
        example.non_thinking_example is None,
    ):
        raise UserError(f"{where}: the context says /think or /no_think, and so changes the mode")
    return _set_teacher_prompt(example, other)


def _set_teacher_prompt(example: Example, teacher_example: Example) -> Example:
    """`made`, in each of its modes, with the prompt of `behind` for the teacher."""
    other = (
        example.non_thinking_example
        and teacher_example.non_thinking_example
        and _set_teacher_prompt(example.non_thinking_example, teacher_example.non_thinking_example)
    )
    return dataclasses.replace(
        example, teacher_prompt=teacher_example.prompt, non_thinking_example=other
    )


def _is_id_list(words: object) -> bool:
    return isinstance(words, list) and all(type(i) is int and i >= 0 for i in words)


def _encode_sample_prompt(
    row: dict,
    example: Example,
    text: str,
    context: TeacherContext,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[int]:
    """Of a written sample, whose prompt is known by its tokens: in the mode that gives them."""
    where = example.where
    prompt_row = columns.canonicalize_row(row["asked"], "", where, False)
    for thinking in (True, False, None):
        if (
            "tokens" not in prompt_row
            and encode_prompt(prompt_row, where, tokenizer, thinking) == example.prompt
        ):
            teacher_row = _insert_context(prompt_row, text, context.placement, where)
            return encode_prompt(teacher_row, where, tokenizer, thinking)
    raise UserError(
        f"{where}: its prompt_tokens are not what the chat template renders, so a context finds no "
        "place in them"
    )


def _insert_context(row: dict, text: str, placement: str, where: str) -> dict:
    """The row with the text in its prompt."""
    if isinstance(row.get("prompt"), str):
        row = {**row, "prompt": f"{text}\n\n{row['prompt']}"}
    if "messages" in row:
        messages = chat.parse_messages(row, where, prompt=None)
        return {**row, "messages": _insert_into_messages(messages, text, placement, where)}
    if "question" in row and "prompt" not in row:
        question_messages = [{"role": "user", "content": row["question"]}]
        # A row of messages is learned from its last, unless it has a response.
        learned = {"response": row["solution"]} if "solution" in row else {}
        return {
            **learned,
            **row,
            "messages": _insert_into_messages(question_messages, text, placement, where),
        }
    if "prompt" not in row:
        raise UserError(f"{where}: no prompt to put a context into among {sorted(row)}")
    return row


def _insert_into_messages(
    messages: list[dict], text: str, placement: str, where: str
) -> list[dict]:
    first = messages[0]
    if placement == "question":
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise UserError(f"{where}: messages: no user's turn to put a context before")
        at = users[-1]
        said = {**messages[at], "content": f"{text}\n\n{messages[at]['content']}"}
        return [*messages[:at], said, *messages[at + 1 :]]
    if first["role"] == "system":
        return [{**first, "content": f"{text}\n\n{first['content']}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
