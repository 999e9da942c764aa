"""Tests the list of a checkpoint's files, and the checksum of an array."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from distill.runtime import integrity
from distill.runtime.integrity import DamagedError


@pytest.fixture
def step_dir(tmp_path: Path) -> epath.Path:
    for name, data in (("a/x", b"abc"), ("a/d/y", b"\0" * 100), ("b/z", b""), ("top", b"late")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    integrity.write_file_list(epath.Path(tmp_path))
    return epath.Path(tmp_path)


def test_intact_files_pass(step_dir: epath.Path) -> None:
    integrity.check_files(step_dir)
    (step_dir / "top").write_text("later")  # Orbax writes it after the list
    integrity.check_files(step_dir)


def test_last_files_are_checked_once_they_are_listed(step_dir: epath.Path) -> None:
    integrity.add_last_files(step_dir)
    integrity.check_files(step_dir)
    (step_dir / "top").write_text("lat_")
    for items in (None, {"b"}):
        with pytest.raises(DamagedError, match=r"^top was altered$"):
            integrity.check_files(step_dir, items)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a/x", b"abd", "a/x was altered"),
        ("a/d/y", b"\0" * 99, "a/d/y has 99 bytes, 100 were written"),
        ("b/z", b"1", "b/z has 1 bytes, 0 were written"),
        ("a/x", None, "a/x is missing or cannot be read"),
        ("files.json", None, "files.json is missing"),
        ("files.json", b"", "files.json was altered"),
        ("files.json", b"[]", "files.json was altered"),
        ("files.json", b"\xff", "files.json was altered"),
    ],
)
def test_damaged_files_are_named(
    step_dir: epath.Path, name: str, data: bytes | None, reason: str
) -> None:
    if data is None:
        (step_dir / name).unlink()
    else:
        (step_dir / name).write_bytes(data)
    with pytest.raises(DamagedError, match=f"^{reason}$"):
        integrity.check_files(step_dir)
    if name == "a/x":
        integrity.check_files(step_dir, {"b"})  # a reader of other items is not concerned


def test_any_changed_digit_of_the_list_is_found(step_dir: epath.Path) -> None:
    text = (step_dir / "files.json").read_text()
    for i, c in enumerate(text):
        if c.isdigit():
            (step_dir / "files.json").write_text(f"{text[:i]}{9 - int(c)}{text[i + 1 :]}")
            with pytest.raises(DamagedError):
                integrity.check_files(step_dir)


def test_long_files_are_compared_by_size(
    step_dir: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their arrays have checksums of their own."""
    monkeypatch.setattr(integrity, "DIGEST_BYTES", 50)
    integrity.write_file_list(step_dir)
    assert json.loads((step_dir / "files.json").read_text())["files"]["a/d/y"] == [100, None]
    (step_dir / "a/d/y").write_bytes(b"1" * 100)
    integrity.check_files(step_dir)
    (step_dir / "a/d/y").write_bytes(b"1" * 51)
    with pytest.raises(DamagedError, match="has 51 bytes"):
        integrity.check_files(step_dir)


def test_a_checksum_finds_a_change_of_any_bit() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = int(integrity.compute_checksum(jnp.array(x)))
    for i in range(x.size):
        for bit in range(32):
            changed = x.copy()
            changed.view(np.uint32).reshape(-1)[i] ^= np.uint32(1) << np.uint32(bit)
            assert int(integrity.compute_checksum(jnp.array(changed))) != expected
