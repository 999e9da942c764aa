"""Paths that tests use."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "assets" / "teacher"  # its vocabulary has 512 ids
DATA = ROOT.parent / "shared" / "data"  # real data that may lie beside the project
