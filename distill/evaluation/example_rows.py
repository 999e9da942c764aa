"""The rows of an evaluation's examples.jsonl, for what reads them without jax."""

from typing import Any

from etils import epath

EXAMPLES_FILE = "examples.jsonl"

_BULKY_FIELDS = ("prompt_tokens", "tokens", "response")


def drop_bulky_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Removes the large fields that no statistic reads, so that all rows fit in memory."""
    return {name: x for name, x in row.items() if name not in _BULKY_FIELDS}


def describe_graded(folder: epath.Path) -> str:
    """Says where the graded responses of an evaluation that ended early are, if there are any, and
    how to go on."""
    path = folder / EXAMPLES_FILE
    if not path.exists() or not path.stat().length:
        return "no response was graded yet; the same command begins anew"
    return f"the responses that were graded are in {folder}, and the same command goes on"
