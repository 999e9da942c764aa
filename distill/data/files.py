"""Local files of rows as people have them: JSON lines, JSON or parquet, told by name and content.

Rows are read by number, more than once and by several threads. So a pipe or a compressed file is
refused, in words that say how to make a file of it.
"""

import itertools
import json
import os
import re
from array import array
from pathlib import Path
from typing import Any

from distill.data import values
from distill.runtime.paths import suggest_path
from models.errors import UserError

_BOM = b"\xef\xbb\xbf"
_FORMATS = "rows are read from .jsonl, .json and .parquet files"
CSV_SUFFIXES = (".csv", ".tsv")
CSV_ADVICE = "put it into a folder of its own: hf:FOLDER reads csv and tsv"
_UTF16 = "is in UTF-16, and rows are read in UTF-8: iconv -f UTF-16 -t UTF-8 converts it"
_MAGIC = {  # how files begin that no name makes readable
    b"\x1f\x8b": "is compressed: gunzip it",
    b"\x28\xb5\x2f\xfd": "is compressed: unzstd it",
    b"BZh": "is compressed: bunzip2 it",
    b"\xfd7zXZ": "is compressed: unxz it",
    b"PK\x03\x04": "is a zip archive: unzip it",
    b"ARROW1": f"is an Arrow file; {_FORMATS}",
    b"\xff\xff\xff\xff": f"is an Arrow stream; {_FORMATS}",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
_SPACE = re.compile(r"\s*")


def find_format(path: str) -> str:
    """Returns the format of a file: parquet, jsonl (an object a line) or json (over any lines).

    Raises:
      UserError: if there is no such file, it cannot be read, or it is in another format.
    """
    suffix = Path(path).suffix.lower()
    try:
        _require_file(path)
        with open(path, "rb") as file:
            start = file.read(8)
            if start.startswith(b"PAR1"):
                return "parquet"
            for magic, reason in _MAGIC.items():
                if start.startswith(magic):
                    raise UserError(f"{path}: {reason}")
            if suffix == ".parquet":
                raise UserError(f"{path}: is no parquet file")
            if suffix in (".jsonl", ".ndjson"):
                return "jsonl"
            file.seek(0)
            lines = [*itertools.islice((line for line in file if not _is_blank(line)), 2)]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if any(_is_object(line) for line in lines):  # the first may be a bad row
        return "jsonl"
    if suffix != ".json" and lines:
        way = f"; {CSV_ADVICE}" if suffix in CSV_SUFFIXES else ""
        raise UserError(f"{path}: its first line is no JSON object; {_FORMATS}{way}")
    return "json"


def _require_file(path: str) -> None:
    if not path:
        raise UserError("no source of rows: name a file, hf:NAME or tfds:NAME")
    if Path(path).is_dir():
        if (Path(path) / "metrics.jsonl").exists():
            raise UserError(f"{path}: is a run, not rows; its samples are in {path}/rollouts")
        raise UserError(f"{path}: is a folder; hf:{path} reads the files of one")
    if not Path(path).exists():
        if "://" in path:
            raise UserError(f"{path}: rows are read from local files, hf:NAME and tfds:NAME")
        target = f": the link's target {os.readlink(path)}" if Path(path).is_symlink() else ""
        raise UserError(f"{path}: no such file{target}{suggest_path(path)}")
    if not Path(path).is_file():
        raise UserError(f"{path}: is a pipe or a device; write its rows to a file first")


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(_BOM).strip()


def _is_object(line: bytes) -> bool:
    try:
        return bool(parse_line(line, ""))
    except UserError:
        return False


def index_lines(path: str) -> tuple[array, array]:
    """Returns (offsets, numbers from 1) of the lines of a file that are not blank, in one pass."""
    starts, numbers, offset = array("q"), array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not _is_blank(line):
                starts.append(offset)
                numbers.append(number)
            offset += len(line)
    return starts, numbers


def parse_line(line: bytes, where: str) -> dict:
    """Parses a line as a JSON object. Raises UserError that begins with `where` if it is none."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_make_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: {_explain_json_error(error)}") from None
    # Few brackets cannot be nested deeply.
    return require_object(row, where, line.count(b"[") + line.count(b"{") > values.MAX_DEPTH)


def _explain_json_error(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = f"byte 0x{error.object[error.start]:02x}"
        return f"not UTF-8 ({byte} at position {error.start}); save the file as UTF-8"
    return f"not JSON ({error})"


def require_object(row: Any, where: str, may_be_deep: bool = True) -> dict:
    """Returns `row`. Raises UserError that begins with `where` unless it is an object that can be
    written again."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    try:
        if may_be_deep:
            values.check_depth(row)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return row


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):  # the json module would keep the last in silence
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} is there twice")
    return fields


def read_json(path: str) -> list:
    """Returns the elements of a file of one list, or the values that it holds one after another.

    Raises:
      UserError: if the file is not JSON.
    """
    decoder, found, end = json.JSONDecoder(object_pairs_hook=_make_object), [], 0
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").strip()
        while end < len(text):
            value, end = decoder.raw_decode(text, end)
            found.append(value)
            end = _SPACE.match(text, end).end()  # pyright: ignore[reportOptionalMemberAccess]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {_explain_json_error(error)}") from None
    return found[0] if len(found) == 1 and isinstance(found[0], list) else found
