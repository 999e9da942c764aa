"""Text that a teacher reads in its prompt and the student does not (config `context`).

The teacher's prompt is encoded from the same row by the same code as the student's, with the
context inserted into its messages. So the two differ by the context alone, and share the response
token by token.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from distill.data import canonical
from distill.data.examples import Encoding, Example, encode_prompt, is_id_list, make_example
from distill.data.messages import parse_messages
from distill.data.template import describe_template
from models import checks
from models.errors import UserError

PLACEMENTS = ("system", "question")  # in the system's turn, or before the last user's words


@dataclasses.dataclass(frozen=True)
class TeacherContext:
    """A text for all rows, then that of a column of each row; either may be empty."""

    text: str
    column: str
    placement: str


def load_context(c: ConfigDict, config_path: str) -> TeacherContext | None:
    """Reads the context that the config `c` at `config_path` asks for; None if it asks for none.

    Raises:
      UserError: naming the key or the file at fault.
    """
    if not c.text and not c.column:
        return None
    checks.check_fields(
        c, {"place": PLACEMENTS, "max_tokens": checks.Range(1)}, prefix=f"{config_path}."
    )
    text = ""
    if c.text:
        try:
            text = Path(c.text).read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{config_path}.text={c.text}: cannot be read: {error}") from None
        if not text:
            raise UserError(f"{config_path}.text={c.text}: the file is empty")
    return TeacherContext(text, c.column, c.place)


def add_context(
    context: TeacherContext, row: dict, example: Example, encoding: Encoding
) -> Example:
    """Returns `example`, which was encoded from `row`, with the prompt that the teacher reads.

    A row whose context is empty keeps its prompt.

    Raises:
      UserError: naming the row, if it lacks the column or a place for the context.
    """
    where = example.where
    source_row = row.get("source_row")  # of a sample: sources.expand_samples
    fields = {**(source_row or {}), **row}
    if context.column and context.column not in fields:
        raise UserError(f"{where}: no {context.column} among its columns {sorted(fields)}")
    value = fields.get(context.column, "")
    if "tokens" in row and source_row is None:
        if context.text or not is_id_list(value):
            raise UserError(
                f"{where}: a prompt of tokens takes its context as token ids, in a column"
            )
        return dataclasses.replace(example, teacher_prompt=[*value, *example.prompt])
    if not isinstance(value, str):
        raise UserError(f"{where}: {context.column} is not a text")
    text = "\n\n".join(part for part in (context.text, value.strip()) if part)
    if not text:
        return example
    if source_row is not None:
        prompt = _encode_sample_prompt(
            source_row, example, text, context.placement, encoding.tokenizer
        )
        return dataclasses.replace(example, teacher_prompt=prompt)
    teacher_row = _insert_context(row, text, context.placement, where)
    teacher_example = make_example(teacher_row, where, encoding)
    if teacher_example.response != example.response:
        raise UserError(f"{where}: the context changes the response")
    has_both = example.non_thinking_example is not None
    if (teacher_example.thinking, teacher_example.non_thinking_example is not None) != (
        example.thinking,
        has_both,
    ):
        raise UserError(f"{where}: the context says /think or /no_think, and so changes the mode")
    return _set_teacher_prompt(example, teacher_example)


def _set_teacher_prompt(example: Example, teacher_example: Example) -> Example:
    """Returns `example` with the prompt of `teacher_example` for the teacher, in both modes."""
    other, teacher_other = example.non_thinking_example, teacher_example.non_thinking_example
    if other and teacher_other:
        other = _set_teacher_prompt(other, teacher_other)
    return dataclasses.replace(
        example, teacher_prompt=teacher_example.prompt, non_thinking_example=other
    )


def _encode_sample_prompt(
    source_row: dict,
    example: Example,
    text: str,
    placement: str,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[int]:
    """Encodes the prompt of a written sample with the context, in the mode of its prompt_tokens."""
    where = example.where
    prompt_row = canonical.canonicalize_row(source_row, "", where, False)
    modes = (True, False, None) if describe_template(tokenizer).has_switch else (True,)
    for thinking in modes if "tokens" not in prompt_row else ():
        if encode_prompt(prompt_row, where, tokenizer, thinking) == example.prompt:
            teacher_row = _insert_context(prompt_row, text, placement, where)
            return encode_prompt(teacher_row, where, tokenizer, thinking)
    raise UserError(
        f"{where}: its prompt_tokens are not what the chat template renders, so a context finds no "
        "place in them"
    )


def _insert_context(row: dict, text: str, placement: str, where: str) -> dict:
    """Returns the row with the text in its prompt."""
    if isinstance(row.get("prompt"), str):
        row = {**row, "prompt": f"{text}\n\n{row['prompt']}"}
    if "messages" in row:
        messages = parse_messages(row, where, prompt=None)
    elif "question" in row and "prompt" not in row:
        messages = [{"role": "user", "content": row["question"]}]
        if "solution" in row:  # messages without a response would train their last turn
            row = {"response": row["solution"], **row}
    elif "prompt" in row:
        return row
    else:
        raise UserError(f"{where}: no prompt to put a context into among {sorted(row)}")
    return {**row, "messages": _insert_into_messages(messages, text, placement, where)}


def _insert_into_messages(
    messages: list[dict], text: str, placement: str, where: str
) -> list[dict]:
    if placement == "system":
        if messages[0]["role"] != "system":
            return [{"role": "system", "content": text}, *messages]
        index = 0
    else:
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise UserError(f"{where}: messages: no user's turn to put a context before")
        index = users[-1]
    content = f"{text}\n\n{messages[index]['content']}"
    return [*messages[:index], {**messages[index], "content": content}, *messages[index + 1 :]]
