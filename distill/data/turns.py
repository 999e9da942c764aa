"""Reads chats and what belongs to them, in the forms that sets store them in."""

import json
import re
from typing import Any

from distill.data import messages as chats
from models.errors import UserError

# ShareGPT's speakers, and LLaMA-Factory's, whose function_call is a tool call.
ROLES = chats.ROLES | {"human": "user", "gpt": "assistant", "function_call": "assistant"}


_WRITTEN_CHAT = re.compile(r"\s*\[\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:\s*['\"]")


def read_turns(value: Any, name: str) -> list:
    """Returns the turns in column `name` as messages {"role", "content", ...}.

    Reads from/value (ShareGPT) and role/content (OpenAI), one turn or a list of them, or the object
    of lists that TFDS and old versions of `datasets` make of a list of objects. A field of null,
    which parquet gives a turn for each field of another turn, is left out.

    Raises:
      UserError: naming the turn, if its speaker is unknown or its function call no JSON.
    """
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(v) for v in value.values()}) > 1:
            raise UserError(f"{name}: its lists have different lengths")
        fields = zip(*value.values(), strict=True)
        value = [dict(zip(value, turn, strict=True)) for turn in fields]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} is not a list of at least one message")
    return [_read_turn(turn, f"{name}[{number}]") for number, turn in enumerate(value)]


def _read_turn(turn: Any, where: str) -> dict:
    if not isinstance(turn, dict):
        raise UserError(f"{where} is not an object with role and content")
    field = "from" if turn.get("role") is None and "from" in turn else "role"
    speaker = turn.get(field)
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise UserError(f"{where}.{field} {speaker!r} is none of {', '.join(ROLES)}")
    read = ("role", "from", "value")
    others = {k: v for k, v in turn.items() if k not in read and (v is not None or k == "content")}
    message = {"role": ROLES[speaker], **others}
    if turn.get("content") is None and "value" in turn:
        message["content"] = turn["value"]
    if speaker == "function_call":
        message |= {"tool_calls": _read_calls(message.get("content"), where), "content": ""}
    return message


def _read_calls(value: Any, where: str) -> list[dict]:
    calls = _parse_json(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(c, dict) and {"name", "arguments"} <= c.keys() for c in calls):
        raise UserError(f"{where}: a function call is no JSON object of name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _parse_json(value: Any) -> Any:
    """Parses a text as JSON; returns None if it is none, and what is no text as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None


def read_tools(value: Any, name: str) -> list[dict]:
    """Returns the tools in column `name`, a list or its JSON, in the form of Qwen3's own prompts:
    {"type": "function", "function": {"name", ...}}.

    Raises UserError if they are no objects with a name.
    """
    if isinstance(value, str) and value.strip() in ("", "null"):
        return []
    tools = _parse_json(value)
    tools = [_parse_json(tool) for tool in (tools if isinstance(tools, list) else [tools])]
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{name}[{number}] is no JSON schema of a function with a name")
    return [tool if "function" in tool else _wrap_function(tool) for tool in tools]


def _wrap_function(function: dict) -> dict:
    fields = {k: v for k, v in function.items() if (k, v) != ("type", "function")}
    return {"type": "function", "function": fields}


def read_history(value: Any) -> list[dict]:
    """Returns earlier turns of LLaMA-Factory's `history`, pairs of question and answer.

    Raises UserError if it has another form.
    """
    pairs = value if isinstance(value, list) else [value]
    messages = []
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise UserError(f"history[{number}] is no pair of question and answer")
        messages += [
            {"role": r, "content": c} for r, c in zip(("user", "assistant"), pair, strict=True)
        ]
    return messages


def add_system(messages: list[dict], system: str, name: str) -> list[dict]:
    """Returns the turns of column `name` after a system's turn, unless they have the same one.

    Raises UserError if they have another one.
    """
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if get_text(messages[0]).strip() != system.strip():
        raise UserError(f"system and {name}[0] are two system texts; leave one out")
    return messages


def drop_answer(messages: list[dict]) -> list[dict]:
    """Returns the turns before the last one, if that is the assistant's.

    Raises UserError if there are none.
    """
    if messages[-1]["role"] != "assistant":
        return messages
    if len(messages) == 1:
        raise UserError("messages: nothing before the assistant's turn")
    return messages[:-1]


def get_text(message: dict) -> str:
    """Returns the text of a turn; parts of content that are no text are left out."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def replace_last_user_text(messages: list[dict], old: str, new: str) -> list[dict]:
    """Returns messages with the text `new` in the last user's turn, if its text was `old`."""
    users = [i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"]
    if not users or get_text(messages[users[-1]]).strip() != old.strip():
        return messages
    return [
        {**message, "content": new} if i == users[-1] else message
        for i, message in enumerate(messages)
    ]


def is_written_chat(text: str) -> bool:
    """Returns True for a list of turns that became a text, as JSON or as Python prints it."""
    return bool(_WRITTEN_CHAT.match(text))


def holds(text: str, part: str) -> bool:
    """Returns True if a text holds another, up to white space."""
    return " ".join(part.split()) in " ".join(text.split())
