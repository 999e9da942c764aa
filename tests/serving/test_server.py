"""A server, asked by the official client and by hand: its answers against the sampler and the
scorer in this process."""

import itertools
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest

from distill import rollout
from distill.data import chat
from distill.evaluation import scoring
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rollout.sampling import Sampling
from distill.runtime import mesh as mesh_lib
from distill.serving.server import RunningServer
from distill.teachers import wire
from tests.support.runs import tiny_model
from tests.support.serving import TOKEN, get, post, read_metric, serve, wait_until

COMPLETIONS, CHAT, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/score"
PROMPT = "<|im_start|>user\nWhat is 12 + 5?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", 1, num_hidden_layers=1)


@pytest.fixture(scope="module")
def running(model: str) -> Iterator[RunningServer]:
    limits = {"max_queue": 16, "max_logprobs": 5, "max_top_k": 8, "max_body_mib": 0.5}
    with serve(model, slots=8, **limits) as running:
        yield running


@pytest.fixture(scope="module")
def subject(model: str) -> Policy:
    described = policy.make_abstract_for_inference(model, "float32", mesh_lib.make_mesh(1, 1, 1))
    with policy.use(described):
        return policy.load(described, "float32")


@pytest.fixture
def client(running: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=TOKEN, max_retries=0) as client:
        yield client


SAMPLINGS = [
    Sampling(0.0),
    Sampling(),
    Sampling(0.7, top_k=20, top_p=0.95),
    Sampling(1.3, min_p=0.05),
    Sampling(presence_penalty=1.5),
    Sampling(0.0, presence_penalty=0.5),
]


@pytest.mark.parametrize(
    "compared", [[2], pytest.param([0, 1, 3, 4, 5], marks=pytest.mark.long)], ids=["one", "others"]
)
def test_a_seed_means_what_it_means_for_generate(
    running: RunningServer, subject: Policy, compared: list[int]
) -> None:
    """Requests with other settings, which decode in the same slots, change nothing."""
    prompt = chat.encode(subject.tokenizer, PROMPT)  # pyright: ignore[reportArgumentType]

    def ask(number: int) -> Any:
        s = SAMPLINGS[number]
        fields = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
        fields |= {"min_p": s.min_p, "presence_penalty": s.presence_penalty}
        body = {"prompt": prompt, "max_tokens": 40, "seed": 7 + number, "n": 2, **fields}
        return post(running, COMPLETIONS, return_token_ids=True, **body).json()

    with ThreadPoolExecutor(len(SAMPLINGS)) as pool:
        replies = list(pool.map(ask, range(len(SAMPLINGS))))
    with policy.use(subject):
        for number in compared:
            reply = replies[number]
            spec = rollout.SampleSpec(2, 40, SAMPLINGS[number], seed=7 + number, batch_size=2)
            (expected,) = rollout.complete(subject, [prompt], spec)
            assert [x.tokens for x in expected] == [x["token_ids"] for x in reply["choices"]]
            reasons = [x["finish_reason"] for x in reply["choices"]]
            assert [x.finish_reason for x in expected] == reasons


def test_logprobs_are_those_of_score(running: RunningServer, subject: Policy) -> None:
    prompt = chat.encode(subject.tokenizer, PROMPT)  # pyright: ignore[reportArgumentType]
    body = {"prompt": [prompt, prompt[:9], prompt[:1]], "max_tokens": 12, "seed": 1, "n": 1}
    body |= {"temperature": 0.8, "logprobs": 3, "echo": True, "prompt_logprobs": 2}
    reply = post(running, COMPLETIONS, return_token_ids=True, **body).json()
    sequences = [x["prompt_token_ids"] + x["token_ids"] for x in reply["choices"]]
    with policy.use(subject):
        scored = list(scoring.score_sequences(subject, sequences, batch_size=4, top_k=3))
    for choice, (logprobs, top) in zip(reply["choices"], scored, strict=True):
        assert choice["logprobs"]["token_logprobs"][0] is None
        ours, size = choice["logprobs"]["token_logprobs"], len(choice["prompt_token_ids"])
        np.testing.assert_allclose(ours[1:size], logprobs[1:size], atol=1e-5)  # pyright: ignore
        # Tokens that were drawn have the decoder's own, whose sums are rounded otherwise.
        np.testing.assert_allclose(ours[size:], logprobs[size:], atol=3e-5)  # pyright: ignore
        assert len(choice["logprobs"]["tokens"]) == len(logprobs)
        assert choice["text"].startswith("".join(choice["logprobs"]["tokens"])[:1])
        pairs = zip(choice["logprobs"]["top_logprobs"][1:], top[1:], strict=True)
        for found, expected in pairs:
            assert max(found.values()) == pytest.approx(expected[0][1], abs=3e-5)  # pyright: ignore
        assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == size
        for place in range(1, size):
            entries = choice["prompt_logprobs"][place]
            own = entries[str(choice["prompt_token_ids"][place])]
            assert own["logprob"] == pytest.approx(logprobs[place], abs=1e-5)
            assert [str(i) for i, _ in top[place][:2]] == list(entries)[:2]  # pyright: ignore
            assert len(entries) in (2, 3)


def test_scores_are_those_of_the_scorer(running: RunningServer, subject: Policy) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 300, p).tolist(), rng.integers(0, 300, n).tolist())
        for p, n in ((1, 1), (5, 40), (30, 9), (12, 52))
    ]
    sequences = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    with policy.use(subject):
        expected = list(
            scoring.score_responses(subject, pairs, batch_size=4, top_k=5, with_hidden=True)
        )
    entry = get(running, "/v1/models").json()["data"][0]
    for output, names in (
        ("token", ["logp"]),
        ("top", ["logp", "top_logp"]),
        ("hidden", ["hidden"]),
    ):
        top_k = 5 if output == "top" else 0
        reply = post(running, SCORE, sequences=sequences, output=output, top_k=top_k)
        found, metadata = wire.decode_outputs(reply.content, 512)
        assert metadata["model_hash"] == entry["model_hash"] and metadata["model"] == "tiny"
        for ours, theirs in zip(found, expected, strict=True):
            for name in names:
                a, b = getattr(ours, name), getattr(theirs, name)
                np.testing.assert_allclose(a, b, atol=1e-5 if name != "hidden" else 1e-4)
            if output == "top":
                np.testing.assert_array_equal(ours.top_ids, theirs.top_ids)


@pytest.mark.long
@pytest.mark.parametrize("param_dtype", ["float32", "int8"])
def test_several_devices_answer_as_one(subject: Policy, model: str, param_dtype: str) -> None:
    mesh = mesh_lib.make_reader_mesh(subject.config)
    assert mesh.size > 1
    prompt = chat.encode(subject.tokenizer, PROMPT)  # pyright: ignore[reportArgumentType]
    body = {"prompt": prompt, "max_tokens": 30, "seed": 5, "n": 5, "top_k": 20, "logprobs": 1}
    pairs = [{"prompt": prompt[:4], "response": prompt[4:]}, {"prompt": [5], "response": [6]}]
    found = []
    for own_mesh in (mesh, None):
        with serve(model, mesh=own_mesh, param_dtype=param_dtype, slots=8) as running:
            reply = post(running, COMPLETIONS, return_token_ids=True, **body).json()
            scores = post(running, SCORE, sequences=pairs, output="hidden")
            outputs, _ = wire.decode_outputs(scores.content, 512, hidden_size=32)
            found.append(([choice["token_ids"] for choice in reply["choices"]], outputs))
            assert get(running, "/v1/models").json()["data"][0]["param_dtype"] == param_dtype
    assert found[0][0] == found[1][0]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(a.hidden, b.hidden, atol=1e-4)


def test_the_head_comes_once(running: RunningServer, subject: Policy) -> None:
    entry = get(running, "/v1/models/tiny").json()
    assert (entry["vocab_size"], entry["hidden_size"], entry["dtype"]) == (512, 32, "float32")
    reply = get(running, "/v1/head")
    head_VE = wire.decode_head(reply.content, 512, 32, entry["head_hash"])
    np.testing.assert_array_equal(head_VE, subject.params["embed"])
    assert reply.headers["ETag"] == f'"{entry["head_hash"]}"'
    again = get(running, "/v1/head", **{"If-None-Match": reply.headers["ETag"]})
    assert again.status_code == 304 and not again.content


def test_the_official_client_completes_and_streams(client: openai.OpenAI) -> None:
    body = {"model": "tiny", "prompt": [PROMPT, "4"], "max_tokens": 30, "seed": 3, "n": 2}
    whole = client.completions.create(**body, logprobs=2, stop=["\n\n"])
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert not any("\n\n" in choice.text for choice in whole.choices)
    assert whole.usage is not None and whole.usage.completion_tokens > 4
    texts = dict.fromkeys(range(4), "")
    reasons: dict[int, str] = {}
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(**body, stop=["\n\n"], stream=True, stream_options=options)  # pyright: ignore
    )
    for choice in itertools.chain.from_iterable(chunk.choices for chunk in chunks):
        texts[choice.index] += choice.text
        if choice.finish_reason:
            assert reasons.setdefault(choice.index, choice.finish_reason) == choice.finish_reason
    assert [choice.text for choice in whole.choices] == list(texts.values())
    assert {c.index: c.finish_reason for c in whole.choices} == reasons
    assert chunks[-1].usage == whole.usage


def test_the_official_client_chats(client: openai.OpenAI, subject: Policy) -> None:
    messages: Any = [{"role": "user", "content": "What is 12 + 5?"}]
    body: Any = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24}
    body |= {"extra_body": {"return_token_ids": True}}
    reply = client.chat.completions.create(**body, logprobs=True, top_logprobs=4)
    (choice,) = reply.choices
    prompt, tokens = reply.prompt_token_ids, choice.token_ids  # pyright: ignore
    assert prompt == chat.render_messages(subject.tokenizer, messages)  # pyright: ignore
    assert choice.message.content == chat.decode(subject.tokenizer, tokens)  # pyright: ignore
    assert choice.logprobs is not None and choice.logprobs.content is not None
    with policy.use(subject):
        ((logprobs, _),) = scoring.score_sequences(subject, [prompt + tokens], batch_size=1)
    drawn = [entry.logprob for entry in choice.logprobs.content]
    np.testing.assert_allclose(drawn, logprobs[len(prompt) :], atol=1e-5)  # pyright: ignore
    assert [len(x.top_logprobs) for x in choice.logprobs.content] == [4] * len(tokens)
    chunks = list(client.chat.completions.create(**body, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    off = {"chat_template_kwargs": {"enable_thinking": False}, "return_token_ids": True}
    quiet = client.chat.completions.create(**{**body, "extra_body": off})
    own = chat.render_messages(subject.tokenizer, messages, thinking=False)  # pyright: ignore
    assert quiet.prompt_token_ids == own != prompt  # pyright: ignore


BAD = [
    ({"prompt": "2"}, {"n": 0}, 400, "n"),
    ({"prompt": "2"}, {"n": "1"}, 400, "n"),
    ({"prompt": "2"}, {"n": 200}, 400, "n"),
    ({"prompt": "2"}, {"n": 17}, 400, None),  # more than may wait
    ({"prompt": "2"}, {"max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": "2"}, {"max_tokens": 600}, 400, "max_tokens"),
    ({"prompt": "2"}, {"max_tokens": 1.5}, 400, "max_tokens"),
    ({"prompt": "2"}, {"max_tokens": True}, 400, "max_tokens"),
    ({"prompt": "2"}, {"temperature": -0.1}, 400, "temperature"),
    ({"prompt": "2"}, {"temperature": 1e-9}, 400, "temperature"),
    ({"prompt": "2"}, {"temperature": 10**400}, 400, "temperature"),
    ({"prompt": "2"}, {"top_p": 0}, 400, "top_p"),
    ({"prompt": "2"}, {"seed": -1}, 400, "seed"),
    ({"prompt": "2"}, {"seed": 2**32}, 400, "seed"),
    ({"prompt": "2"}, {"logprobs": 6}, 400, "logprobs"),
    ({"prompt": "2"}, {"prompt_logprobs": 9}, 400, "prompt_logprobs"),
    ({"prompt": "2"}, {"prompt_logprobs": 1, "stream": True}, 400, "stream"),
    ({"prompt": "2"}, {"stop": ""}, 400, "stop"),
    ({"prompt": "2"}, {"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"prompt": "2"}, {"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"prompt": "2"}, {"bogus": 1}, 400, "bogus"),
    ({"prompt": "2"}, {"model": "other"}, 404, "model"),
    ({"prompt": ""}, {}, 400, "prompt"),
    ({"prompt": []}, {}, 400, "prompt"),
    ({"prompt": [[]]}, {}, 400, "prompt"),
    ({"prompt": [1, "a"]}, {}, 400, "prompt"),
    ({"prompt": [1, -1]}, {}, 400, "prompt"),
    ({"prompt": [512]}, {}, 400, "prompt"),
    ({"prompt": [10**30]}, {}, 400, "prompt"),
    ({"prompt": [3] * 513}, {}, 400, "prompt"),
    ({"prompt": {"a": 1}}, {}, 400, "prompt"),
    ({}, {}, 400, "prompt"),
    ({"messages": []}, {}, 400, "messages"),
    ({"messages": [{"role": "nobody", "content": "a"}]}, {}, 400, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, {}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "a" * 3000}]}, {}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "a"}]}, {"top_logprobs": 2}, 400, "top_logprobs"),
    ({"messages": [{"role": "user", "content": "a"}]}, {"tool_choice": "required"}, 400, None),
    ({"sequences": []}, {"output": "token"}, 400, "sequences"),
    ({"sequences": [{"prompt": [], "response": [1]}]}, {"output": "token"}, 400, None),
    ({"sequences": [{"prompt": [1], "response": [600]}]}, {"output": "token"}, 400, None),
    ({"sequences": [{"prompt": [1], "response": [1] * 512}]}, {"output": "token"}, 400, None),
    ({"sequences": [{"prompt": [1], "response": [1]}]}, {"output": "logits"}, 400, "output"),
    ({"sequences": [{"prompt": [1], "response": [1]}]}, {"output": "top"}, 400, "top_k"),
    (
        {"sequences": [{"prompt": [1], "response": [1]}]},
        {"output": "hidden", "top_k": 1},
        400,
        None,
    ),
    (
        {"sequences": [{"prompt": [1], "response": [1]}]},
        {"output": "top", "top_k": 9},
        400,
        "top_k",
    ),
    ({"sequences": [{"prompt": [1], "response": [1]}] * 17}, {"output": "token"}, 400, None),
]


def test_bad_requests_are_named(running: RunningServer) -> None:
    before = read_metric(running, "distill_generated_tokens_total")
    for body, more, status, param in BAD:
        route = CHAT if "messages" in body else SCORE if "sequences" in body else COMPLETIONS
        reply = post(running, route, **body, **more)
        error = reply.json()["error"]
        assert reply.status_code == status, (body, more, error)
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert "\n" not in error["message"]
        assert param is None or error["param"].startswith(param), (body, more, error)
    assert read_metric(running, "distill_generated_tokens_total") == before


RAW = [
    (b'{"prompt": "\xff"}', "application/json", 400),
    (b'{"prompt": "\\ud800"}', "application/json", 400),
    (b'{"prompt": "2", "temperature": NaN}', "application/json", 400),
    (b'{"prompt": "2", "top_p": -Infinity}', "application/json", 400),
    (b'{"prompt": "2"', "application/json", 400),
    (b"[" * 100_000, "application/json", 400),
    (b"", "application/json", 400),
    (b"[]", "application/json", 400),
    (b'{"prompt": "2"}', "text/plain", 415),
    (b'{"prompt": "' + b"a" * 2**20 + b'"}', "application/json", 413),
]


def test_bad_bytes_are_refused(running: RunningServer) -> None:
    import requests

    for data, kind, status in RAW:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
        url = f"{running.url}{COMPLETIONS}"
        chunked = requests.post(url, data=iter([data]), headers=headers, timeout=30)
        for reply in (requests.post(url, data=data, headers=headers, timeout=30), chunked):
            assert reply.status_code == status, (data[:40], reply.text)
            assert reply.json()["error"]["message"]
    assert get(running, "/nothing").json()["error"]["type"] == "not_found_error"
    assert get(running, COMPLETIONS).status_code == 405
    assert get(running, "/v1/models/other").status_code == 404


def test_nothing_is_done_without_the_token(running: RunningServer) -> None:
    before = read_metric(running, "distill_prompt_tokens_total")
    for token in ("", "wrong", TOKEN + "x"):
        for route in (COMPLETIONS, SCORE, "/v1/nothing"):
            reply = post(running, route, token, prompt=[4, 5, 6], output="token")
            assert reply.status_code == 401 and reply.json()["error"]["type"]
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        for route in ("/v1/models", "/v1/head", "/metrics", "/openapi.json"):
            assert get(running, route, Authorization=f"Bearer {token}").status_code == 401
    assert get(running, "/health", Authorization="").status_code == 200
    assert read_metric(running, "distill_prompt_tokens_total") == before


def test_a_client_that_leaves_frees_its_slots(running: RunningServer) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    before = read_metric(running, "distill_generated_tokens_total")
    for stream in (True, False):
        body = {"prompt": [5], "n": 12, "max_tokens": 500, "stream": stream, "temperature": 2.0}
        data = json.dumps(body).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + data)
            wait_until(lambda: running.worker.num_decoding == 8)
        wait_until(lambda: running.worker.num_pending == 0)
        wait_until(lambda: running.worker.num_decoding == 0)
    drawn = read_metric(running, "distill_generated_tokens_total") - before
    assert drawn < 2 * 12 * 500 / 4  # it stopped long before the end


def test_a_full_queue_says_when_to_come_again(running: RunningServer) -> None:
    with ThreadPoolExecutor(4) as pool:
        body = {"prompt": [5], "n": 12, "max_tokens": 300, "temperature": 2.0}
        replies = list(pool.map(lambda _: post(running, COMPLETIONS, **body), range(4)))
    codes = sorted(reply.status_code for reply in replies)
    assert codes[0] == 200 and codes[-1] == 429 and set(codes) == {200, 429}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"


def test_figures_of_requests_are_kept(running: RunningServer) -> None:
    post(running, COMPLETIONS, prompt=[5], max_tokens=2)
    text = get(running, "/metrics").text
    assert 'distill_requests_total{code="200",route="/v1/completions"}' in text
    assert 'distill_request_seconds_bucket{le="+Inf",route="/v1/completions"}' in text
    assert read_metric(running, "distill_slots_in_use") == 0
    assert read_metric(running, "distill_queue_length") == 0
