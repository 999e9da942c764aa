"""Reads the chats of rows, in the forms in which people store them, as one form.

A message then has a `role` of ROLES and `content`, a text. An assistant's may have its thoughts in
`reasoning_content` (or as a think block in its content), and `tool_calls`. Other keys stay.
"""

import json
from typing import Any

from distill.data import values
from models.errors import UserError

EMPTY_THINK = "<think>\n\n</think>\n\n"  # ends the prompt where a hybrid model is not to think

# role in a row -> role that chat templates know
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_FIELDS = ("weight", "train", "training", "loss")  # of a message: is it trained


def wrap_thinking(reasoning: str, final: str) -> str:
    """Returns a response in the form that Qwen3 writes: a think block, then the final text."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{final.lstrip()}"


def split_thinking(text: str) -> tuple[str | None, str]:
    """Returns (thoughts, the text after their block); thoughts of None if there is no block.

    The opening tag may be missing: some templates write it, so that responses to them lack it. A
    block that is never closed reaches to the end.
    """
    before, opened, thoughts = text.partition("<think>")
    if not opened or before.strip():  # no block at the start
        if "</think>" not in before:
            return None, text
        thoughts = text
    thoughts, _, final = thoughts.partition("</think>")
    return thoughts, final.lstrip()


def restore_think_tag(text: str) -> str:
    """Puts back the opening tag of a response whose think block lacks it."""
    opened = "<think>" in text.partition("</think>")[0]
    return text if opened or "</think>" not in text else f"<think>\n{text.lstrip()}"


def merge_reasoning(text: str, reasoning: str, where: str) -> str:
    """Returns a response with reasoning from a field of its own as its think block.

    Raises UserError if the response has a block with other thoughts.
    """
    thoughts, final = split_thinking(text)
    if thoughts is not None and thoughts.strip() != reasoning.strip():
        raise UserError(f"{where} and the think block of the response differ")
    return wrap_thinking(reasoning, final)


def to_assistant_text(message: dict) -> str:
    """Renders an assistant's turn as the model writes it: `reasoning_content`, if the message has
    any, becomes a think block before the content. Does not render tool calls."""
    content, reasoning = message.get("content") or "", message.get("reasoning_content")
    return wrap_thinking(reasoning, content) if reasoning else content


def parse_messages(row: dict, where: str = "row", *, prompt: bool | None = True) -> list[dict]:
    """Checks and returns `row["messages"]` in the one form that the rest of the project reads.

    prompt=True requires that the last turn is not the assistant's, prompt=False that it is; None
    takes either. Raises UserError that begins with `where` (file:line) and names the message.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is not a list of at least one message")
    parsed = [_parse_message(m, f"{where}: messages[{i}]") for i, m in enumerate(messages)]
    if any(message.get("tool_calls") for message in parsed):
        tools = parse_tools(row, where)
        parsed = [_drop_padded_arguments(message, tools or []) for message in parsed]
    if prompt is not None and prompt == (parsed[-1]["role"] == "assistant"):
        must = "must not" if prompt else "must"
        raise UserError(f"{where}: messages: the last role {must} be assistant")
    return parsed


def _parse_message(message: Any, name: str) -> dict:
    if not isinstance(message, dict):
        raise UserError(f"{name} is not an object with role and content")
    role, content, thoughts = message.get("role"), message.get("content"), ""
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{name}.role {role!r} is none of {', '.join(ROLES)}")
    if message.get("tools"):
        raise UserError(f"{name}.tools: tools are read from a column `tools` of the row")
    message = {**message, "role": ROLES[role]}
    if isinstance(content, list):
        message["content"], thoughts = _join_parts(content, name, role == "assistant")
    if role == "assistant":
        message = _parse_tool_calls(_parse_reasoning(message, thoughts, name), name)
    text, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(text, str) and not (text is None and calls):
        raise UserError(f"{name}.content is not a text")
    values.require_characters(message, name)
    return message


def _join_parts(parts: list, name: str, is_assistant: bool) -> tuple[str, str]:
    """Returns (text, thoughts) of content in parts."""
    text, thoughts = [], []
    for part in parts:
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type == "text" and isinstance(part.get("text"), str):
            text.append(part["text"])
        elif part_type in ("thinking", "reasoning") and is_assistant:
            value = part.get(part_type, part.get("text"))
            if text or not isinstance(value, str):
                raise UserError(
                    f"{name}.content: a part of type {part_type!r} must be text before the answer"
                )
            thoughts.append(value)
        else:
            raise UserError(f"{name}.content has a part of type {part_type!r}; only text is read")
    return "".join(text), "\n".join(thoughts)


def _parse_reasoning(message: dict, thoughts: str, name: str) -> dict:
    """Moves an assistant's thoughts from whichever field has them to `reasoning_content`."""
    found = {"content": thoughts} if thoughts.strip() else {}
    for field in REASONING_FIELDS:
        value = message.get(field)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{name}.{field} is not a text")
        if value and value.strip():
            found[field] = value
    message = {key: value for key, value in message.items() if key not in REASONING_FIELDS}
    if not found:
        return message
    (first, reasoning), *others = found.items()
    for field, value in others:
        if value.strip() != reasoning.strip():
            raise UserError(f"{name}: {first} and {field} differ; which are its thoughts?")
    content = message.get("content")
    block, final = split_thinking(content) if isinstance(content, str) else (None, content)
    if block is not None and block.strip() != reasoning.strip():
        raise UserError(f"{name}: {first} and the think block of content differ")
    return {**message, "content": final, "reasoning_content": reasoning}


def _parse_tool_calls(message: dict, name: str) -> dict:
    """Checks an assistant's `tool_calls`; a `function_call` (OpenAI's older form) becomes one."""
    if message.get("function_call") and not message.get("tool_calls"):
        call = {"type": "function", "function": message["function_call"]}
        message = {**message, "tool_calls": [call]}
    calls = message.get("tool_calls")
    if not calls:
        return message
    if not isinstance(calls, list):
        raise UserError(f"{name}.tool_calls is not a list of calls")
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{name}.tool_calls[{number}] has no name of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise UserError(f"{name}.tool_calls[{number}].arguments are not an object of JSON")
    return message


def is_trained(message: dict, name: str) -> bool:
    """Returns False if a message of a trace says that it is not to be trained (`weight` of 0, or
    `train` of false).

    Raises UserError for another weight than 0 or 1, or for a weight of 1 on what no model writes.
    """
    trained = True
    for field in WEIGHT_FIELDS:
        value = message.get(field)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise UserError(f"{name}.{field}={value!r}: a turn is trained (1) or not (0)")
        if value and message["role"] != "assistant":
            raise UserError(f"{name}.{field}={value!r}: only turns of the assistant are trained")
        trained = trained and bool(value)
    return trained


def parse_tools(row: dict, where: str) -> list[dict] | None:
    """Returns the tools of a row (`tools`: schemas, or a JSON text of them); None without any.

    Raises UserError if they are something else.
    """
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
        if isinstance(tools, list):
            tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: tools: not JSON ({error})") from None
    values.require_characters(tools, f"{where}: tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise UserError(f"{where}: tools is not a list of tools, each an object")
    return _drop_padding(tools) if _has_padding(tools) else tools


# Arrow gives all objects of a column the same keys, with null for those that an object lacks. In a
# schema of JSON only these keys may be null themselves.
_NULLABLE = ("default", "const", "example", "examples", "enum")


def _drop_padded_arguments(message: dict, tools: list[dict]) -> dict:
    """Leaves out arguments of null that the tool of a call does not have."""
    if message["role"] != "assistant" or not message.get("tool_calls"):
        return message
    schemas = [tool.get("function", tool) for tool in tools]
    known = {x.get("name"): (x.get("parameters") or {}).get("properties") for x in schemas}

    def drop(call: dict) -> dict:
        function = call.get("function", call)
        names, arguments = known.get(function["name"]), function["arguments"]
        if names is None or not isinstance(arguments, dict):
            return call
        kept = {k: v for k, v in arguments.items() if v is not None or k in names}
        function = {**function, "arguments": kept}
        return {**call, "function": function} if "function" in call else function

    return {**message, "tool_calls": [drop(call) for call in message["tool_calls"]]}


def _has_padding(value: Any) -> bool:
    if isinstance(value, dict):
        nulls = any(x is None and key not in _NULLABLE for key, x in value.items())
        return nulls or any(map(_has_padding, value.values()))
    return isinstance(value, list) and any(map(_has_padding, value))


def _drop_padding(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_padding(x) for key, x in value.items() if x is not None}
    return [_drop_padding(x) for x in value] if isinstance(value, list) else value
