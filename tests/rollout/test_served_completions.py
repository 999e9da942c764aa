"""Generation from a model behind a server: what is asked and written, and what may go wrong."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs import base
from distill import generate
from distill.data import chat, dataset
from distill.data.examples import encode_prompt
from distill.runtime import http_client
from tests.support.http_servers import Answer, Asked, FakeServer, serve
from tests.support.openai_server import NAME, POSITIONS, FakeModel
from tests.support.paths import ROOT, TOKENIZER
from tests.support.templates import THINKING_ONLY
from tests.support.verbs import call, read, write

ROWS = [
    {"question": "What is 2 + 2?", "id": "a"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    {"prompt": "Once upon"},
    {"tokens": [5, 6, 7], "max_new_tokens": 3},
]
TOKEN = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "WAIT_SECONDS", (0.01,) * 4)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serve(FakeModel()) as server:
        yield server


class Job:
    """Calls the verb with a file of rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, server: FakeServer, rows: list, *flags: str, out: str = "out") -> int:
        prompts = write(self.folder / "rows.jsonl", rows)
        shared = (f"--model={server.url}", f"--prompts={prompts}", f"--out={self.path(out)}")
        return call(generate, *shared, "--max_new_tokens=40", *flags)

    def path(self, out: str = "out") -> Path:
        return self.folder / f"{out}.jsonl"

    def rows(self, out: str = "out") -> list[dict]:
        return read(self.path(out))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def asked_by(server: FakeServer) -> list[Asked]:
    """Returns requests for responses, without those of one token with which the work begins."""
    return [a for a in server.asked if a.body and a.body["max_tokens"] > 1]


@pytest.mark.parametrize("kind", ["ours", "vllm", "sglang", "other"])
def test_rows_of_all_forms_are_completed_in_order(kind: str, job: Job) -> None:
    model = FakeModel(kind)
    with serve(model) as server:
        assert job(server, ROWS, "--samples=2") == 0
    rows = job.rows()
    assert len(rows) == len(ROWS)
    has_ids = kind in ("ours", "vllm")
    for row, given in zip(rows, ROWS, strict=True):
        assert {k: row[k] for k in given} == given
        prompt = encode_prompt(given, "row", model.tokenizer, None if kind == "other" else True)
        assert row["prompt_tokens"] == (prompt if has_ids or "tokens" in given else None)
        assert len(row["samples"]) == 2
        for sample in row["samples"]:
            assert list(sample) == ["tokens", "text", "logprobs", "finish_reason"]
            if has_ids:
                assert chat.decode(model.tokenizer, sample["tokens"]) == sample["text"]
            logprobs = sample["logprobs"]
            assert (logprobs is None) == (kind == "other")
            assert not (has_ids and len(logprobs) != len(sample["tokens"]))
    assert [s["finish_reason"] for s in rows[3]["samples"]] == ["length"] * 2
    assert rows[0]["samples"][0]["text"].startswith("<think>\n")
    seeds = [a.body["seed"] for a in asked_by(server)]
    assert len(set(seeds)) == 8


def test_requests_say_all_that_a_server_would_fill_in(job: Job, server: FakeServer) -> None:
    flags = ("--temperature=0.6", "--top_k=20", "--thinking=off", "--stop=END", "--seed=3")
    assert job(server, ROWS[:1] + ROWS[2:3], *flags) == 0
    first, second = sorted(asked_by(server), key=lambda a: a.path)
    shared = {
        **{"model": NAME, "max_tokens": 40, "temperature": 0.6, "top_p": 1.0, "top_k": 20},
        **{"min_p": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "stop": ["END"]},
        "return_token_ids": True,
    }
    asked = {k: x for k, x in first.body.items() if k != "seed"}
    assert asked == {
        **shared,
        "messages": [{"role": "user", "content": "What is 2 + 2?"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "return_prompt_text": True,
    }
    asked = {k: x for k, x in second.body.items() if k != "seed"}
    assert asked == {**shared, "prompt": "Once upon", "add_special_tokens": False}
    for row in job.rows():
        assert row["samples"][0]["logprobs"] is None  # of which distribution, servers differ


def test_with_a_tokenizer_prompts_are_those_of_a_model_that_is_loaded(
    job: Job, server: FakeServer, tmp_path: Path
) -> None:
    assert job(server, ROWS, f"--tokenizer={TOKENIZER}", "--thinking=off") == 0
    tokenizer = chat.load_tokenizer(TOKENIZER)
    for row, given in zip(job.rows(), ROWS, strict=True):
        assert row["prompt_tokens"] == encode_prompt(given, "row", tokenizer, False)
    assert {a.path for a in server.asked} == {"/v1/models", "/v1/completions"}


@pytest.mark.parametrize("kind", ["ours", "vllm", "sglang"])
def test_a_block_that_the_prompt_opens_is_part_of_the_text(kind: str, job: Job) -> None:
    """Also where the response is cut within it, if the server says what the prompt is."""
    model = FakeModel(kind)
    model.template = THINKING_ONLY
    rows = [ROWS[0], {**ROWS[0], "max_new_tokens": 2}]
    with serve(model) as server:
        assert job(server, rows) == 0
    texts = [row["samples"][0]["text"] for row in job.rows()]
    assert texts[0].startswith("<think>\né") and texts[0].count("<think>") == 1
    assert texts[1].startswith("<think>\n") == (kind != "sglang")


def test_thoughts_in_a_field_of_their_own_are_put_back(job: Job, server: FakeServer) -> None:
    rows = [ROWS[0], {**ROWS[0], "max_new_tokens": 5}]
    assert job(server, rows) == 0
    server.answer = FakeModel(has_parser=True)
    assert job(server, rows, out="parsed") == 0
    assert job.path("parsed").read_text() == job.path().read_text()


def drop_some(model: FakeModel, share: int = 3) -> Callable[[Asked], Answer]:
    """Fails one request in `share`, each time in another way, and never one twice."""
    faults: list[Callable[[dict], Answer]] = [
        lambda reply: Answer(reply, fault="half"),
        lambda reply: Answer(reply, fault="drop"),
        lambda reply: Answer("busy", 500),
        lambda reply: Answer("slow down", 429, {"Retry-After": "0"}),
        lambda reply: Answer({**reply, "choices": reply["choices"] * 2}),
        lambda reply: Answer({**reply, "choices": []}),
        lambda reply: Answer({**reply, "model": "another"}),
        lambda reply: Answer({**reply, "choices": [reply["choices"][0] | {"token_ids": [1.5]}]}),
        lambda reply: Answer(_change(reply, finish_reason="abort")),
        lambda reply: Answer(_change(reply, logprobs=None)),
        lambda reply: Answer(_change(reply, logprobs={"content": [{"logprob": float("nan")}]})),
        lambda reply: Answer(_change(reply, message={"content": None})),
        lambda reply: Answer(_change(reply, message={"content": "\ud800"})),
        lambda reply: Answer(_change(reply, token_ids=[1] * 41)),
        lambda reply: Answer([reply]),
    ]
    seen: set[str] = set()
    lock = threading.Lock()

    def answer(asked: Asked) -> Answer:
        key = json.dumps(asked.body)
        with lock:
            fails = asked.path.endswith("completions") and key not in seen
            fails = fails and len(seen) % share == 0
            number = len(seen) // share
            seen.add(key)
        reply = model(asked)
        return faults[number % len(faults)](reply.body) if fails else reply

    return answer


def _change(reply: dict, **fields: Any) -> dict:
    return {**reply, "choices": [{**reply["choices"][0], **fields}]}


MANY = [{"question": f"What is {i} + {i}?"} for i in range(16)]


def test_faults_change_nothing(job: Job, server: FakeServer) -> None:
    assert job(server, MANY, "--samples=3") == 0
    server.answer = drop_some(FakeModel())
    assert job(server, MANY, "--samples=3", "--batch_size=5", out="disturbed") == 0
    assert job.path("disturbed").read_bytes() == job.path().read_bytes()
    assert server.most_in_flight <= 32


def test_a_server_that_goes_away_leaves_what_is_finished(
    job: Job, server: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    assert job(server, MANY) == 0
    model = FakeModel()

    def until_row_eight(asked: Asked) -> Answer:
        return Answer("gone", 503) if "8 + 8" in json.dumps(asked.body) else model(asked)

    server.answer = until_row_eight
    assert job(server, MANY, "--batch_size=1", out="stopped") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no answer in 5 tries: status 503: gone; the rows that were finished" in error
    partial = job.path("stopped").with_name("stopped.jsonl.partial")
    assert len(read(partial)) == 8 and not job.path("stopped").exists()
    with partial.open("a") as file:
        file.write('{"question": "cut in the mid')
    server.answer = model
    for flag in ("--seed=1", "--temperature=0.5", f"--tokenizer={TOKENIZER}", "--thinking=off"):
        assert job(server, MANY, flag, out="stopped") == 2
        assert " is of another work: " in capsys.readouterr().err
    server.asked.clear()
    assert job(server, MANY, out="stopped") == 0
    assert len(asked_by(server)) == 8
    assert job.path("stopped").read_bytes() == job.path().read_bytes()


def test_another_model_does_not_go_on_with_the_rows(
    job: Job, server: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    model = FakeModel("ours")
    server.answer = lambda a: Answer("gone", 503) if "8 + 8" in json.dumps(a.body) else model(a)
    assert job(server, MANY, "--batch_size=1") == 2
    capsys.readouterr()

    def other_hash(asked: Asked) -> Answer:
        reply = model(asked)
        if asked.path == "/v1/models":
            reply.body["data"][0]["model_hash"] = "i"
        return reply

    server.answer = other_hash
    assert job(server, MANY) == 2
    assert "model_hash was 'h', now 'i'" in capsys.readouterr().err


def test_a_row_that_the_server_refuses_fails_alone(
    job: Job, server: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    rows = [*MANY[:3], {"question": "x" * 3 * POSITIONS}, {"tokens": []}, *MANY[3:5]]
    assert job(server, rows) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "rows.jsonl:4: " in error and f"maximum context length is {POSITIONS}" in error
    assert "(and 1 more rows)" in error
    assert [bool(row.get("error")) for row in job.rows()] == [0, 0, 0, 1, 1, 0, 0]
    assert job(server, rows, f"--tokenizer={TOKENIZER}", out="b") == 2
    assert f"exceed the {POSITIONS} positions" in capsys.readouterr().err


def test_errors_of_rows_before_an_interruption_are_told_at_the_end(
    job: Job, server: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    model, rows = FakeModel(), [{"question": "x" * 3 * POSITIONS}, *MANY[7:10]]
    server.answer = lambda a: Answer("gone", 503) if "8 + 8" in json.dumps(a.body) else model(a)
    assert job(server, rows, "--batch_size=1") == 2
    server.answer = model
    capsys.readouterr()
    assert job(server, rows) == 2
    assert "rows.jsonl:1: " in capsys.readouterr().err


def change_list(*entries: dict) -> Callable[[Asked], Answer]:
    model = FakeModel()
    return lambda a: Answer({"data": list(entries)}) if a.path == "/v1/models" else model(a)


ENTRY = {"id": NAME, "owned_by": "vllm"}
REFUSED = {
    "--served_model: {url} serves tiny, lora; name one": (
        change_list(ENTRY, ENTRY | {"id": "lora"}),
        [],
    ),
    "--served_model=x: {url} serves tiny": (FakeModel(), ["--served_model=x"]),
    "--top_k=20: {url}: its kind ('system') is not known": (FakeModel("other"), ["--top_k=20"]),
    "--thinking=off: {url}: its kind": (FakeModel("other"), ["--thinking=off"]),
    "{url}/v1/chat/completions: status 400: unknown field": (
        lambda a: FakeModel("vllm" if a.path == "/v1/models" else "other")(a),
        [],
    ),
    "{url}/v1/models: status 401: it wants a token (api_key_env)": (lambda a: Answer(0, 401), []),
    "--api_key_env: names an environment variable that is not set": (
        FakeModel(),
        ["--api_key_env=NO_SUCH"],
    ),
    "--dtype: is not read with --model=http": (FakeModel(), ["--dtype=float32"]),
    "--top_logprobs: is not read": (FakeModel(), ["--top_logprobs=3"]),
    "no tokenizer": (FakeModel(), [f"--tokenizer={ROOT / 'docs'}"]),
    "the reply is no list of models": (lambda a: Answer({"data": [7]}), []),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_one_line_before_the_work_begins(
    message: str, job: Job, server: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    server.answer, flags = REFUSED[message]
    assert job(server, ROWS[:1], *flags) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message.format(url=server.url) in error
    assert not list(job.folder.glob("out.jsonl*"))


def test_tools_need_a_tokenizer(
    job: Job, server: FakeServer, capsys: pytest.CaptureFixture
) -> None:
    row = {**ROWS[0], "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert job(server, [row]) == 2
    assert "rows.jsonl:1: tools: --tokenizer is needed" in capsys.readouterr().err


def test_flags_of_servers_are_refused_without_one(job: Job, capsys: pytest.CaptureFixture) -> None:
    prompts = write(job.folder / "rows.jsonl", ROWS)
    shared = (f"--model={TOKENIZER}", f"--prompts={prompts}", f"--out={job.path()}")
    assert call(generate, *shared, "--api_key_env=X") == 2
    assert "--api_key_env: is read with --model=http" in capsys.readouterr().err
    assert call(generate, f"--model=http://me:{TOKEN}@host", *shared[1:]) == 2
    assert TOKEN not in capsys.readouterr().err


def test_the_token_is_in_no_file(
    job: Job, server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MY_API", TOKEN)
    model = FakeModel()

    def answer(asked: Asked) -> Answer:
        if asked.headers.get("Authorization") != f"Bearer {TOKEN}":
            return Answer(None, 401)
        is_last = asked.body and "8 + 8" in json.dumps(asked.body)
        return Answer(f"no {TOKEN}", 503) if is_last else model(asked)

    server.answer = answer
    assert job(server, MANY, "--api_key_env=MY_API", "--batch_size=1") == 2
    output = capsys.readouterr()
    assert TOKEN not in output.err + output.out and "no ***" in output.err
    for file in job.folder.iterdir():
        assert TOKEN not in file.read_text()


def test_several_servers_share_the_work(job: Job, server: FakeServer) -> None:
    assert job(server, MANY) == 0
    with serve(FakeModel()) as other:
        both = FakeServerPair(server, other)
        before = len(server.asked)
        assert job(both, MANY, out="both") == 0  # type: ignore[arg-type]
        assert len(server.asked) > before and asked_by(other)
    assert job.path("both").read_bytes() == job.path().read_bytes()
    with serve(change_list({**ENTRY, "max_model_len": 7})) as other:
        assert job(FakeServerPair(server, other), MANY, out="c") == 2  # type: ignore[arg-type]


class FakeServerPair:
    def __init__(self, *servers: FakeServer) -> None:
        self.url = ",".join(server.url for server in servers)


@pytest.mark.long
def test_a_killed_process_is_resumed(job: Job, server: FakeServer) -> None:
    """Killed without warning while responses come: the file is that of an undisturbed one."""
    assert job(server, MANY) == 0
    model, gate = FakeModel(), threading.Event()
    server.answer = lambda a: Answer(gate.wait(60)) if "8 + 8" in json.dumps(a.body) else model(a)
    command = [sys.executable, "-m", "distill.generate", f"--model={server.url}"]
    command += [f"--prompts={job.folder / 'rows.jsonl'}", f"--out={job.path('killed')}"]
    process = subprocess.Popen([*command, "--max_new_tokens=40"], cwd=ROOT)
    partial = job.path("killed").with_name("killed.jsonl.partial")
    while process.poll() is None and not (partial.exists() and len(read(partial)) == 8):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9
    gate.set()
    server.answer = model
    assert job(server, MANY, out="killed") == 0
    assert job.path("killed").read_bytes() == job.path().read_bytes()


@pytest.mark.parametrize("thinking", ["on", "off"])
def test_samples_without_ids_are_trained_by_their_text(thinking: str, job: Job) -> None:
    """Their tokens are those that the model wrote, since text and tokenizer are the same."""
    tokenizer = chat.load_tokenizer(TOKENIZER)
    examples = {}
    for kind in ("sglang", "vllm"):
        with serve(FakeModel(kind)) as server:
            rows = [
                *MANY[:3],
                {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
            ]
            flags = ("--samples=2", f"--thinking={thinking}", "--max_new_tokens=80")
            assert job(server, rows, *flags, out=kind) == 0
        c = base.make_stage("sft").data
        c.source = str(job.path(kind))
        source = dataset.load_source(c, tokenizer, 0, True)
        assert source.size == 8
        examples[kind] = [
            (e.prompt, e.response, e.thinking) for e in map(source.read_example, range(8))
        ]
    assert examples["sglang"] == examples["vllm"]
    assert [thinks for *_, thinks in examples["vllm"]] == [thinking == "on"] * 6 + [True] * 2
