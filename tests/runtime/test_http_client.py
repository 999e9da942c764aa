"""The client of servers: what it repeats, what it does not, and that it loses and shows nothing."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from distill.runtime import addresses, http_client
from distill.runtime.http_client import BadReply, Client, ClientOptions, RefusedRequest, Reply
from models.errors import SourceFailure, UserError
from tests.support.http_servers import Answer, Asked, FakeServer, serve

TOKEN = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "WAIT_SECONDS", (0.01,) * 4)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Answers with the body that it was sent."""
    with serve(lambda asked: Answer(asked.body)) as server:
        yield server


def make_client(*urls: str, **options) -> Client:
    return Client(ClientOptions(urls, **options))


def read_json(reply: Reply) -> object:
    return reply.read_json()


def read_number(reply: Reply) -> int:
    value = reply.read_json()
    if not isinstance(value, int):
        raise BadReply(f"{value!r} is no number")
    return value


FAULTS = {
    "status 500": Answer({"error": {"message": "no room"}}, 500),
    "status 429": Answer(None, 429, {"Retry-After": "0"}),
    "drop": Answer(7, fault="drop"),
    "half": Answer(7777, fault="half"),
    "no json": Answer(b"{"),
    "not accepted": Answer("NaN"),
    "slow": Answer(7, seconds=0.8),
    "dripping": Answer(b" " * 20 + b"7", fault="drip"),
    "compressed": Answer(7, headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_tried_again_and_said_once(
    name: str, server: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    faults = [FAULTS[name]] * 2
    server.answer = lambda asked: faults.pop() if faults else Answer(asked.body)
    timeout = 0.5 if name in ("slow", "dripping") else 30
    with make_client(server.url, timeout_seconds=timeout) as client:
        assert client.post("/x", 7, read_number) == 7
    assert len(server.asked) == 3 and all(asked.body == 7 for asked in server.asked)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"warning: {server.url}: "), lines
    assert lines[1] == f"{server.url}: answers again"


@pytest.mark.parametrize("name", ["status 500", "drop", "half", "not accepted", "slow"])
def test_a_fault_that_stays_is_one_line_and_fails_what_comes_after(
    name: str, server: FakeServer
) -> None:
    server.answer = lambda _: FAULTS[name]
    with make_client(server.url, timeout_seconds=0.2 if name == "slow" else 30) as client:
        with pytest.raises(SourceFailure, match="no answer in 5 tries: ") as error:
            client.post("/v1/x", 7, read_number)
        assert str(error.value).startswith(f"{server.url}/v1/x: ") and "\n" not in str(error.value)
        assert "0x" not in str(error.value)  # no object's address
        before = len(server.asked)
        with pytest.raises(SourceFailure):
            client.submit("/x", 7, read_number).result()
        assert len(server.asked) == before


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with make_client(url) as client, pytest.raises(SourceFailure, match="nothing listens there"):
        client.get("/health", read_json)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_is_not_repeated(status: int, server: FakeServer) -> None:
    server.answer = lambda _: Answer({"error": {"message": "too\nlong"}}, status)
    with make_client(server.url) as client:
        with pytest.raises(RefusedRequest, match=f"status {status}: too long") as error:
            client.post("/x", 7, read_json)
        assert error.value.status == status and len(server.asked) == 1
        server.answer = lambda asked: Answer(asked.body)
        assert client.post("/x", 7, read_json) == 7


def test_another_server_takes_over(server: FakeServer) -> None:
    with (
        serve(lambda _: Answer(None, 503)) as broken,
        make_client(broken.url, server.url, max_in_flight=4) as client,
    ):
        futures = [client.submit("/x", i, read_json) for i in range(40)]
        assert [future.result() for future in futures] == list(range(40))
        assert len(broken.asked) <= 8  # then avoided
        assert len(server.asked) == 40


def test_the_least_busy_server_is_chosen() -> None:
    slow, fast = (lambda asked, t=t: Answer(asked.body, seconds=t) for t in (0.2, 0.005))
    with serve(slow) as a, serve(fast) as b, make_client(a.url, b.url, max_in_flight=4) as client:
        futures = [client.submit("/x", i, read_json) for i in range(40)]
        assert [future.result() for future in futures] == list(range(40))
        assert len(b.asked) > len(a.asked) > 0


def test_requests_in_flight_are_bounded(server: FakeServer) -> None:
    gate = threading.Event()

    def answer(asked: Asked) -> Answer:
        gate.wait(10)
        return Answer(asked.body)

    server.answer = answer
    with make_client(server.url, max_in_flight=3) as client:
        futures = []

        def submit() -> None:
            futures.extend(client.submit("/x", i, read_json) for i in range(20))

        thread = threading.Thread(target=submit)
        thread.start()
        while len(server.asked) < 3:
            time.sleep(0.01)
        time.sleep(0.1)
        assert thread.is_alive() and len(server.asked) == 3  # it waits too
        gate.set()
        thread.join()
        assert [future.result() for future in futures] == list(range(20))
    assert server.most_in_flight == 3


def test_what_a_server_asks_to_wait_is_waited(server: FakeServer) -> None:
    answers = [Answer(None, 429, {"Retry-After": "1"})]
    server.answer = lambda _: answers.pop() if answers else Answer(7)
    start = time.monotonic()
    with make_client(server.url) as client:
        assert client.get("/x", read_number) == 7
    assert time.monotonic() - start >= 1


def test_the_token_is_sent_and_never_shown(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", TOKEN)
    with make_client(server.url, api_key_env="MY_KEY") as client:
        client.post("/x", 7, read_json)
        assert server.asked[-1].headers["Authorization"] == f"Bearer {TOKEN}"
        for status, kind in ((401, RefusedRequest), (400, RefusedRequest), (500, SourceFailure)):
            server.answer = lambda _, status=status: Answer(f"wrong key {TOKEN}", status)
            with pytest.raises(kind, match=r"\*\*\*") as error:
                client.post("/x", 7, read_json)
            assert TOKEN not in str(error.value)


def test_a_redirect_is_refused(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", TOKEN)
    with (
        serve(lambda _: Answer(None, 307, {"Location": server.url})) as first,
        make_client(first.url, api_key_env="MY_KEY") as client,
        pytest.raises(RefusedRequest, match="redirects to another address"),
    ):
        client.post("/x", 7, read_json)
    assert not server.asked


def test_netrc_and_proxies_of_the_environment_are_left_out(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with make_client(server.url) as client:
        assert client.post("/x", 7, read_json) == 7
    assert "Authorization" not in server.asked[0].headers


def test_closing_cancels_what_waits(server: FakeServer) -> None:
    gate = threading.Event()
    server.answer = lambda asked: Answer(gate.wait(10))
    client = make_client(server.url, max_in_flight=1)
    futures = [client.submit("/x", i, read_json) for i in range(2)]
    time.sleep(0.1)
    client.close()
    gate.set()
    assert futures[0].result() is True and futures[1].cancelled()


def test_a_reply_has_a_size(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "MAX_REPLY_BYTES", 100)
    server.answer = lambda _: Answer("x" * 1000)
    with make_client(server.url) as client, pytest.raises(SourceFailure, match="more than 100 b"):
        client.get("/x", read_json)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://a:8000", "http://a:8000"),
        ("HTTPS://a/v1/", "https://a"),
        ("http://a/prefix/v1", "http://a/prefix"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_addresses(text: str, url: str) -> None:
    assert addresses.read_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "http://",
        "http://a:x",
        "http://a:99999",
        "ftp://a",
        "http://a b",
        "http://[::1",
        "http://a?b",
    ]
    + [f"http://me{x}@a" for x in (":hidden", ":hid/den", "", ":hid:den")],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UserError) as error:
        addresses.read_url(text)
    assert "hid" not in str(error.value)


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="timeout_seconds"):
        ClientOptions(("http://a",), timeout_seconds=0)
    with pytest.raises(UserError, match="max_in_flight"):
        ClientOptions(("http://a",), max_in_flight=0)
    with pytest.raises(UserError, match="twice"):
        ClientOptions(("http://a", "http://a/v1"))
    monkeypatch.setenv("MY_KEY", "one\ntwo")
    for name in ("MY_KEY", "NO_SUCH_KEY", "sk-123"):
        with pytest.raises(UserError, match="api_key_env"):
            make_client("http://a", api_key_env=name)
