"""A teacher on servers: what is checked before the first step, and requests in flight.

Responses are sent as they come. While more wait than can be in flight, several share a request.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from distill.policy import identity
from distill.policy.policy import Policy
from distill.runtime import addresses, paths, run_files
from distill.runtime.http_client import BadReply, Client, ClientOptions, RefusedRequest, Reply
from distill.teachers import endpoints, wire
from distill.teachers.endpoints import KINDS, Item, Question
from distill.teachers.outputs import InvalidOutput, ResponseOutput, ScorerInfo
from models import checks
from models.checks import Range
from models.errors import SourceFailure, UserError

DEFAULT_TIMEOUT_SECONDS = 300.0  # of one request
DEFAULT_IN_FLIGHT = 16  # requests at a time, to each address
MAX_HEAD_BYTES = 2**34  # a head of 152k tokens and 8k numbers in float32 has 5e9
# Responses in one request, their tokens, and the bytes of their hidden states
MAX_GROUP, MAX_GROUP_TOKENS, MAX_GROUP_BYTES = 16, 32_768, 2**28
PROBE_TEXT = (
    "The quick brown fox jumps over 13 lazy dogs; 2 + 2 = 4.\nÉté, 你好, def f(x): return x"
)
PROBE_TOKENS, PROBE_PROMPT_TOKENS = 48, 8
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Waiting:
    item: Item
    future: Future[ResponseOutput]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.item))


class RemoteScorer:
    """A teacher on one or several servers of the same model (outputs.Scorer).

    Args:
      t: the sub-config `key` of the teacher, whose path has the addresses.
      output, top_k: as for endpoints.Question.
      vocab_size: of the student; a server of another kind than ours does not tell its own.

    Raises:
      UserError: naming the key or the server at fault, if the servers cannot be reached, serve
        different models, or do not give the output.
    """

    def __init__(self, t: ConfigDict, key: str, output: str, top_k: int, vocab_size: int) -> None:
        rules = {"kind": (*KINDS,), "timeout_seconds": Range(off="300")}
        checks.check_fields(t, rules | {"max_in_flight": Range(off="16")}, f"{key}.")
        urls = addresses.split_urls(t.path)
        self._key, self._in_flight = key, (t.max_in_flight or DEFAULT_IN_FLIGHT) * len(urls)
        timeout = t.timeout_seconds or DEFAULT_TIMEOUT_SECONDS
        try:
            self._client = Client(
                ClientOptions(urls, t.api_key_env, timeout, self._in_flight, MAX_HEAD_BYTES)
            )
        except UserError as error:
            about_field = re.match(r"(api_key_env|timeout_seconds|max_in_flight)\b", str(error))
            raise UserError(f"{key}.{'' if about_field else 'path='}{error}") from None
        self._endpoint = KINDS[t.kind]()
        if output not in self._endpoint.outputs:
            raise UserError(
                f"{key}.kind={t.kind}: gives {' or '.join(self._endpoint.outputs)} "
                f"(loss.teacher_output), not {output}; kind=ours gives hidden states"
            )
        infos = [self._read_info(url, t.model, vocab_size) for url in self._client.urls]
        for url, info in zip(self._client.urls, infos, strict=True):
            if info != infos[0]:
                raise UserError(
                    f"{key}.path: {self._client.urls[0]} serves {_describe_model(infos[0])}, but "
                    f"{url} {_describe_model(info)}"
                )
        self._info = infos[0]
        if self._info.top_k and top_k > self._info.top_k:
            raise UserError(
                f"{key}.path: {self._client.urls[0]} gives the {self._info.top_k} likeliest tokens "
                f"at most, but loss.teacher_topk is {top_k}; lower it, or serve with more"
            )
        self._question = Question(output, top_k, self._info)
        self._group_tokens = MAX_GROUP_TOKENS
        if output == "hidden":
            token_bytes = self._info.hidden_size * jnp.dtype(self._info.hidden_dtype).itemsize
            self._group_tokens = min(MAX_GROUP_TOKENS, MAX_GROUP_BYTES // max(1, token_bytes))
        self._probe: Item = make_probe(None, vocab_size)
        self._probe_output: ResponseOutput | None = None
        self._head_VE: np.ndarray | None = None
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._changed = threading.Condition()
        self._sender: threading.Thread | None = None
        self._is_closed = False

    @property
    def info(self) -> ScorerInfo:
        return self._info

    def _read_info(self, url: str, model: str, vocab_size: int) -> ScorerInfo:
        """Reads what a server lists of its model."""

        def read(reply: Reply) -> ScorerInfo:
            listed = reply.read_json()
            entries = listed.get("data") if isinstance(listed, dict) else None
            if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
                raise UserError(f"{url}/v1/models: lists no models")
            named = [x for x in entries if x.get("id") == model] if model else entries
            if len(named) != 1:
                ids = ", ".join(str(x.get("id")) for x in entries) or "no model"
                raise UserError(f"{url} serves {ids}; {self._key}.model={model!r} names none of it")
            try:
                return self._endpoint.make_info(named[0], vocab_size)
            except BadReply as error:
                raise UserError(f"{url}/v1/models: {error}") from None

        return self._name_key(lambda: self._client.get("/v1/models", read, url=url))

    def _name_key(self, request: Callable[[], T]) -> T:
        """Runs a request before step 0, whose errors name the config key."""
        try:
            return request()
        except UserError as error:
            raise UserError(f"{self._key}.path: {error}") from None

    def check(self, student: Policy) -> None:
        """Asks each server for a probe, twice, and prints how far apart the answers are.

        Raises:
          UserError: if a server does not answer, answers what cannot be right, or reads a text as
            other tokens than the student does.
        """
        self._probe = make_probe(student.tokenizer, self._info.vocab_size)
        outputs = []
        for url in self._client.urls:
            self._check_tokenizer(url, student)
            for _ in range(2):
                outputs.append(self._name_key(functools.partial(self._ask_probe, url)))
        self._probe_output = outputs[0]
        distance = max(endpoints.measure_distance(outputs[0], other) for other in outputs[1:])
        unit = "" if self._question.output == "hidden" else " nats"
        if distance > endpoints.PROBE_TOLERANCE and unit:
            raise UserError(
                f"{self._key}.path: equal requests get log-probabilities that differ by "
                f"{distance:.2f} nats on average: no teacher to learn from"
            )
        run_files.log_line(
            f"{self._key} ({', '.join(self._client.urls)}): equal requests get "
            + (f"answers {distance:.1e}{unit} apart" if distance else "the same bits")
        )

    def _ask_probe(self, url: str) -> ResponseOutput:
        items = [self._probe]
        read = functools.partial(endpoints.read_reply, self._endpoint, self._question, items)
        body = self._endpoint.make_body(self._question, items)
        try:
            (output,) = self._client.post(self._endpoint.path, body, read, url=url)
        except RefusedRequest as error:
            if not self._question.top_k:
                raise
            raise UserError(
                f"{error}; loss.teacher_topk={self._question.top_k} must be no more than the "
                "server gives (vllm serve --max-logprobs)"
            ) from None
        return output

    def _check_tokenizer(self, url: str, student: Policy) -> None:
        """Compares the tokenizers' files by hash or, if these are not the same, a text's tokens."""
        tokenizer = student.tokenizer
        if tokenizer is None:
            return
        parts = identity.describe_tokenizer(student.tokenizer_dir)
        if identity.hash_parts(parts) == self._info.tokenizer_hash:
            return
        path, body, read = self._endpoint.make_tokenizing(self._info, PROBE_TEXT)
        ids = self._name_key(lambda: self._client.post(path, body, read, url=url))
        if ids is None:
            run_files.log_line(
                f"{self._key}: {url} does not tell how it reads a text: not compared"
            )
        elif ids != tokenizer.encode(PROBE_TEXT, add_special_tokens=False):
            raise UserError(
                f"{self._key}.path: {url} reads a text as other tokens than the student: its "
                "tokenizer is another, so its log-probabilities are of other texts"
            )

    @property
    def head_VE(self) -> np.ndarray | None:
        """The output head, from a server or from this user's cache of heads by their hash."""
        if self._question.output == "hidden" and self._head_VE is None:
            path = _get_head_cache() / f"{self._info.head_hash}.safetensors"
            with contextlib.suppress(OSError, InvalidOutput):
                self._head_VE = self._decode_head(path.read_bytes())
            if self._head_VE is None:
                fetch = functools.partial(self._fetch_head, path)
                self._head_VE = self._name_key(lambda: self._client.get("/v1/head", fetch))
        return self._head_VE

    def _decode_head(self, data: bytes) -> np.ndarray:
        info = self._info
        return wire.decode_head(data, info.vocab_size, info.hidden_size, info.head_hash)

    def _fetch_head(self, path: Path, reply: Reply) -> np.ndarray:
        try:
            head_VE = self._decode_head(reply.body)
        except InvalidOutput as error:
            raise BadReply(f"the reply {error}") from None
        try:
            paths.write_bytes(path, reply.body)
        except OSError as error:
            run_files.log_line(f"{self._key}: the head is not cached: {error}")
        return head_VE

    def submit(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        where: str = "",
        limit: int | None = None,
    ) -> Future[ResponseOutput]:
        """Asks for the output of a response; never waits. See outputs.Scorer."""
        waiting = _Waiting(([*prompt], [*response[:limit]]), Future())
        with self._changed:
            assert not self._is_closed
            self._waiting.append(waiting)
            if self._sender is None:
                self._sender = threading.Thread(target=self._send, name="teacher", daemon=True)
                self._sender.start()
            self._changed.notify()
        return waiting.future

    def _send(self) -> None:
        """Sends what waits. Waits itself while too many requests are in flight."""
        probes = [] if self._info.model_hash else [self._probe]
        while group := self._take_group():
            items = [*probes, *(x.item for x in group)]
            body = self._endpoint.make_body(self._question, items)
            read = functools.partial(self._read_group, items, len(probes))
            try:
                request = self._client.submit(self._endpoint.path, body, read)
            except RuntimeError:  # closed meanwhile
                _fail(group, SourceFailure(f"{self._key}: the work was stopped"))
                return
            request.add_done_callback(functools.partial(self._finish, group))

    def _take_group(self) -> list[_Waiting]:
        """Takes the responses of the next request; none once this is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return []
            size = min(MAX_GROUP, max(1, len(self._waiting) // self._in_flight))
            group = [self._waiting.popleft()]
            tokens = group[0].num_tokens
            while self._waiting and len(group) < size:
                tokens += self._waiting[0].num_tokens
                if tokens > self._group_tokens:
                    break
                group.append(self._waiting.popleft())
            return group

    def _read_group(
        self, items: Sequence[Item], num_probes: int, reply: Reply
    ) -> list[ResponseOutput]:
        outputs = endpoints.read_reply(self._endpoint, self._question, items, reply)
        if num_probes and self._probe_output:
            endpoints.require_same_probe(self._probe_output, outputs[0])
        return outputs[num_probes:]

    def _finish(self, group: list[_Waiting], request: Future[list[ResponseOutput]]) -> None:
        if request.cancelled():
            _fail(group, SourceFailure(f"{self._key}: the work was stopped"))
        elif error := request.exception():
            # What a server refuses now it took at the start, so the server has changed.
            is_ours = isinstance(error, UserError)
            _fail(group, SourceFailure(f"{self._key}.path: {error}") if is_ours else error)
        else:
            for waiting, output in zip(group, request.result(), strict=True):
                waiting.future.set_result(output)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._client.close()


def _fail(group: Sequence[_Waiting], error: BaseException) -> None:
    for waiting in group:
        waiting.future.set_exception(error)


def _describe_model(info: ScorerInfo) -> str:
    return f"{info.model} ({info.model_hash})" if info.model_hash else info.model


def make_probe(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> Item:
    """Returns a prompt and a response: a text's tokens or, without a tokenizer, ids from all over
    the vocabulary."""
    ids = [int(i) for i in np.arange(1, PROBE_TOKENS + 1) * 7919 % vocab_size]
    if tokenizer is not None:
        ids = tokenizer.encode(PROBE_TEXT, add_special_tokens=False)[:PROBE_TOKENS]
    return ids[:PROBE_PROMPT_TOKENS], ids[PROBE_PROMPT_TOKENS:]


def _get_head_cache() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "qwen3-distill" / "heads"
