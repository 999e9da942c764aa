"""Tests what is read again, and what a source that fails does to a run."""

import json
import re
from types import SimpleNamespace

import datasets
import pytest

from configs import base
from distill.data import dataset, retry, sources
from distill.training import loop, trainer
from models.errors import SourceFailure, UserError
from tests.support.runs import config, numbers, tiny_model


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(retry, "WAIT_SECONDS", (0.0, 0.0, 0.0))


def make_reader(*outcomes):
    """Returns a function that raises or returns these in turn, and the list of those left."""
    left = list(outcomes)

    def read_row(index):
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return read_row, left


def test_a_connection_is_tried_again_and_a_bad_row_is_not(capsys):
    wrapped = UserError("row 3: cannot be read: reset")
    wrapped.__cause__ = ConnectionResetError("reset by peer")
    read_row, left = make_reader(wrapped, TimeoutError(), {"x": 1}, UserError("row 3: not JSON"))
    read_row = retry.retry_reads(read_row, "hf:x")
    assert read_row(3) == {"x": 1}
    assert capsys.readouterr().err.splitlines() == [
        "warning: hf:x: reset by peer; trying again in 0 s",
        "warning: hf:x: TimeoutError; trying again in 0 s",
    ]
    with pytest.raises(UserError, match=r"^row 3: not JSON$"):
        read_row(3)
    assert not left


def test_a_source_that_stays_away_is_named():
    read_row, left = make_reader(*[OSError(5, "Input/output error")] * 5)
    with pytest.raises(SourceFailure, match=r"^a\.jsonl: row 3 could not be read in 4 tries: .*I"):
        retry.retry_reads(read_row, "a.jsonl")(3)
    assert len(left) == 1


def test_a_stream_starts_again_where_it_broke(monkeypatch):
    """No row is lost or read twice."""
    failures = [ConnectionError("lost")]

    class Stream:
        info = SimpleNamespace(splits={"train": SimpleNamespace(num_examples=12)}, features=None)

        def __init__(self, first=0):
            self.first = first

        def skip(self, count):
            return Stream(self.first + count)

        def __iter__(self):
            for i in range(self.first, 12):
                if i == 6 and failures:
                    raise failures.pop()
                yield {"i": i}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Stream())
    rows = sources.open_rows("hf:x", window=4)
    assert [rows.read_row(i)["i"] for i in range(12)] == list(range(12)) and not failures


def test_a_failing_source_is_no_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"tokens": [1, {i}]}}\n' for i in range(8)))
    c = base.make_data()
    c.source, c.on_bad_row, c.check_rows = str(path), "skip", 4
    source = dataset.load_source(c, None, 0, False)
    path.rename(tmp_path / "away.jsonl")
    with pytest.raises(SourceFailure):
        source.read_example(6)
    assert not source.skip_reasons
    (tmp_path / "away.jsonl").rename(path)
    assert source.read_example(6).prompt == [1, 6]


def test_a_run_stops_at_a_checkpoint_when_its_source_fails(tmp_path, monkeypatch):
    """Nothing that was trained is lost, and the same command goes on."""
    path, away = tmp_path / "rows.jsonl", tmp_path / "away.jsonl"
    rows = [{"question": f"{i}+1?", "response": str(i + 1)} for i in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config([tiny_model(tmp_path / "student", 0), ""])
    c.stages, c.sft.steps, c.sft.pack_tokens, c.sft.data.source = ("sft",), 5, 0, str(path)
    c.checkpoint.every = 100
    take = trainer.Trainer.step

    def step(self, state, *arguments):
        if int(state.step) == 1:
            path.rename(away)
        return take(self, state, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", step)
        with pytest.raises(UserError) as stopped:
            loop.run(c, tmp_path / "run")
    said = r"in 4 tries: No such file or directory; stopped at the checkpoint of step ([23]), from"
    found = re.search(said, str(stopped.value))
    assert found, stopped.value
    assert [row["step"] for row in numbers(tmp_path / "run")] == list(range(int(found[1])))
    away.rename(path)
    loop.run(c, tmp_path / "run")
    assert [row["step"] for row in numbers(tmp_path / "run")] == list(range(5))
