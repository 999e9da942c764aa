"""From the body of a request to token ids and options, checked against the model that is served."""

import dataclasses
import secrets
from typing import Any

import jax.numpy as jnp

from distill.data import examples
from distill.policy.policy import Policy
from distill.rollout.sampling import Sampling
from distill.serving.errors import ApiError
from distill.serving.jobs import GenerationOptions
from distill.serving.schemas import ChatRequest, CompletionRequest, ScoreRequest
from models.errors import UserError

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
MAX_REPLY_BYTES = 2**29  # of hidden states or likeliest tokens in one reply


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model as its clients know it.

    The hashes say whether two servers, or a server and a file, have the same model.
    """

    name: str
    subject: Policy  # described
    param_dtype: str  # of the weights
    max_length: int  # tokens of a prompt and its response
    max_logprobs: int  # likeliest tokens of a generated token
    max_top_k: int  # and of a token that is scored
    model_hash: str
    tokenizer_hash: str
    head_hash: str = ""  # once the weights are loaded
    step: int | None = None  # of the run's checkpoint

    def describe(self) -> dict[str, Any]:
        """Returns the entry of /v1/models."""
        config = self.subject.config
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "qwen3-distill",
            "max_model_len": self.max_length,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "dtype": self.subject.dtype,
            "param_dtype": self.param_dtype,
            "max_top_k": self.max_top_k,
            "model_hash": self.model_hash,
            "tokenizer_hash": self.tokenizer_hash,
            "head_hash": self.head_hash,
            "step": self.step,
        }

    def check_name(self, name: str | None) -> None:
        """Raises ApiError (404) for another model's name; None is the only one."""
        if name is not None and name != self.name:
            raise ApiError(
                f"the model {name!r} does not exist; this server has {self.name!r}",
                *(404, "model", "model_not_found"),
            )

    def check_ids(self, ids: list[int], param: str) -> None:
        """Raises ApiError for ids outside the vocabulary."""
        size = self.subject.config.vocab_size
        if ids and max(ids) >= size:
            raise ApiError(
                f"{param}: token id {max(ids)} is outside the vocabulary of {size}", param=param
            )

    def check_length(self, prompt: int, new: int, param: str) -> None:
        """Raises ApiError if so many tokens are more than the model takes."""
        if prompt + new > self.max_length:
            raise ApiError(
                f"{param}: {prompt} tokens and {new} new ones exceed the {self.max_length} tokens "
                "that this server takes",
                *(400, param, "context_length_exceeded"),
            )


def encode_prompts(request: CompletionRequest, served: ServedModel) -> list[list[int]]:
    """Returns the token ids of each prompt."""
    prompts = request.prompt
    if isinstance(prompts, str) or type(prompts[0]) is int:
        prompts = [prompts]
    field = "prompt" if isinstance(prompts[0], str) else "tokens"
    encoded = [_encode_row({field: prompt}, served, None, "prompt") for prompt in prompts]
    for ids in encoded:
        served.check_ids(ids, "prompt")
        served.check_length(len(ids), 0, "prompt")
    return encoded


def encode_chat(request: ChatRequest, served: ServedModel) -> list[int]:
    """Returns the token ids of a conversation, rendered by the model's chat template."""
    row = {"messages": request.messages} | ({"tools": request.tools} if request.tools else {})
    options = request.chat_template_kwargs
    ids = _encode_row(row, served, options and options.enable_thinking, "messages")
    served.check_ids(ids, "messages")
    served.check_length(len(ids), 1, "messages")
    return ids


def _encode_row(row: dict, served: ServedModel, thinking: bool | None, param: str) -> list[int]:
    try:
        return examples.encode_prompt(row, "request", served.subject.tokenizer, thinking)
    except UserError as error:
        raise ApiError(str(error), param=param) from None


def make_limits(prompts: list[list[int]], max_tokens: int | None, served: ServedModel) -> list[int]:
    """Returns the tokens at most of the response to each prompt; None: all that fit."""
    if max_tokens is None:
        return [served.max_length - len(ids) for ids in prompts]
    for ids in prompts:
        served.check_length(len(ids), max_tokens, "max_tokens")
    return [max_tokens] * len(prompts)


def make_options(
    request: CompletionRequest | ChatRequest, served: ServedModel, num_logprobs: int | None
) -> GenerationOptions:
    """Returns how responses are drawn.

    Raises:
      ApiError: for a value that Sampling refuses, or more than the model has.
    """
    vocab_size = served.subject.config.vocab_size
    fields = ("temperature", "top_p", "min_p", "presence_penalty")
    values = {name: getattr(request, name) for name in fields}
    try:
        sampling = Sampling(
            top_k=min(max(0, request.top_k or 0), vocab_size),
            **{name: float(x) for name, x in values.items() if x is not None},
        )
    except UserError as error:
        raise ApiError(str(error), param=str(error).partition("=")[0]) from None
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if stops and served.subject.tokenizer is None:
        raise ApiError("stop: the model has no tokenizer to find texts with", param="stop")
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options: needs stream=true", param="stream_options")
    check_count(num_logprobs, served.max_logprobs, "logprobs")
    return GenerationOptions(
        sampling=sampling,
        seed=secrets.randbits(32) if request.seed is None else request.seed,
        samples=request.n or 1,
        stops=tuple(stops),
        wants_logprobs=num_logprobs is not None,
        is_stream=bool(request.stream),
    )


def find_prompt_output(
    request: CompletionRequest | ChatRequest, served: ServedModel
) -> tuple[str, int] | None:
    """Returns the output and top_k with which the prompts are to be scored; None: they are not."""
    counts = [request.prompt_logprobs]
    if isinstance(request, CompletionRequest) and request.echo:
        counts.append(request.logprobs)
    asked = [count for count in counts if count is not None]
    if not asked:
        return None
    if request.stream:
        raise ApiError("log-probabilities of a prompt cannot be streamed", param="stream")
    top_k = max(asked)
    check_count(top_k, served.max_top_k, "prompt_logprobs")
    return ("top" if top_k else "token"), top_k


def check_count(count: int | None, most: int, param: str) -> None:
    """Raises ApiError if more likeliest tokens are asked for than this server gives."""
    if count is not None and count > most:
        raise ApiError(f"{param}={count}: this server gives at most {most}", param=param)


def check_scores(request: ScoreRequest, served: ServedModel) -> list[tuple[list[int], list[int]]]:
    """Returns the (prompt, response) pairs to score."""
    if (request.output == "top") != (request.top_k > 0):
        raise ApiError("top_k: must be at least 1 for the output top, 0 for others", param="top_k")
    check_count(request.top_k, served.max_top_k, "top_k")
    for number, sequence in enumerate(request.sequences):
        param = f"sequences[{number}]"
        served.check_ids(sequence.prompt, f"{param}.prompt")
        served.check_ids(sequence.response, f"{param}.response")
        served.check_length(len(sequence.prompt), len(sequence.response), param)
    tokens = sum(len(sequence.response) for sequence in request.sequences)
    width = {
        "token": 4,
        "top": 8 * request.top_k + 4,
        "hidden": served.subject.config.hidden_size
        * jnp.dtype(served.subject.model.dtype).itemsize,
    }[request.output]
    if tokens * width > MAX_REPLY_BYTES:
        raise ApiError(
            f"sequences: the reply would have {tokens * width:,} bytes, at most "
            f"{MAX_REPLY_BYTES:,}: send fewer in one request",
            param="sequences",
        )
    return [(sequence.prompt, sequence.response) for sequence in request.sequences]


def get_chat_tokens(request: ChatRequest) -> int | None:
    """Returns the limit of new tokens by whichever name it has."""
    if request.max_completion_tokens is not None and request.max_tokens is not None:
        raise ApiError("max_tokens and max_completion_tokens: give one of them", param="max_tokens")
    return request.max_completion_tokens or request.max_tokens
