"""Chat templates: renders conversations, and finds out by rendering how a template behaves.

Templates differ in who writes the think tags. A hybrid one (Qwen3) leaves them to the model, and
ends the prompt with an empty block where it is not to think. One for thinking only (Thinking-2507,
DeepSeek-R1) ends every prompt with the opening tag. Others (Instruct-2507) know no think block.
Only what a template renders counts, never the name of a model.
"""

import dataclasses
import functools
import re
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from distill.data import sandbox, values
from models.errors import UserError

_OPENED = re.compile(r"<think>\s*\Z")
_CLOSED = re.compile(r"<think>\s*</think>\s*\Z")
_QUESTION = {"role": "user", "content": "Hello"}


@dataclasses.dataclass(frozen=True)
class Template:
    """How a chat template behaves.

    has_switch: `enable_thinking` changes the prompt.
    opened: the opening think tag, and the space after it, with which a prompt of the thinking mode
      ends; "": the model writes it.
    header: text between a conversation and what the model writes; without a think tag.
    end_token: text of the token that ends a turn; "": none does.
    renders_tools, renders_calls, renders_results: tools, and messages about them, reach the text.
    """

    has_switch: bool
    opened: str = ""
    header: str = ""
    end_token: str = ""
    renders_tools: bool = False
    renders_calls: bool = False
    renders_results: bool = False

    @property
    def has_modes(self) -> bool:
        """False if the template knows no think block, so that its model is not asked to think."""
        return self.has_switch or bool(self.opened)

    @property
    def always_thinks(self) -> bool:
        """True if every prompt opens a think block."""
        return bool(self.opened) and not self.has_switch

    def find_mode(self, thinking: bool) -> bool:
        """Returns the mode of a prompt that was asked for with `thinking`."""
        return self.has_modes and (thinking or self.always_thinks)


def describe_template(tokenizer: PreTrainedTokenizerBase | None) -> Template:
    """Describes a tokenizer's chat template. Without one, both modes are taken to exist."""
    if tokenizer is None or tokenizer.chat_template is None:
        return Template(has_switch=True)
    return _describe(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=16)
def _describe(tokenizer: PreTrainedTokenizerBase, template: str) -> Template:
    """Describes `template`, the one of the tokenizer, which is an argument for the cache's sake."""
    with sandbox.limit_time():
        return _describe_by_rendering(tokenizer)


def _describe_by_rendering(tokenizer: PreTrainedTokenizerBase) -> Template:
    question = [_QUESTION]
    on, off = (_try_render(tokenizer, question, None, thinking=mode) for mode in (True, False))
    asked = _try_render(tokenizer, question, None, thinking=True, add_generation_prompt=False)
    header = on.removeprefix(asked) if on.startswith(asked) else ""
    call = {"type": "function", "function": {"name": "probe_call", "arguments": {}}}
    turns = [
        _QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "probe_result"},
        {"role": "assistant", "content": "probe_answer"},
    ]
    return Template(
        has_switch=on != off,
        opened=find_opened_block(on),
        header=header.removesuffix(find_opened_block(on)),
        end_token=_find_end_token(tokenizer),
        renders_tools="probe_call" in _try_render(tokenizer, turns[:1], [call]),
        renders_calls="probe_call" in _try_render(tokenizer, turns[:2], [call]),
        renders_results="probe_result" in _try_render(tokenizer, turns, [call]),
    )


def _find_end_token(tokenizer: PreTrainedTokenizerBase) -> str:
    turns = [_QUESTION, {"role": "assistant", "content": "Goodbye"}]
    text = _try_render(tokenizer, turns, None, add_generation_prompt=False)
    ids = tokenizer.encode(text.rpartition("Goodbye")[2], add_special_tokens=False)
    ends = [i for i in ids if i in tokenizer.added_tokens_decoder]
    return cast(str, tokenizer.decode(ends[:1]))


def _try_render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    tools: list[dict] | None,
    **options: Any,
) -> str:
    try:
        return render_text(tokenizer, messages, tools=tools, **options)
    except UserError:
        return ""


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    tools: list[dict] | None = None,
    *,
    thinking: bool | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Renders a conversation as text.

    thinking=None leaves the switch to the template. Raises UserError if the tokenizer has no chat
    template, or if that fails, or exceeds the bounds of `sandbox`.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no chat template")
    switch: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    try:
        with sandbox.limit_time():
            text = tokenizer.apply_chat_template(
                # Some templates fail on a content of None, which a turn of tool calls may have.
                [{**message, "content": message.get("content") or ""} for message in messages],
                tools=tools,  # pyright: ignore[reportArgumentType]  (plain schemas are accepted)
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **switch,
            )
    except Exception as error:  # a template may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} cannot render the messages: {reason}"
        ) from error
    values.require_characters(text, f"what the chat template of {tokenizer.name_or_path} renders")
    return cast(str, text)


def require_tools_rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list[dict] | None
) -> None:
    """Raises UserError if the template would leave out tools, their calls or their results."""
    template = describe_template(tokenizer)
    name = tokenizer.name_or_path
    if tools and not template.renders_tools:
        raise UserError(f"tools: the chat template of {name} has no place for them")
    if not template.renders_calls and any(message.get("tool_calls") for message in messages):
        raise UserError(f"tool_calls: the chat template of {name} does not render them")
    if not template.renders_results and any(message["role"] == "tool" for message in messages):
        raise UserError(f"messages of role tool: the chat template of {name} leaves them out")


def find_opened_block(text: str) -> str:
    """Returns the opening think tag, and the space after it, with which a prompt ends; or ""."""
    found = _OPENED.search(text)
    return found[0] if found else ""


def ends_with_empty_block(text: str) -> bool:
    """Returns True if a prompt ends with an empty think block."""
    return bool(_CLOSED.search(text))
