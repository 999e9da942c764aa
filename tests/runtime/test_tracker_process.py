"""Tests what is sent to a tracker, with one that only remembers."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from distill.runtime import tracker_process


class Memory:
    """A tracker that keeps what it is sent."""

    def __init__(self, next_step: int = 0) -> None:
        self.next_step = next_step
        self.rows: list[dict[str, Any]] = []
        self.tables: dict[int, Any] = {}

    def log(self, row: dict[str, Any], tables: Any) -> None:
        self.rows.append(row)
        self.tables[row["step"]] = tables

    def finish(self, is_complete: bool) -> None:
        pass


def append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def to_line(step: int, **values: Any) -> str:
    return json.dumps({"step": step, "stage": "opd", **values}) + "\n"


def send(tracker: Memory, workdir: Path) -> int:
    """Sends what is there."""
    finish = threading.Event()
    finish.set()
    return tracker_process.send_run(tracker, epath.Path(workdir), finish, 0.01)


def test_only_what_a_tracker_lacks_is_sent(tmp_path: Path) -> None:
    assert send(Memory(), tmp_path) == -1  # in a bucket the file appears late
    append(tmp_path / "metrics.jsonl", "".join(to_line(step, x=step, y=None) for step in range(5)))
    tracker = Memory(next_step=3)
    assert send(tracker, tmp_path) == 4
    assert tracker.rows == [{"step": step, "stage": "opd", "x": step} for step in (3, 4)]


def test_rows_are_sent_while_they_are_written(tmp_path: Path) -> None:
    tracker, finish, path = Memory(), threading.Event(), tmp_path / "metrics.jsonl"
    arguments = tracker, epath.Path(tmp_path), finish, 0.01
    thread = threading.Thread(target=tracker_process.send_run, args=arguments)
    thread.start()
    for step in range(3):
        line = to_line(step)
        append(path, line[:9])  # half a row waits for the other half
        append(path, line[9:])
    finish.set()
    thread.join(10)
    assert [row["step"] for row in tracker.rows] == [0, 1, 2]


def test_half_a_row_is_not_sent(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", to_line(0) + to_line(1)[:-1])
    tracker = Memory()
    send(tracker, tmp_path)
    assert [row["step"] for row in tracker.rows] == [0]


def test_transcripts_and_evaluations_go_with_the_row_of_their_step(tmp_path: Path) -> None:
    transcript = {"prompt": "2+2=", "response": "4\ud800", "tokens": [7, 8], "kl": [1.0, None, 2.0]}
    append(tmp_path / "rollouts" / "000001.jsonl", json.dumps(transcript) + "\n")
    append(tmp_path / "eval" / "000002" / "examples.jsonl", '{"id": "a", "correct": true}\n')
    append(tmp_path / "eval" / "000002" / "summary.json", "{}")
    append(tmp_path / "eval" / "000003" / "examples.jsonl", '{"id": "not finished"}\n')
    append(tmp_path / "metrics.jsonl", "".join(map(to_line, range(3))))
    tracker = Memory()
    send(tracker, tmp_path)
    assert tracker.tables == {
        0: {},
        1: {
            "transcripts": [{"prompt": "2+2=", "response": "4?", "tokens": 2, "kl": 1.5}],
            "evaluation": [{"id": "a", "correct": True}],
        },
        2: {},
    }


def test_tables_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_process, "MAX_ROWS", 2)
    monkeypatch.setattr(tracker_process, "MAX_CHARACTERS", 3)
    append(tmp_path / "rows.jsonl", '{"text": "abcdef"}\n' * 3)
    rows = tracker_process.read_table(epath.Path(tmp_path / "rows.jsonl"))
    assert rows == [{"text": "abc… (6 characters)"}] * 2
    assert tracker_process.to_columns([{"a": 1}, {"b": 2}]) == (["a", "b"], [[1, None], [None, 2]])


def test_the_config_is_flat_and_without_stages_that_do_not_run() -> None:
    stage = {"objective": "opd", "optim": {"learning_rate": 1e-5}, "teachers": ["teacher"]}
    config = {"stages": ["opd"], "seed": 0, "opd": stage, "sft": {"objective": "sft"}}
    assert tracker_process.flatten_config(config) == {
        "stages": ["opd"],
        "seed": 0,
        "opd.objective": "opd",
        "opd.optim.learning_rate": 1e-5,
        "opd.teachers": ["teacher"],
    }
