"""The verb: its flags, and a process that a signal stops."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests

from tests.support.paths import ROOT
from tests.support.serving import wait_until
from tests.support.verbs import call, verb_module

MODEL = f"--model={ROOT / 'assets' / 'teacher'}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host=0.0.0.0"], "--host=0.0.0.0: other machines would reach the server"),
        (["--api_key_env=NO_SUCH"], "--api_key_env=NO_SUCH: the environment has no such variable"),
        (["--api_key_env=SPACED"], "--api_key_env=SPACED: a token has visible ASCII"),
        (["--max_length=9999"], "--max_length=9999: the model has 512 positions"),
        (["--port=70000"], "port"),
        (["--slots=0"], "slots"),
        (["--cache_tokens=100"], "--cache_tokens=100: "),
    ],
)
def test_bad_flags_are_named(
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPACED", "a b")
    assert call(verb_module("serve"), MODEL, *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert "a b" not in line


@pytest.mark.long
def test_a_signal_lets_running_requests_finish(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "SERVE_TOKEN": "t0ken"}
    words = [sys.executable, "-m", "distill.serve", MODEL, "--port=0", "--api_key_env=SERVE_TOKEN"]
    with log.open("w") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        wait_until(lambda: "serving" in log.read_text() or process.poll() is not None, 120)
        url = log.read_text().strip().rpartition(" at ")[2]
        headers, replies = {"Authorization": "Bearer t0ken"}, []
        body = {"prompt": [5], "n": 8, "max_tokens": 500, "temperature": 2.0, "seed": 1}

        def ask() -> None:
            replies.append(requests.post(f"{url}/v1/completions", json=body, headers=headers))

        asking = threading.Thread(target=ask)
        asking.start()
        metrics = f"{url}/metrics"
        wait_until(
            lambda: "slots_in_use 8.0" in requests.get(metrics, headers=headers, timeout=9).text
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, log.read_text()
        asking.join()
    finally:
        process.kill()
        process.wait()
    assert replies[0].status_code == 200
    assert len(replies[0].json()["choices"]) == 8
    said = log.read_text()
    assert "Traceback" not in said and "t0ken" not in said
    assert "SIGTERM: stopping" in said
