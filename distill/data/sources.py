"""Opens a dataset as rows by number.

    PATH.jsonl, PATH.json, PATH.parquet      local files (`files` says what else they may be)
    hf:NAME[:CONFIG][:SPLIT]                 a hub id or a local folder, through `datasets`
    tfds:NAME[:CONFIG][:SPLIT]               a TFDS name or a prepared folder; no TensorFlow
    arithmetic                               the generated task, without end

CONFIG may be empty (`hf:NAME::train[:100]`); SPLIT is train by default. Memory holds the place of
each row only: rows are read on demand. `columns` interprets their columns.

To add a source, write a function that returns its `Rows` and call it in `open_rows`.
"""

import contextlib
import dataclasses
import glob
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distill.data import arithmetic, columns, files, retry, values
from distill.runtime import network, run_files
from models.errors import SourceFailure, UserError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows by number; `size` 0: without end. window > 0: a stream, which is read forward and holds
    so many rows; reading window after window costs nothing extra."""

    name: str
    size: int
    read_row: Callable[[int], dict]  # raises UserError naming a row that cannot be read
    locate_row: Callable[[int], str]  # names a row in an error
    window: int = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        """Yields (name, row), each read on demand."""
        return ((self.locate_row(i), self.read_row(i)) for i in range(self.size))


def open_rows(source: str, *, size: int = 0, window: int = 0) -> Rows:
    """Opens the rows of a file or a set; only the first `size` of them unless it is 0.

    window > 0 streams (hf: only): rows are fetched on demand, `window` at a time. Their number
    must then be known, from `size` or from the hub.

    Reading a row is tried again if a network or a disk fails (retry.retry_reads).

    Raises:
      UserError: if the source does not exist, or has no rows.
    """
    scheme, _, name = source.partition(":")
    if window and scheme != "hf":
        raise UserError(f"config.data.streaming: {source} is not read through hf:")
    if scheme == "hf":
        rows = _open_stream(name, size, window) if window else _open_hub(name)
    elif scheme == "tfds":
        rows = _open_tfds(name)
    else:
        openers = {"jsonl": _open_jsonl, "json": _open_json, "parquet": _open_parquet}
        rows = openers[files.find_format(source)](source)
    if not rows.size:
        raise UserError(f"{source}: no rows")
    read_row = retry.retry_reads(rows.read_row, source)
    return dataclasses.replace(rows, size=min(size or rows.size, rows.size), read_row=read_row)


def make_arithmetic_rows(c: Any, seed: int) -> Rows:
    """Generates the arithmetic task as rows with messages, response and answer, as the config of a
    stage's `data` says.

    Raises UserError for an unknown split or a bad range of operations.
    """

    def read_row(index: int) -> dict:
        problem = arithmetic.make_problem(seed, index, c.split, tuple(c.operations))
        return {
            "messages": arithmetic.to_messages(problem),
            "response": arithmetic.to_response(problem),
            "direct": problem.answer,
            "answer": problem.answer,
            "operations": problem.operations,
        }

    try:
        read_row(0)
    except UserError as error:  # of the split, or the range of operations
        raise UserError(f"config.data.{error}") from None
    return Rows("arithmetic", c.max_rows, read_row, lambda index: f"arithmetic problem {index}")


def _open_jsonl(path: str) -> Rows:
    """Opens a file of one object a line, without its blank lines."""
    starts, numbers = files.index_lines(path)

    def locate_row(index: int) -> str:
        return f"{path}:{numbers[index]}"

    def read_row(index: int) -> dict:
        with open(path, "rb") as file:  # its own handle: the caller may be another thread
            file.seek(starts[index])
            return files.parse_line(file.readline(), locate_row(index))

    return Rows(path, len(starts), read_row, locate_row)


def _open_json(path: str) -> Rows:
    """Opens a file of JSON over any lines, read whole."""
    objects = files.read_json(path)

    def locate_row(index: int) -> str:
        return f"{path}[{index}]"

    def read_row(index: int) -> dict:
        return files.require_object(objects[index], locate_row(index))

    return Rows(path, len(objects), read_row, locate_row)


def _open_parquet(path: str) -> Rows:
    pattern = glob.escape(os.path.abspath(path))  # its brackets are no pattern
    return _open_dataset(path, f"{path}: row ", "parquet", None, "train", data_files=pattern)


def _open_hub(name: str) -> Rows:
    return _open_dataset(f"hf:{name}", f"hf:{name} row ", *_parse_hub_name(name))


def _open_dataset(
    source: str, prefix: str, path: str, config: str | None, split: str, **options: Any
) -> Rows:
    """Opens a set that `datasets` keeps on disk as Arrow files, mapped into memory."""
    if not Path(path).exists():
        network.find_hub()
    import datasets  # takes seconds to import

    table = _call_library(source, datasets.load_dataset, path, config, split=split, **options)
    _keep_media_encoded(table.info.features)
    return _make_table_rows(source, table, prefix)


def _keep_media_encoded(feature: Any) -> None:
    """Leaves images, audio and video of a set's features as they are stored, as bytes and a path.
    Decoding them needs further packages, and gives what is neither text nor JSON."""
    if isinstance(feature, dict):
        for inner in feature.values():
            _keep_media_encoded(inner)
    elif hasattr(feature, "feature"):  # of a list
        _keep_media_encoded(feature.feature)
    elif hasattr(feature, "decode") and type(feature).__name__ != "Json":
        feature.decode = False


def _open_tfds(name: str) -> Rows:
    """Opens a TFDS set in array_record files, which need no TensorFlow."""
    import tensorflow_datasets as tfds

    path, config, split = _parse_name(name)
    source = f"tfds:{name}"
    if (Path(path) / "dataset_info.json").is_file():
        builder = _call_library(source, tfds.builder_from_directory, path)
        table = _call_library(source, builder.as_data_source, split=split)
    else:
        full_name = f"{path}/{config}" if config else path
        table = _call_library(source, tfds.data_source, full_name, split=split)
    return _make_table_rows(source, table, f"{source} row ")


def _make_table_rows(source: str, table: Any, prefix: str) -> Rows:
    """Makes rows of a sequence of mappings, named by `prefix` and their numbers."""

    def locate_row(index: int) -> str:
        return f"{prefix}{index}"

    def read_row(index: int) -> dict:
        row = _call_library(locate_row(index), table.__getitem__, index)
        return values.convert_row(row, locate_row(index))

    return Rows(source, len(table), read_row, locate_row)


def _open_stream(name: str, size: int, window: int) -> Rows:
    """Opens a set that is fetched while it is read. Holds one window of rows: one before it starts
    the stream again, one after the next window skips ahead."""
    path, config, split = _parse_hub_name(name)
    if not Path(path).exists():
        network.find_hub()
    import datasets

    source = f"hf:{name}"
    stream = _call_library(source, datasets.load_dataset, path, config, split=split, streaming=True)
    _keep_media_encoded(stream.info.features)
    known = (stream.info.splits or {}).get(split)
    total = known.num_examples if known else 0
    if not total and not size:
        raise UserError(f"{source}: of unknown length: streaming it needs config.data.max_rows")
    held: list[dict] = []
    number, remaining = -1, iter(())  # of the window, and the rows after it

    def fetch_window(wanted: int) -> None:
        nonlocal held, number, remaining
        if wanted != number + 1 or number < 0:
            remaining = iter(stream.skip(wanted * window))
        held, number = [], -1  # if it fails, the next call starts the stream again
        for _ in range(window):
            row = _call_library(source, next, remaining, None)
            if row is None:
                break
            held.append(row)
        number = wanted

    def read_row(index: int) -> dict:
        if index // window != number:
            fetch_window(index // window)
        if index % window >= len(held):
            count = number * window + len(held)
            raise UserError(f"{source}: has only {count} rows, config.data.max_rows says {size}")
        return values.convert_row(held[index % window], locate_row(index))

    def locate_row(index: int) -> str:
        return f"{source} row {index}"

    return Rows(source, total or size, read_row, locate_row, window)


def _parse_name(name: str) -> tuple[str, str | None, str]:
    """Splits NAME[:CONFIG][:SPLIT]. A split may hold colons itself, and so may a folder's path that
    stands alone."""
    if Path(name).is_dir():
        return name, None, "train"
    path, config, split = [*name.split(":", 2), "", ""][:3]
    return path, config or None, split if name.count(":") > 1 else "train"


def _parse_hub_name(name: str) -> tuple[str, str | None, str]:
    path, config, split = _parse_name(name)
    if not path:
        raise UserError(f"hf:{name}: names no set")
    if Path(path).is_file():
        is_csv = Path(path).suffix.lower() in files.CSV_SUFFIXES
        reason = files.CSV_ADVICE if is_csv else "which is named without hf:"
        raise UserError(f"hf:{name}: is a file, {reason}")
    if Path(path).is_dir() and "[" in os.path.realpath(path):
        raise UserError(f"hf:{name}: `datasets` takes [ for a pattern: rename the folder")
    return path, config, split


def _call_library(source: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls a library; turns whatever it raises into a UserError of one line."""
    try:
        return call(*arguments, **options)
    except Exception as error:  # the libraries raise every kind
        is_vague = type(error).__name__ == "DatasetGenerationError"  # which only says where
        cause = error.__cause__ if is_vague and error.__cause__ else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"{source}: cannot be read: {reason}") from error


# Of a row with samples, what a sample's own text stands in place of.
_SAMPLE_FIELDS = {"samples", "prompt_tokens", *columns.TRACES, *columns.RESPONSES}


_OF_SAMPLES = ("top_logprobs", "logprobs", "finish_reason")  # read beside a sample's tokens


def has_samples(rows: Rows) -> bool:
    """Returns True if the first row that can be read is one that `generate` wrote."""
    for index in range(min(10, rows.size)):
        with contextlib.suppress(UserError):
            return "samples" in rows.read_row(index)
    return False


def expand_samples(rows: Rows, keep: str, skip_reasons: dict[str, str] | None) -> Rows:
    """Makes a row of each kept sample that `generate` wrote beside a prompt, by its tokens.

    The whole row that it is from is its `source_row`. A sample without tokens, from a server that
    gives none, becomes the row with its text as `response`. Reads the file once, to find the
    samples.

    Args:
      keep: all, finished (ended by a stop token), or correct (finished, and graded correct).
      skip_reasons: receives why each bad row was skipped, by the row's name; None: raise instead.

    Raises:
      UserError: if a row has no samples, a sample lacks what `keep` needs, or none is left.
    """
    row_indices, sample_indices = array("q"), array("q")
    for index in range(rows.size):
        where = rows.locate_row(index)
        try:
            kept = _find_kept_samples(rows.read_row(index), where, keep)
        except UserError as error:
            if skip_reasons is None or isinstance(error, SourceFailure):
                raise
            skip_reasons[where] = str(error)
            run_files.log_skipped(error, len(skip_reasons))
            continue
        row_indices.extend([index] * len(kept))
        sample_indices.extend(kept)
    if not row_indices:
        raise UserError(f"{rows.name}: config.data.keep_samples={keep} leaves none of its samples")

    def read_row(index: int) -> dict:
        row = rows.read_row(row_indices[index])
        sample = row["samples"][sample_indices[index]]
        if row["prompt_tokens"] is None or sample["tokens"] is None:
            others = {k: v for k, v in row.items() if k not in _SAMPLE_FIELDS}
            return {**others, "response": sample["text"]}
        return {
            "tokens": row["prompt_tokens"],
            "response_tokens": sample["tokens"],
            "source_row": row,
            **{name: row[name] for name in ("answer",) if name in row},
            **{name: sample[name] for name in _OF_SAMPLES if name in sample},
        }

    def locate_row(index: int) -> str:
        return f"{rows.locate_row(row_indices[index])} sample {sample_indices[index]}"

    return Rows(rows.name, len(row_indices), read_row, locate_row)


def _find_kept_samples(row: dict, where: str, keep: str) -> list[int]:
    samples = row.get("samples")
    if not isinstance(samples, list) or "prompt_tokens" not in row:
        raise UserError(f"{where}: no prompt_tokens and samples: {sorted(row)}")
    if keep == "correct" and any("correct" not in sample for sample in samples):
        raise UserError(
            f"{where}: config.data.keep_samples=correct, but its samples were not graded "
            "(python -m distill.verify)"
        )
    return [
        number
        for number, sample in enumerate(samples)
        if keep == "all"
        or (sample.get("finish_reason") == "stop" and (keep != "correct" or sample["correct"]))
    ]
