"""What the server does with failures, malformed requests, time and its own end."""

import functools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.numpy import load_file, save_file

from distill.serving import server as server_lib
from distill.serving.server import RunningServer
from models.errors import UserError
from tests.support.runs import tiny_model
from tests.support.serving import TOKEN, get, post, serve, wait_until

COMPLETIONS, SCORE = "/v1/completions", "/v1/score"
ROUTES = (COMPLETIONS, "/v1/chat/completions", SCORE)
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
POISON = 9  # a token whose embedding is NaN


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("models") / "poisoned"
    tiny_model(directory, 0, tie_word_embeddings=False, num_hidden_layers=1)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][POISON] = np.nan
    # So that it is never drawn: all other logits are far larger, or far smaller, than its zero.
    tensors["lm_head.weight"] *= 50
    tensors["lm_head.weight"][POISON] = 0
    save_file(tensors, path, {"format": "pt"})
    with serve(directory, slots=4, max_length=256, timeout_seconds=60) as running:
        yield running


def test_a_request_with_nan_fails_alone(running: RunningServer) -> None:
    replies: dict[int, requests.Response] = {}

    def ask(number: int) -> None:
        prompt = [4, POISON if number % 3 == 1 else 6, 5]
        if number >= 9:
            sequences = [{"prompt": prompt, "response": [6, 7]}]
            replies[number] = post(running, SCORE, sequences=sequences, output="token")
        else:
            body = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
            replies[number] = post(running, COMPLETIONS, **body)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, reply in replies.items():
        assert reply.status_code == (500 if number % 3 == 1 else 200), reply.text
    assert "not finite" in replies[1].json()["error"]["message"]
    texts = {replies[n].json()["choices"][0]["text"] for n in range(9) if n % 3 != 1}
    assert len(texts) == 1
    body = {"prompt": [4, POISON, 5], "max_tokens": 20, "stream": True}
    (event,) = post(running, COMPLETIONS, **body).text.split("\n\n")[:-1]
    assert json.loads(event.removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.fixture
def slow(running: RunningServer, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Makes each decoding step slow; returns a body that takes about 2.5 s."""
    real = running.worker._get_token_budget  # its name is the test's only knowledge of the inside

    def wait_first() -> int:
        real()
        time.sleep(0.1)
        return 1

    monkeypatch.setattr(running.worker, "_get_token_budget", wait_first)
    return {"prompt": [4], "max_tokens": 25, "temperature": 0}


def test_a_request_that_takes_too_long_ends(
    running: RunningServer, slow: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(running.server), "seconds", 0.5)
    reply = post(running, COMPLETIONS, **slow)
    assert reply.status_code == 504 and reply.json()["error"]["type"] == "timeout_error"
    events = post(running, COMPLETIONS, stream=True, **slow).text
    assert '"timeout_error"' in events and "[DONE]" not in events
    wait_until(lambda: running.worker.num_pending == 0)
    wait_until(lambda: running.worker.num_decoding == 0)


def test_a_body_that_does_not_come_is_not_waited_for(
    running: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(running.server), "seconds", 0.3)

    def send() -> Iterator[bytes]:
        yield b'{"prompt": '
        time.sleep(1)
        yield b'"a"}'

    url = running.url + COMPLETIONS
    assert requests.post(url, data=send(), headers=HEADERS, timeout=10).status_code == 408


def test_options_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--max_length=9999: the model has 512 positions"):
        tiny_model(tmp_path / "model", 0)
        with serve(tmp_path / "model", max_length=9999):
            pass
    taken = server_lib.bind_socket("127.0.0.1", 0)
    taken.listen()
    with taken, pytest.raises(UserError, match="cannot listen there: Address already in use"):
        server_lib.bind_socket("127.0.0.1", taken.getsockname()[1])
    assert [server_lib.is_loopback(x) for x in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert not any(server_lib.is_loopback(x) for x in ("0.0.0.0", "::", "10.0.0.1", "example"))


def read_resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.long)])
def test_malformed_requests_are_refused(running: RunningServer, count: int) -> None:
    schema = schemathesis.openapi.from_dict(get(running, "/openapi.json").json())
    codes: Counter[int] = Counter()
    # Made from the server's own description of itself.
    with requests.Session() as session:
        for route in ROUTES:
            strategy = schema[route]["POST"].as_strategy(
                generation_mode=schemathesis.GenerationMode.NEGATIVE
            )

            @settings(
                max_examples=-(-count // len(ROUTES)),
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
            )
            @given(case=strategy)
            def send(case: schemathesis.Case, route: str) -> None:
                body = case.body if isinstance(case.body, bytes) else json.dumps(case.body)
                reply = session.post(running.url + route, data=body, headers=HEADERS, timeout=60)
                codes[reply.status_code] += 1
                assert 400 <= reply.status_code < 500, (reply.status_code, body)
                assert set(reply.json()["error"]) == {"message", "type", "param", "code"}

            functools.partial(send, route=route)()
            post(running, "/v1/completions", prompt=[4], max_tokens=2).raise_for_status()
    assert sum(codes.values()) >= 0.9 * count
    assert running.worker.num_pending == 0


@pytest.mark.long
def test_memory_is_flat_under_malformed_requests(running: RunningServer) -> None:
    bodies = [b'{"prompt": ' + b"[" * size for size in range(1, 2000, 100)]
    bodies += [b'{"prompt": "' + b"\xff" * 50_000, b'{"prompt": [' + b"99999," * 20_000 + b"1]}"]
    sizes = []
    with requests.Session() as session:
        for _ in range(6):
            for number in range(500):
                url = running.url + ROUTES[number % 3]
                reply = session.post(
                    url, data=bodies[number % len(bodies)], headers=HEADERS, timeout=60
                )
                assert reply.status_code == 400
            sizes.append(read_resident_mib())
    assert sizes[-1] - sizes[1] < 20, sizes


def test_running_requests_finish_before_it_stops(running: RunningServer, slow: dict) -> None:
    """The last test of this server."""
    replies: list[requests.Response] = []
    asking = threading.Thread(target=lambda: replies.append(post(running, COMPLETIONS, **slow)))
    asking.start()
    wait_until(lambda: running.worker.num_decoding == 1)
    cut: list[int] = []
    stopping = threading.Thread(target=lambda: cut.append(running.stop(60)))
    stopping.start()
    wait_until(lambda: get(running, "/v1/models").status_code == 503)
    refused = post(running, COMPLETIONS, **slow)
    assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
    assert get(running, "/health", Authorization="").status_code == 503
    stopping.join()
    asking.join()
    assert replies[0].status_code == 200
    assert replies[0].json()["usage"]["completion_tokens"] == 25 and cut == [0]
    with pytest.raises(requests.ConnectionError):
        get(running, "/health")


@pytest.mark.long
def test_a_device_that_fails_ends_the_server(tmp_path: Path) -> None:
    """Nobody waits for ever, and the verb says what has happened."""
    tiny_model(tmp_path / "model", 0, num_hidden_layers=1)
    with serve(tmp_path / "model", slots=2, max_length=64) as running:
        assert get(running, "/health").status_code == 200

        def fail(token_budget: int | None) -> bool:
            raise MemoryError("the device has no room")

        assert running.worker._engine is not None
        running.worker._engine.advance = fail
        replies = [post(running, COMPLETIONS, prompt=[4], max_tokens=9) for _ in range(2)]
        assert [reply.status_code for reply in replies] == [503, 503]
        assert get(running, "/health").status_code == 500
        with pytest.raises(MemoryError, match="no room"):
            running.wait()
