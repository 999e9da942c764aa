"""A server's life: it binds, loads, answers, and stops without losing what it has accepted."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.routing import Route

from distill.policy import identity
from distill.policy.policy import Policy
from distill.rollout.options import DEFAULT_DRAFT_TOKENS, RolloutOptions
from distill.serving.app import make_app
from distill.serving.calls import Server
from distill.serving.formats import TokenNames
from distill.serving.guard import Guard, Metrics
from distill.serving.requests import ServedModel
from distill.serving.worker import Worker
from distill.teachers import wire
from models.errors import UserError

CLOSE_SECONDS = 5.0  # for replies that are on their way when the server stops
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, and what it takes."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    name: str = ""  # of the model; "": its path
    token: str = dataclasses.field(default="", repr=False)  # that clients must send; "": none
    slots: int = 32  # sequences that decode together
    max_length: int = 0  # tokens of a prompt and its response; 0: DEFAULT_MAX_LENGTH
    cache_tokens: int = 0  # see RolloutOptions
    drafts: str = ""  # see RolloutOptions
    draft_tokens: int = DEFAULT_DRAFT_TOKENS
    max_queue: int = 256  # sequences that wait
    max_logprobs: int = 20  # likeliest tokens of generated tokens
    max_top_k: int = 256  # and of scored ones
    max_body_mib: float = 16.0
    timeout_seconds: float = 600.0  # of a request
    stop_seconds: float = 20.0  # for running requests, once the server is to stop


DEFAULT_MAX_LENGTH = 8192  # tokens, or the model's positions if those are fewer


def is_loopback(host: str) -> bool:
    """Returns True if only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound but does not listen yet.

    Raises:
      UserError: if the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as closing:
            bound = closing.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            closing.pop_all()  # the caller's from here on
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: cannot listen there: {error.strerror or error}"
        ) from error
    return bound


class RunningServer:
    """A server that answers at `url`, in threads of its own."""

    def __init__(
        self, url: str, server: Server, guard: Guard, uvicorn_server: uvicorn.Server
    ) -> None:
        self.url, self.server, self.worker = url, server, server.worker
        self._guard, self._uvicorn = guard, uvicorn_server
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)

    def start(self, listening: socket.socket) -> None:
        self._socket = listening
        self.worker.start()
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise RuntimeError("the HTTP server did not start")
            time.sleep(0.01)

    def _serve(self) -> None:
        self._uvicorn.run(sockets=[self._socket])

    def wait(self) -> None:
        """Returns only if the device's thread ends; raises what has ended it."""
        # Not `join`, which takes a thread for ended where a signal interrupts it (Python 3.11).
        while self.worker.is_alive():
            time.sleep(_POLL_SECONDS)
        self.worker.check()

    def stop(self, seconds: float) -> int:
        """Refuses new requests, gives the open ones `seconds`, and ends. Returns how many requests
        were cut off."""
        self._guard.is_stopping = True
        end = time.monotonic() + seconds
        while self._guard.num_open and time.monotonic() < end and self.worker.is_alive():
            time.sleep(_POLL_SECONDS / 2)
        num_cut = self._guard.num_open
        self.worker.stop()
        self.worker.wait()
        self._uvicorn.should_exit = True
        if self._thread.is_alive():
            self._thread.join(2 * CLOSE_SECONDS)
        return num_cut


@contextlib.contextmanager
def open_server(
    subject: Policy, param_dtype: str, options: ServerOptions
) -> Iterator[RunningServer]:
    """Loads a described policy and serves it; on the way out stops at once, unless `stop` was
    called.

    Raises:
      UserError: if it cannot listen, or an option does not fit the model.
    """
    positions = subject.config.context_length
    if options.max_length > positions:
        raise UserError(f"--max_length={options.max_length}: the model has {positions} positions")
    max_length = options.max_length or min(positions, DEFAULT_MAX_LENGTH)
    vocab_size = subject.config.vocab_size
    try:
        rollout = RolloutOptions(
            options.slots,
            max_length=max_length,
            cache_tokens=options.cache_tokens,
            top_logprobs=min(options.max_logprobs, vocab_size),
            drafts=options.drafts,
            draft_tokens=options.draft_tokens,
        )
    except UserError as error:  # names an option, which is a flag of the same name
        raise UserError(f"--{error}") from None
    listening = bind_socket(options.host, options.port)
    loop: list[asyncio.AbstractEventLoop] = []

    def call_soon(function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop[0].call_soon_threadsafe(function)

    worker = Worker(subject, param_dtype, rollout, options.max_queue, call_soon)
    with contextlib.closing(listening), tempfile.TemporaryDirectory() as folder:
        worker.load()
        served = describe_served(worker, subject, param_dtype, rollout, options)
        metrics, names = Metrics(worker), TokenNames(subject.tokenizer)
        max_bytes = int(options.max_body_mib * 2**20)
        server = Server(worker, served, names, options.timeout_seconds, max_bytes)
        app = make_app(server, metrics, Path(folder))
        routes = {route.path for route in app.routes if isinstance(route, Route)}
        guard = Guard(app, options.token, metrics, routes)
        http = make_uvicorn(guard, loop.append)
        running = RunningServer(f"http://{format_address(listening)}", server, guard, http)
        try:
            running.start(listening)
            yield running
        finally:
            running.stop(0)


def describe_served(
    worker: Worker,
    subject: Policy,
    param_dtype: str,
    rollout: RolloutOptions,
    options: ServerOptions,
) -> ServedModel:
    """Describes the model of a worker that has loaded it."""
    assert worker.head_VE is not None
    tokenizer = identity.describe_tokenizer(subject.tokenizer_dir) if subject.tokenizer else {}
    return ServedModel(
        name=options.name or subject.path,
        subject=subject,
        param_dtype=param_dtype,
        max_length=rollout.max_length,
        max_logprobs=rollout.top_logprobs,
        max_top_k=min(options.max_top_k, subject.config.vocab_size),
        model_hash=identity.hash_parts(identity.describe_model(subject.path, worker.step)),
        tokenizer_hash=identity.hash_parts(tokenizer) if tokenizer else "",
        head_hash=wire.hash_head(worker.head_VE),
        step=worker.step,
    )


def format_address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def make_uvicorn(app: Any, started: Callable[[asyncio.AbstractEventLoop], Any]) -> uvicorn.Server:
    """Returns a server that calls `started` with its event loop before the first request."""

    async def run_app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        while (message := await receive())["type"] == "lifespan.startup":
            started(asyncio.get_running_loop())
            await send({"type": "lifespan.startup.complete"})
        assert message["type"] == "lifespan.shutdown"
        await send({"type": "lifespan.shutdown.complete"})

    config = uvicorn.Config(
        run_app,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(CLOSE_SECONDS),
    )
    return uvicorn.Server(config)
