"""Reads final answers as texts, and tells values that are none."""

import json
from decimal import Decimal

from distill.data import values
from models.errors import UserError


def to_text(value: object) -> str:
    """Converts an answer, a text or a number, to its text: 5.0 to "5".

    Returns "" for what is no answer: null, NaN, infinity, a boolean, a list or an object.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return ""
    if not isinstance(value, float | Decimal):
        return _unwrap_list(str(value)) if str(value).strip() else ""
    number = Decimal(repr(value)) if isinstance(value, float) else value
    text = format(number, "f") if number.is_finite() else ""  # never 1e-07
    return text.rstrip("0").rstrip(".") if "." in text else text


def _unwrap_list(text: str) -> str:
    """Returns the only text of a list in JSON, as Skywork-OR1 and others have it in verl's form:
    '["34"]' is 34. Returns "" for a list of several, and any other text as it is."""
    if not (text.startswith('["') and text.endswith('"]')):
        return text
    try:
        items = json.loads(text)
    except ValueError:
        return text
    return str(items[0]).strip() if len(items) == 1 else ""


def require_answer(row: dict, where: str) -> str:
    """Returns the text of a canonical row's answer. Raises UserError naming the row if it has
    none."""
    value = row.get("answer")
    if text := to_text(value):
        values.require_characters(text, f"{where}: answer")
        return text
    reason = "" if value is None else f": {str(value)[:60]!r} is no final text or number"
    raise UserError(f"{where}: no answer among its fields {sorted(row)}{reason}")
