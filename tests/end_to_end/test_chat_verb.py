"""Tests `chat`: turns of a conversation, its switches, and answers that are shown as they come."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill import chat
from distill.rollout import sampler
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.verbs import call


def test_turns_and_switches_of_a_conversation(capsys):
    asked = []

    def answer(messages: list[dict], thinking: bool, number: int) -> str:
        asked.append(([m["content"] for m in messages], thinking, number))
        if messages[-1]["content"] == "long":
            raise UserError("too long")
        return f"answer {number}"

    lines = ["one", "", "/no_think", "two", "long", "three /think", "/rest", "/help", "/reset"]
    lines.append("four")
    chat.converse(iter(f" {line}\n" for line in lines), answer)
    first, second = ["one", "answer 0"], ["two", "answer 1"]
    assert asked == [
        (["one"], True, 0),
        ([*first, "two"], False, 1),
        ([*first, *second, "long"], False, 2),
        ([*first, *second, "three /think"], True, 2),
        (["four"], True, 3),
    ]
    assert capsys.readouterr().err.splitlines() == [
        "(thinking is off)",
        "error: too long; /reset begins anew",
        "error: /rest: no such command; did you mean '/reset'?",
        "error: /help: no such command; commands are /think, /no_think, /reset",
        "(a new conversation)",
    ]


def test_an_answer_is_shown_in_parts_and_may_be_stopped(capsys, monkeypatch):
    """Bytes of half a character wait for the others; Ctrl-C keeps what was said."""
    texts = {1: "a\ufffd", 2: "aé", 3: "aé!"}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: texts[len(ids)], chat_template="x")
    subject = SimpleNamespace(
        tokenizer=tokenizer, config=SimpleNamespace(vocab_size=9, context_length=50),
        model=None, params=None, stop_ids=(),
    )  # fmt: skip
    shown = []

    def sample(model, sequences, *, ended, **_):
        for token in range(3):
            sequences[0].tokens.append(token)
            ended(sequences[0])
            shown.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(sampler, "sample", sample)
    from distill.rollout import completions

    monkeypatch.setattr(completions, "encode_row_prompt", lambda *_: [1, 2])
    monkeypatch.setattr("distill.data.chat.find_opened_block", lambda *_: "")
    chat.OPTIONS(["chat", "--model=x"])
    assert chat.sample_answer(subject, [{"role": "user", "content": "x"}], True, 0) == "aé!"  # pyright: ignore[reportArgumentType]
    assert shown == ["a", "é", "!"] and capsys.readouterr().out == "\n"


SLOW_CHAT = """
import fcntl, importlib, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C on this terminal is for this process
from distill.rollout import sampler

def sample(model, sequences, *, ended, **_):
    while True:
        sequences[0].tokens.append(13)  # a full stop
        ended(sequences[0])
        time.sleep(0.01)

sampler.sample = sample
from distill import chat
from distill.runtime import cli
cli.run(chat.main, chat.OPTIONS)
"""


def test_keys_of_a_terminal():
    """Ctrl-C stops an answer, and at the prompt does nothing but say so; Ctrl-D ends."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SLOW_CHAT, f"--model={ROOT}/assets/student"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True
    )
    os.close(theirs)

    unread = b""

    def read_until(words: bytes, key: bytes = b"") -> bytes:
        """Reads what is shown up to some words. Presses a key, again after each silent second: one
        that comes right after the prompt may be missed."""
        nonlocal unread
        for _ in range(60):
            os.write(ours, key)
            while words not in unread and select.select([ours], [], [], 1)[0]:
                unread += os.read(ours, 1000)
            if words in unread:
                break
        text, found, unread = unread.partition(words)
        assert found, text
        return text

    try:
        for _ in range(2):  # the second turn shows that the first one's end was orderly
            read_until(b"> ")
            os.write(ours, b"hello\n")
            read_until(b"hello\r\n")
            read_until(b"...")  # of the answer, which has no end
            os.write(ours, b"\x03")
            assert set(read_until(b"\r\n")) <= {*b".^C"}
        read_until(b"> ")
        read_until(b"(Ctrl-D ends)", key=b"\x03")
        for _ in range(200):
            os.write(ours, b"\x04")
            time.sleep(0.3)
            if process.poll() is not None:
                break
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.long
def test_lines_of_a_pipe_are_answered(capsys, monkeypatch):
    monkeypatch.setattr("signal.set_wakeup_fd", lambda *_, **__: -1)
    monkeypatch.setattr("sys.stdin", io.StringIO("Leo has 64 pens, gives away 7. How many?\nhi\n"))
    flags = (f"--model={ROOT}/assets/teacher", "--max_new_tokens=40", "--temperature=0")
    assert call(chat, *flags) == 0
    out = capsys.readouterr().out
    assert out.startswith("<think>\n64") and out.count("\n") > 3, out


def test_a_model_without_a_template_is_refused(capsys, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(ROOT / "assets" / "student" / name)
    assert call(chat, f"--model={tmp_path}") == 2
    assert "has no chat template" in capsys.readouterr().err
