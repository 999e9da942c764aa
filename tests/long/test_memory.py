"""Memory of long runs: what was written is not kept, and nothing is left open."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.runs import tiny_model
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

append_rows, written = run_files.JsonlAppender.append_rows, 0
def noted(self, rows):
    global written
    rows = list(rows)
    append_rows(self, rows)
    written += len(rows)
    if written % 100 == 0:
        print(written, resident(), file=sys.stderr)
run_files.JsonlAppender.append_rows = noted
cli.run(verb.main, verb.OPTIONS)
"""

# A run, which notes what it holds at every hundredth step, without what the C library keeps of what
# was freed: with 100 threads that is 100 MiB, a few per cent more or less.
TRAINED = """
import ctypes, gc, os, sys
from pathlib import Path
from distill.runtime import watchdog
from distill.training import loop
from tests.support import runs

objective, steps, student, teacher, workdir = sys.argv[1:]

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon:"))  # KiB

start_step = watchdog.Watchdog.start_step
def noted(self, step):
    start_step(self, step)
    if step % 100 == 0:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        print("held", step, resident(), files, threads, len(children), file=sys.stderr)
watchdog.Watchdog.start_step = noted

c = runs.config((student, teacher))
c.stages, c.opd.objective, c.opd.steps = ("opd",), objective, int(steps)
c.checkpoint.every, c.log.transcripts_every = 50, 20
c.eval.every, c.eval.limit, c.eval.max_new_tokens = 100, 4, 8
c.eval.benchmark, c.eval.data, c.eval.best = "arithmetic", "", "accuracy"
if objective == "grpo":
    c.opd.reward.format, c.opd.reward.grader = 1.0, "math"
loop.run(c, workdir)
"""

ROWS, LENGTH = 5000, 500
STEPS, WARM_UP = 2000, 1000


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


@pytest.mark.parametrize("objective", ["opd", "grpo"])
def test_training_does_not_grow(objective: str, tmp_path: Path) -> None:
    """2,000 steps with checkpoints, transcripts, evaluations and graders: after the first 1,000,
    resident memory is flat within 2%, and files, threads and processes are as many as before."""
    models = [tiny_model(tmp_path / name, seed) for seed, name in enumerate(("student", "teacher"))]
    words = [objective, str(STEPS), *models, str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", TRAINED, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("held ")]
    print(*map(" ".join, lines), sep="\n")
    held = {int(step): [int(x) for x in rest] for step, *rest in lines}
    assert len(held) == STEPS // 100
    later = [held[step] for step in held if step >= WARM_UP]
    # A sample may meet a checkpoint on its way, with its buffers and files.
    resident, third = [x[0] for x in later], len(later) // 3
    assert statistics.median(resident[-third:]) < 1.02 * statistics.median(resident[:third])
    for values in zip(*(x[1:] for x in later), strict=True):  # of files, threads, processes
        half = len(values) // 2
        assert max(values[half:]) <= max(values[:half]) + 8, "one of each save would be 15"
