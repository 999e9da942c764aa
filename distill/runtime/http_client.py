"""Requests to servers of one service: bounded in flight, retried, and balanced over several URLs.

A request goes to the server that has the fewest in flight. Where it fails in a way that may pass (a
connection that breaks or is refused, a time-out, status 408, 429 or 5xx, half a body, a reply that
`read` does not accept) it is sent to the next server; once all of them have failed it waits, and
tries again. What a server refuses for good (any other status) is not repeated. A request that runs
out of tries fails all that come after it, at once: nobody is left waiting for servers that are
gone.

Redirects are refused, since they could carry a bearer token to another host.
"""

import contextlib
import dataclasses
import json
import queue
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import requests
import urllib3

from distill.runtime import addresses, run_files
from models.errors import SourceFailure, UserError

T = TypeVar("T")

WAIT_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0)  # between rounds over all servers
MAX_RETRY_AFTER_SECONDS = 120.0  # of what a server may ask to wait
CONNECT_SECONDS = 10.0
AVOID_SECONDS = 30.0  # a server that failed is then the last choice
MAX_REPLY_BYTES = 2**30
_BLOCK_BYTES = 2**20
_MAX_TEXT = 300  # characters of a server's message that are shown
_RETRIED = {408, 409, 425, 429}  # and 5xx


class BadReply(Exception):
    """A reply that is not what was asked for; another try may bring a better one."""


class RefusedRequest(UserError):
    """A request that a server understood and will not serve, with its HTTP `status`."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply of status 2xx, or 304: its whole body, and the base URL of the server."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    def read_json(self) -> Any:
        """Returns the body as JSON. Raises BadReply if it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise BadReply(f"the reply is no JSON ({error})") from None


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """How to reach a service. The token of `api_key_env` is read once, and never shown.

    Raises:
      UserError: naming the field that is wrong.
    """

    urls: tuple[str, ...]  # of equal servers: http(s)://HOST:PORT; a /v1 at the end is left out
    api_key_env: str = ""  # name of the environment variable with the bearer token; "": none
    timeout_seconds: float = 600.0  # from a request's start to the end of its reply
    max_in_flight: int = 32  # requests on all servers together
    max_reply_bytes: int = 0  # 0: MAX_REPLY_BYTES

    def __post_init__(self) -> None:
        if not self.urls:
            raise UserError("urls: none is given")
        object.__setattr__(self, "urls", tuple(map(addresses.read_url, self.urls)))
        if len(set(self.urls)) < len(self.urls):
            raise UserError(f"{','.join(self.urls)}: names a server twice")
        if not 0 < self.timeout_seconds < 1e9:
            raise UserError(f"timeout_seconds={self.timeout_seconds}: must be above 0")
        if self.max_in_flight < 1:
            raise UserError(f"max_in_flight={self.max_in_flight}: must be at least 1")


@dataclasses.dataclass
class _Server:
    url: str
    in_flight: int = 0
    avoided_until: float = 0.0
    is_failing: bool = False  # the last request failed, and that was said


@dataclasses.dataclass(frozen=True)
class _Request:
    path: str
    body: Any  # for JSON; None: GET
    read: Callable[[Reply], Any]
    url: str  # base URL; "": of any server
    headers: Mapping[str, str]


class Client:
    """Sends requests to equal servers. A context; its methods may be called in any thread.

    Results are those of `read`, a function of the reply, which raises BadReply for one that another
    try may mend. Requests raise:
      RefusedRequest: for a status that no further try changes.
      SourceFailure: if no server gave an answer in any of the tries.
      UserError: what `read` raises.
    """

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        self._token = addresses.read_token(options.api_key_env)
        self._servers = [_Server(url) for url in options.urls]
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._failure = ""  # of a request that ran out of tries
        self._sessions = threading.local()
        # As many wait here as are in flight; `submit` then waits too.
        self._queue: queue.Queue[tuple[Future, _Request] | None] = queue.Queue(
            options.max_in_flight
        )
        self._threads: list[threading.Thread] = []

    @property
    def urls(self) -> tuple[str, ...]:
        return self._options.urls

    def get(
        self,
        path: str,
        read: Callable[[Reply], T],
        *,
        url: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Gets a path from any server, or from that of `url`; waits for the answer."""
        return self._run(_Request(path, None, read, url, headers or {}))

    def post(self, path: str, body: Any, read: Callable[[Reply], T], *, url: str = "") -> T:
        """Posts JSON to any server, or to that of `url`; waits for the answer."""
        return self._run(_Request(path, body, read, url, {}))

    def submit(self, path: str, body: Any, read: Callable[[Reply], T]) -> Future[T]:
        """Posts JSON to any server, in a thread. Waits if `max_in_flight` requests are waiting
        already."""
        future: Future[T] = Future()
        if self._closed.is_set():
            raise RuntimeError("the client is closed")
        with self._lock:
            if len(self._threads) < self._options.max_in_flight:
                # Daemons: an interrupted process does not wait for replies.
                thread = threading.Thread(target=self._work, name="http", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._queue.put((future, _Request(path, body, read, "", {})))
        return future

    def close(self) -> None:
        """Cancels the requests that wait. Those in flight end by themselves."""
        self._closed.set()
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if item is not None:
                    item[0].cancel()
        for _ in self._threads:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while not self._closed.is_set() and (item := self._queue.get()) is not None:
            future, request = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = self._run(request)
            except BaseException as error:  # whoever waits for the result raises it
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, request, item  # nothing is held while this waits for the next

    def _run(self, request: _Request) -> Any:
        """Sends a request until it is answered, or refused, or out of tries."""
        failures: Counter[str] = Counter()
        count = 1 if request.url else len(self._servers)
        waits, retry_after = iter(WAIT_SECONDS), 0.0
        while True:
            if self._failure:
                raise SourceFailure(self._failure)
            server = self._choose_server(failures, request.url)
            try:
                result = self._send(server, request)
            except _Failed as failed:
                failures[server.url] += 1
                retry_after = max(retry_after, failed.retry_after)
                reason = self._hide_token(str(failed))
            else:
                self._note_success(server)
                return result
            finally:
                with self._lock:
                    server.in_flight -= 1
            seconds = None
            if failures.total() % count == 0:  # all of them failed
                wait = next(waits, None)
                if wait is None:
                    self._failure = (
                        f"{server.url}{request.path}: no answer in {failures.total()} tries: "
                        f"{reason}"
                    )
                    raise SourceFailure(self._failure)
                seconds = max(wait * random.uniform(0.5, 1.0), retry_after)
                retry_after = 0.0
            self._note_failure(server, reason, seconds)
            if seconds is not None and self._closed.wait(seconds):
                raise SourceFailure(f"{server.url}: given up, since the work was stopped")

    def _choose_server(self, failures: Counter[str], url: str) -> _Server:
        """Returns the server that failed this request least, does not fail now and has least to
        do, and counts the request as its own."""
        now = time.monotonic()
        with self._lock:
            server = min(
                (server for server in self._servers if url in ("", server.url)),
                key=lambda s: (failures[s.url], s.avoided_until > now, s.in_flight),
            )
            server.in_flight += 1
            return server

    def _note_failure(self, server: _Server, reason: str, seconds: float | None) -> None:
        """Avoids a server for a while, and says so at its first failure."""
        with self._lock:
            is_first, server.is_failing = not server.is_failing, True
            server.avoided_until = time.monotonic() + AVOID_SECONDS
        if is_first:
            how = "elsewhere" if seconds is None else f"in {seconds:.1f} s"
            run_files.log_line(f"warning: {server.url}: {reason}; trying again {how}")

    def _note_success(self, server: _Server) -> None:
        with self._lock:
            was_failing, server.is_failing, server.avoided_until = server.is_failing, False, 0.0
        if was_failing:
            run_files.log_line(f"{server.url}: answers again")

    def _send(self, server: _Server, request: _Request) -> Any:
        """Sends a request once. Raises _Failed if another try may mend it."""
        start, timeout = time.monotonic(), self._options.timeout_seconds
        headers = {"Accept-Encoding": "identity", **request.headers}
        data = None
        if request.body is not None:
            data = json.dumps(request.body, allow_nan=False).encode()
            headers["Content-Type"] = "application/json"
        try:
            with self._get_session(server.url).request(
                "GET" if request.body is None else "POST",
                server.url + request.path,
                data=data,
                headers=headers,
                auth=self._authorise,
                timeout=(min(CONNECT_SECONDS, timeout), timeout),
                allow_redirects=False,
                stream=True,
            ) as response:
                body = self._read_body(response, start)
                reply = Reply(server.url, response.status_code, response.headers, body)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise _Failed(_explain_connection(error, timeout)) from error
        if not (200 <= reply.status < 300 or reply.status == 304):
            self._refuse_status(server, request, reply)
        try:
            return request.read(reply)
        except BadReply as error:
            raise _Failed(str(error)) from error

    def _authorise(self, prepared: requests.PreparedRequest) -> requests.PreparedRequest:
        """Adds the bearer token. That there is such a function keeps requests from sending what
        ~/.netrc has for the host."""
        if self._token:
            prepared.headers["Authorization"] = f"Bearer {self._token}"
        return prepared

    def _get_session(self, url: str) -> requests.Session:
        """Returns this thread's session, which keeps its connections open. This machine itself is
        never reached by way of a proxy."""
        sessions = self._sessions.__dict__
        if url not in sessions:
            sessions[url] = requests.Session()
            sessions[url].trust_env = not addresses.is_loopback(url)
        return sessions[url]

    def _read_body(self, response: requests.Response, start: float) -> bytes:
        """Reads the whole body, within the time and size that a reply may take."""
        if response.headers.get("Content-Encoding", "identity") not in ("", "identity"):
            raise _Failed("the reply is compressed, which was not asked for")
        blocks, size = [], 0
        while block := response.raw.read1(_BLOCK_BYTES, decode_content=False):
            blocks.append(block)
            size += len(block)
            if size > (limit := self._options.max_reply_bytes or MAX_REPLY_BYTES):
                raise _Failed(f"the reply has more than {limit:,} bytes")
            if time.monotonic() - start > self._options.timeout_seconds:
                raise _Failed(f"the reply took more than {self._options.timeout_seconds:g} s")
        return b"".join(blocks)

    def _refuse_status(self, server: _Server, request: _Request, reply: Reply) -> None:
        where, status = f"{server.url}{request.path}", reply.status
        said = self._hide_token(_find_message(reply.body))
        said = f": {said}" if said else ""
        if status in _RETRIED or 500 <= status < 600:
            raise _Failed(f"status {status}{said}", _read_retry_after(reply.headers))
        if 300 <= status < 400:
            raise RefusedRequest(
                f"{where}: redirects to another address, which is not followed; name that", status
            )
        if status in (401, 403):
            name = self._options.api_key_env
            hint = f"it refuses the token of {name}" if name else "it wants a token (api_key_env)"
            raise RefusedRequest(f"{where}: status {status}: {hint}{said}", status)
        raise RefusedRequest(f"{where}: status {status}{said}", status)

    def _hide_token(self, text: str) -> str:
        return text.replace(self._token, "***") if self._token else text


class _Failed(Exception):
    """A try that failed; `retry_after` are the seconds that the server asked to wait."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def _read_retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds of a Retry-After header; 0 without one. Dates are not read."""
    value = headers.get("Retry-After", "").strip()
    if not re.fullmatch(r"\d{1,9}(\.\d*)?", value):
        return 0.0
    return min(float(value), MAX_RETRY_AFTER_SECONDS)


def _find_message(body: bytes) -> str:
    """Returns the first words of what a server says about an error, in one line."""
    text: Any = body[: 64 * _MAX_TEXT].decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        text = json.loads(body)
        for name in ("error", "detail", "message"):
            if isinstance(text, dict) and text.get(name):
                text = text[name]
    text = text if isinstance(text, str) else json.dumps(text)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def _explain_connection(error: Exception, timeout_seconds: float) -> str:
    """Says in a few words how a connection failed. The libraries' own texts hold addresses of
    objects, and several errors within one another."""
    found: BaseException | None = error
    names = []
    while found is not None and len(names) < 8:
        names.append(type(found).__name__)
        if isinstance(found, ConnectionRefusedError):
            return "the connection is refused: nothing listens there"
        if isinstance(found, requests.ConnectTimeout):
            return f"no connection within {min(CONNECT_SECONDS, timeout_seconds):g} s"
        if isinstance(found, requests.Timeout | urllib3.exceptions.ReadTimeoutError | TimeoutError):
            return f"no reply within {timeout_seconds:g} s"
        if isinstance(found, OSError) and found.strerror and not found.__context__:
            return f"the connection fails: {found.strerror}"
        if isinstance(found, urllib3.exceptions.IncompleteRead):
            return "the connection broke in the middle of the reply"
        found = found.__cause__ or found.__context__
    return f"the connection broke ({names[0]})"
