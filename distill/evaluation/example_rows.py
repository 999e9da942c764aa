"""The rows of an evaluation's examples.jsonl, for what reads them without jax."""

from typing import Any

EXAMPLES_FILE = "examples.jsonl"

_BULKY_FIELDS = ("prompt_tokens", "tokens", "response")


def drop_bulky_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Removes the large fields that no statistic reads, so that all rows fit in memory."""
    return {name: x for name, x in row.items() if name not in _BULKY_FIELDS}
