"""Local files as people have them, by name and content."""

import gzip
import json
import os
from pathlib import Path

import pytest

from distill.data import sources
from models.errors import UserError

ROW = {"question": "2+2?", "response": "4"}
LINE = json.dumps(ROW).encode() + b"\n"
BOM = b"\xef\xbb\xbf"


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def read_all(source: str) -> list[dict]:
    return [row for _, row in sources.open_rows(source)]


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a set [v2]/r*ws?.jsonl", LINE, 1),
        ("#1%41:ü/-rows.jsonl", LINE, 1),
        ("ROWS.JSONL", LINE, 1),
        ("ROWS.JSON", b"[" + LINE + b"]", 1),
        ("rows.ndjson", LINE + LINE, 2),
        ("rows", LINE, 1),
        ("rows.txt", LINE, 1),
        ("bom.jsonl", BOM + LINE + b"\n" + BOM + LINE, 2),  # two such files, one after the other
        ("bom.json", BOM + b"[" + LINE + b"]", 1),
        ("crlf.jsonl", LINE.replace(b"\n", b"\r\n") * 2, 2),
        ("no end.jsonl", LINE + LINE.strip(), 2),
        ("list.json", json.dumps([ROW, ROW], indent=2).encode(), 2),
        ("object.json", json.dumps(ROW, indent=2).encode(), 1),
        ("objects.json", json.dumps(ROW, indent=2).encode() * 3, 3),
    ],
)
def test_files_are_read(tmp_path: Path, name: str, content: bytes, count: int) -> None:
    assert read_all(write(tmp_path / name, content)) == [ROW] * count


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl.gz", gzip.compress(LINE, mtime=0), "is compressed: gunzip it"),
        ("rows.jsonl", gzip.compress(LINE, mtime=0), "is compressed: gunzip it"),
        ("rows.json", b"\x28\xb5\x2f\xfd...", "is compressed: unzstd it"),
        ("rows.jsonl", LINE.decode().encode("utf-16"), "is in UTF-16"),
        (
            "rows.csv",
            b"question,answer\n2+2?,4\n",
            "its first line is no JSON object; rows are read from .jsonl, .json and .parquet "
            "files; put it into a folder of its own: hf:FOLDER reads csv and tsv",
        ),
        ("rows.txt", b"2+2?\n", "its first line is no JSON object"),
        ("rows.arrow", b"ARROW1\0\0", "is an Arrow file"),
        ("rows.parquet", LINE, "is no parquet file"),
        ("rows.parquet", b"", "is no parquet file"),
        ("rows.parquet", b"PAR1" + LINE, "cannot be read: Parquet magic bytes not found"),
        ("rows.jsonl", BOM + b"\n\r\n", "no rows"),
        ("rows.json", b"[]", "no rows"),
        ("rows.json", b"[1,", "not JSON"),
        ("x" * 300, None, "File name too long"),
    ],
)
def test_other_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    path = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        sources.open_rows(path)
    assert str(error.value).startswith(f"{path}: {words}") and "\n" not in str(error.value)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    run = tmp_path / "run"
    write(run / "metrics.jsonl", b"")
    (tmp_path / "dangling.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    rows = write(tmp_path / "rows.jsonl", LINE)
    (tmp_path / "link.jsonl").symlink_to(rows)
    assert read_all(str(tmp_path / "link.jsonl")) == [ROW]
    for source, words in {
        str(tmp_path): "is a folder; hf:",
        str(run): "run: is a run, not rows; its samples are in .*run/rollouts$",
        str(tmp_path / "pipe.jsonl"): "is a pipe or a device",
        "/dev/null": "is a pipe or a device",
        str(tmp_path / "dangling.jsonl"): "no such file: the link's target gone.jsonl",
        str(tmp_path / "loop.jsonl"): "no such file: the link's target loop.jsonl",
        f"{rows}/": "Not a directory|no such file",
        "gs://bucket/rows.jsonl": "rows are read from local files",
        "": "^no source of rows",
        f"hf:{rows}": "is a file, which is named without hf:",
        "hf:": "names no set",
    }.items():
        with pytest.raises(UserError, match=words):
            sources.open_rows(source)


@pytest.mark.parametrize(("name", "gap"), [("rows.csv", b","), ("rows.tsv", b"\t")])
def test_tables_are_read_from_their_folder(tmp_path: Path, name: str, gap: bytes) -> None:
    path = write(tmp_path / "set" / name, gap.join([b"question", b"answer\n2+2?", b"4\n"]))
    with pytest.raises(UserError, match="is a file, put it into a folder of its own: hf:FOLDER"):
        sources.open_rows(f"hf:{path}")
    assert read_all(f"hf:{tmp_path}/set") == [{"question": "2+2?", "answer": 4}]


def test_a_folder_is_read_through_hf_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path / "a:b #1" / "train.jsonl", LINE)
    assert read_all(f"hf:{tmp_path}/a:b #1") == [ROW]
    write(tmp_path / "set [v2]" / "train.jsonl", LINE)
    with pytest.raises(UserError, match=r"set \[v2\]: .* rename the folder"):
        sources.open_rows(f"hf:{tmp_path}/set [v2]")


def nested(depth: int) -> bytes:
    return b'{"x": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"answer": "4", "answer": "5"}', "not JSON (the key 'answer' is there twice)"),
        (b'{"x": {"a": 1, "a": 1}}', "not JSON (the key 'a' is there twice)"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON (Exceeds the limit"),
        (nested(100), "nested more than 100 deep"),
        (nested(600), "nested more than 100 deep"),
        (nested(100_000), "not JSON (maximum recursion depth exceeded"),
        (b"\0\0\0\0", "not JSON ("),
        (
            b'{"question": "caf\xe9"}',
            "not UTF-8 (byte 0xe9 at position 17); save the file as UTF-8",
        ),
        (b"[1]", "not a JSON object"),
    ],
)
def test_a_line_that_cannot_be_used_is_a_bad_row(tmp_path: Path, line: bytes, words: str) -> None:
    rows = sources.open_rows(write(tmp_path / "rows.jsonl", LINE + line + b"\n" + LINE))
    assert rows.size == 3 and rows.read_row(0) == rows.read_row(2) == ROW
    with pytest.raises(UserError) as error:
        rows.read_row(1)
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: {words}")


def test_what_may_be_nested_or_large_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", nested(99) + b'\n{"x": ' + b"9" * 400 + b"}\n")
    assert [type(row["x"]) for row in read_all(path)] == [list, int]
