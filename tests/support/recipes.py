"""Checks recipes at their full size, without network and weights."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from absl.flags import FlagValues
from ml_collections import ConfigDict, config_flags

from configs import tiny
from distill.data import chat, sources
from distill.planning import aot
from distill.policy import hub, policy
from distill.runtime import mesh as mesh_lib
from distill.training import eval_hook, setup
from models.errors import UserError
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def parse_config(*flags: str) -> ConfigDict:
    """Returns the config that train builds from these flags."""
    options = FlagValues()  # a new one, because FlagValues remember earlier overrides
    config = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *flags])  # ml_collections looks here for overrides
        options(sys.argv)
    return config.value


@pytest.fixture(scope="module")
def published(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns directories of all published models, with config.json and tokenizer but no
    weights."""
    root, tokenizer = tmp_path_factory.mktemp("hub"), shared_data / "qwen3_tokenizer"
    known = json.loads((shared_data / "qwen3_configs.json").read_text())["models"]
    directories = {name: root / name for name in known}
    for name, directory in directories.items():
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(known[name]["config"]))
        for file in tokenizer.iterdir():
            (directory / file.name).symlink_to(file)
    return directories


@pytest.fixture
def offline(published: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces model ids by these directories, and data sets by rows with the same columns."""
    monkeypatch.setattr(hub, "_download_repository", published.__getitem__)
    monkeypatch.setattr(policy, "check_files", lambda *_: None)  # there are no weights
    monkeypatch.setattr(chat, "load_tokenizer", functools.cache(chat.load_tokenizer))
    open_rows = sources.open_rows

    def rows(source: str, **options: Any) -> sources.Rows:
        return open_rows(tiny.SAMPLE_ROWS.get(source.removesuffix(":test"), source), **options)

    monkeypatch.setattr(sources, "open_rows", rows)


def make_slice_mesh(topology: str, c: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the mesh that `c` describes on a slice."""
    try:
        devices = aot.get_devices(topology)
    except UserError as error:
        pytest.skip(str(error))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices)
        patch.setattr(jax, "device_count", lambda: len(devices))
        return mesh_lib.make_mesh(**c.mesh)


def check_recipe(
    recipe: str, chips: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs all checks that precede reading weights, on the mesh of a slice."""
    file, _, argument = recipe.partition(":")
    c = parse_config(f"--config=configs/{file}.py{':' if argument else ''}{argument}")
    if recipe == "manual:opd":  # the export of the first stage
        c.student.path = "Qwen/Qwen3-0.6B"
    c.opd.context.text = tiny.SAMPLE_ROWS.get(c.opd.context.text, "")
    mesh = make_slice_mesh(chips, c, monkeypatch)
    run_setup = setup.setup_run(c, mesh)
    assert tuple(stage.name for stage in run_setup.stages) == tuple(c.stages)
    assert mesh.size == len(aot.get_devices(chips))
    if c.eval.every and (shared_data / f"{c.eval.benchmark}/test.jsonl").exists():
        c.eval.data = str(shared_data / f"{c.eval.benchmark}/test.jsonl")
    eval_hook.setup_validation(c.eval, run_setup.student, c.seed)
