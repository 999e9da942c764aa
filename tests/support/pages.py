"""Reads what users read: README, CONTRIBUTING and docs/*.md."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *GUIDES]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def find_blocks(text: str, language: str) -> Iterator[str]:
    """Yields the fenced blocks of a language."""
    yield from (code for kind, code in FENCED.findall(text) if kind == language)


def find_files(text: str) -> Iterator[tuple[str, str]]:
    """Yields (name, code) of the Python blocks that begin with `# NAME.py`, the file to save."""
    for code in find_blocks(text, "python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            yield name[1], code


def split_lines(block: str) -> list[str]:
    """Returns the commands of a bash block, with continuations joined and without comments."""
    lines = re.sub(r"\\\n *", "", block).splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def find_spans(text: str) -> Iterator[str]:
    """Yields the code spans of the prose."""
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCED.sub("", text))


def make_anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
