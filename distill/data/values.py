"""Converts values of tables that JSON has no form for, and refuses text that is none."""

import contextlib
import datetime
import decimal
from typing import Any

import numpy as np

from models.errors import UserError

MAX_DEPTH = 100  # of lists and objects in a row: what writes it recurses


def convert_row(row: dict, where: str) -> dict:
    """Returns a row of a table in values of JSON.

    Timestamps, dates and times become ISO 8601, and so do durations, in seconds (PT1.5S); decimals
    become their digits, bytes their UTF-8 text, arrays and maps lists. Bytes that are not UTF-8
    stay bytes, so that none is read as a text; `run_files.to_json` writes them in base64.

    Raises:
      UserError: naming the row and the column that holds anything else.
    """
    converted = {}
    for column, value in row.items():
        try:
            converted[column] = _convert_value(value, MAX_DEPTH)
        except ValueError as error:
            raise UserError(f"{where}: {column}: {error}") from None
    return converted


def _convert_value(value: Any, depth: int) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if not depth:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind == "M":  # tolist() gives nanoseconds as plain integers
            value = value.astype(str)
        return _convert_value(value.tolist(), depth)
    if isinstance(value, dict):
        return {str(key): _convert_value(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_convert_value(inner, depth - 1) for inner in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
        return value
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return f"PT{decimal.Decimal(repr(value.total_seconds())):f}S"
    if isinstance(value, decimal.Decimal):
        return f"{value:f}"
    raise ValueError(f"a value of type {type(value).__name__} has no form in JSON")


def check_depth(row: Any) -> None:
    """Raises ValueError if lists and objects are nested more than MAX_DEPTH deep."""
    level = [row]
    for _ in range(MAX_DEPTH):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def require_characters(value: Any, where: str) -> None:
    """Raises UserError if a text in `value`, or a key, holds half a surrogate pair, which JSON can
    write and no tokenizer reads. `where` names the row and the field."""
    place = _find_half_pair(value)
    if place is not None:
        raise UserError(f"{where}{place} holds half a surrogate pair, which is no character")


def _find_half_pair(value: Any) -> str | None:
    """Returns where within `value` one is, such as [0].content; None if nowhere."""
    if isinstance(value, str):
        return None if value.isascii() or _is_encodable(value) else ""
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, part in inner:
        if isinstance(key, str) and _find_half_pair(key) is not None:
            return ""
        place = _find_half_pair(part)
        if place is not None:
            return f"[{key}]{place}" if isinstance(value, list) else f".{key}{place}"
    return None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
