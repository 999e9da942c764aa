"""Rows in: what `data.source` names, as rows by number.

    PATH.jsonl, PATH.json, PATH.parquet      local files
    hf:NAME[:CONFIG][:SPLIT]                 a hub id or a local folder, through `datasets`
    tfds:NAME[:CONFIG][:SPLIT]               a TFDS name or a prepared folder; no TensorFlow
    arithmetic                               the generated task, without end

CONFIG may be left empty (`hf:NAME::train[:100]`); SPLIT is train where it is not given. Nothing is
held in memory but the place of each row: rows are read when they are asked for. What a row's
columns mean is for `columns` to say.
"""

import contextlib
import dataclasses
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import arithmetic
from distill.runtime import run_files
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows by number. `size` 0: without end. `window` > 0: a stream, read forward, of which so many
    rows are at hand; an order that leaves its windows one after another costs nothing extra."""

    name: str
    size: int
    read_row: Callable[[int], dict]  # raises UserError naming a row that cannot be read
    locate_row: Callable[[int], str]  # names a row in an error
    window: int = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        """Each with its name, read as it is asked for."""
        return ((self.locate_row(i), self.read_row(i)) for i in range(self.size))


def open_rows(source: str, *, size: int = 0, window: int = 0) -> Rows:
    """The rows of a file or a set; the first `size` of them, if it is not 0.

    window > 0 streams (hf: only): rows are fetched as they are needed, `window` at a time. The
    number of rows must then be known, from `size` or from the hub.

    Raises:
      UserError: if there is no such source, or it has no rows.
    """
    scheme, _, name = source.partition(":")
    if window and scheme != "hf":
        raise UserError(f"config.data.streaming: {source} is not read through hf:")
    if scheme == "hf":
        rows = _open_stream(name, size, window) if window else _open_hub(name)
    elif scheme == "tfds":
        rows = _open_tfds(name)
    elif source.endswith(".parquet"):
        _require_file(source)
        rows = _open_table("parquet", None, "train", f"{source}: row ", data_files=str(source))
    elif source.endswith(".json") and _is_json_list(source):
        rows = _open_json(source)
    else:
        rows = _open_jsonl(source)
    if not rows.size:
        raise UserError(f"{source}: no rows")
    return dataclasses.replace(rows, size=min(size or rows.size, rows.size))


def make_arithmetic_rows(c: Any, seed: int) -> Rows:
    """The generated task as rows of messages, response and answer; `c` is a stage's `data`.

    Raises UserError for a split or range of operations that there is not.
    """

    def read_row(index: int) -> dict:
        problem = arithmetic.make_problem(seed, index, c.split, tuple(c.operations))
        return {
            "messages": arithmetic.to_messages(problem),
            "response": arithmetic.to_response(problem),
            "direct": arithmetic.to_direct_response(problem),
            "answer": problem.answer,
            "operations": problem.operations,
        }

    read_row(0)  # a bad split or range is an error now
    return Rows("arithmetic", c.max_rows, read_row, lambda index: f"arithmetic problem {index}")


def parse_json_line(line: bytes, where: str) -> dict:
    """The JSON object of a line. Raises UserError that begins with `where` if it is none."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object")
    return row


def _require_file(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")


def _open_jsonl(path: str) -> Rows:
    """One object a line; blank lines are skipped. One pass finds where the lines begin."""
    _require_file(path)
    starts, numbers, at = array("q"), array("q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                starts.append(at)
                numbers.append(number)
            at += len(line)

    def locate_row(index: int) -> str:
        return f"{path}:{numbers[index]}"

    def read_row(index: int) -> dict:
        with open(path, "rb") as file:  # anew each time: the reader may be in another thread
            file.seek(starts[index])
            return parse_json_line(file.readline(), locate_row(index))

    return Rows(path, len(starts), read_row, locate_row)


def _is_json_list(path: str) -> bool:
    """Whether a .json file is one list; many are a row a line."""
    _require_file(path)
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                return line.lstrip().startswith(b"[")
    return False


def _open_json(path: str) -> Rows:
    """One list of objects, read whole."""
    try:
        objects = json.loads(Path(path).read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None

    def read_row(index: int) -> dict:
        if not isinstance(objects[index], dict):
            raise UserError(f"{path}[{index}]: not a JSON object")
        return objects[index]

    return Rows(path, len(objects), read_row, lambda index: f"{path}[{index}]")


def _parse_name(name: str) -> tuple[str, str | None, str]:
    """(name, config, split) of what follows `hf:` or `tfds:`. A split may hold colons itself."""
    parts = name.split(":", 2)
    config = parts[1] if len(parts) > 1 else ""
    return parts[0], config or None, parts[2] if len(parts) > 2 else "train"


def _call_library(source: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `call` gives; whatever it raises, in one line. The libraries raise of every kind."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: cannot be read: {reason}") from error


def _open_hub(name: str) -> Rows:
    path, config, split = _parse_name(name)
    return _open_table(path, config, split, f"hf:{name} row ")


def _open_table(path: str, config: str | None, split: str, prefix: str, **options: Any) -> Rows:
    """A set that `datasets` keeps on disk as Arrow files, mapped into memory."""
    import datasets  # seconds to import, and only here needed

    source = prefix.removesuffix(" row ").removesuffix(":")
    table = _call_library(source, datasets.load_dataset, path, config, split=split, **options)

    def locate_row(index: int) -> str:
        return f"{prefix}{index}"

    def read_row(index: int) -> dict:
        return _call_library(locate_row(index), table.__getitem__, index)

    return Rows(source, len(table), read_row, locate_row)


def _open_stream(name: str, size: int, window: int) -> Rows:
    """A set that is fetched as it is read. A window of rows is kept; a row before it begins the
    stream anew, one beyond it skips ahead."""
    import datasets

    path, config, split = _parse_name(name)
    source = f"hf:{name}"
    stream = _call_library(source, datasets.load_dataset, path, config, split=split, streaming=True)
    known = (stream.info.splits or {}).get(split)
    total = known.num_examples if known else 0
    if not total and not size:
        raise UserError(f"{source}: of unknown length: streaming it needs config.data.max_rows")
    kept: list[dict] = []
    begin, rest = -1, iter(())

    def fetch_window(number: int) -> None:
        nonlocal kept, begin, rest
        if number != begin + 1 or begin < 0:
            rest = iter(stream.skip(number * window))
        kept, begin = [], number
        for _ in range(window):
            row = _call_library(source, next, rest, None)
            if row is None:
                break
            kept.append(row)

    def read_row(index: int) -> dict:
        if index // window != begin:
            fetch_window(index // window)
        if index % window >= len(kept):
            have = begin * window + len(kept)
            raise UserError(f"{source}: has only {have} rows, config.data.max_rows says {size}")
        return kept[index % window]

    return Rows(source, total or size, read_row, lambda index: f"{source} row {index}", window)


def _open_tfds(name: str) -> Rows:
    """A TFDS set in array_record files, which need no TensorFlow."""
    import tensorflow_datasets as tfds

    path, config, split = _parse_name(name)
    source = f"tfds:{name}"
    if (Path(path) / "dataset_info.json").is_file():
        builder = _call_library(source, tfds.builder_from_directory, path)
        table = _call_library(source, builder.as_data_source, split=split)
    else:
        full = f"{path}/{config}" if config else path
        table = _call_library(source, tfds.data_source, full, split=split)

    def locate_row(index: int) -> str:
        return f"{source} row {index}"

    def read_row(index: int) -> dict:
        fields = _call_library(locate_row(index), table.__getitem__, index)
        return {
            field: _to_json_value(value, f"{locate_row(index)}: {field}")
            for field, value in fields.items()
        }

    return Rows(source, len(table), read_row, locate_row)


def _to_json_value(value: Any, what: str) -> Any:
    """A TFDS value as JSON would have it: bytes are UTF-8 text, arrays are lists."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{what}: not UTF-8 ({error})") from None
    if isinstance(value, np.ndarray | np.generic):
        return _to_json_value(value.tolist(), what)
    if isinstance(value, dict):
        return {key: _to_json_value(inner, what) for key, inner in value.items()}
    return [_to_json_value(inner, what) for inner in value] if isinstance(value, list) else value


def has_samples(rows: Rows) -> bool:
    """Whether the first row that can be read is one that `generate` wrote."""
    for index in range(min(10, rows.size)):
        with contextlib.suppress(UserError):
            return "samples" in rows.read_row(index)
    return False


def expand_samples(rows: Rows, keep: str, skip_reasons: dict[str, str] | None) -> Rows:
    """The samples that `generate` wrote beside each prompt, as rows of their own, by their tokens.

    keep: all, finished (ended by a stop token), or correct (finished, and graded correct). The file
    is read once, to find them; `skipped` takes the bad rows and why, None makes them errors.

    Raises:
      UserError: if a row has no samples, a sample lacks what `keep` asks for, or none is left.
    """

    def find_kept_samples(index: int) -> list[int]:
        row = rows.read_row(index)
        if not isinstance(row.get("samples"), list) or "prompt_tokens" not in row:
            raise UserError(
                f"{rows.locate_row(index)}: no prompt_tokens and samples: {sorted(row)}"
            )
        if keep == "correct" and any("correct" not in sample for sample in row["samples"]):
            raise UserError(
                f"{rows.locate_row(index)}: config.data.keep_samples=correct, but its samples "
                "were not graded "
                "(python -m distill.verify)"
            )
        finished = [sample.get("finish_reason") == "stop" for sample in row["samples"]]
        right = [keep != "correct" or sample["correct"] for sample in row["samples"]]
        return [
            number
            for number in range(len(finished))
            if keep == "all" or (finished[number] and right[number])
        ]

    kept, numbers = array("q"), array("q")  # of its row, and in it
    for index in range(rows.size):
        try:
            numbers.extend(good := find_kept_samples(index))
            kept.extend([index] * len(good))
        except UserError as error:
            if skip_reasons is None:
                raise
            skip_reasons[rows.locate_row(index)] = str(error)
            run_files.log_line(f"skipped: {error}")
    if not kept:
        raise UserError(f"{rows.name}: config.data.keep_samples={keep} leaves none of its samples")

    def read_row(position: int) -> dict:
        index, number = kept[position], numbers[position]
        whole = rows.read_row(index)
        sample = whole["samples"][number]
        return {
            "tokens": whole["prompt_tokens"],
            "response_tokens": sample["tokens"],
            "asked": whole,
            **{name: whole[name] for name in ("answer",) if name in whole},
            **{name: sample[name] for name in ("top_logprobs",) if name in sample},
        }

    def locate_row(position: int) -> str:
        index, number = kept[position], numbers[position]
        return f"{rows.locate_row(index)} sample {number}"

    return Rows(rows.name, len(kept), read_row, locate_row)
