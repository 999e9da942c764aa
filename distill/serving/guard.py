"""What stands before every route: the token, the size of the body, the time, and the counts."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Iterator
from typing import Any, TypeVar

import prometheus_client
import pydantic
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from distill.serving.errors import ApiError
from distill.serving.worker import Worker

OPEN_PATHS = ("/health",)  # without a token
CLIENT_GONE = 499  # the status that is counted for a client that left
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

Body = TypeVar("Body", bound=pydantic.BaseModel)
T = TypeVar("T")


class Metrics:
    """Figures for Prometheus, in a registry of this server's own."""

    def __init__(self, worker: Worker) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            *("distill_requests", "Requests by route and status.", ("route", "code")),
            registry=self.registry,
        )
        self.seconds = prometheus_client.Histogram(
            *("distill_request_seconds", "Seconds from a request to the end of its reply."),
            labelnames=("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_seconds = prometheus_client.Histogram(
            *("distill_first_byte_seconds", "Seconds from a request to the first of its reply."),
            labelnames=("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._worker = worker
        self.registry.register(self)  # pyright: ignore[reportArgumentType]

    def collect(self) -> Iterator[Metric]:
        """Yields what the device's thread counts."""
        worker, decoding = self._worker, self._worker.num_decoding
        gauges = {
            "distill_slots_in_use": ("Sequences that decode.", decoding),
            "distill_queue_length": (
                "Sequences that wait for a slot or to be scored.",
                max(0, worker.num_pending - decoding),
            ),
        }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(name, about, value=value)
        for name in ("prompt", "generated", "scored"):
            about = f"Tokens {'of prompts read' if name == 'prompt' else name}."
            yield CounterMetricFamily(f"distill_{name}_tokens", about, value=worker.counts[name])

    def render(self) -> bytes:
        return prometheus_client.generate_latest(self.registry)


class Guard:
    """Refuses requests without the token, and all while the server stops; counts the others.

    Args:
      token: that clients must send; "": none.
      routes: paths that are counted by name.
    """

    def __init__(self, app: ASGIApp, token: str, metrics: Metrics, routes: set[str]) -> None:
        self._app, self._token, self._metrics, self._routes = app, token.encode(), metrics, routes
        self.is_stopping = False
        self.num_open = 0  # requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, route = time.monotonic(), CLIENT_GONE, scope["path"]
        route = route if route in self._routes else "other"

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._metrics.first_seconds.labels(route).observe(time.monotonic() - start)
            await send(message)

        self.num_open += 1
        try:
            refusal = self._find_refusal(scope)
            if refusal is None:
                await self._app(scope, receive, send_counted)
            else:
                await send_error(refusal, send_counted)
        finally:
            self.num_open -= 1
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - start)

    def _find_refusal(self, scope: Scope) -> ApiError | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        expected = b"Bearer " + self._token
        is_known = len(given) == 1 and hmac.compare_digest(given[0], expected)
        if self._token and not is_known and scope["path"] not in OPEN_PATHS:
            return ApiError("no valid bearer token", 401, code="invalid_api_key")
        if self.is_stopping:
            return ApiError("the server is stopping", 503, retry_after=1)
        return None


async def send_error(error: ApiError, send: Send) -> None:
    headers = {"content-type": "application/json", "connection": "close", **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": error.to_bytes()})


async def read_body(request: Request, kind: type[Body], max_bytes: int, seconds: float) -> Body:
    """Reads and checks the JSON body of a request.

    Raises:
      ApiError: if it is too large, comes too slowly, or is not what `kind` describes.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != (
        "application/json"
    ):
        raise ApiError("Content-Type: must be application/json", 415)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise ApiError(f"the body has more than {max_bytes:,} bytes", 413)
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size > max_bytes:
                    raise ApiError(f"the body has more than {max_bytes:,} bytes", 413)
                parts.append(part)
    except TimeoutError:
        raise ApiError(f"the body did not come within {seconds:g} s", 408) from None
    return parse_body(b"".join(parts), kind)


def parse_body(data: bytes, kind: type[Body]) -> Body:
    """Parses JSON. Raises ApiError naming the first field that is not as it should be."""
    try:
        return kind.model_validate_json(data)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = format_location(first["loc"])
        message = first["msg"]
        raise ApiError(f"{param}: {message}" if param else message, param=param or None) from None


def format_location(parts: tuple[Any, ...]) -> str:
    """Returns where in a body an error is: messages[0].role."""
    # Names of alternatives, such as constrained-str, are pydantic's own.
    fields = [part for part in parts if isinstance(part, int) or str(part).isidentifier()]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fields)
    return text.removeprefix(".")[:200]


async def finish(request: Request, result: Awaitable[T], seconds: float) -> T:
    """Returns a result, unless the client leaves or it takes too long.

    Raises:
      ApiError: if it took longer than `seconds`.
      ClientDisconnect: if the client has left.
    """
    task, gone = asyncio.ensure_future(result), asyncio.ensure_future(wait_for_leave(request))
    try:
        done, _ = await asyncio.wait(
            {task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if task in done:
            return task.result()
        if gone in done:
            raise ClientDisconnect
        raise ApiError(f"not done within {seconds:g} s", 504)
    finally:
        for pending in (task, gone):
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pending


async def wait_for_leave(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
