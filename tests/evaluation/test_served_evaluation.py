"""Evaluation of a model behind a server: its numbers, its records, and that it goes on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.evaluation.problems import load_problems
from distill.runtime import http_client
from tests.support.evaluations import summary_of, untimed
from tests.support.http_servers import Answer, FakeServer, serve
from tests.support.openai_server import NAME, FakeModel
from tests.support.verbs import call, read, verb_module, write

evaluate = verb_module("evaluate")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "WAIT_SECONDS", (0.01,) * 4)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serve(FakeModel()) as server:
        yield server


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Problems of which the model's answer, 0, 1 or 2, is sometimes right."""
    problems = load_problems("arithmetic", "", 8)
    rows = [{**row, "answer": str(i % 3)} for i, (_, row) in enumerate(problems)]
    return write(tmp_path / "questions.jsonl", rows)


def run(server: FakeServer, questions: Path, name: str, *flags: str) -> int:
    out = questions.parent / name
    shared = ("--benchmark=math", f"--data={questions}", f"--out={out}", "--max_new_tokens=60")
    sampling = ("--samples=3", "--temperature=1", "--k=1,3")
    return call(evaluate, f"--model={server.url}", *shared, *sampling, *flags)


def test_the_numbers_are_those_of_the_same_texts_and_what_was_asked_is_recorded(
    questions: Path, server: FakeServer
) -> None:
    assert run(server, questions, "served") == 0
    rows, summary = read(questions.parent / "served/examples.jsonl"), None
    summary = summary_of(questions.parent / "served")
    assert len(rows) == 24 and 0 < summary["accuracy"] < 1
    texts = [{"id": r["id"], "answer": r["answer"], "response": r["response"]} for r in rows]
    stored = write(questions.parent / "stored.jsonl", texts)
    shared = ("--benchmark=math", f"--responses={stored}", "--k=1,3")
    assert call(evaluate, *shared, f"--out={questions.parent / 'stored'}") == 0
    again = summary_of(questions.parent / "stored")
    for name in ("accuracy", "interval", "pass@3", "maj@3", "format_rate", "repetition_rate"):
        assert summary[name] == again[name], name
    assert summary["mean_length"] == sum(len(r["tokens"]) for r in rows) / 24
    assert all(r["prompt_tokens"] and r["finish_reason"] == "stop" for r in rows)
    assert summary["tokens_per_second"] > 0 and summary["memory"] is None
    protocol = summary["protocol"]
    assert (
        protocol.items()
        >= {
            **{"model": server.url, "served_model": NAME, "server": "vllm", "model_hash": None},
            **{"prompts": "rendered by the server", "tokenizer": None, "thinking": True},
            **{"temperature": 1.0, "samples": 3, "max_new_tokens": 60, "benchmark": "math"},
        }.items()
    )
    assert json.loads((questions.parent / "served/protocol.json").read_text()) == protocol


def test_it_goes_on_where_it_stopped(
    questions: Path, server: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    assert run(server, questions, "whole") == 0
    model, stop = FakeModel(), read(questions)[5]["question"]
    server.answer = lambda a: Answer(0, 503) if stop in str(a.body) else model(a)
    assert run(server, questions, "broken", "--batch_size=1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the responses that were graded are in" in error
    assert len(read(questions.parent / "broken/examples.jsonl")) == 15
    server.answer = model
    assert run(server, questions, "broken", "--seed=1") == 2
    assert "seed was 0, now 1" in capsys.readouterr().err
    assert run(server, questions, "broken") == 0
    whole, broken = (questions.parent / name for name in ("whole", "broken"))
    assert (broken / "examples.jsonl").read_bytes() == (whole / "examples.jsonl").read_bytes()
    assert untimed(summary_of(broken)) == untimed(summary_of(whole))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher=assets/teacher"], "--teacher: is not read with --model=http"),
        (["--dtype=float32"], "--dtype: is not read with"),
        (["--max_new_tokens=390"], "maximum context length is 400"),
    ],
)
def test_what_a_server_cannot_do_is_refused(
    flags: list[str],
    message: str,
    questions: Path,
    server: FakeServer,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run(server, questions, "out", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_benchmark_of_any_form_can_be_asked(tmp_path: Path, server: FakeServer) -> None:
    """Arithmetic has questions of its own, and its protocol for Qwen3 cuts and penalises."""
    flags: Any = ("--benchmark=arithmetic", "--limit=3", "--protocol=qwen3-nonthinking")
    model = (f"--model={server.url}", f"--out={tmp_path / 'out'}", "--max_new_tokens=50")
    assert call(evaluate, *flags, *model) == 0
    body = server.asked[-1].body
    assert (body["top_k"], body["presence_penalty"]) == (20, 1.5)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
