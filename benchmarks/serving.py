"""python -m benchmarks.serving [--requests=2000] [--clients=64]: what HTTP costs the sampler.

Samples the same requests twice, of mixed lengths: with the sampler alone, all at once, and through
`python -m distill.serve` in a process of its own, from concurrent clients on loopback, each with
one request at a time. Each reply must have the tokens that the sampler alone draws under its seed,
so none can be lost, mixed up or answered twice. Prints one line of JSON: tokens per second of both,
their ratio, and seconds of a request (p50, p99).
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from distill import rollout
from distill.policy import policy
from distill.runtime import cli

OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string("model", "assets/teacher", "Model directory.", OPTIONS)
REQUESTS = flags.DEFINE_integer("requests", 2000, "Requests in all.", 1, flag_values=OPTIONS)
CLIENTS = flags.DEFINE_integer("clients", 64, "Concurrent clients.", 1, flag_values=OPTIONS)
SLOTS = flags.DEFINE_integer("slots", 32, "Responses that decode together.", 1, flag_values=OPTIONS)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 400, "Of the longest.", 1, flag_values=OPTIONS)
REPEATS = flags.DEFINE_integer("repeats", 1, "Measurements; the best counts.", 1, None, OPTIONS)

MAX_PROMPT = 64


@dataclasses.dataclass(frozen=True)
class Question:
    """One request, and the seed that makes its tokens known."""

    prompt: list[int]
    max_tokens: int
    seed: int


def make_questions(count: int, vocab_size: int, max_tokens: int) -> list[Question]:
    rng = np.random.default_rng(0)
    return [
        Question(
            rng.integers(0, vocab_size // 2, rng.integers(1, MAX_PROMPT)).tolist(),
            int(rng.integers(1, max_tokens + 1)),
            number,
        )
        for number in range(count)
    ]


def sample_alone(
    subject: policy.Policy, questions: Sequence[Question], slots: int, max_length: int
) -> tuple[list[list[int]], float]:
    """Returns the tokens of each question, and the seconds without compilation."""
    keys = [rollout.make_row_keys(jax.random.key(x.seed), [0], [0])[0] for x in questions]
    model = rollout.SamplingModel(subject.model, subject.params, subject.stop_ids)
    options = rollout.RolloutOptions(slots, max_length=max_length, warm_up=True)
    sampled = rollout.sample(
        model,
        [
            rollout.Sequence(x.prompt, key, x.max_tokens)
            for x, key in zip(questions, keys, strict=True)
        ],
        sampling=rollout.Sampling(),
        options=options,
    )
    start = time.perf_counter()
    tokens = [sequence.tokens for sequence in sampled]
    return tokens, time.perf_counter() - start


@contextlib.contextmanager
def start_server(model: str, slots: int) -> Iterator[tuple[str, int]]:
    """Starts the verb in a process; yields its host and port."""
    words = [sys.executable, "-m", "distill.serve", f"--model={model}", "--port=0"]
    words += [f"--slots={slots}", "--dtype=float32"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    try:
        found = None
        while found is None and (line := process.stderr.readline()):
            found = re.search(r"http://([\d.]+):(\d+)", line)
        assert found, "the server did not start"
        yield found[1], int(found[2])
    finally:
        process.terminate()
        process.wait(60)


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: Question
) -> dict[str, Any]:
    """Sends a request over a connection that stays open, and returns the reply."""
    body = dataclasses.asdict(question) | {"return_token_ids": True}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    header = await reader.readuntil(b"\r\n\r\n")
    size = re.search(rb"content-length: (\d+)", header)
    assert size is not None and header.startswith(b"HTTP/1.1 200"), header
    return json.loads(await reader.readexactly(int(size[1])))


async def ask_all(
    address: tuple[str, int], questions: Sequence[Question], clients: int
) -> tuple[list[list[list[int]]], list[float], float]:
    """Returns all replies to each question, the seconds of each, and those of all together."""
    waiting = iter(range(len(questions)))
    replies: list[list[list[int]]] = [[] for _ in questions]
    seconds: list[float] = []

    async def run_client() -> None:
        reader, writer = await asyncio.open_connection(*address)
        for number in waiting:
            start = time.perf_counter()
            reply = await ask(reader, writer, questions[number])
            seconds.append(time.perf_counter() - start)
            replies[number].append(reply["choices"][0]["token_ids"])
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(run_client() for _ in range(clients)))
    return replies, seconds, time.perf_counter() - start


def measure(
    model: str, requests: int, clients: int, slots: int, max_tokens: int, repeats: int
) -> dict[str, float]:
    """Returns the figures of the best of `repeats` measurements."""
    described = policy.make_abstract_for_inference(model, "float32")
    questions = make_questions(requests, described.config.vocab_size, max_tokens)
    alone, served = [], []
    with policy.use(described), start_server(model, slots) as address:
        subject = policy.load(described, "float32")
        max_length = described.config.context_length
        asyncio.run(ask_all(address, questions[:slots], clients))
        for _ in range(repeats):
            expected, seconds = sample_alone(subject, questions, slots, max_length)
            alone.append(seconds)
            replies, each, total = asyncio.run(ask_all(address, questions, clients))
            served.append((total, each))
            assert all(len(reply) == 1 for reply in replies), "a request was answered twice"
            same = sum(reply[0] == tokens for reply, tokens in zip(replies, expected, strict=True))
            # Another batch rounds logits otherwise: a draw may differ in one of many thousands.
            assert same >= 0.99 * len(questions), f"{same} of {len(questions)} replies are right"
    tokens = sum(map(len, expected))
    total, each = min(served)
    rates = tokens / min(alone), tokens / total
    return {
        "requests": requests,
        "clients": clients,
        "tokens": tokens,
        "same": same,
        "alone_tokens_per_second": round(rates[0]),
        "served_tokens_per_second": round(rates[1]),
        "ratio": round(rates[1] / rates[0], 3),
        "p50_seconds": round(float(np.quantile(each, 0.5)), 3),
        "p99_seconds": round(float(np.quantile(each, 0.99)), 3),
    }


def main() -> None:
    names = ("model", "requests", "clients", "slots", "max_tokens", "repeats")
    settings: dict[str, Any] = {name: OPTIONS[name].value for name in names}
    print(json.dumps(measure(**settings)))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
