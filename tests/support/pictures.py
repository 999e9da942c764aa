"""Compares figures that were drawn again with the committed ones."""

import html
import re
from pathlib import Path

import matplotlib


def read_texts(file: Path) -> list[str]:
    """Returns the texts of a figure: titles, ticks, and the numbers beside bars."""
    return [html.unescape(text) for text in re.findall(r">([^<>]+)</text>", file.read_text())]


def require_same(committed: Path, drawn: Path) -> None:
    """Compares byte by byte, where matplotlib is the version that drew the committed figure; else
    texts alone."""
    assert read_texts(committed) == read_texts(drawn), committed.name
    if f"Matplotlib v{matplotlib.__version__}," in committed.read_text():
        assert committed.read_bytes() == drawn.read_bytes(), committed.name
