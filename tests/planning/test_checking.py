"""Tests `train --check`: all mistakes at once, all rows read, memory, programs, no file written."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from distill.planning import checking, gpus
from distill.policy import hub
from tests.support.paths import ROOT
from tests.support.verbs import call, verb_module, write

train = verb_module("train")
TINY = f"--config={ROOT}/configs/quickstart.py:tiny"
MODELS = (
    f"--config.student.path={ROOT}/assets/student",
    f"--config.teacher.path={ROOT}/assets/teacher",
)


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, list[str]]:
    """Returns (exit code, all of stderr, its lines that are errors)."""
    code = call(train, "--check", *arguments)
    text = capsys.readouterr().err
    return code, text, [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_good_run_shows_its_memory_and_programs_and_writes_nothing(capsys, tmp_path):
    code, text, errors = check(capsys, TINY, f"--workdir={tmp_path}/run")
    assert (code, errors) == (0, []), text
    assert "opd reads rows of arithmetic" in text and "memory: about " in text
    programs = text.partition("opd compiles ")[2].partition("nothing wrong")[0].splitlines()
    assert re.fullmatch(r"\d+ programs:", programs[0]) and int(programs[0].split()[0]) >= 9
    assert re.fullmatch(r"  weights +copies the student's weights for the sampler", programs[1])
    words = {line.split()[0]: line.split()[1:] for line in programs[1:]}
    assert words["cache"] and words["accumulate"] and "updates" in words["apply"]
    assert text.endswith("nothing wrong was found; nothing was written\n")
    assert not [*tmp_path.iterdir()]


def test_all_refused_flags_are_listed(capsys):
    wrong = (
        "--config.opd.stesp=4",
        "--config.opd.batch_size=x",
        "--wrkdir=y",
        "--config.opd.steps=4",
    )
    code, text, errors = check(capsys, TINY, *wrong)
    assert code == 2 and text.count("\n") == 3
    for line, words in zip(
        errors, ("opd.stesp: no such key", "batch_size=x", "wrkdir"), strict=True
    ):
        assert words in line


def test_mistakes_of_all_stages_are_listed(capsys):
    changes = (
        "--config.stages=('opd','sft')",
        "--config.sft.batch_size=0",
        "--config.opd.samples=7",
    )
    changes += ("--config.opd.optim.name=x", "--config.mesh.fsdp=9", "--config.sft.optim.name=y")
    changes += ("--config.log.to=wandbb",)
    code, _, errors = check(capsys, TINY, *changes)
    assert code == 2 and len(errors) == len(set(errors)) == 6
    text = "\n".join(errors)
    for words in (
        "config.log.to: 'wandbb'",
        "config.mesh: needs 9",
        "sft.batch_size=0",
        "opd",
        "opd.optim.name='x'",
        "sft.optim.name='y'",
    ):
        assert words in text


def test_a_wrong_stage_does_not_hide_a_wrong_evaluation(capsys):
    changes = ("--config.opd.batch_size=0", "--config.eval.every=2", "--config.eval.best=accurcy")
    code, _, errors = check(capsys, TINY, *MODELS, *changes)
    assert code == 2 and len(errors) == 2
    assert "opd.batch_size=0" in errors[0] and "config.eval.best='accurcy'" in errors[1]


def test_a_missing_model_does_not_hide_the_other_mistakes(capsys, tmp_path):
    changes = (
        "--config.stages=('opd','sft')",
        "--config.student.path=stud",
        "--config.teacher.path=teach",
        f"--config.opd.data.source={tmp_path}/rows.jsonl",
        "--config.sft.steps=0",
        "--config.sft.loss.beta=0.5",
        "--config.alerts.truncation=2.0",
        "--topology=v9:2x2",
    )
    code, _, errors = check(capsys, TINY, *changes)
    assert code == 2 and len(errors) == len(set(errors)) == 7, errors
    text = "\n".join(errors)
    for words in (
        "config.student.path=stud: no model directory",
        "config.teacher.path=teach: no model directory",
        f"config.opd.data.source={tmp_path}/rows.jsonl: no such file",
        "config.sft.steps=0: must be ",
        "config.sft.loss.beta: read by divergence=jsd only",
        "config.alerts.truncation=2.0: must be ",
        "--topology=v9:2x2: name ",
    ):
        assert words in text


@pytest.mark.parametrize(
    "change",
    [
        '--config.opd.data.mixture=(("rows.jsonl"),)',
        '--config.opd.data.mixture=("arithmetic",1.0)',
        "--config.opd.data.mixture=(1,)",
        "--config.opd.data.mixture=((1,2),)",
        "--config.opd.data.mixture=(None,)",
        "--config.stages=(None,)",
    ],
)
def test_malformed_values_are_mistakes_like_others(capsys, change):
    code, text, errors = check(capsys, TINY, change, "--config.opd.steps=0")
    assert code == 2 and errors and "Traceback" not in text
    key = change[2:].partition("=")[0]
    assert sum(key in line for line in errors) == 1, errors


def test_too_long_prompts_are_counted_over_all_rows(capsys, tmp_path):
    rows = [{"prompt": "1+" * n + "1"} for n in (2, 60, 3, 90, 70)]
    source = write(tmp_path / "rows.jsonl", rows)
    flags = (TINY, f"--config.opd.data.source={source}", "--config.opd.data.check_rows=1")
    code, _, errors = check(capsys, *flags)
    assert code == 2 and len(errors) == 1
    assert (
        "rows.jsonl:2: prompt of " in errors[0]
        and "3 of 5 prompts are longer, the longest " in errors[0]
    )
    assert "on_bad_row=skip" in errors[0]
    code, text, errors = check(capsys, *flags, "--config.opd.data.on_bad_row=skip")
    assert (code, errors) == (0, []) and "opd reads 2 rows of " in text


def test_a_run_that_cannot_go_on_is_refused(capsys, tmp_path):
    """As `train` would, which compares the config with the run's."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("[]")
    code, _, errors = check(capsys, TINY, f"--workdir={run}")
    assert code == 2 and "config.json: not the config of a run" in errors[0]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json"]


def test_memory_is_compared_with_that_of_the_planned_device(capsys, monkeypatch):
    pytest.importorskip("libtpu")
    flags = ("--config=configs/base.py", *MODELS, "--topology=v5e:2x2")
    flags += ("--config.opd.max_prompt_tokens=200", "--config.opd.max_response_tokens=100")
    code, text, _ = check(capsys, *flags)
    assert code == 0 and "it has 15.8" in text
    code, _, errors = check(capsys, *flags, "--config.loss_chunk_mib=80000")
    assert code == 2 and "needs at least" in errors[0] and "which has 15.75 free" in errors[0]
    assert check(capsys, *flags, "--topology=v5e")[0] == 2


def test_what_stand_ins_cannot_tell_is_said(capsys, monkeypatch):
    """The eight devices of this process stand in for those of a slice."""
    find = importlib.util.find_spec
    hide = lambda name, *x: None if name == "libtpu" else find(name, *x)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    monkeypatch.setattr(checking.jax.config, "update", lambda *_: None)
    flags = ("--config=configs/base.py", *MODELS, "--topology=v6e:2x4")
    flags += ("--config.opd.max_prompt_tokens=200", "--config.opd.max_response_tokens=100")
    code, text, _ = check(capsys, *flags)
    assert code == 0 and "compiles" not in text
    assert "not checked: memory and programs, which for v6e:2x4 take its compiler: pip" in text
    code, _, errors = check(capsys, *flags, "--config.mesh.fsdp=16")
    assert code == 2 and "config.mesh: needs 16 devices, there are 8" in errors[0]


@pytest.mark.long
def test_a_slice_is_checked_without_its_compiler():
    """CPU devices stand in, as many as the slice has."""
    code = (
        "import importlib, importlib.util as u, sys; find = u.find_spec;"
        "u.find_spec = lambda name, *x: None if name == 'libtpu' else find(name, *x);"
        "from distill.runtime import cli; t = importlib.import_module('distill.train');"
        "cli.run(t.main, t.OPTIONS)"
    )
    flags = ("--check", "--config=configs/base.py", *MODELS, "--topology=v6e:4x4")
    flags += ("--config.opd.max_prompt_tokens=200", "--config.opd.max_response_tokens=100")
    environment = {**os.environ, "JAX_PLATFORMS": ""}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *flags, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)

    done = run()
    assert done.returncode == 0 and "not checked: memory and programs" in done.stderr, done.stderr
    assert "pip install 'libtpu'" in done.stderr
    done = run("--config.mesh.fsdp=32")
    assert done.returncode == 2 and "config.mesh: needs 32 devices, there are 16" in done.stderr


def test_models_of_the_hub_are_fetched_without_weights(monkeypatch):
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(ROOT / "assets" / "student")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    hub._download_files.cache_clear()
    with hub.without_weights():
        hub.to_local_dir("some/model")
        assert not hub.has_weights("some/model") and hub.has_weights(ROOT)
    hub.to_local_dir("some/model")
    hub._download_files.cache_clear()
    assert "*.safetensors" not in asked[0] and "*.safetensors" in asked[1]


def test_what_a_gpu_needs_is_named(capsys, monkeypatch):
    find = importlib.util.find_spec
    hide = lambda name, *x: None if "cuda" in name else find(name, *x)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    plan = verb_module("plan")
    assert call(plan, TINY, "--topology=h100:8") == 2
    assert "pip install 'jax-cuda12-plugin[with-cuda]==" in capsys.readouterr().err
    for name in ("h100:16", "h100:2x4", "h100", "h300:8"):
        assert call(plan, TINY, f"--topology={name}") == 2
        assert capsys.readouterr().err.startswith(f"error: --topology={name}: name ")


def test_figures_of_gpus_are_plausible(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert gpus.GPUS["h100"].pool_gib == 59.33  # three quarters of 79.1
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    assert gpus.GPUS["h100"].pool_gib == 72.78
    for gpu in gpus.GPUS.values():
        text = gpu.describe_target()
        assert f'"{gpu.name}"' in text and text.count("{") == text.count("}")
        # Peak of products: between 4 and 16 times that of the float32 units.
        float32 = 2 * gpu.cores * gpu.units_per_core * gpu.clock_ghz / 1e3
        assert 1.9 < gpu.bf16_tflops / float32 < 17
