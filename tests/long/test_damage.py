"""Harm done to checkpoints: bytes flipped in any file, and a full disk."""

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from distill.policy import policy
from distill.runtime import integrity
from distill.runtime.checkpoint import Checkpoints
from distill.training import loop
from tests.support import runs
from tests.support.checkpoints import abstract, state
from tests.support.paths import ROOT

FLIPS = 500


def describe_kind(name: str) -> str:
    """Returns the part of a checkpoint that a file belongs to."""
    if "/d/" in name:
        return "array data of a process" if "ocdbt.process" in name else "array data"
    return Path(name).name.replace("process_0", "array_metadatas")


@pytest.mark.parametrize("digest_bytes", [integrity.DIGEST_BYTES, 0])
def test_flipped_bytes(
    tmp_path: Path,
    digest_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half of the bytes are chosen among all, half among those of a file chosen first.

    With digests of files, none goes unnoticed. Without, as in files too long for one, a flip is
    noticed or harmless: what is restored then has the bits that were saved.
    """
    monkeypatch.setattr(integrity, "DIGEST_BYTES", digest_bytes)
    with Checkpoints(tmp_path, save_interval_steps=1) as saved:
        for step in (1, 2):
            saved.save(step, state(step), {"number": step})
    newest = tmp_path / "2"
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    sizes = [file.stat().st_size for file in files]
    expected = {n: jax.tree.map(np.asarray, state(n)) for n in (1, 2)}
    table: Counter[tuple[str, str]] = Counter()
    draw = random.Random(0)
    for flip in range(FLIPS):
        file = draw.choices(files, sizes if flip % 2 else None)[0]
        name, before = file.relative_to(newest).as_posix(), file.read_bytes()
        at, bit = draw.randrange(len(before)), 1 << draw.randrange(8)
        file.write_bytes(before[:at] + bytes([before[at] ^ bit]) + before[at + 1 :])
        with Checkpoints(tmp_path) as saved:
            result = saved.restore(abstract(state()))
        file.write_bytes(before)
        assert result is not None
        restored, meta = result
        jax.tree.map(np.testing.assert_array_equal, restored, expected[meta["number"]])
        told = capsys.readouterr().err
        assert (f"{newest}: damaged (" in told) == (meta["number"] == 1)
        outcome = "noticed" if meta["number"] == 1 else "harmless"
        table[describe_kind(name), outcome] += 1
        assert outcome == "noticed" or not digest_bytes, name
    with capsys.disabled():
        print(f"\n{'noticed':>40}{'harmless':>10}   (files up to {digest_bytes} bytes digested)")
        for kind in sorted({kind for kind, _ in table}):
            print(f"{kind:32}{table[kind, 'noticed']:8}{table[kind, 'harmless']:10}")
    assert sum(table.values()) == FLIPS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    """The third checkpoint finds no room; with room, the same command ends the run."""
    words = ["--config=configs/quickstart.py:tiny", f"--workdir={small_disk / 'run'}"]
    words += ["--config.checkpoint.every=1", "--config.compilation_cache="]
    call = [sys.executable, "-m", "distill.train", *words]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    where = f"error: {small_disk}/run/checkpoints/3: the checkpoint could not be written: "
    assert last.startswith(f"{where}No space left on device ("), done.stderr
    assert last.endswith("the same command goes on from step 2")
    steps = {p.name for p in (small_disk / "run/checkpoints").iterdir() if p.name.isdigit()}
    assert steps == {"1", "2"}
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = {p.name for p in (small_disk / "run/checkpoints").iterdir() if p.name.isdigit()}
    assert steps == {"2", "3"}
    assert (small_disk / "run/metrics.jsonl").read_text().count("\n") == 3


def test_falling_back_to_a_stage_with_another_optimiser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints of the second stage are damaged: the run continues from the first's end."""
    teacher = runs.tiny_model(tmp_path / "teacher", 1, hidden_size=48)
    models = runs.tiny_model(tmp_path / "student", 0), teacher
    c = runs.config(models)
    c.checkpoint.keep, c.opd.optim.name = 5, "muon"
    loop.run(c, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in ("4", "5"):
        data = (tmp_path / "run/checkpoints" / step / "params").rglob("d/*")
        os.truncate(max(data, key=os.path.getsize), 1000)
    capsys.readouterr()
    loop.run(c, tmp_path / "run")
    told = capsys.readouterr().err
    assert "checkpoints/5: damaged (" in told and "checkpoints/4: damaged (" in told
    assert "checkpoints/2: the newest checkpoint that is intact" in told
    ours, theirs = (runs.final(tmp_path / name, models) for name in ("run", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert runs.numbers(tmp_path / "run") == runs.numbers(tmp_path / "whole")
    assert policy.find_newest_step(tmp_path / "run") == 5
