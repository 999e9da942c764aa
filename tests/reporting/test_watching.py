"""Tests report --watch: a page that follows its runs, for this machine only."""

import http.client
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from distill import report
from tests.support.paths import ROOT
from tests.support.run_files import write_run
from tests.support.verbs import call


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_follows_its_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=3)
    command = [sys.executable, "-m", "distill.report", str(run), "--watch"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])  # pyright: ignore[reportOptionalSubscript]
        try:
            status, page = get(port, "/")
            state = get(port, "/state")
            assert status == 200 and "3 of 6 steps" in page and state == get(port, "/state")
            assert f'"{state[1]}"' in page and "connect-src 'self'" in page
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 3, "stage": "opd", "train/loss": 0.1}\n')
            assert get(port, "/state") != state
            assert "4 of 6 steps" in get(port, "/")[1]
            assert get(port, "/metrics.jsonl")[0] == 404
            assert get(port, "/", host="elsewhere.example")[0] == 403
            (run / "config.json").unlink()
            os.rename(run / "metrics.jsonl", tmp_path / "gone")
            assert get(port, "/")[0] == 503
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert not (tmp_path / "report.html").exists() and not (ROOT / "report.html").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys) -> None:
    assert call(report, str(tmp_path / "none"), "--watch") == 2
    assert "none: no such directory" in capsys.readouterr().err
    assert call(report, "gs://bucket/run", "--watch") == 2
    assert "only local directories are followed" in capsys.readouterr().err


def test_a_report_needs_no_jax() -> None:
    code = "import sys, distill.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
