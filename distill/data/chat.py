"""Conversations to token ids and back, with a model directory's tokenizer and chat template.

A prompt is what the chat template renders, the think switch included. A response is what the model
itself would sample after it: its text and one stop token. So a trace that is trained on and a
rollout that is scored have the same form, and the mask is 1 exactly on what the model writes.
"""

import bisect
import functools
import itertools
import json
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.data import template, values
from distill.data.messages import (
    EMPTY_THINK,
    is_trained,
    split_thinking,
    to_assistant_text,
    wrap_thinking,
)
from models.errors import UserError

# Said where a text is longer than a tokeniser's model_max_length. All who encode here compare with
# the model's positions themselves, and name the row that is too long.
logging.getLogger("transformers.tokenization_utils_base").addFilter(
    lambda record: not str(record.msg).startswith("Token indices sequence length is longer")
)

_EMPTY_BLOCK = re.compile(r"<think>\s*</think>\n*")
_TAIL_TOKENS = 40  # of a prompt: more than an empty think block has

# Files of a model directory that make up its tokenizer and chat template.
TOKENIZER_FILES = (
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


def find_opened_block(tokenizer: PreTrainedTokenizerBase | None, prompt: list[int]) -> str:
    """Returns the opening think tag, and the space after it, with which a prompt ends; or ""."""
    if tokenizer is None:
        return ""
    return template.find_opened_block(cast(str, tokenizer.decode(prompt[-_TAIL_TOKENS:])))


def has_empty_think(tokenizer: PreTrainedTokenizerBase | None, prompt: list[int]) -> bool:
    """Returns True if a prompt ends with an empty think block, so that the model does not think."""
    if tokenizer is None:
        return False
    return template.ends_with_empty_block(cast(str, tokenizer.decode(prompt[-_TAIL_TOKENS:])))


def add_empty_think(tokenizer: PreTrainedTokenizerBase, prompt: list[int]) -> list[int]:
    """Returns the prompt with an empty think block at its end, which it may have opened itself."""
    if find_opened_block(tokenizer, prompt):
        tails = (prompt[-size:] for size in range(1, _TAIL_TOKENS + 1))
        tag = next(x for x in tails if str(tokenizer.decode(x)).lstrip().startswith("<think>"))
        prompt = prompt[: -len(tag)]
    return prompt + encode(tokenizer, EMPTY_THINK)


def strip_end_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Removes end tokens from the end of a response's text, and the space after them."""
    end_token = template.describe_template(tokenizer).end_token
    own = (str(token) for token in (tokenizer.eos_token, tokenizer.pad_token) if token)
    ends = tuple(filter(None, (end_token, *own, *_list_stop_tokens(tokenizer))))
    while ends and (stripped := text.rstrip()).endswith(ends):
        text = next(stripped.removesuffix(x) for x in ends if stripped.endswith(x))
    return text


@functools.lru_cache(maxsize=16)
def _list_stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lists the tokens that end a response by the model's files beside its tokenizer."""
    directory = Path(tokenizer.name_or_path)
    ids = load_stop_ids(directory) if directory.is_dir() else ()
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in ids if i < len(tokenizer)]


def _render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    tools: list[dict] | None,
    **options: Any,
) -> str:
    """Renders a conversation, with one end token after each turn of the assistant.

    `options` are those of template.render_text.
    """
    template.require_tools_rendered(tokenizer, messages, tools)
    messages = [
        {**message, "content": strip_end_tokens(tokenizer, message.get("content") or "")}
        if message["role"] == "assistant"
        else message
        for message in messages
    ]
    return template.render_text(tokenizer, messages, tools, **options)


def render_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    *,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
    tools: list[dict] | None = None,
) -> list[int]:
    """Returns the token ids of a conversation, rendered by the chat template.

    thinking=False ends the generation prompt of a hybrid template with an empty think block; None
    leaves the switch to the template. Raises UserError if the tokenizer has no chat template, or if
    that fails or has no place for tools.
    """
    options = {"thinking": thinking, "add_generation_prompt": add_generation_prompt}
    return encode(tokenizer, _render_text(tokenizer, messages, tools, **options))


def render_last_turn(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list[dict] | None = None
) -> str:
    """Returns what the model writes as the last turn, an assistant's, without the stop token: its
    thoughts in a think block, its content, and its tool calls as the template renders them.

    Raises UserError if the template renders the turn in another place or form.
    """
    *before, last = messages
    if not last.get("tool_calls"):
        return to_assistant_text(last)
    thoughts, final = split_thinking(to_assistant_text(last))
    bare = {key: x for key, x in last.items() if key != "reasoning_content"} | {"content": final}
    texts = [
        _render_text(tokenizer, turns, tools, add_generation_prompt=False)
        for turns in (before, [*before, bare])
    ]
    about = template.describe_template(tokenizer)
    start, end = texts[0] + about.header, about.end_token
    if not texts[1].startswith(start) or not end or end not in texts[1][len(start) :]:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} does not render the tool calls of the "
            "last turn as the end of the conversation"
        )
    turn = texts[1][len(start) :].rpartition(end)[0]
    block, calls = split_thinking(turn)
    calls = turn if block is None or block.strip() else calls
    return calls if thoughts is None else wrap_thinking(thoughts, calls)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of a text and nothing else; special tokens written in it become their ids.

    Raises UserError if the text holds half a surrogate pair.
    """
    values.require_characters(text, "its text")
    return tokenizer.encode(text, add_special_tokens=False)


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Returns the ids of a response as a model writes it: its text and one stop token, which the
    text may bring, as text that was decoded with its special tokens does.

    With thinking on, `response` brings its own think block. Raises UserError if the tokenizer has
    no stop token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no eos_token to end a turn")
    text = strip_end_tokens(tokenizer, response)
    return [*encode(tokenizer, text), cast(int, tokenizer.eos_token_id)]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list[dict] | None = None
) -> tuple[list[int], list[int]]:
    """Returns (ids, mask) of a whole conversation; the mask is 1 on every assistant turn, but for
    those that are not to be trained (`messages.is_trained`).

    A turn reaches from the end of its header to its end-of-turn token, inclusive: the model writes
    neither the newline after it, nor the empty think block that the template inserts, nor the think
    tag that the template's prompts end with. Raises UserError if a message spells out an assistant
    turn's header, which would be trained on; or if the template drops part of the last turn.
    """
    about = template.describe_template(tokenizer)
    text = _render_text(tokenizer, messages, tools, add_generation_prompt=False)
    flags = [is_trained(m, "messages") for m in messages if m["role"] == "assistant"]
    starts = [found.end() for found in re.finditer(re.escape(about.header or text), text)]
    if not about.header or not about.end_token:
        raise UserError(f"the chat template of {tokenizer.name_or_path} does not mark its turns")
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: data.turns=all needs a tokenizer.json")
    thoughts, final = split_thinking(to_assistant_text(messages[-1]))
    rendered = text.rpartition(about.header)[2]
    if thoughts and thoughts.strip() not in rendered:
        raise UserError("messages: the chat template drops the thoughts of the last turn")
    if strip_end_tokens(tokenizer, final).strip() not in rendered:  # before a think block
        raise UserError("messages: the chat template drops text of the last turn")
    if len(starts) != len(flags):
        raise UserError("messages: a content spells out the header of an assistant turn")
    values.require_characters(text, "its text")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = cast(list[int], encoded["input_ids"]), encoded["offset_mapping"]
    mask = [0] * len(ids)
    for start in itertools.compress(starts, flags):
        inserted = _EMPTY_BLOCK.match(text, start)
        if inserted:
            start = inserted.end()
        elif about.opened and text.startswith(about.opened, start):
            start += len(about.opened)
        found = text.find(about.end_token, start)
        end = len(text) if found < 0 else found + len(about.end_token)
        for i in range(bisect.bisect_left(offsets, (start, 0)), len(ids)):
            if offsets[i][1] > end:
                break
            mask[i] = 1
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
        except (ValueError, AttributeError, RecursionError) as error:
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


def decode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], response: list[int]
) -> str:
    """Returns the text of a sampled response, without special tokens, that speaks for itself: if
    its prompt opened a think block, the text begins with the opening tag. So thoughts can be told
    from the answer also where the response was cut within them."""
    return find_opened_block(tokenizer, prompt) + decode(tokenizer, response)


def copy_tokenizer(
    model_dir: Path, tokenizer_dir: Path, stops: tuple[int, ...], directory: Path
) -> None:
    """Copies the tokenizer of `tokenizer_dir` into `directory`, and writes the model's stop ids.

    The files are copied byte by byte: if transformers 5 wrote them, they would name classes that
    other readers do not know. generation_config.json keeps its other fields.
    """
    for name in TOKENIZER_FILES:
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
    for field in ("bos_token_id", "eos_token_id"):  # a pad token reaches no model
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
