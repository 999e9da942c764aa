"""Memory of `clean` on a large file."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc"),
]

MEASURED = """
import resource, sys
from distill import clean
from distill.runtime import cli

def peak_kib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak_kib()
cli.run(clean.main, clean.OPTIONS)
print(peak_kib() - before)
"""


@pytest.mark.parametrize("words", [12, 350])
def test_200_mb_take_less_than_300(tmp_path: Path, words: int) -> None:
    """Peak resident memory above that after the imports, for short and for long rows, one in
    twenty of them a duplicate."""
    draw, size, path = random.Random(0), 0, tmp_path / "rows.jsonl"
    known = [f"{draw.randrange(10**8)}" for _ in range(30000)]
    row = ""
    with path.open("w") as file:
        while size < 200e6:
            if draw.random() > 0.05 or not row:
                text = draw.choices(known, k=words)
                row = json.dumps({"question": " ".join(text), "response": text[0]}) + "\n"
            size += file.write(row)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, f"--data={path}", f"--out={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    grown_mb = int(done.stdout.split()[-1]) / 1024
    print(f"{size / 1e6:.0f} MB: {grown_mb:.0f} MB more; {done.stderr.splitlines()[-1]}")
    assert grown_mb < 300
