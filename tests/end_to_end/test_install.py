"""Tests that the project installs: its metadata, what a wheel holds, and verbs in any directory."""

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("distill", "models", "configs", "assets")


def read_requirements(name: str) -> set[str]:
    lines = (ROOT / name).read_text().splitlines()
    texts = (re.split(r"\s+#", line)[0].strip() for line in lines)
    return {text for text in texts if text and not text.startswith(("#", "-r"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel of the project, built from links so that nothing is written into the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in (*PACKAGES, "tests", "benchmarks", "pyproject.toml", "README.md"):
        (source / name).symlink_to(ROOT / name)
    (source / "requirements.txt").symlink_to(ROOT / "requirements.txt")
    code = "import sys; from setuptools import build_meta as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(out / done.stdout.splitlines()[-1])


def test_metadata_names_what_the_requirements_do(wheel):
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    fields = email.message_from_bytes(wheel.read(name))
    assert fields["Name"] == "qwen3-distill" and fields["Requires-Python"] == ">=3.11"
    needs = fields.get_all("Requires-Dist") or []
    plain = {x.replace(" ", "") for x in needs if "extra ==" not in x}
    assert plain == {x.replace(" ", "") for x in read_requirements("requirements.txt")}


def test_extras_are_those_of_the_requirement_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in ("eval", "gpu", "tpu"):
        names = read_requirements(f"requirements-{extra}.txt")
        assert {*project["optional-dependencies"][extra]} == names


def test_a_wheel_holds_the_packages_and_their_files(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in held} == {*PACKAGES}
    assert not any("__pycache__" in name for name in held)
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    assert not {*tracked} - held, "files of the packages that an installation lacks"


@pytest.mark.long
def test_an_installed_project_runs_in_any_directory(wheel, tmp_path: Path):
    """With its own recipes and models, and the user's relative paths."""
    wheel.extractall(tmp_path / "site")
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "distill", *words]
        return subprocess.run(
            command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True
        )

    done = run("train", "--config=configs/quickstart.py:tiny", "--workdir=runs/x")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "runs" / "x" / "metrics.jsonl").is_file()
    done = run("export", "--run=runs/x", "--out=model")
    assert done.returncode == 0 and (tmp_path / "work" / "model" / "config.json").is_file()
