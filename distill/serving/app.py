"""The routes of the server."""

import asyncio
import functools
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from distill.serving import calls, requests
from distill.serving.calls import Call, Server
from distill.serving.errors import ApiError
from distill.serving.guard import CLIENT_GONE, Metrics, finish, read_body
from distill.serving.schemas import BODIES, ChatRequest, CompletionRequest, ScoreRequest
from distill.teachers import wire

_REFS = "#/components/schemas/{model}"
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_JSON = {"application/json": {"schema": {"type": "object"}}}


def make_app(server: Server, metrics: Metrics, folder: Path) -> FastAPI:
    """Returns the routes, without what stands before them (guard.Guard).

    folder: where the file of the output head is written, when first asked for.
    """
    app = FastAPI(title="qwen3-distill", version="1", docs_url=None, redoc_url=None)
    served, read = server.served, functools.partial(_read_body, server)
    head_lock = asyncio.Lock()

    @app.post("/v1/completions", **_describe(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        return await calls.complete(server, request, await read(request, CompletionRequest))

    @app.post("/v1/chat/completions", **_describe(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        return await calls.chat(server, request, await read(request, ChatRequest))

    @app.post("/v1/score", **_describe(ScoreRequest, _BINARY))
    async def score(request: Request) -> Response:
        return await answer_score(server, request, await read(request, ScoreRequest))

    @app.get("/v1/head", responses={200: {"content": _BINARY}, **_get_errors()})
    async def get_head(request: Request) -> Response:
        async with head_lock:  # one request writes the file, and the others find it
            return await send_head(server, request, folder)

    @app.get("/v1/models", responses={200: {"content": _JSON}, **_get_errors()})
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [served.describe()]})

    @app.get("/v1/models/{name:path}", responses={200: {"content": _JSON}, **_get_errors()})
    async def get_model(name: str) -> Response:
        served.check_name(name)
        return JSONResponse(served.describe())

    @app.get("/health", responses={200: {"content": _JSON}, **_get_errors()})
    async def get_health() -> Response:
        if server.worker.failure is not None:
            raise ApiError("the device has failed", 500)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **_get_errors()})
    async def get_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.openapi = functools.partial(_describe_routes, app)
    _add_error_handlers(app)
    return app


async def _read_body(server: Server, request: Request, kind: type) -> Any:
    return await read_body(request, kind, server.max_body_bytes, server.seconds)


async def answer_score(server: Server, request: Request, body: ScoreRequest) -> Response:
    """Answers POST /v1/score."""
    served, call = server.served, Call(server)
    served.check_name(body.model)
    job = call.score(requests.check_scores(body, served), body.output, body.top_k)
    try:
        outputs = await finish(request, call.collect_outputs(job), server.seconds)
    except BaseException:
        call.cancel()
        raise
    metadata = {"model": served.name, "model_hash": served.model_hash, "output": body.output}
    metadata |= {"head_hash": served.head_hash}
    metadata |= {"step": "" if served.step is None else str(served.step)}
    data = await asyncio.to_thread(wire.encode_outputs, outputs, metadata)
    return Response(data, media_type="application/octet-stream")


async def send_head(server: Server, request: Request, folder: Path) -> Response:
    """Answers GET /v1/head; the head's hash is its ETag."""
    tag, path = f'"{server.served.head_hash}"', folder / "head.safetensors"
    tags = [part.strip() for part in request.headers.get("if-none-match", "").split(",")]
    if tag in tags or "*" in tags:
        return Response(status_code=304, headers={"ETag": tag})
    head_VE = server.worker.head_VE
    assert head_VE is not None
    if not path.exists():
        await asyncio.to_thread(_write_head, head_VE, path)
    return FileResponse(path, media_type="application/octet-stream", headers={"ETag": tag})


def _write_head(head_VE: np.ndarray, path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(wire.encode_head(head_VE))
    partial.replace(path)


def _describe(body: type, content: dict[str, Any] = _JSON) -> dict[str, Any]:
    """Returns the OpenAPI description of a route whose body the route reads itself."""
    schema = {"schema": {"$ref": _REFS.format(model=body.__name__)}}
    extra = {"requestBody": {"required": True, "content": {"application/json": schema}}}
    return {"openapi_extra": extra, "responses": {200: {"content": content}, **_get_errors()}}


def _get_errors() -> dict[Any, Any]:
    return {"default": {"description": "An error in OpenAI's form.", "content": _JSON}}


def _describe_routes(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI description, with the bodies that the routes read themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, bodies = models_json_schema([(x, "validation") for x in BODIES], ref_template=_REFS)
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(bodies["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema


def _add_error_handlers(app: FastAPI) -> None:
    """Answers all failures with OpenAI's JSON."""

    async def answer_error(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=CLIENT_GONE)
        if isinstance(error, HTTPException):
            error = ApiError(
                f"{request.method} {request.url.path}: {error.detail}", error.status_code
            )
        elif not isinstance(error, ApiError):
            error = ApiError(f"the server failed: {type(error).__name__}", 500)
        return Response(
            error.to_bytes(), error.status, error.headers, media_type="application/json"
        )

    for kind in (ApiError, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, answer_error)
