"""Conversations to token ids and back, with a model directory's tokenizer and chat template.

A prompt is what the chat template renders, the think switch included. A response is what the model
itself would sample after it: its text and one stop token. So a trace that is trained on and a
rollout that is scored have the same form, and the mask is 1 exactly on what the model writes.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.data import values
from models.errors import UserError

EMPTY_THINK = "<think>\n\n</think>\n\n"  # ends the prompt where the model is not to think
ROLES = ("system", "user", "assistant", "tool")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def load_tokenizer(model_dir: str | Path) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer of a local directory (without the network) or of a hub id.

    Returns None if a local directory has no tokenizer. Raises UserError if it cannot be read.
    """
    local = Path(model_dir).is_dir()
    files = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
    if local and not any((Path(model_dir) / name).exists() for name in files):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=local)
    except Exception as error:  # the tokenizers library raises bare Exceptions for broken files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{model_dir}: the tokenizer cannot be loaded: {reason}") from error


def parse_messages(row: dict, where: str = "row", *, prompt: bool | None = True) -> list[dict]:
    """Checks and returns `row["messages"]`. Keeps other keys of a message; joins content in parts.

    prompt=True requires that the last turn is not the assistant's, prompt=False that it is; None
    takes either. Raises UserError that begins with `where` (file:line) and names the message.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: messages is not a list of at least one message")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UserError(f"{where}: messages[{i}] is not an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"{where}: messages[{i}].role {role!r} is none of {', '.join(ROLES)}")
        if isinstance(message.get("content"), list):
            text = _join_text_parts(message["content"], f"{where}: messages[{i}]")
            message = {**message, "content": text}
        calls_tool = role == "assistant" and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not calls_tool:
            raise UserError(f"{where}: messages[{i}].content is not a text")
        values.require_characters(message, f"{where}: messages[{i}]")
        checked.append(message)
    if prompt is not None and prompt == (checked[-1]["role"] == "assistant"):
        must = "must not" if prompt else "must"
        raise UserError(f"{where}: messages: the last role {must} be assistant")
    return checked


def _join_text_parts(parts: list, where: str) -> str:
    for part in parts:
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{where}.content has a part of type {part_type!r}; only text is read")
    return "".join(part["text"] for part in parts)


def has_empty_think(tokenizer: PreTrainedTokenizerBase | None, prompt: list[int]) -> bool:
    """Returns True if a prompt ends with an empty think block, so that the model does not think."""
    if tokenizer is None:
        return False
    return cast(str, tokenizer.decode(prompt[-4 * len(EMPTY_THINK) :])).endswith(EMPTY_THINK)


def has_thinking_switch(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns True if the chat template renders the two modes differently, or there is none."""
    if tokenizer.chat_template is None:
        return True
    turn = [{"role": "user", "content": "Hello"}]
    on, off = (render_messages(tokenizer, turn, thinking=thinking) for thinking in (True, False))
    return on != off


def wrap_thinking(reasoning: str, final: str) -> str:
    """Returns a response in the form that Qwen3 writes: a think block, then the final text."""
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{final.lstrip()}"


def to_assistant_text(message: dict) -> str:
    """Renders an assistant's turn as the model writes it: `reasoning_content`, if the message has
    any, becomes a think block before the content."""
    content, reasoning = message.get("content") or "", message.get("reasoning_content")
    return wrap_thinking(reasoning, content) if reasoning else content


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    *,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
    tools: list[dict] | None = None,
) -> list[int]:
    """Returns the token ids of a conversation, rendered by the chat template.

    thinking=False ends the generation prompt with an empty think block; None leaves the switch
    to the template. Raises UserError if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    ids = tokenizer.apply_chat_template(
        messages,
        tools=tools,  # pyright: ignore[reportArgumentType]  (plain JSON schemas are accepted)
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,  # transformers 5 would give a dict of lists
        **switch,
    )
    return cast(list[int], ids)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text and nothing else; special tokens written in it become their ids."""
    return tokenizer.encode(text, add_special_tokens=False)


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Returns the ids of a response as a model writes it: its text and the stop token.

    With thinking on, `response` brings its own think block. Raises UserError if the tokenizer has
    no stop token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token to end a turn")
    return [*encode(tokenizer, response), cast(int, tokenizer.eos_token_id)]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list[dict] | None = None
) -> tuple[list[int], list[int]]:
    """Returns (ids, mask) of a whole conversation; the mask is 1 on every assistant turn.

    A turn reaches from the end of its header to its end-of-turn token, inclusive: the model writes
    neither the newline after it nor the empty think block that the template inserts. Raises
    UserError if a message spells out an assistant turn's header, which would be trained on.
    """
    ids = render_messages(tokenizer, messages, add_generation_prompt=False, tools=tools)
    header = render_messages(tokenizer, messages, tools=tools)[len(ids) :]
    empty = encode(tokenizer, EMPTY_THINK)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    mask, turns = [0] * len(ids), 0
    for i in range(len(header), len(ids)):
        if ids[i - len(header) : i] != header:
            continue
        turns += 1
        start = i + len(empty) if ids[i : i + len(empty)] == empty else i
        end = next((j for j in range(start, len(ids)) if ids[j] in special), len(ids) - 1)
        mask[start : end + 1] = [1] * (end + 1 - start)
    if turns != sum(message["role"] == "assistant" for message in messages):
        raise UserError("messages: a content spells out the header of an assistant turn")
    return ids, mask


def load_stop_ids(
    model_dir: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[int, ...]:
    """Returns all ids that end a response, sorted: those of the model's files and its tokenizer.

    Empty for a bare model, whose responses then end by their length. Raises UserError if a file's
    eos_token_id is neither an id nor a list of ids.
    """
    stops: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        if not path.exists():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a JSON object: {error}") from error
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i >= 0 for i in values):
            raise UserError(f"{path}: eos_token_id {value!r} is not a token id or a list of them")
        stops.update(values)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        stops.add(cast(int, tokenizer.eos_token_id))
    return tuple(sorted(stops))


class StopStringMatcher:
    """Looks for stop strings in a response while it is being written.

    The text searched is that of `decode`, without special tokens; a character whose bytes span
    several tokens appears with the last of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._count = 0  # tokens read
        self._tail = ""  # the end of their text, in which a stop string may have begun
        self._pending: list[int] = []  # tokens after it, which end within a character

    def feed(self, ids: Iterable[int]) -> int | None:
        """Reads further tokens. Returns how many were read up to and including the one that
        completes a stop string; None if none does."""
        for token in ids:
            self._count += 1
            self._pending.append(token)
            text = self._tail + decode(self._tokenizer, self._pending)
            if any(stop in text for stop in self._stops):
                return self._count
            if not text.endswith("\ufffd"):
                self._tail = text[-max(map(len, self._stops)) :]
                self._pending = []
        return None

    def cut_text(self, text: str) -> str:
        """Returns the text before the first stop string in it (OpenAI's rule)."""
        return text[: min((i for s in self._stops if (i := text.find(s)) >= 0), default=None)]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Returns the text of a response, without its special tokens."""
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True))


def copy_tokenizer(
    model_dir: Path, tokenizer_dir: Path, stops: tuple[int, ...], directory: Path
) -> None:
    """Copies the tokenizer of `tokenizer_dir` into `directory`, and writes the model's stop ids.

    The files are copied byte by byte: if transformers 5 wrote them, they would name classes that
    other readers do not know. generation_config.json keeps its other fields.
    """
    for name in _TOKENIZER_FILES:
        if (tokenizer_dir / name).is_file():
            shutil.copyfile(tokenizer_dir / name, directory / name)
    path = model_dir / "generation_config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    fields["eos_token_id"] = list(stops) or None
    (directory / path.name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def require_same_tokenizer(
    a: PreTrainedTokenizerBase | None,
    b: PreTrainedTokenizerBase | None,
    names: tuple[str, str],
) -> None:
    """Raises UserError naming the first difference between two models' tokens; None matches all."""
    if a is None or b is None:
        return
    _require_same_ids(a, b, names)
    who = f"the tokenizers of {names[0]} and {names[1]} differ"
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    unshared = vocab_a.keys() ^ vocab_b.keys()
    if unshared:
        token = min(unshared)
        owner = names[0] if token in vocab_a else names[1]
        sizes = f"{len(vocab_a)} and {len(vocab_b)} tokens"
        raise UserError(f"{who}: {sizes}; only {owner} has {token!r}")
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(a, field) != getattr(b, field):
            raise UserError(f"{who}: {field} is {getattr(a, field)} and {getattr(b, field)}")


def require_vocab_subset(
    own: PreTrainedTokenizerBase | None,
    superset: PreTrainedTokenizerBase | None,
    names: tuple[str, str],
) -> None:
    """Raises UserError unless `superset` has each token of `own`, with the same id."""
    if superset is None:
        raise UserError(f"{names[1]}: no tokenizer for {names[0]} to take")
    if own is None:
        return
    _require_same_ids(own, superset, names)
    missing = own.get_vocab().keys() - superset.get_vocab().keys()
    if missing:
        raise UserError(f"the tokenizer of {names[1]} lacks {min(missing)!r} of {names[0]}")


def _require_same_ids(
    a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, names: tuple[str, str]
) -> None:
    """Raises UserError naming the first shared token whose two ids differ."""
    who = f"the tokenizers of {names[0]} and {names[1]} differ"
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    for token in sorted(vocab_a.keys() & vocab_b.keys(), key=vocab_a.__getitem__):
        if vocab_a[token] != vocab_b[token]:
            raise UserError(f"{who}: {token!r} is {vocab_a[token]} and {vocab_b[token]}")
