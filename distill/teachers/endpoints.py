"""Requests for teachers' outputs to servers of three kinds, and the replies to them.

`ours` is this project's own server (python -m distill.serve); its route /v1/score also gives hidden
states. vLLM and SGLang give log-probabilities of a prompt's tokens and of the likeliest ones, so a
prompt with its response is sent as a prompt.

A reply is only as good as its checks: the number of sequences, their tokens, finite
log-probabilities, and the model that they are from. Ours says its hash in each reply. To the
others each request also sends a probe, whose log-probabilities must be those of the run's start: a
server that came back with another model does not teach.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distill.runtime.http_client import BadReply, Reply
from distill.teachers import wire
from distill.teachers.outputs import InvalidOutput, ResponseOutput, ScorerInfo, check_output

# vLLM writes -9999 for a log-probability of minus infinity.
VLLM_MINUS_INFINITY = -9999.0
# Nats that the probe's log-probabilities may differ on average. In bfloat16 they depend on the
# other sequences of a batch by some hundredths; on the model by more than one.
PROBE_TOLERANCE = 0.25

Item = tuple[list[int], list[int]]  # the ids of a prompt, and of its response
# A path, the body that asks there how the server reads a text, and what reads the ids in its reply
# (None: it does not tell).
Tokenizing = tuple[str, dict[str, Any], Callable[[Reply], list[int] | None]]


@dataclasses.dataclass(frozen=True)
class Question:
    """What a server is asked about each response."""

    output: str  # a key of outputs.OUTPUT_FIELDS
    top_k: int  # tokens of "top"
    info: ScorerInfo


class Ours:
    """python -m distill.serve."""

    outputs = ("token", "top", "hidden")
    path = "/v1/score"

    def make_info(self, entry: dict[str, Any], vocab_size: int) -> ScorerInfo:
        """Reads the server's description of its model. Raises BadReply if something is missing."""
        try:
            return ScorerInfo(
                model=_get(entry, "id", str),
                outputs=self.outputs,
                vocab_size=_get(entry, "vocab_size", int),
                context_length=_get(entry, "max_model_len", int),
                hidden_size=_get(entry, "hidden_size", int),
                top_k=_get(entry, "max_top_k", int),
                hidden_dtype=_get(entry, "dtype", str),
                param_dtype=_get(entry, "param_dtype", str),
                model_hash=_get(entry, "model_hash", str),
                tokenizer_hash=str(entry.get("tokenizer_hash") or ""),
                head_hash=_get(entry, "head_hash", str),
            )
        except BadReply as error:
            raise BadReply(
                f"{error}: no server of kind ours (set kind to vllm or sglang)"
            ) from None

    def make_body(self, question: Question, items: Sequence[Item]) -> dict[str, Any]:
        sequences = [{"prompt": prompt, "response": response} for prompt, response in items]
        body = {"model": question.info.model, "sequences": sequences, "output": question.output}
        return body | ({"top_k": question.top_k} if question.output == "top" else {})

    def read(self, question: Question, items: Sequence[Item], reply: Reply) -> list[ResponseOutput]:
        info, wants = question.info, question.output
        try:
            outputs, metadata = wire.decode_outputs(
                reply.body,
                info.vocab_size,
                hidden_size=info.hidden_size if wants == "hidden" else 0,
                top_k=question.top_k if wants == "top" else 0,
            )
        except InvalidOutput:  # as those of another model may be
            self._require_model(info, wire.decode_tensors(reply.body)[1])
            raise
        self._require_model(info, metadata)
        if len(outputs) != len(items):
            raise BadReply(f"{len(outputs)} outputs for {len(items)} responses")
        return outputs

    def _require_model(self, info: ScorerInfo, metadata: dict[str, str]) -> None:
        # The head's bytes also differ where the same files were loaded in another dtype.
        for name, expected in (("model_hash", info.model_hash), ("head_hash", info.head_hash)):
            if metadata.get(name) != expected:
                raise BadReply(
                    f"the server has another model than at the start: {name} "
                    f"{metadata.get(name)!r}, not {expected!r}"
                )

    def make_tokenizing(self, info: ScorerInfo, text: str) -> Tokenizing:
        return _make_completion_tokenizing(info.model, text)


class VLLM:
    """vLLM's /v1/completions with prompt_logprobs."""

    outputs = ("token", "top")
    path = "/v1/completions"

    def make_info(self, entry: dict[str, Any], vocab_size: int) -> ScorerInfo:
        return _make_foreign_info(self.outputs, entry, vocab_size)

    def make_body(self, question: Question, items: Sequence[Item]) -> dict[str, Any]:
        return {
            "model": question.info.model.partition(" ")[0],
            "prompt": [prompt + response for prompt, response in items],
            "max_tokens": 1,  # 0 is refused
            "temperature": 1.0,
            "prompt_logprobs": question.top_k if question.output == "top" else 0,
            "add_special_tokens": False,
            "return_token_ids": True,
        }

    def read(self, question: Question, items: Sequence[Item], reply: Reply) -> list[ResponseOutput]:
        choices = _get(reply.read_json(), "choices", list)
        by_index = {_get(choice, "index", int): choice for choice in choices}
        if sorted(by_index) != list(range(len(items))) or len(choices) != len(items):
            raise BadReply(f"choices {sorted(by_index)} for {len(items)} prompts")
        return [
            self._read_choice(question, prompt, response, by_index[number])
            for number, (prompt, response) in enumerate(items)
        ]

    def _read_choice(
        self, question: Question, prompt: list[int], response: list[int], choice: dict[str, Any]
    ) -> ResponseOutput:
        ids = prompt + response
        _require_echo(ids, choice.get("prompt_token_ids") or ids)
        rows = _get(choice, "prompt_logprobs", list)
        if len(rows) != len(ids):
            raise BadReply(f"prompt_logprobs of {len(rows)} tokens for a prompt of {len(ids)}")
        logp, tops = [], []
        for token, row in zip(response, rows[len(prompt) :], strict=True):
            # Keyed by the ids as texts: the likeliest, and the prompt's own token.
            if not isinstance(row, dict) or str(token) not in row:
                raise BadReply(f"prompt_logprobs lack the prompt's own token {token}")
            own = _to_float(_get(row[str(token)], "logprob"))
            if own <= VLLM_MINUS_INFINITY and question.output == "token":
                raise BadReply(f"the token {token} has probability 0 for the teacher")
            logp.append(own)
            if question.output == "top":
                tops.append(_sort_vllm_top(row, question.top_k))
        return _make_output(question, logp, tops)

    def make_tokenizing(self, info: ScorerInfo, text: str) -> Tokenizing:
        path, body, read = _make_completion_tokenizing(info.model.partition(" ")[0], text)
        return path, {**body, "add_special_tokens": False}, read


class SGLang:
    """SGLang's /generate with logprobs of the input."""

    outputs = ("token", "top")
    path = "/generate"

    def make_info(self, entry: dict[str, Any], vocab_size: int) -> ScorerInfo:
        return _make_foreign_info(self.outputs, entry, vocab_size)

    def make_body(self, question: Question, items: Sequence[Item]) -> dict[str, Any]:
        return {
            "input_ids": [prompt + response for prompt, response in items],
            "sampling_params": {
                "temperature": 1.0,
                "max_new_tokens": 0,
                "skip_special_tokens": False,
            },
            "return_logprob": True,
            # The first entry is always null: that of the prompt's last token.
            "logprob_start_len": [len(prompt) - 1 for prompt, _ in items],
            "top_logprobs_num": question.top_k if question.output == "top" else 0,
        }

    def read(self, question: Question, items: Sequence[Item], reply: Reply) -> list[ResponseOutput]:
        found = reply.read_json()
        found = [found] if isinstance(found, dict) else found
        if not isinstance(found, list) or len(found) != len(items):
            raise BadReply(f"no list of {len(items)} results, one for each prompt")
        return [
            self._read_result(question, prompt, response, _get(result, "meta_info", dict))
            for (prompt, response), result in zip(items, found, strict=True)
        ]

    def _read_result(
        self, question: Question, prompt: list[int], response: list[int], about: dict[str, Any]
    ) -> ResponseOutput:
        count = about.get("prompt_tokens", len(prompt) + len(response))
        if count != len(prompt) + len(response):
            raise BadReply(f"it read {count} tokens of {len(prompt) + len(response)}")
        entries = _drop_null(_get(about, "input_token_logprobs", list), len(response))
        pairs = [_read_pair(entry) for entry in entries]
        _require_echo(response, [token for _, token in pairs])
        tops = []
        if question.output == "top":
            rows = _drop_null(_get(about, "input_top_logprobs", list), len(response))
            tops = [
                _cut_top([_read_pair(x) for x in _as_list(row)], question.top_k) for row in rows
            ]
        return _make_output(question, [logp for logp, _ in pairs], tops)

    def make_tokenizing(self, info: ScorerInfo, text: str) -> Tokenizing:
        sampling = {"temperature": 1.0, "max_new_tokens": 0}
        body = {"text": text, "sampling_params": sampling, "return_logprob": True}

        def read(reply: Reply) -> list[int]:
            found = reply.read_json()
            found = found[0] if isinstance(found, list) and found else found
            entries = _get(_get(found, "meta_info", dict), "input_token_logprobs", list)
            return [_get_id(entry) for entry in entries]

        return self.path, body | {"logprob_start_len": 0}, read


Endpoint = Ours | VLLM | SGLang
KINDS: dict[str, type[Ours] | type[VLLM] | type[SGLang]] = {
    "ours": Ours,
    "vllm": VLLM,
    "sglang": SGLang,
}


def read_reply(
    endpoint: Endpoint, question: Question, items: Sequence[Item], reply: Reply
) -> list[ResponseOutput]:
    """Returns the outputs of the items. Raises BadReply for a reply that cannot be right."""
    info, wants = question.info, question.output
    try:
        outputs = endpoint.read(question, items, reply)
        for (_, response), output in zip(items, outputs, strict=True):
            check_output(
                output,
                len(response),
                info.vocab_size,
                hidden_size=info.hidden_size if wants == "hidden" else 0,
                top_k=question.top_k if wants == "top" else 0,
            )
            if wants == "token" and output.logp is None:
                raise BadReply("the reply has no logp")
        return outputs
    except InvalidOutput as error:
        raise BadReply(f"the reply {error}") from None


def require_same_probe(before: ResponseOutput, now: ResponseOutput) -> None:
    """Raises BadReply if a server's probe is not the one of the run's start."""
    distance = measure_distance(before, now)
    if distance > PROBE_TOLERANCE:
        raise BadReply(
            f"the server has another model than at the start: the same tokens' log-probabilities "
            f"differ by {distance:.2f} nats on average"
        )


def measure_distance(one: ResponseOutput, other: ResponseOutput) -> float:
    """Returns the mean absolute difference of two outputs of one response: of their
    log-probabilities, of the likeliest tokens by rank, or of their hidden states."""
    pairs = ((one.logp, other.logp), (one.top_logp, other.top_logp), (one.hidden, other.hidden))
    for a, b in pairs:
        if a is not None and b is not None:
            return float(np.mean(np.abs(a.astype(np.float64) - b.astype(np.float64))))
    return float("inf")


def _make_completion_tokenizing(model: str, text: str) -> Tokenizing:
    body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0.0}

    def read(reply: Reply) -> list[int] | None:
        choices = _get(reply.read_json(), "choices", list)
        return choices[0].get("prompt_token_ids") if choices else None

    return "/v1/completions", body | {"return_token_ids": True}, read


def _make_foreign_info(
    outputs: tuple[str, ...], entry: dict[str, Any], vocab_size: int
) -> ScorerInfo:
    """Returns what servers of others tell of their model in /v1/models: its name and, where that is
    another, the path it was loaded from. They do not tell the size of its vocabulary."""
    name, root = _get(entry, "id", str), entry.get("root")
    length = entry.get("max_model_len")
    return ScorerInfo(
        model=f"{name} ({root})" if root and root != name else name,
        outputs=outputs,
        vocab_size=vocab_size,
        context_length=length - 1 if isinstance(length, int) else 0,  # one token is generated
    )


def _make_output(question: Question, logp: list[float], tops: list[Any]) -> ResponseOutput:
    with np.errstate(over="ignore"):  # infinite numbers are refused later
        own_logp = np.array(logp, np.float32)
        if question.output == "token":
            return ResponseOutput(logp=own_logp)
        pairs = np.array(tops, np.float64).reshape(len(tops), -1, 2)
        return ResponseOutput(
            logp=own_logp,
            top_ids=pairs[..., 1].astype(np.int32),
            top_logp=pairs[..., 0].astype(np.float32),
        )


def _sort_vllm_top(row: dict[str, Any], top_k: int) -> list[tuple[float, int]]:
    """Returns (log-probability, id) of the likeliest tokens. The prompt's own token is among the
    entries whether it is one of them or not; its rank tells."""
    entries = []
    for key, value in row.items():
        if not key.isdecimal():
            raise BadReply(f"prompt_logprobs has the key {key[:40]!r}, which is no token id")
        rank = value.get("rank") if isinstance(value, dict) else None
        order = rank if isinstance(rank, int) else 0
        entries.append((-_to_float(_get(value, "logprob")), order, int(key)))
    return _cut_top([(-negative, token) for negative, _, token in sorted(entries)], top_k)


def _cut_top(pairs: list[tuple[float, int]], top_k: int) -> list[tuple[float, int]]:
    if len(pairs) < top_k:
        raise BadReply(f"it gives the {len(pairs)} likeliest tokens, not {top_k}")
    if any(token >= 2**31 for _, token in pairs):
        raise BadReply("a token id among the likeliest is above 2**31")
    return pairs[:top_k]


def _drop_null(entries: list[Any], count: int) -> list[Any]:
    """Returns the entries of a response, without that of the prompt's last token."""
    if len(entries) != count + 1:
        raise BadReply(f"log-probabilities of {len(entries)} tokens, not {count + 1}")
    return entries[1:]


def _read_pair(entry: Any) -> tuple[float, int]:
    """Returns (log-probability, id) of SGLang's [log-probability, id, text or null]."""
    token = _get_id(entry)
    return _to_float(entry[0]), token


def _get_id(entry: Any) -> int:
    values = _as_list(entry)
    if len(values) < 2 or type(values[1]) is not int:
        raise BadReply(f"an entry of the log-probabilities is {str(entry)[:60]}")
    return values[1]


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadReply(f"{str(value)[:60]} is no list")
    return value


def _to_float(value: Any) -> float:
    if type(value) not in (int, float):
        raise BadReply(f"a log-probability is {str(value)[:60]}")
    try:
        return float(value)
    except OverflowError:
        raise BadReply("a log-probability is no number of a float") from None


def _get(value: Any, name: str, kind: type | None = None) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise BadReply(f"the reply has no {name}")
    if kind and not isinstance(value[name], kind):
        raise BadReply(f"{name} is {str(value[name])[:60]}")
    return value[name]


def _require_echo(sent: Sequence[int], read: Any) -> None:
    if list(sent) != read:
        raise BadReply("the server read other token ids than those that were sent")
