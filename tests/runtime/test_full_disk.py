"""Tests that a disk that is full or gone is said in one line, and harms no earlier file."""

import json
import shutil

import pytest
from etils import epath

from distill.runtime import run_files
from models.errors import UserError


@pytest.mark.parametrize("file", ["metrics.jsonl", "rollouts/000001.jsonl.tmp", "events"])
def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path, monkeypatch, file):
    """Linux's /dev/full refuses to write, as a full disk does."""
    workdir = tmp_path / "run"
    with run_files.Writer(workdir, 0) as writer:
        writer.write(0, "opd", {"x": 1.0})
        writer.write_rollouts(0, [{"text": "a"}])
    kept = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    def fill_disk():
        if file in ("metrics.jsonl", "events"):
            monkeypatch.setattr(epath.Path(workdir).__class__, "open", open_full)
        else:
            (workdir / file).symlink_to("/dev/full")

    def open_full(self, mode="r", *more):
        is_full = mode == "ab" and self.name.startswith(file)
        return open("/dev/full" if is_full else self, mode, *more)

    fill_disk()
    with (
        pytest.raises(UserError, match=r"^--workdir=w: No space left on device[^\n]*is intact"),
        run_files.explain_write_errors(workdir, "--workdir=w"),
        run_files.Writer(workdir, 1) as writer,
    ):
        writer.write(1, "opd", {"x": 2.0})
        writer.write_rollouts(1, [{"text": "b"}])
    monkeypatch.undo()
    assert all(path.read_bytes().startswith(content) for path, content in kept.items())
    with run_files.Writer(workdir, 1) as writer:  # there is room again
        writer.write(1, "opd", {"x": 2.0})
        writer.write_rollouts(1, [{"text": "b"}])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["x"] for row in rows] == [1.0, 2.0]
    assert (workdir / "rollouts" / "000001.jsonl").read_text() == '{"text": "b"}\n'


def test_a_directory_that_vanishes_is_not_made_again(tmp_path):
    workdir = tmp_path / "run"
    with (
        pytest.raises(UserError, match=r"^--workdir=w: No such file or directory: .*jsonl;"),
        run_files.explain_write_errors(workdir, "--workdir=w"),
        run_files.Writer(workdir, 0) as writer,
    ):
        writer.write(0, "opd", {"x": 1.0})
        shutil.rmtree(workdir)
        writer.write_rollouts(1, [{"text": "a"}])
    assert not workdir.exists()


def test_only_errors_of_writing_are_explained(tmp_path):
    with pytest.raises(ConnectionError), run_files.explain_write_errors(tmp_path, "--out=x"):
        raise ConnectionError("reset")
