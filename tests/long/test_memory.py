"""Memory of long runs: what was written is not kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_qwen3

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]

# The verb, which notes its resident memory at every so many rows that it has written.
WATCHED = """
import sys
from pathlib import Path
from typing import Any
from distill import {verb} as verb
from distill.runtime import cli, run_files

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon:"))  # KiB

append, written = run_files.JsonlAppender.append_rows, 0
def noted(self, rows):
    global written
    rows = list(rows)
    append(self, rows)
    written += len(rows)
    if written % 100 == 0:
        print(written, resident(), file=sys.stderr)
run_files.JsonlAppender.append_rows = noted
cli.run(verb.main, verb.OPTIONS)
"""

ROWS, LENGTH = 5000, 500


def watched(verb: str, *flags: str) -> dict[int, int]:
    """Rows written -> KiB of resident memory then."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(verb=verb), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    numbers = [line.split() for line in done.stderr.splitlines()]
    return {int(a): int(b) for a, b in (n for n in numbers if len(n) == 2 and n[0].isdigit())}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Tiny, and never at an end: no stop token is among its 64."""
    path = tmp_path_factory.mktemp("model")
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "head_dim": 4,
    }
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    tiny_qwen3(path, **fields, max_position_embeddings=1024, eos_token_id=None)
    return path


@pytest.mark.parametrize("top_logprobs", [0, 5])
def test_generate_does_not_grow(model: Path, tmp_path: Path, top_logprobs: int) -> None:
    """5,000 rows of 500 tokens: resident memory is flat within 5% after the first 500."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"tokens": [1 + i % 60, 1 + i // 60 % 60, 3], "note": "x" * 500} for i in range(ROWS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = watched(
        "generate",
        f"--model={model}",
        f"--prompts={prompts}",
        f"--out={out}",
        f"--max_new_tokens={LENGTH}",
        f"--top_logprobs={top_logprobs}",
        "--batch_size=250",
    )
    with out.open() as file:
        lengths = [len(json.loads(line)["samples"][0]["tokens"]) for line in file]
    assert lengths == [LENGTH] * ROWS
    begun, later = found[500], [x for rows, x in found.items() if rows > 500]
    print(f"{begun} KiB after 500 rows, at most {max(later)} after")
    assert len(later) == ROWS // 100 - 5
    assert max(later) < 1.05 * begun
