"""Values of tables as JSON, and text that is none."""

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from distill.data import messages, sources, values
from distill.runtime import run_files
from models.errors import UserError

WHEN = datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


COLUMNS = {
    "timestamp": (pa.array([WHEN]), "2024-01-02T03:04:05+00:00"),
    "nanoseconds": (
        pa.array([1_704_164_645_123_456_789], pa.timestamp("ns")),
        "2024-01-02T03:04:05.123456789",
    ),
    "date": (pa.array([WHEN.date()]), "2024-01-02"),
    "time": (pa.array([WHEN.time()]), "03:04:05"),
    "duration": (pa.array([datetime.timedelta(days=1, milliseconds=500)]), "PT86400.5S"),
    "decimal": (pa.array([decimal.Decimal("1.50")]), "1.50"),
    "bytes": (pa.array([PNG]), "iVBORw=="),
    "text in bytes": (pa.array(["é".encode()]), "é"),
    "nested": (pa.array([{"a": [{"b": WHEN, "c": PNG}]}]), {"a": [{"b": WHEN.isoformat()}]}),
    "not a number": (pa.array([float("nan")]), None),
    "endless": (pa.array([[1.0, float("-inf")]]), [1.0, None]),
    "float16": (pa.array([np.float16(1.5)]), 1.5),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    "category": (pa.array(["x"]).dictionary_encode(), "x"),
    "nothing": (pa.nulls(1), None),
    "large string": (pa.array(["x"], pa.large_string()), "x"),
}
COLUMNS["nested"][1]["a"][0]["c"] = "iVBORw=="


def test_any_value_of_a_parquet_file_can_be_written(tmp_path: Path) -> None:
    """In a folder, too, whose name would be a pattern."""
    path = tmp_path / "set [v2]*?" / "rows.PARQUET"
    path.parent.mkdir()
    table = pa.table({"question": ["2+2?"], **{k: array for k, (array, _) in COLUMNS.items()}})
    parquet.write_table(table, path)
    rows = sources.open_rows(str(path))
    assert rows.size == 1
    written = json.loads(run_files.to_json(rows.read_row(0)))
    assert written == {"question": "2+2?", **{k: value for k, (_, value) in COLUMNS.items()}}


def test_images_are_left_as_they_are_stored(tmp_path: Path) -> None:
    import datasets

    image, text = datasets.Image(), datasets.Value("string")
    stored = {"bytes": PNG, "path": "a.png"}  # no image: it would fail if it were decoded
    features = datasets.Features({"question": text, "image": image, "pages": [image]})
    rows = [{"question": "q", "image": x, "pages": [x]} for x in (None, stored)]
    (tmp_path / "set").mkdir()
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(tmp_path / "set" / "rows.parquet")
    for source in (f"{tmp_path}/set/rows.parquet", f"hf:{tmp_path}/set"):
        row = sources.open_rows(source).read_row(1)
        assert row["image"] == stored and row["pages"] == [stored]
    row = sources.open_rows(f"hf:{tmp_path}/set", size=2, window=2).read_row(1)
    assert row["image"] == stored and row["pages"] == [stored]


@pytest.mark.parametrize(
    ("value", "converted"),
    [
        (np.array([[1, 2]], np.int8), [[1, 2]]),
        (np.float32(0.5), 0.5),
        (np.array([b"a", PNG], object), ["a", PNG]),
        (np.datetime64("2024-01-02T03:04:05", "ns"), "2024-01-02T03:04:05.000000000"),
        ([("key", WHEN)], [["key", WHEN.isoformat()]]),
        ({1: True}, {"1": True}),
        (datetime.timedelta(microseconds=-1), "PT-0.000001S"),
        (decimal.Decimal("1E+3"), "1000"),
    ],
)
def test_values_of_other_libraries(value: Any, converted: Any) -> None:
    assert values.convert_row({"x": value}, "row 1") == {"x": converted}


def test_what_has_no_form_in_json_is_named() -> None:
    with pytest.raises(UserError, match=r"^row 1: x: a value of type complex has no form in JSON"):
        values.convert_row({"x": [1j]}, "row 1")
    deep: Any = []
    for _ in range(values.MAX_DEPTH):
        deep = [deep]
    with pytest.raises(UserError, match=r"^row 1: x: nested more than 100 deep"):
        values.convert_row({"x": deep}, "row 1")
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        values.check_depth({"x": deep})
    values.check_depth({"x": deep[0][0]})


def test_bytes_that_are_no_text_are_no_prompt() -> None:
    row = values.convert_row({"messages": [{"role": "user", "content": PNG}]}, "row 1")
    with pytest.raises(UserError, match=r"^row 1: messages\[0\]\.content is not a text"):
        messages.parse_messages(row, "row 1")


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("a\ud83d", ""),
        ([{"a": "b"}, {"content": "\udc00"}], "[1].content"),
        ({"tools": [{"\ud83d": 1}]}, ".tools[0]"),
    ],
)
def test_half_a_surrogate_pair_is_named_by_its_place(value: Any, place: str) -> None:
    with pytest.raises(UserError) as error:
        values.require_characters(value, "row 1: x")
    assert str(error.value) == (
        f"row 1: x{place} holds half a surrogate pair, which is no character"
    )
    assert json.loads(run_files.to_json([value])) == [value]  # written as it was read
    values.require_characters(["é", {"😀": "a", "b": [1, None]}], "row 1: x")
