"""The bodies of requests: their fields and bounds, as OpenAI's API and vLLM have them.

A field that is not listed is refused: what it asks for would silently not be done. Fields whose
only value is neutral are listed because clients send them.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

MAX_SAMPLES = 128  # responses to one prompt
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000
SEEDS = Field(ge=0, le=2**32 - 1)
_MAX_INT = 2**31 - 1

TokenIds = list[Annotated[int, Field(ge=0, le=_MAX_INT)]]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {
    "title": "Prompt",
    "description": "A text, the ids of its tokens, or a list of either.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ],
}


def _check_prompt(value: Any) -> Any:
    """Checks a prompt by its first entry: trying each form on a long list takes long."""
    entries = value if isinstance(value, list) else [value]
    if not entries or not all(entries if isinstance(entries[0], list | str) else [True]):
        raise PydanticCustomError("prompt", "a prompt is empty")
    if all(isinstance(entry, str) for entry in entries):
        return value
    lists = entries if isinstance(entries[0], list) else [value]
    if not all(isinstance(x, list) and all(type(i) is int and i >= 0 for i in x) for x in lists):
        raise PydanticCustomError("prompt", "must be a text, token ids, or a list of either")
    return value


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False


class _Generation(_Body):
    """What completions and chats have in common."""

    model: str | None = Field(None, description="The name that /v1/models lists.")
    temperature: float | None = Field(
        None, ge=0, le=1e6, description="0: greedy. Default 1. Else at least 1e-6."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_INT, description="0 or -1: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-1e6, le=1e6)
    n: int | None = Field(None, ge=1, le=MAX_SAMPLES)
    seed: Annotated[int, SEEDS] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
            Field(max_length=MAX_STOPS),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(
        None, ge=0, description="Likeliest tokens at each position of the prompt, as in vLLM."
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(
        None, description='Tokens in `logprobs` are written "token_id:ID", as in vLLM.'
    )
    user: str | None = Field(None, description="Not read.")
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class CompletionRequest(_Generation):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        Any, pydantic.BeforeValidator(_check_prompt), pydantic.WithJsonSchema(_PROMPT)
    ]
    max_tokens: int | None = Field(None, ge=0, le=_MAX_INT, description="Default 16.")
    logprobs: int | None = Field(None, ge=0, le=_MAX_INT)
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = Field(None, description="Not read: none are added.")


class TemplateOptions(_Body):
    enable_thinking: bool | None = None


class ChatRequest(_Generation):
    """The body of POST /v1/chat/completions. `messages` and `tools` are as in training data."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto"] | None = None
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT, description="Default: all that fit.")
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_INT)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_INT)
    chat_template_kwargs: TemplateOptions | None = None
    return_prompt_text: bool | None = Field(
        None, description="The reply has what the chat template rendered, as in vLLM."
    )


class ScoredSequence(_Body):
    prompt: TokenIds = Field(min_length=1)
    response: TokenIds = Field(min_length=1)


class ScoreRequest(_Body):
    """The body of POST /v1/score."""

    model: str | None = None
    sequences: list[ScoredSequence] = Field(min_length=1)
    output: Literal["token", "top", "hidden"] = Field(
        description="Of each token of a response: its log-probability; the top_k likeliest tokens "
        "too; or the final hidden state that predicts it."
    )
    top_k: int = Field(0, ge=0, le=_MAX_INT)


BODIES = (CompletionRequest, ChatRequest, ScoreRequest)
