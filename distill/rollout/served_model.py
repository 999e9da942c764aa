"""A model behind an OpenAI-compatible server: vLLM, SGLang, `serve` of this project, or another.

Chats and questions go to /v1/chat/completions, where the server renders its own chat template;
texts and token ids to /v1/completions. With a tokenizer all prompts are rendered here, and go to
/v1/completions as token ids: then they are those of a model that is run here.

What a server knows beyond OpenAI's API depends on its kind, which /v1/models tells (`owned_by`).
vLLM and SGLang fill settings that a request leaves out from the model's generation_config.json, so
all of them are written into each request. (vllm/entrypoints/openai/chat_completion/protocol.py at
002032ee; python/sglang/srt/entrypoints/openai/protocol.py at 0285f807.)
"""

import dataclasses
import hashlib
import math
from concurrent.futures import Future
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.data import chat, columns, template
from distill.data import messages as chats
from distill.data.examples import encode_prompt
from distill.policy import hub, identity
from distill.rollout.sampling import Sampling
from distill.runtime import addresses
from distill.runtime.http_client import BadReply, Client, ClientOptions, RefusedRequest, Reply
from models.errors import RowError, UserError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TIMEOUT_SECONDS = 3600.0  # of a response: 32,768 tokens at 10 a second
_ROW_STATUS = (400, 413, 422)  # of a request whose own row is at fault
_KINDS = ("vllm", "sglang")  # what `owned_by` may be


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as a request has it; `ids` are its tokens if they are known."""

    path: str  # CHAT or TEXT
    fields: dict[str, Any]
    ids: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A response. `text` begins with the think tag that the prompt opened, where that is known."""

    text: str
    finish_reason: str  # stop or length
    length: int  # tokens
    tokens: list[int] | None  # None: the server does not give ids
    logprobs: list[float] | None  # of the tokens; None: not asked for
    prompt_tokens: list[int] | None


@dataclasses.dataclass(frozen=True)
class RequestSettings:
    """What all requests of a job have in common."""

    sampling: Sampling
    seed: int
    thinking: bool
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False


class ServedModel:
    """A model behind one or several equal servers. A context, which closes the client.

    Attributes:
      name: the model's name on the server.
      kind: ours, vllm, sglang, or other.
      tokenizer: renders prompts here; None: the server renders them.
      max_length: tokens of prompt and response together; None: unknown.

    Raises:
      UserError: if the servers cannot be reached, or do not serve one and the same model.
    """

    def __init__(self, options: ClientOptions, name: str = "", tokenizer_dir: str = "") -> None:
        self.tokenizer: PreTrainedTokenizerBase | None = None
        if tokenizer_dir:
            tokenizer_dir = str(hub.resolve_tokenizer_dir(tokenizer_dir))
            self.tokenizer = chat.load_tokenizer(tokenizer_dir)
            if self.tokenizer is None:
                raise UserError(f"--tokenizer={tokenizer_dir}: has no tokenizer")
        self._tokenizer_dir = tokenizer_dir
        self.address = ",".join(options.urls)
        self.client = Client(options)
        entries = [self._find_entry(url, name) for url in options.urls]
        self._entry = entries[0]
        self.name, self.kind = str(self._entry["id"]), _find_kind(self._entry)
        for url, entry in zip(options.urls, entries, strict=True):
            for field in ("id", "owned_by", "max_model_len", "model_hash"):
                if entry.get(field) != self._entry.get(field):
                    raise UserError(
                        f"{options.urls[0]} and {url}: serve different models: {field} is "
                        f"{self._entry.get(field)!r} and {entry.get(field)!r}"
                    )
        length = self._entry.get("max_model_len")
        self.max_length = length if type(length) is int and length > 0 else None

    def __enter__(self) -> "ServedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def _find_entry(self, url: str, name: str) -> dict[str, Any]:
        """Returns what a server says about the model `name`, or about its only one."""

        def read(reply: Reply) -> list[dict]:
            try:
                entries = [dict(entry) for entry in reply.read_json()["data"]]
                return [entry for entry in entries if isinstance(entry["id"], str)]
            except (LookupError, TypeError, ValueError):
                raise BadReply("the reply is no list of models") from None

        try:
            entries = self.client.get("/v1/models", read, url=url)
        except RefusedRequest as error:
            if error.status == 404 and name:  # some gateways have no list
                return {"id": name}
            raise
        names = [entry["id"] for entry in entries]
        if name in names or (not name and len(names) == 1):
            return entries[names.index(name) if name else 0]
        known = ", ".join(names[:20]) or "none"
        if name:
            raise UserError(f"--served_model={name}: {url} serves {known}")
        raise UserError(f"--served_model: {url} serves {known}; name one")

    def describe(self) -> dict[str, Any]:
        """Returns what a file records of the model and of how prompts reach it. An address has no
        credentials."""
        tokenizer = None
        if self._tokenizer_dir:
            tokenizer = identity.hash_parts(identity.describe_tokenizer(self._tokenizer_dir))
        return {
            "model": self.address,
            "served_model": self.name,
            "server": self.kind,
            "model_hash": self._entry.get("model_hash"),
            "prompts": "token ids" if tokenizer else "rendered by the server",
            "tokenizer": tokenizer,
        }

    def check_settings(self, settings: RequestSettings) -> None:
        """Raises UserError naming a setting that is not OpenAI's, for a server of unknown kind."""
        if self.kind != "other":
            return
        sampling, owner = settings.sampling, self._entry.get("owned_by")
        unknown = f"{self.address}: its kind ({owner!r}) is not known to take it"
        for field in ("top_k", "min_p"):
            if getattr(sampling, field):
                raise UserError(f"--{field}={getattr(sampling, field)}: {unknown}; take 0")
        if not settings.thinking and not self.tokenizer:
            raise UserError(
                f"--thinking=off: {unknown}; give --tokenizer, or --thinking=on, which leaves it "
                "to the server"
            )

    def make_prompt(self, row: dict, where: str, thinking: bool, limit: int) -> Prompt:
        """Makes the prompt of a canonical row.

        Raises:
          RowError: if it is empty, or is known to be too long with `limit` new tokens.
          UserError: if the row has no valid prompt. Both messages begin with `where`.
        """
        if self.tokenizer or "tokens" in row:
            ids = encode_prompt(row, where, self.tokenizer, thinking)
            if self.max_length and len(ids) + limit > self.max_length:
                raise RowError(
                    f"{where}: prompt of {len(ids)} tokens and {limit} new ones (max_new_tokens) "
                    f"exceed the {self.max_length} positions that {self.address} has"
                )
            return Prompt(TEXT, {"prompt": ids}, ids)
        if "prompt" in row:
            text = row["prompt"]
            if not isinstance(text, str):
                raise UserError(f"{where}: prompt is not a text")
            if not text:
                raise RowError(f"{where}: the prompt is empty")
            return Prompt(TEXT, {"prompt": text})
        if "messages" not in row and not isinstance(row.get("question"), str):
            reason = columns.explain_missing_prompt(row) or "question is not a text"
            raise UserError(f"{where}: {reason}")
        if "messages" not in row:
            row = {**row, "messages": [{"role": "user", "content": row["question"]}]}
        messages = chats.parse_messages(row, where)
        if chats.parse_tools(row, where) or any(
            m["role"] == "tool" or m.get("tool_calls") for m in messages
        ):
            raise UserError(f"{where}: tools: --tokenizer is needed, to render them here")
        turns = [
            {
                "role": m["role"],
                "content": chats.to_assistant_text(m) if m["role"] == "assistant" else m["content"],
            }
            for m in messages
        ]
        return Prompt(CHAT, {"messages": turns})

    def make_request(
        self, prompt: Prompt, settings: RequestSettings, limit: int, row: int, sample: int
    ) -> dict[str, Any]:
        """Makes the body of a request for one response of at most `limit` tokens.

        Its seed is a function of the job's seed, and of the row's and the sample's number.
        """
        sampling, is_chat = settings.sampling, prompt.path == CHAT
        seed = hashlib.sha256(f"{settings.seed}/{row}/{sample}".encode()).digest()[:4]
        body: dict[str, Any] = {
            "model": self.name,
            **prompt.fields,
            "max_tokens": limit,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "seed": int.from_bytes(seed, "big") >> 1,
        }
        if settings.stop_strings:
            body["stop"] = list(settings.stop_strings)
        if self.kind == "other":
            return body
        off = 0 if self.kind == "ours" else -1
        body |= {"top_k": sampling.top_k or off, "min_p": sampling.min_p}
        if settings.logprobs:
            body["logprobs"] = True if is_chat else 0
        if is_chat:
            body["chat_template_kwargs"] = {"enable_thinking": settings.thinking}
        if self.kind in ("ours", "vllm"):
            body |= {"return_token_ids": True} | ({"return_prompt_text": True} if is_chat else {})
        if self.kind in ("vllm", "sglang"):
            body["repetition_penalty"] = 1.0
        if self.kind == "vllm" and not is_chat:
            body["add_special_tokens"] = False
        if self.kind == "sglang" and is_chat:
            body["separate_reasoning"] = False
        return body

    def check_answers(self, prompt: Prompt, settings: RequestSettings) -> None:
        """Asks each server for one token after a prompt of the same form, with the same settings:
        what a server refuses is known before the work begins."""
        tiny: dict[str, Any] = {"prompt": prompt.ids[:1] if prompt.ids else "Hello"}
        if prompt.path == CHAT:
            tiny = {"messages": [{"role": "user", "content": "Hello"}]}
        probe = dataclasses.replace(prompt, fields=tiny, ids=None)
        body = self.make_request(probe, settings, 1, 0, 0)
        for url in self.client.urls:
            self.client.post(
                prompt.path, body, lambda reply: self._read(reply, probe, settings, 1), url=url
            )

    def submit(
        self, prompt: Prompt, settings: RequestSettings, limit: int, row: int, sample: int
    ) -> Future[Completion]:
        """Asks for one response, in a thread; for waiting and errors see `http_client.Client`."""
        return self.client.submit(
            prompt.path,
            self.make_request(prompt, settings, limit, row, sample),
            lambda reply: self._read(reply, prompt, settings, limit),
        )

    def _read(
        self, reply: Reply, prompt: Prompt, settings: RequestSettings, limit: int
    ) -> Completion:
        """Reads a reply. Raises BadReply if it is not the one response that was asked for."""
        body = reply.read_json()
        try:
            (choice,) = body["choices"]
            message = choice["message"] if prompt.path == CHAT else {"content": choice["text"]}
            content = message.get("content")
            count = (body.get("usage") or {}).get("completion_tokens")
            reason, model = choice.get("finish_reason"), body.get("model")
        except (LookupError, TypeError, ValueError, AttributeError):
            raise BadReply("the reply is not one response") from None
        if self.kind != "other" and model != self.name:
            raise BadReply(f"the reply is from model {model!r}, not {self.name!r}")
        if reason == "content_filter":
            raise RowError("the server's content filter refuses it")
        if reason not in ("stop", "length"):
            raise BadReply(f"the response ended by {reason!r}")
        tokens = _read_ids(choice.get("token_ids"), "token_ids")
        prompt_tokens = prompt.ids or _read_ids(
            body.get("prompt_token_ids") or choice.get("prompt_token_ids"), "prompt_token_ids"
        )
        count = len(tokens) if tokens is not None else count
        if type(count) is not int or not 0 <= count <= limit:
            raise BadReply(f"the reply has {count!r} tokens, of at most {limit}")
        text = _read_text(message, content)
        if prompt.ids is not None and self.tokenizer is not None:
            text = chat.find_opened_block(self.tokenizer, prompt.ids) + text
        elif isinstance(body.get("prompt_text"), str) and prompt.path == CHAT:
            opened = template.find_opened_block(body["prompt_text"])
            text = text if text.startswith("<think>") else opened + text
        elif prompt.path == CHAT:
            text = chats.restore_think_tag(text)
        logprobs = None
        if settings.logprobs and self.kind != "other":
            logprobs = _read_logprobs(choice, prompt.path, tokens)
        return Completion(text, reason, count, tokens, logprobs, prompt_tokens)


def find_row_error(error: BaseException) -> str | None:
    """Returns what is wrong with a request's own row; None if more than that is wrong."""
    if isinstance(error, RowError):
        return str(error)
    is_own = isinstance(error, RefusedRequest) and error.status in _ROW_STATUS
    return str(error) if is_own else None


def _find_kind(entry: dict[str, Any]) -> str:
    if "model_hash" in entry:
        return "ours"
    return next((kind for kind in _KINDS if entry.get("owned_by") == kind), "other")


def _read_ids(value: Any, name: str) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise BadReply(f"{name} is no list of token ids")
    return value


def _read_text(message: dict, content: Any) -> str:
    """Returns the text of a message, with the thoughts that a server's parser took out of it in a
    think block again; one that is not closed if nothing follows."""
    thoughts = message.get("reasoning") or message.get("reasoning_content") or ""
    content = "" if content is None and thoughts else content
    if not isinstance(content, str) or not isinstance(thoughts, str):
        raise BadReply("the reply has no text")
    try:
        (thoughts + content).encode()
    except UnicodeEncodeError:
        raise BadReply("the text has half a surrogate pair") from None
    if not thoughts.strip():
        return content
    return chats.wrap_thinking(thoughts, content) if content else f"<think>\n{thoughts.lstrip()}"


def _read_logprobs(choice: dict, path: str, tokens: list[int] | None) -> list[float]:
    try:
        found = choice["logprobs"]
        values = (
            [entry["logprob"] for entry in found["content"]]
            if path == CHAT
            else list(found["token_logprobs"])
        )
        is_valid = all(math.isfinite(x) and x <= 1e-3 for x in values)
    except (LookupError, TypeError):
        raise BadReply("the reply has no log-probabilities, which were asked for") from None
    if not is_valid or (tokens is not None and len(values) != len(tokens)):
        raise BadReply("the reply's log-probabilities are not one finite number a token")
    return [float(x) for x in values]


def open_served_model(
    address: str, max_in_flight: int, *, served_model: str, api_key_env: str, tokenizer: str
) -> ServedModel:
    """Opens the model at one or several addresses, separated by commas, by the flags of
    `cli.define_server_flags`.

    Raises UserError naming the flag at fault, or the server that cannot be used.
    """
    try:
        addresses.read_token(api_key_env)
    except UserError as error:
        raise UserError(f"--{error}") from None
    urls = tuple(sorted(addresses.split_urls(address)))
    try:
        options = ClientOptions(urls, api_key_env, TIMEOUT_SECONDS, max_in_flight)
    except UserError as error:
        raise UserError(f"--model={error}") from None
    return ServedModel(options, served_model, tokenizer)
