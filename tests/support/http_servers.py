"""A server in a thread of the test, which answers with a function and can fail in every way."""

import contextlib
import dataclasses
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a client sent; `body` is None for a GET."""

    path: str
    headers: Mapping[str, str]
    body: Any


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the server sends: bytes as they are, anything else as JSON.

    fault: "drop" closes the connection before the reply, "half" in the middle of its body; "drip"
    sends a byte every tenth of a second.
    """

    body: Any = None
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fault: str = ""
    seconds: float = 0.0  # before the reply


class FakeServer:
    """Answers each request with `answer`, and records all of them in `asked`."""

    def __init__(self, answer: Callable[[Asked], Answer]) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                outer.handle(self, None)

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length", 0))
                outer.handle(self, json.loads(self.rfile.read(size)))

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Says nothing of clients that are gone."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def handle(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        asked = Asked(handler.path, dict(handler.headers), body)
        with self.lock:
            self.asked.append(asked)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self._send(handler, self.answer(asked))
        finally:
            with self.lock:
                self.in_flight -= 1

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        time.sleep(answer.seconds)
        if answer.fault == "drop":
            linger = struct.pack("ii", 1, 0)  # a reset instead of an orderly end
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            handler.close_connection = True
            return
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if answer.fault == "half":
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
            return
        for i in range(len(data) if answer.fault == "drip" else 0):
            handler.wfile.write(data[i : i + 1])
            handler.wfile.flush()
            time.sleep(0.1)
        if answer.fault != "drip":
            handler.wfile.write(data)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def serve(answer: Callable[[Asked], Answer]) -> Iterator[FakeServer]:
    server = FakeServer(answer)
    try:
        yield server
    finally:
        server.close()
