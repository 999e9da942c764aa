"""Answers of teachers' servers in the documented shapes of vLLM and SGLang, and of ours, computed
by a model in this process; and the faults that such servers have."""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from distill.teachers import wire
from distill.teachers.outputs import ResponseOutput
from tests.support.http_servers import Answer, Asked
from tests.support.scorers import LocalScorer

MAX_LOGPROBS = 20  # vLLM's default of --max-logprobs
NAME, ROOT = "served", "org/teacher"
AnswerFn = Callable[[Asked], Answer]


def answer_as_vllm(scorer: LocalScorer) -> AnswerFn:
    """Returns a function that answers as vLLM: ids as keys, null first, K or K + 1 entries in no
    order, -9999 for minus infinity, choices in no order."""
    shuffle = random.Random(0).shuffle

    def score_ids(ids: list[int], k: int) -> list[Any]:
        found = scorer.compute(ids[:1], ids[1:])
        rows: list[Any] = [None]
        for n, token in enumerate(ids[1:]):
            top = zip(found["top_ids"][n, :k].tolist(), found["top_logp"][n, :k], strict=True)
            entries = {i: (float(logp), rank) for rank, (i, logp) in enumerate(top, start=1)}
            entries.setdefault(token, (float(found["logp"][n]), 999))
            pairs = list(entries.items())
            shuffle(pairs)
            rows.append(
                {
                    str(i): {"logprob": logp, "rank": rank, "decoded_token": f"<{i}>"}
                    for i, (logp, rank) in pairs
                }
            )
        return rows

    def answer(asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            return list_model({"max_model_len": 129})
        body, k = asked.body, asked.body.get("prompt_logprobs")
        if asked.path != "/v1/completions" or body["model"] != NAME or body["max_tokens"] < 1:
            return refuse(404 if body.get("model") != NAME else 400, "no such model or request")
        if k is not None and k > MAX_LOGPROBS:
            return refuse(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: 20"
            )
        prompts = body["prompt"]
        if isinstance(prompts, str):
            prompts = [encode(scorer, prompts)]
        choices = [
            {
                "index": index,
                "text": "x",
                "finish_reason": "length",
                "prompt_token_ids": ids,
                "prompt_logprobs": None if k is None else score_ids(ids, k),
            }
            for index, ids in enumerate(prompts)
        ]
        shuffle(choices)
        return Answer({"id": "cmpl-1", "model": NAME, "choices": choices, "usage": {}})

    return answer


def answer_as_sglang(scorer: LocalScorer) -> AnswerFn:
    """Returns a function that answers as SGLang: [log-probability, id, text] of the input from
    logprob_start_len on, of which the first has no log-probability."""

    def answer(asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            return list_model({"max_model_len": 129})
        body = asked.body
        if asked.path != "/generate" or not body["return_logprob"]:
            return refuse(404, "Not Found")
        if "text" in body:
            ids = encode(scorer, body["text"])
            return Answer(score_ids(ids, body["logprob_start_len"], 0))
        pairs = zip(body["input_ids"], body["logprob_start_len"], strict=True)
        return Answer([score_ids(ids, start, body["top_logprobs_num"]) for ids, start in pairs])

    def score_ids(ids: list[int], start: int, k: int) -> dict[str, Any]:
        found = scorer.compute(ids[: start + 1], ids[start + 1 :])
        entries: list[Any] = [[None, ids[start], None]]
        tops: list[Any] = [None]
        for n, token in enumerate(ids[start + 1 :]):
            entries.append([float(found["logp"][n]), token, None])
            top = zip(found["top_logp"][n, :k], found["top_ids"][n, :k].tolist(), strict=True)
            tops.append([[float(logp), i, None] for logp, i in top])
        about: dict[str, Any] = {"prompt_tokens": len(ids), "input_token_logprobs": entries}
        return {
            "text": "",
            "meta_info": about | ({"input_top_logprobs": tops} if k else {}),
        }

    return answer


def answer_as_ours(scorer: LocalScorer) -> AnswerFn:
    """Returns a function that answers as /v1/score, /v1/models and /v1/head of this project."""
    info, head_hash = scorer.info, wire.hash_head(scorer.head_VE)

    def answer(asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            about = {"vocab_size": info.vocab_size, "hidden_size": info.hidden_size}
            about |= {
                "dtype": "float32",
                "param_dtype": "float32",
                "max_top_k": 64,
                "tokenizer_hash": "",
            }
            hashes = {"model_hash": info.model_hash, "head_hash": head_hash}
            return list_model({"max_model_len": 128, **about, **hashes})
        if asked.path == "/v1/head":
            return Answer(wire.encode_head(scorer.head_VE))
        body = asked.body
        if asked.path == "/v1/completions":
            ids = encode(scorer, body["prompt"])
            return Answer({"choices": [{"index": 0, "prompt_token_ids": ids}]})
        outputs = []
        for x in body["sequences"]:
            found = scorer.compute(x["prompt"], x["response"])
            fields = {
                "token": ("logp",),
                "hidden": ("hidden",),
                "top": ("logp", "top_ids", "top_logp"),
            }[body["output"]]
            cut = {name: found[name] for name in fields}
            cut |= {n: cut[n][:, : body["top_k"]] for n in cut if n.startswith("top")}
            outputs.append(ResponseOutput(**cut))
        metadata = {"model_hash": info.model_hash, "head_hash": head_hash}
        return Answer(wire.encode_outputs(outputs, metadata))

    return answer


ANSWERS = {"vllm": answer_as_vllm, "sglang": answer_as_sglang, "ours": answer_as_ours}


def encode(scorer: LocalScorer, text: str) -> list[int]:
    assert scorer.policy.tokenizer
    return scorer.policy.tokenizer.encode(text, add_special_tokens=False)


def list_model(fields: dict[str, Any]) -> Answer:
    return Answer({"object": "list", "data": [{"id": NAME, "root": ROOT, **fields}]})


def refuse(status: int, message: str) -> Answer:
    return Answer({"error": {"message": message}}, status)


def spoil_numbers(answer: Answer) -> Answer:
    """Replaces the last log-probability or hidden state of a reply by NaN."""
    if isinstance(answer.body, bytes):
        nan = np.array([np.nan], np.float32).tobytes()
        size = 8 + int.from_bytes(answer.body[:8], "little")
        return Answer(answer.body[:size] + nan * ((len(answer.body) - size) // 4))
    text = json.dumps(answer.body)
    at = text.rindex("-") if "logprob" in text else 0
    end = at + 1 + next(i for i, x in enumerate(text[at + 1 :]) if x not in "0123456789.e-+")
    return Answer((text[:at] + "NaN" + text[end:]).encode())


def cut_sequence(answer: Answer) -> Answer:
    """Leaves out the last token of the last sequence of a reply."""
    if isinstance(answer.body, bytes):
        outputs, metadata = wire.decode_outputs(answer.body, 512)
        fields = outputs[-1].get_fields().items()
        outputs[-1] = ResponseOutput(**{name: x[:-1] for name, x in fields})
        return Answer(wire.encode_outputs(outputs, metadata))
    body = json.loads(json.dumps(answer.body))
    if isinstance(body, list):
        for rows in body[-1]["meta_info"].values():
            if isinstance(rows, list):
                rows.pop()
    else:
        max(body["choices"], key=lambda x: x["index"])["prompt_logprobs"].pop()
    return Answer(body)


def change_ids(answer: Answer) -> Answer:
    """Makes the last token of each sequence another one, as a server of other ids would."""
    if isinstance(answer.body, bytes):
        return cut_sequence(answer)
    body = json.loads(json.dumps(answer.body))
    for result in body if isinstance(body, list) else [body]:
        if "meta_info" in result:
            result["meta_info"]["input_token_logprobs"][-1][1] += 1
    for choice in body.get("choices", ()) if isinstance(body, dict) else ():
        choice["prompt_token_ids"][-1] += 1
    return Answer(body)


# What a server does to a good answer.
FAULTS: dict[str, Callable[[Answer], Answer]] = {
    "500": lambda good: refuse(500, "out of memory"),
    "429": lambda good: Answer({"error": "busy"}, 429, {"Retry-After": "0"}),
    "502 of a proxy": lambda good: Answer(b"<html>Bad Gateway</html>", 502),
    "dropped": lambda good: Answer(good.body, fault="drop"),
    "half a body": lambda good: Answer(good.body, fault="half"),
    "slow": lambda good: Answer(good.body, seconds=1.0),
    "no JSON": lambda good: Answer(b"[1, 2"),
    "not finite": spoil_numbers,
    "cut short": cut_sequence,
    "other ids": change_ids,
    "another shape": lambda good: Answer({"choices": {}}),
}
