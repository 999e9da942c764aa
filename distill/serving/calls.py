"""One call of a route: its jobs are submitted, and their results become a reply or a stream."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from distill.serving import formats
from distill.serving import requests as reading
from distill.serving.errors import ApiError
from distill.serving.formats import TokenLogprobs, TokenNames
from distill.serving.guard import finish
from distill.serving.jobs import Generation, Job, Piece, Scoring
from distill.serving.requests import ServedModel
from distill.serving.schemas import ChatRequest, CompletionRequest
from distill.serving.worker import Worker
from distill.teachers.outputs import ResponseOutput


@dataclasses.dataclass(frozen=True)
class Server:
    """What the calls of all routes share."""

    worker: Worker
    served: ServedModel
    names: TokenNames
    seconds: float  # that a request may take
    max_body_bytes: int


class Call:
    """The jobs of one request, and the queue of what they deliver in the event loop."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._jobs: list[Job] = []
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._outputs: asyncio.Queue[list[ResponseOutput] | Exception] = asyncio.Queue()

    def generate(
        self, prompts: list[list[int]], limits: list[int], options: reading.GenerationOptions
    ) -> Generation:
        job = Generation(prompts, limits, options, self.pieces.put_nowait)
        self._submit(job)
        return job

    def score(
        self, sequences: list[tuple[list[int], list[int]]], output: str, top_k: int
    ) -> Scoring:
        job = Scoring(sequences, output, top_k, self._outputs.put_nowait)
        self._submit(job)
        return job

    def _submit(self, job: Job) -> None:
        try:
            self.server.worker.submit(job)
        except ApiError:
            self.cancel()  # the request's other job
            raise
        self._jobs.append(job)

    def cancel(self) -> None:
        """Frees what the jobs that are not done hold."""
        for job in self._jobs:
            self.server.worker.cancel(job)

    async def collect(
        self, generation: Generation | None, scoring: Scoring | None
    ) -> tuple[list[list[Piece]], list[ResponseOutput]]:
        """Returns the pieces of each response and the outputs, once all are done."""
        return await self._collect_pieces(generation), await self.collect_outputs(scoring)

    async def _collect_pieces(self, job: Generation | None) -> list[list[Piece]]:
        pieces: list[list[Piece]] = [[] for _ in range(job.num_sequences if job else 0)]
        left = len(pieces)
        while left:
            piece = await self.pieces.get()
            if isinstance(piece, Exception):
                raise piece
            pieces[piece.index].append(piece)
            left -= bool(piece.finish_reason)
        return pieces

    async def collect_outputs(self, job: Scoring | None) -> list[ResponseOutput]:
        outputs = await self._outputs.get() if job else []
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    async def iterate_pieces(self, job: Generation) -> AsyncIterator[Piece]:
        """Yields the pieces of all responses as they come.

        Raises:
          ApiError: if the model failed, or the time is over.
        """
        loop = asyncio.get_running_loop()
        left, end = job.num_sequences, loop.time() + self.server.seconds
        while left:
            try:
                piece = await asyncio.wait_for(self.pieces.get(), end - loop.time())
            except TimeoutError:
                raise ApiError(f"not done within {self.server.seconds:g} s", 504) from None
            if isinstance(piece, Exception):
                raise piece
            left -= bool(piece.finish_reason)
            yield piece


async def complete(server: Server, request: Request, body: CompletionRequest) -> Response:
    """Answers POST /v1/completions."""
    served = server.served
    served.check_name(body.model)
    prompts = await asyncio.to_thread(reading.encode_prompts, body, served)
    options = reading.make_options(body, served, body.logprobs)
    count = reading.DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    limits = reading.make_limits(prompts, count, served)
    if body.stream and not count:
        raise ApiError("max_tokens: must be at least 1 in a stream", param="max_tokens")
    asked = reading.find_prompt_output(body, served)
    call = Call(server)
    generation = call.generate(prompts, limits, options) if count else None
    envelope = formats.make_envelope("text_completion", "cmpl", served.name)
    if body.stream:
        assert generation is not None
        echoes = _make_echoes(server, body, prompts, envelope)

        def format_piece(piece: Piece) -> dict[str, Any]:
            choice = _make_completion_choice(server, body, generation, piece, len(piece.text))
            return {**envelope, "choices": [choice]}

        return stream_pieces(call, generation, echoes, format_piece, body, envelope)
    longer = [(ids[:1], ids[1:]) for ids in prompts if len(ids) > 1] if asked else []
    try:
        scoring = call.score(longer, *asked) if asked and longer else None
        pieces, found = await finish(request, call.collect(generation, scoring), server.seconds)
    except BaseException:
        call.cancel()
        raise
    outputs = iter(found)
    scored = [next(outputs) if len(ids) > 1 and asked else None for ids in prompts]
    choices = []
    for index in range(len(prompts) * options.samples):
        number = index // options.samples
        own = _join_pieces(pieces[index]) if generation else Piece(index, "", 0, 0, "length")
        choices.append(
            _make_whole_choice(server, body, generation, own, prompts[number], scored[number])
        )
    total = sum(piece.end - piece.start for own in pieces for piece in own)
    return JSONResponse(
        {**envelope, "choices": choices, "usage": formats.count_usage(prompts, total)}
    )


def _join_pieces(pieces: list[Piece]) -> Piece:
    last = pieces[-1]
    text = "".join(piece.text for piece in pieces)
    return Piece(last.index, text, 0, last.end, last.finish_reason)


def _make_completion_choice(
    server: Server, body: CompletionRequest, job: Generation | None, piece: Piece, offset: int
) -> dict[str, Any]:
    """Returns a choice about the tokens of a piece. offset: characters before them."""
    choice: dict[str, Any] = {"index": piece.index, "text": piece.text, "logprobs": None}
    if body.logprobs is not None and job is not None:
        drawn = TokenLogprobs.of_piece(job.responses[piece.index], piece, body.logprobs)
        as_id = bool(body.return_tokens_as_token_ids)
        choice["logprobs"] = formats.describe_completion_logprobs(
            server.names, drawn, as_id, offset
        )
    if body.return_token_ids:
        choice["token_ids"] = (
            job.responses[piece.index].sequence.tokens[piece.start : piece.end] if job else []
        )
    return {**choice, "finish_reason": piece.finish_reason or None}


def _make_whole_choice(
    server: Server,
    body: CompletionRequest,
    job: Generation | None,
    piece: Piece,
    prompt: list[int],
    scored: ResponseOutput | None,
) -> dict[str, Any]:
    """Returns a choice with all of its response, after the prompt if that is to be echoed."""
    text = server.names.decode_prompt(prompt) if body.echo else ""
    choice = _make_completion_choice(server, body, job, piece, len(text))
    choice["text"] = text + choice["text"]
    if body.echo and body.logprobs is not None:
        as_id, about = bool(body.return_tokens_as_token_ids), choice["logprobs"] or {}
        before = formats.describe_completion_logprobs(
            server.names,
            TokenLogprobs.of_prompt(prompt, scored, body.logprobs),
            *(as_id, 0, prompt[0]),
        )
        choice["logprobs"] = {name: [*x, *about.get(name, [])] for name, x in before.items()}
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = formats.describe_prompt_logprobs(
            server.names, prompt, scored, body.prompt_logprobs
        )
    if body.return_token_ids:
        choice["prompt_token_ids"] = prompt
    return choice


def _make_echoes(
    server: Server, body: CompletionRequest, prompts: list[list[int]], envelope: dict[str, Any]
) -> list[dict[str, Any]]:
    """Returns the chunks with the prompts that a stream begins with, where they are wanted."""
    samples, chunks = body.n or 1, []
    for index in range(len(prompts) * samples if body.echo else 0):
        text = server.names.decode_prompt(prompts[index // samples])
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        chunks.append({**envelope, "choices": [choice]})
    return chunks


async def chat(server: Server, request: Request, body: ChatRequest) -> Response:
    """Answers POST /v1/chat/completions."""
    served = server.served
    served.check_name(body.model)
    count = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs: needs logprobs=true", param="top_logprobs")
    prompt = await asyncio.to_thread(reading.encode_chat, body, served)
    options = reading.make_options(body, served, count)
    limits = reading.make_limits([prompt], reading.get_chat_tokens(body), served)
    asked = reading.find_prompt_output(body, served)
    call = Call(server)
    generation = call.generate([prompt], limits, options)

    def describe(piece: Piece) -> dict[str, Any]:
        """Returns what message and delta of a choice have in common."""
        about: dict[str, Any] = {"index": piece.index, "logprobs": None}
        if count is not None:
            drawn = TokenLogprobs.of_piece(generation.responses[piece.index], piece, count)
            as_id = bool(body.return_tokens_as_token_ids)
            about["logprobs"] = formats.describe_chat_logprobs(server.names, drawn, as_id)
        if body.return_token_ids:
            tokens = generation.responses[piece.index].sequence.tokens
            about["token_ids"] = tokens[piece.start : piece.end]
        return {**about, "finish_reason": piece.finish_reason or None}

    if body.stream:
        envelope = formats.make_envelope("chat.completion.chunk", "chatcmpl", served.name)
        begin = {"logprobs": None, "finish_reason": None}
        delta = {"role": "assistant", "content": ""}
        openings = [
            {**envelope, "choices": [{"index": index, "delta": delta, **begin}]}
            for index in range(options.samples)
        ]

        def format_piece(piece: Piece) -> dict[str, Any]:
            return {**envelope, "choices": [{**describe(piece), "delta": {"content": piece.text}}]}

        return stream_pieces(call, generation, openings, format_piece, body, envelope)
    try:
        sequences = [(prompt[:1], prompt[1:])]
        scoring = call.score(sequences, *asked) if asked and len(prompt) > 1 else None
        pieces, scored = await finish(request, call.collect(generation, scoring), server.seconds)
    except BaseException:
        call.cancel()
        raise
    choices = []
    for piece in map(_join_pieces, pieces):
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        choices.append({**describe(piece), "message": message})
    total = sum(piece.end - piece.start for own in pieces for piece in own)
    envelope = formats.make_envelope("chat.completion", "chatcmpl", served.name)
    reply = {**envelope, "choices": choices, "usage": formats.count_usage([prompt], total)}
    if body.prompt_logprobs is not None:
        reply["prompt_logprobs"] = formats.describe_prompt_logprobs(
            server.names, prompt, scored[0] if scored else None, body.prompt_logprobs
        )
    if body.return_token_ids:
        reply["prompt_token_ids"] = prompt
    if body.return_prompt_text and (tokenizer := served.subject.tokenizer) is not None:
        reply["prompt_text"] = tokenizer.decode(prompt)
    return JSONResponse(reply)


def stream_pieces(
    call: Call,
    job: Generation,
    openings: list[dict[str, Any]],
    format_piece: Callable[[Piece], dict[str, Any]],
    body: CompletionRequest | ChatRequest,
    envelope: dict[str, Any],
) -> StreamingResponse:
    """Returns a stream of server-sent events: the openings, a chunk for each piece and, where it is
    asked for, the usage. A failure is an event with an error, which ends the stream."""
    has_usage = bool(body.stream_options and body.stream_options.include_usage)
    more = {"usage": None} if has_usage else {}

    async def iterate_events() -> AsyncIterator[bytes]:
        num_tokens, is_done = 0, False
        try:
            for chunk in openings:
                yield encode_event({**chunk, **more})
            async for piece in call.iterate_pieces(job):
                num_tokens += piece.end - piece.start
                yield encode_event({**format_piece(piece), **more})
            is_done = True
            if has_usage:
                usage = formats.count_usage(job.prompts, num_tokens)
                yield encode_event({**envelope, "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield encode_event(error.to_json())
        finally:
            if not is_done:
                call.cancel()

    return StreamingResponse(iterate_events(), media_type="text/event-stream")


def encode_event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, allow_nan=False).encode() + b"\n\n"
