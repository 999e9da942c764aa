"""What a resumed run compares: data, models and adapters, by content; and what it then says."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from configs import base
from distill.policy import identity
from distill.training import loop, resume
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.runs import numbers, tiny_model
from tests.support.verbs import write


def make_rows(count: int) -> list[dict]:
    return [{"question": f"{i}+{i}?", "response": f"{2 * i:3}"} for i in range(count)]


def save_tensors(path: Path, first: float, names: str = "ab") -> None:
    save_file({name: np.full((4, 300), first + i) for i, name in enumerate(names)}, path)


class Run:
    """The inputs of a run with every kind of them, two stages, and no training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, count in (("rows", 8), ("other", 5), ("rates", 3), ("last", 4), ("eval", 2)):
            write(folder / f"{name}.jsonl", make_rows(count))
        (folder / "manual.txt").write_text("Add the numbers.")
        for name in ("student", "teacher"):
            shutil.copytree(
                ROOT / "assets/student", folder / name, ignore=lambda *_: ["model.safetensors"]
            )
            save_tensors(folder / name / "model.safetensors", 1.0)
            (folder / name / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "adapter").mkdir()
        fields = {"base_model_name_or_path": str(folder / "teacher")}
        (folder / "adapter/adapter_config.json").write_text(json.dumps(fields))
        save_tensors(folder / "adapter/adapter_model.safetensors", 3.0)
        self.c = c = base.get_config()
        c.stages = ("sft", "opd")
        c.student.path = str(folder / "student")
        c.teacher.path = str(folder / "adapter")
        c.eval.data = str(folder / "eval.jsonl")
        c.sft.data.mixture = tuple((str(folder / f"{x}.jsonl"), 1.0) for x in ("rows", "other"))
        c.opd.data.source = str(folder / "last.jsonl")
        c.opd.data.difficulty = str(folder / "rates.jsonl")
        c.opd.context.text = str(folder / "manual.txt")
        self.workdir = epath.Path(folder / "run")

    def check(self, steps_done: int, allow: bool = False, first: int = 0) -> dict[str, Any]:
        """Starts or resumes the run, of which stages from number `first` on are left."""
        stages = [
            SimpleNamespace(
                name=name,
                c=self.c[name],
                local_teachers=("teacher",) if name == "opd" else (),
                external=(),
            )
            for name in self.c.stages[first:]
        ]
        rows = [("", json.loads(x)) for x in Path(self.c.eval.data).read_text().splitlines()]
        found = resume.describe_inputs(self.c, stages, rows)
        resume.init_workdir(self.workdir, self.c, found, steps_done, allow)
        return json.loads((self.workdir / resume.INPUTS_FILE).read_text())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def point_elsewhere(path: Path) -> None:
    target = path.with_name("elsewhere.jsonl")
    write(target, make_rows(9))
    path.unlink()
    path.symlink_to(target)


CHANGES = {
    "a row is added": (
        lambda f: write(f / "rows.jsonl", make_rows(9)),
        r"rows.jsonl \(config.sft.data.mixture\[0\]\): 8 rows then, 9 now",
    ),
    "a row is edited in place": (
        lambda f: replace(f / "rows.jsonl", "3+3", "3+4"),
        "rows.jsonl .*: other content of the same size",
    ),
    "rows are in another order": (
        lambda f: write(f / "rows.jsonl", make_rows(8)[::-1]),
        "rows.jsonl .*: other content of the same size",
    ),
    "other rows, as many": (
        lambda f: write(f / "rows.jsonl", [{**row, "n": 1} for row in make_rows(8)]),
        r"rows.jsonl .*: \d+ bytes then, \d+ now",
    ),
    "the second source of a mixture": (
        lambda f: write(f / "other.jsonl", make_rows(4)),
        r"other.jsonl \(config.sft.data.mixture\[1\]\): 5 rows then, 4 now",
    ),
    "a link points elsewhere": (
        lambda f: point_elsewhere(f / "last.jsonl"),
        r"last.jsonl \(config.opd.data.source\): 4 rows then, 9 now",
    ),
    "pass rates": (
        lambda f: write(f / "rates.jsonl", make_rows(2)),
        r"rates.jsonl \(config.opd.data.difficulty\): 3 rows then, 2 now",
    ),
    "the teacher's manual": (
        lambda f: (f / "manual.txt").write_text("Add the number."),
        r"manual.txt \(config.opd.context.text\): 16 bytes then, 15 now",
    ),
    "the problems of the evaluation": (
        lambda f: write(f / "eval.jsonl", make_rows(3)),
        r"eval.jsonl \(config.eval.*: 2 rows then, 3 now",
    ),
    "the student's weights": (
        lambda f: save_tensors(f / "student/model.safetensors", 2.0),
        r"student/model.safetensors \(config.student.path\): other content",
    ),
    "an adapter's weights": (
        lambda f: save_tensors(f / "adapter/adapter_model.safetensors", 2.0),
        r"adapter/adapter_model.safetensors \(config.teacher.path\): other content",
    ),
    "the base of an adapter": (
        lambda f: save_tensors(f / "teacher/model.safetensors", 1.0, "abc"),
        r"adapter/base/model.safetensors \(config.teacher.path\): [\d,]+ bytes then, [\d,]+ now",
    ),
    "a chat template": (
        lambda f: replace(f / "student/chat_template.jinja", "{{", "{{-"),
        r"student/chat_template.jinja .*: 14 bytes then, 15 now",
    ),
    "a tokenizer": (
        lambda f: replace(f / "student/tokenizer.json", "{", "{ "),
        r"student/tokenizer.json .*: [\d,]+ bytes then",
    ),
    "a file is gone": (
        lambda f: (f / "student/generation_config.json").unlink(),
        "student/generation_config.json .*: is gone",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_inputs_are_refused_by_name(run: Run, capsys: Any, name: str) -> None:
    change, message = CHANGES[name]
    recorded = run.check(0)
    change(run.folder)
    config = (run.workdir / "config.json").read_text()
    run.c.log.transcripts += 1  # may change, but is not written either
    with pytest.raises(UserError, match=f"run: inputs have changed .*{message}.*--allow"):
        run.check(2)
    assert json.loads((run.workdir / resume.INPUTS_FILE).read_text()) == recorded
    assert (run.workdir / "config.json").read_text() == config
    changed = run.check(2, allow=True)
    assert "warning: " in capsys.readouterr().err
    assert changed["inputs"] != recorded["inputs"]
    (entry,) = changed["changes"]
    assert entry["step"] == 2 and len(entry["what"]) == 1
    assert run.check(4) == changed  # the new inputs are now those to compare with


def test_paths_and_times_do_not_count(run: Run, tmp_path: Path) -> None:
    recorded = run.check(0)
    for path in (run.folder / "rows.jsonl", run.folder / "student/model.safetensors"):
        os.utime(path, (1, 1))
    assert run.check(2) == recorded
    for old, new in (("last.jsonl", "moved.jsonl"), ("adapter", "moved"), ("rows.jsonl", "x y")):
        (run.folder / old).rename(run.folder / new)
    c = run.c
    c.opd.data.source = str(tmp_path / "moved.jsonl")
    c.teacher.path = str(tmp_path / "moved")
    c.sft.data.mixture = ((str(tmp_path / "x y"), 1.0), c.sft.data.mixture[1])
    changed = run.check(2)
    assert changed["changes"] == [] and changed["inputs"].keys() == recorded["inputs"].keys()
    assert (
        json.loads((run.workdir / "config.json").read_text())["teacher"]["path"] == c.teacher.path
    )


def test_all_that_may_not_change_is_named_with_the_ways_forward(run: Run) -> None:
    run.check(0)
    before = (run.workdir / "config.json").read_text()
    run.c.opd.data.source, run.c.seed, run.c.opd.accumulate = "arithmetic", 5, 2
    with pytest.raises(UserError) as error:
        run.check(102, allow=True)
    assert str(error.value) == (
        f"{run.workdir} holds a run of another config: config.opd.data.source was "
        f"'{run.folder}/last.jsonl', now 'arithmetic'; config.seed was 0, now 5. Give the old "
        "values again, or start in another directory (--workdir)"
    )
    assert (run.workdir / "config.json").read_text() == before


def test_what_may_change_is_said(run: Run, capsys: Any) -> None:
    run.check(0)
    (run.folder / "last.jsonl").rename(run.folder / "moved.jsonl")
    run.c.opd.data.source = str(run.folder / "moved.jsonl")
    run.c.opd.accumulate, run.c.opd.steps = 2, 200
    run.check(2)
    lines = [line.partition("config.")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "opd.accumulate was 1, now 2 (no step that is done used it)",
        f"opd.data.source was '{run.folder}/last.jsonl', now '{run.folder}/moved.jsonl' (the same "
        "content)",
        "opd.steps was 100, now 200 (no step that is done used it)",
    ]
    run.check(2)
    assert not capsys.readouterr().err  # once
    run.c.opd.steps, run.c.opd.accumulate = 150, 4
    run.check(120)
    assert capsys.readouterr().err.splitlines() == [
        f"{run.workdir} goes on: config.opd.accumulate was 2, now 4 (the same but for rounding)",
        f"{run.workdir} goes on: config.opd.steps was 200, now 150 (from here on learning rate as "
        "in a stage of 150 steps)",
    ]


@pytest.mark.parametrize("name", ["student", "adapter", "."])
def test_a_folder_of_models_is_no_workdir(tmp_path: Path, run: Run, name: str) -> None:
    folder = run.folder / name
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=r"--workdir=.*: holds a model \(.*\) and no run"):
        resume.init_workdir(epath.Path(folder), run.c)
    assert sorted(folder.rglob("*")) == before


def test_a_run_without_a_step_belongs_to_whoever_starts_it(run: Run, capsys: Any) -> None:
    trackers = run.workdir / "trackers.json"
    run.check(0)
    trackers.write_text("{}")
    run.check(0)
    assert trackers.exists()
    run.c.seed, run.c.opd.optim.learning_rate, run.c.stages = 5, 1e-3, ("opd",)
    record = run.check(0)
    assert not trackers.exists()  # it is another run there, too
    assert f"{run.workdir} holds no step, so it starts again: config." in capsys.readouterr().err
    assert json.loads((run.workdir / "config.json").read_text())["seed"] == 5
    assert not any(key.startswith("config.sft") for key in record["inputs"])
    # A checkpoint that cannot be read is a damaged run, which may not be lost.
    (run.workdir / "checkpoints/7").mkdir(parents=True)
    run.c.seed = 6
    with pytest.raises(UserError, match=r"another config: config\.seed was 5, now 6\."):
        run.check(0)


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": ["Qwen3ForCausalLM"]}'])
def test_a_config_of_something_else_is_refused(run: Run, text: str) -> None:
    run.workdir.mkdir()
    (run.workdir / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: not the config of a run"):
        run.check(0)


def test_a_finished_stage_needs_its_data_no_more(run: Run) -> None:
    recorded = run.check(0)
    (run.folder / "rows.jsonl").unlink()
    assert run.check(100, first=1) == recorded
    shutil.rmtree(run.folder / "teacher")
    assert run.check(200, first=2) == recorded
    run.c.student.path = str(run.folder / "other")  # nothing shows that it is the same
    with pytest.raises(UserError, match=r"another config: config\.student\.path was"):
        run.check(200, first=2)


def test_an_older_run_goes_on_with_a_line(run: Run, capsys: Any) -> None:
    run.check(0)
    (run.workdir / resume.INPUTS_FILE).unlink()
    assert run.check(2)["inputs"]
    assert f"{resume.INPUTS_FILE}: no such file, so nothing shows" in capsys.readouterr().err
    (run.workdir / resume.INPUTS_FILE).write_text("{")
    with pytest.raises(UserError, match=r"inputs.json: not a record of a run's inputs"):
        run.check(2)


def test_without_a_checkpoint_a_run_starts_again(run: Run, capsys: Any) -> None:
    recorded = run.check(0)
    write(run.folder / "rows.jsonl", make_rows(9))
    changed = run.check(0)
    assert "holds no step, so it starts again: " in capsys.readouterr().err
    assert changed["inputs"] != recorded["inputs"] and changed["changes"] == []


def test_only_what_is_read_counts(run: Run) -> None:
    run.c.student.random_init = True
    recorded = run.check(0)
    save_tensors(run.folder / "student/model.safetensors", 2.0)
    (run.folder / "student/README.md").write_text("Notes.")
    run.c.eval.data = str(run.folder / "other.jsonl")  # the config of evaluations may change
    assert recorded["inputs"].keys() < run.check(2)["inputs"].keys()


def test_of_large_weights_the_middle_of_each_tensor_counts(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, 1.0)
    whole = identity.describe_file(path)
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1000)
    sampled = identity.describe_file(path)
    assert sampled["bytes"] == whole["bytes"] and sampled["sha256"] != whole["sha256"]
    seen = {sampled["sha256"]}
    for names, first in (("ba", 1.0), ("ab", 2.0), ("abc", 1.0)):
        save_tensors(path, first, names)
        seen.add(identity.describe_file(path)["sha256"])
    assert len(seen) == 4
    path.write_bytes(b"\1" * 2000)  # no safetensors file: its reader will say so
    assert identity.describe_file(path)["bytes"] == 2000


def test_sets_that_are_no_file(run: Run) -> None:
    folder = run.folder / "set"
    folder.mkdir()
    write(folder / "train.jsonl", make_rows(3))
    parts = resume.describe_data(f"hf:{folder}", run.c.sft.data)
    assert parts == {"train.jsonl": identity.describe_file(folder / "train.jsonl")}
    assert resume.describe_data("arithmetic", run.c.sft.data) == {}


def test_a_set_of_a_hub_counts_by_its_rows(run: Run, monkeypatch) -> None:
    rows = make_rows(3000)
    source = SimpleNamespace(size=3000, window=0, read_row=lambda i: rows[i])
    monkeypatch.setattr(resume.sources, "open_rows", lambda *_, **__: source)
    before = resume.describe_data("hf:some/set", run.c.sft.data)
    assert before[""]["rows"] == 3000
    rows[:] = [{**row, "response": "0"} for row in rows]
    assert resume.describe_data("hf:some/set", run.c.sft.data) != before
    source.window = 10  # a stream is not read twice
    assert resume.describe_data("hf:some/set", run.c.sft.data) == {"": {"rows": 3000}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_model(tmp_path_factory.mktemp("models") / "student", 1)


def tiny_run(model: str, folder: Path) -> ConfigDict:
    c = base.get_config()
    c.stages = ("sft", "opd")
    c.student.path, c.student.dtype, c.mesh.fsdp = model, "float32", 1
    c.opd.objective = "sft"
    for stage, name in ((c.sft, "first"), (c.opd, "second")):
        stage.data.source = str(write(folder / f"{name}.jsonl", make_rows(8)))
        stage.steps, stage.batch_size = 2, 2
        stage.max_prompt_tokens, stage.max_response_tokens = 32, 8
    c.checkpoint.every, c.checkpoint.keep = 1, 9
    return c


def test_a_run_is_refused_until_its_data_are_back(model: str, tmp_path: Path) -> None:
    """Stage by stage: the first one's file may go once it is finished."""
    c, workdir = tiny_run(model, tmp_path), tmp_path / "run"
    loop.run(c, workdir)
    whole = numbers(workdir)
    shutil.rmtree(workdir / "checkpoints/4")
    second = tmp_path / "second.jsonl"
    text = second.read_text()
    second.write_text(text.replace("1+1", "1+2"))
    with pytest.raises(UserError, match=r"second\.jsonl .*: other content of the same size"):
        loop.run(c, workdir)
    second.write_text(text)
    (tmp_path / "first.jsonl").unlink()
    loop.run(c, workdir)
    assert numbers(workdir) == whole
    second.unlink()
    loop.run(c, workdir)  # nothing is left to do
    # A damaged checkpoint: back to one whose stage needs its data.
    shutil.rmtree(workdir / "checkpoints/3")
    shutil.rmtree(workdir / "checkpoints/2/params")
    shutil.rmtree(workdir / "checkpoints/4")
    second.write_text(text)
    with pytest.raises(UserError, match=r"first\.jsonl: no such file"):
        loop.run(c, workdir)
    write(tmp_path / "first.jsonl", make_rows(8))
    loop.run(c, workdir)
    assert numbers(workdir) == whole
    jax.clear_caches()


def test_other_devices_and_packages_are_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.check(0)
    path = run.workdir / "environment.json"
    about = json.loads(path.read_text())
    about["devices"]["count"], about["packages"]["jax"] = 16, "0.0.1"
    path.write_text(json.dumps(about))
    capsys.readouterr()
    run.check(3)
    now = f"devices.count was 16, now {jax.device_count()}; packages.jax was 0.0.1, now"
    assert f"{run.workdir} goes on: {now}" in capsys.readouterr().err
    run.check(3)
    assert "goes on" not in capsys.readouterr().err
    for text in ("[]", "{", '{"devices": 1, "packages": {}}'):  # of another version, or damaged
        path.write_text(text)
        run.check(3)


def test_models_of_finished_stages_stay_in_the_record(run: Run) -> None:
    def describe(**models: dict[str, int]) -> dict:
        resume.init_workdir(run.workdir, run.c, {}, 3, models=models)
        return json.loads((run.workdir / "environment.json").read_text())["models"]

    run.check(0)
    assert describe(student={"parameters": 1}, teacher={"parameters": 2}).keys() == {
        "student",
        "teacher",
    }
    assert describe(student={"parameters": 3}) == {
        "student": {"parameters": 3},
        "teacher": {"parameters": 2},
    }
