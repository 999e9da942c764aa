"""Tests whole runs: stages, resuming, run files and refused configs."""

import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import quickstart
from distill import rollout
from distill.data import dataset, packing
from distill.policy import compatibility, exporting, policy
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files
from distill.training import loop, microbatches, setup, trainer
from models.errors import UserError
from tests.support.runs import config, final, numbers, stop_after, tiny_model, transcripts
from tests.support.tokenizers import copy_tokenizer_without


@pytest.fixture(scope="module", autouse=True)
def windows_of_one_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_ROWS", 4)
        yield


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """Trains without interruption."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    loop.run(config(models), workdir)
    return workdir


@pytest.mark.parametrize(
    "step", [0, 2, 4, *(pytest.param(step, marks=pytest.mark.long) for step in (1, 3))]
)
def test_resumed_run_has_the_same_bits(whole, models, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(SystemExit) as stopped:
            loop.run(config(models), tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(numbers(tmp_path)) == step + 1
    loop.run(config(models), tmp_path)
    assert numbers(tmp_path) == numbers(whole)
    assert transcripts(tmp_path) == transcripts(whole)
    same = jax.tree.map(np.array_equal, final(tmp_path, models), final(whole, models))
    assert all(jax.tree.leaves(same))


def test_a_token_budget_parks_rows_and_loses_none(models, tmp_path, monkeypatch):
    """Each started row is trained once, with the random key it would have had without a budget; a
    run stopped while rows are parked resumes as if never stopped."""
    c = config(models)
    c.stages, c.opd.steps, c.opd.rollout.token_budget = ("opd",), 5, 30
    trained = []
    written = microbatches.to_examples

    def record_rows(rows, rewards=None):
        trained.append([(row.prompt, row.key, row.tokens, row.versions) for row in rows])
        return written(rows, rewards)

    monkeypatch.setattr(microbatches, "to_examples", record_rows)
    loop.run(c, tmp_path / "whole")
    rows, trained[:] = [row for step in trained for row in step], []
    source, expected = setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1)).stages[0].source, []
    for step in range(5):
        examples = dataset.get_step_examples(source, step, 2, c.seed)
        key = jax.random.fold_in(jax.random.key(c.seed), step)
        expected += [(row.prompt, row.key) for row in rollout.expand_prompts(examples, 2, key, 16)]
    assert sorted(row[:2] for row in rows) == sorted(expected[: len(rows)])
    assert any(len({*versions}) > 1 for *_, versions in rows)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(SystemExit):
            loop.run(c, tmp_path / "stopped")
    loop.run(c, tmp_path / "stopped")
    assert [row for step in trained for row in step] == rows
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    same = jax.tree.map(
        np.array_equal, final(tmp_path / "stopped", models), final(tmp_path / "whole", models)
    )
    assert all(jax.tree.leaves(same))


def test_a_step_without_a_finished_row_trains_nothing(models, tmp_path, capsys):
    c = config(models)
    c.stages, c.opd.steps, c.opd.rollout.token_budget, c.opd.rollout.segment = ("opd",), 2, 4, 1
    loop.run(c, tmp_path)
    first, last = numbers(tmp_path)
    assert first["rollout/ended"] == first["train/trained_tokens"] == 0
    assert first["train/loss"] is None and first["train/grad_norm"] == 0
    assert last["rollout/ended"] == 4 and last["train/loss"] > 0  # the last step finishes all rows
    assert "nan" not in capsys.readouterr().err


def test_killed_run_resumes_with_the_same_bits(whole, models, tmp_path, monkeypatch):
    """Without a final checkpoint, the run resumes from an earlier one and ends the same."""

    class Killed(BaseException):
        pass

    write = run_files.Writer.write

    def killed(self, at, stage, row):
        write(self, at, stage, row)
        if at == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run_files.Writer, "write", killed)
        with pytest.raises(Killed):
            loop.run(config(models), tmp_path)
    loop.run(config(models), tmp_path)
    assert numbers(tmp_path) == numbers(whole)
    same = jax.tree.map(np.array_equal, final(tmp_path, models), final(whole, models))
    assert all(jax.tree.leaves(same))


def test_metrics_are_written_one_step_late(models, tmp_path, monkeypatch):
    """A step's metrics are written as host numbers while the next step runs; before a checkpoint
    all of them are written."""
    c, seen = config(models), []
    c.stages, c.opd.steps, c.checkpoint.every = ("opd",), 4, 3
    take, write, save = trainer.Trainer.step, run_files.Writer.write, loop.Checkpoints.save

    def step(self, state, *arguments):
        seen.append(("step", int(state.step)))
        return take(self, state, *arguments)

    def written(self, at, stage, row):
        assert not any(isinstance(x, jax.Array) for x in row.values())
        seen.append(("row", at))
        write(self, at, stage, row)

    def saved(self, at, *arguments, **further):
        seen.append(("saved", at))
        return save(self, at, *arguments, **further)

    monkeypatch.setattr(trainer.Trainer, "step", step)
    monkeypatch.setattr(run_files.Writer, "write", written)
    monkeypatch.setattr(loop.Checkpoints, "save", saved)
    loop.run(c, tmp_path)
    expected = "step 0, step 1, row 0, step 2, row 1, row 2, saved 3, step 3, row 3, saved 4"
    assert ", ".join(f"{what} {n}" for what, n in seen) == expected


def test_a_finished_run_has_nothing_to_do(whole, models):
    before = numbers(whole)
    loop.run(config(models), whole)
    assert numbers(whole) == before


def test_run_directory_has_its_documented_files(whole):
    """Checks the contract of a run directory."""
    assert json.loads((whole / "config.json").read_text())["opd"]["steps"] == 3
    environment = json.loads((whole / "environment.json").read_text())
    assert {"packages", "devices", "git", "command"} <= environment.keys()
    assert set(environment["models"]) == {"student", "teacher"}
    assert all(x["flops_per_token"] > x["parameters"] > 0 for x in environment["models"].values())
    rows = numbers(whole)
    assert [row["step"] for row in rows] == list(range(5))
    assert [row["stage"] for row in rows] == ["sft"] * 2 + ["opd"] * 3
    common = {"train/loss", "train/logp", "train/entropy", "train/grad_norm"}
    assert all(common | {"train/learning_rate"} <= row.keys() for row in rows)
    own = {"train/reverse_kl", "train/teacher_logp", "train/sampler_delta", "rollout/mean_length"}
    assert all(own <= row.keys() for row in rows[2:])
    assert list((whole / "tensorboard").glob("events*"))
    assert any((whole / "checkpoints").iterdir())


def test_sampler_and_trainer_logprobs_agree(whole):
    assert all(row["train/sampler_delta"] < 1e-5 for row in numbers(whole)[2:])


def test_opd_loss_equals_the_reported_reverse_kl(whole):
    """They differ only in the order of summation: by chunks and all at once."""
    for row in numbers(whole)[2:]:
        assert (
            row["train/loss"] == pytest.approx(row["train/reverse_kl"], rel=5e-7)
            and row["train/loss"] > 0
        )


def test_transcripts_have_one_number_per_response_token(whole):
    """Per-token numbers align with the tokens of the response."""
    rows = [json.loads(x) for x in (whole / "rollouts" / "000002.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["prompt"].startswith("<|im_start|>user\n")
        assert row["finish_reason"] in ("stop", "length")
        for name in ("logp", "teacher_logp", "reverse_kl", "entropy", "token_texts"):
            assert len(row[name]) == len(row["tokens"])
        assert all(kl >= 0 for kl in row["reverse_kl"])
        # How many marks stand for bytes of no character depends on where they are cut.
        texts = "".join(row["token_texts"]), row["response"]
        assert len({text.replace("\ufffd", "") for text in texts}) == 1 and texts[0]
        assert row["thinking"] is True
        assert "reward" not in row and "student_top" not in row and "top_texts" not in row


def change(path, value):
    def apply(c):
        *parents, key = path.split(".")
        node = c
        for name in parents:
            node = node[name]
        node[key] = value

    return apply


BAD = {
    "missing student": (change("student.path", "no/such/dir"), "no/such/dir"),
    "no student": (change("student.path", ""), "config.student.path"),
    "no teacher": (change("teacher.path", ""), "config.teacher.path"),
    "unknown stage": (change("stages", ("nap",)), "config.stages: 'nap'"),
    "unknown objective": (change("opd.objective", "guess"), "config.opd.objective"),
    "missing data": (
        change("sft.data.source", "none.jsonl"),
        "config.sft.data.source=none.jsonl: no",
    ),
    "prompt too long": (change("opd.max_prompt_tokens", 20), "config.opd.max_prompt_tokens"),
    "beyond positions": (
        change("opd.max_response_tokens", 5000),
        "; lower config.opd.max_response_tokens=5000",
    ),
    "batch and accumulation": (change("sft.accumulate", 3), "config.sft.batch_size=4"),
    "too many devices": (change("mesh.tensor", 16), "config.mesh"),
    "heads": (change("mesh.tensor", 8), "num_attention_heads=4 does not divide"),
    "heads of context": (change("mesh.context", 8), "mesh axis tensor*context=8"),
    "tokens of context": (
        lambda c: c.update_from_flattened_dict({"mesh.context": 4, "sft.pack_tokens": 102}),
        "config.sft: rows of 102 tokens do not divide by context times tensor of config.mesh (4)",
    ),
    "split": (change("sft.data.split", "dev"), "config.sft.data.split: 'dev' is neither"),
    "operations": (change("opd.data.operations", (3,)), "config.opd.data.operations: (3,) is not"),
    "data of a mixture": (
        change("opd.data.mixture", (("none.jsonl", 1.0), ("arithmetic", 1.0))),
        "config.opd.data.mixture=none.jsonl: no such file",
    ),
    "beta, also its default": (
        change("opd.loss.beta", 0.5),
        "config.opd.loss.beta: read by divergence=jsd only",
    ),
    "no samples": (change("opd.samples", 0), "config.opd.samples=0: must be at least 1"),
    "temperature": (change("opd.sampling.temperature", -1.0), "temperature=-1.0: must be"),
    "short rows of samples": (change("opd.pack_tokens", 75), "config.opd.pack_tokens=75: a row"),
    "short rows": (change("sft.pack_tokens", 75), "a row must hold max_prompt_tokens + max_resp"),
    "cache": (change("opd.rollout.cache_tokens", 50), "config.opd.rollout.cache_tokens=50: leaves"),
    "segment": (
        change("opd.rollout.segment", 0),
        "config.opd.rollout.segment=0: must be at least 1",
    ),
    "cache dtype": (change("opd.rollout.cache_dtype", "int4"), "config.opd.rollout.cache_dtype"),
    "budget": (change("opd.rollout.token_budget", -1), "config.opd.rollout.token_budget=-1"),
    "schedule": (change("opd.optim.schedule", "cosin"), "cosin"),
    "checkpoints": (change("checkpoint.every", 0), "config.checkpoint.every=0: must be at least 1"),
    "kept": (change("checkpoint.keep", 0), "config.checkpoint.keep=0: must be at least 1"),
    "trackers": (change("log.to", ("wandbb",)), "config.log.to: 'wandbb' is none of tensorboard, "),
    "minutes": (
        change("checkpoint.every_minutes", -1.0),
        "config.checkpoint.every_minutes=-1.0: must be at least 0 (never)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs_are_refused(models, tmp_path, name):
    """The error is one line that names the fault, and no directory is created."""
    c = config(models)
    apply, words = BAD[name]
    apply(c)
    workdir = tmp_path / "run"
    with pytest.raises(UserError) as error:
        loop.run(c, workdir)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "rows.jsonl: no rows"),
        ('{"question": "1+1?"}\n{"question": ', "rows.jsonl:2: not JSON"),
        ('{"question": "1+1?"}\n[1]\n', "rows.jsonl:2: not a JSON object"),
        ('{"query": "1+1?"}\n', "rows.jsonl:1: none of tokens, prompt, messages, question"),
        ('{"question": 3}\n', "rows.jsonl:1: question is not a text"),
        ('{"question": "1+1?"}\n{"question": "' + "7" * 80 + '"}\n', "rows.jsonl:2: prompt of"),
    ],
)
def test_bad_rows_are_refused(models, tmp_path, text, words):
    c = config(models)
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    c.opd.data.source = str(path)
    with pytest.raises(UserError) as error:
        loop.run(c, tmp_path / "run")
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_tokenizer_is_refused(models, tmp_path):
    """The error names the teacher."""
    other = tmp_path / "other"
    shutil.copytree(models[1], other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"<think>"', '"<thunk>"'))
    config_path = other / "tokenizer_config.json"
    config_path.write_text(config_path.read_text().replace('"<think>"', '"<thunk>"'))
    c = config(models)
    c.teacher.path = str(other)
    with pytest.raises(UserError) as error:
        loop.run(c, tmp_path / "run")
    assert str(other) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_base_student_takes_the_tokenizer_of_its_teacher(models, tmp_path):
    """A Base tokenizer lacks the thinking tokens; trained, sampled and exported text has them."""
    student = copy_tokenizer_without(Path(models[0]), ("<think>", "</think>"), tmp_path / "base")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(models[0]) / name, student)
    (student / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 20}')
    c = config(models)
    c.student.path = str(student)
    with pytest.raises(UserError, match=r"only .*; --config\.student\.tokenizer=\S+ gives"):
        loop.run(c, tmp_path / "run")
    c.student.tokenizer = c.teacher.get_ref("path")  # as a recipe would set it
    c.stages = ("sft",)
    loop.run(c, tmp_path / "run")
    (first, *_) = transcripts(tmp_path / "run").values()
    rows = [json.loads(line) for line in first.splitlines()]
    assert len(rows) == 3 and all("<think>\n" in row["response"] for row in rows)
    exporting.export_run(tmp_path / "run", tmp_path / "out")
    teacher = policy.make_abstract(models[1], "float32", False, mesh_lib.make_mesh(1, 1, 1))
    for path in (tmp_path / "run", tmp_path / "out"):
        saved = policy.make_abstract(str(path), "float32", False, mesh_lib.make_mesh(1, 1, 1))
        compatibility.require_same_vocabulary(saved, teacher)
        assert saved.stop_ids == tuple(sorted({0, *teacher.stop_ids}))
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["top_k"] == 20


def test_resuming_with_a_changed_config_is_refused(whole, models):
    """The files of the run stay as they were."""
    c = config(models)
    c.opd.optim.learning_rate = 2e-3
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"config\.opd\.optim\.learning_rate was 0.001, now 0.002"):
        loop.run(c, whole)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_checkpoints_of_another_run_are_refused(whole, models, tmp_path):
    """A checkpoint holds the config of its run."""
    c = config(models)
    c.opd.optim.learning_rate = 2e-3
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "config.json").write_text(json.dumps(json.loads(c.to_json_best_effort())))
    words = r"its checkpoints are of another config: config\.opd\.optim\.learning_rate was 0\.001"
    with pytest.raises(UserError, match=words):
        loop.run(c, tmp_path)


def test_a_finished_run_goes_on_with_more_steps_or_stages(whole, models, tmp_path, capsys):
    """A further stage has the bits that it would have had if it had been planned."""
    c = config(models)
    c.stages = ("sft",)
    c.opd.optim.learning_rate = 1.0  # of a stage that is not run yet
    loop.run(c, tmp_path / "sft")
    shutil.copytree(tmp_path / "sft", tmp_path / "longer")
    loop.run(config(models), tmp_path / "sft")
    assert numbers(tmp_path / "sft") == numbers(whole)
    same = jax.tree.map(np.array_equal, final(tmp_path / "sft", models), final(whole, models))
    assert all(jax.tree.leaves(same))
    c.sft.steps, c.sft.accumulate, c.log.transcripts = 3, 2, 0
    capsys.readouterr()
    loop.run(c, tmp_path / "longer")
    lines = [x for x in capsys.readouterr().err.splitlines() if " goes on: " in x]
    assert len(lines) == 3 and "from here on learning rate as in a stage of 3 steps" in lines[-1]
    rows = numbers(tmp_path / "longer")
    assert rows[:2] == numbers(whole)[:2] and [row["step"] for row in rows] == [0, 1, 2]
    c.sft.steps = 2
    with pytest.raises(UserError, match=r"config\.sft\.steps was 3, now 2, but 3 are done\."):
        loop.run(c, tmp_path / "longer")


@pytest.mark.parametrize("get_config", [quickstart.get_config])
def test_tiny_variants_are_tiny(get_config):
    c = get_config("tiny")
    assert sum(c[name].steps for name in c.stages) <= 4
    with pytest.raises(ValueError, match="takes tiny, not"):
        get_config("small")


@pytest.fixture(scope="module")
def divisible(tmp_path_factory):
    """Models whose head counts are all divisible by four devices."""
    root = tmp_path_factory.mktemp("divisible")
    heads = {"num_key_value_heads": 4}
    return tiny_model(root / "student", 0, **heads), tiny_model(root / "teacher", 1, **heads)


@pytest.fixture(scope="module")
def one_device(divisible, tmp_path_factory):
    return curve(divisible, tmp_path_factory.mktemp("one") / "run", 1, 1)


def curve(models, workdir, fsdp, tensor, expert=1, context=1, stages=("sft", "opd")):
    c = config(models)
    c.stages = stages
    c.mesh = {"data": 1, "fsdp": fsdp, "tensor": tensor, "expert": expert, "context": context}
    c.sft.batch_size = c.opd.batch_size = 8
    loop.run(c, workdir)
    return numbers(workdir)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (2, 1, 1, 4)], ids=str)
def test_meshes_give_the_same_run(divisible, one_device, tmp_path, sizes):
    """Sampling, scoring and updating on eight devices give the loss curve of one, to 1e-4."""
    rows = curve(divisible, tmp_path, *sizes)
    assert len(rows) == len(one_device) == 5
    for row, expected in zip(rows, one_device, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/entropy"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4)
        assert row["train/trained_tokens"] == expected["train/trained_tokens"]
        assert row.get("train/sampler_delta", 0) < 1e-4


@pytest.mark.long
def test_a_sparse_run_on_a_mesh_equals_one_device(tmp_path):
    """Trains a sparse student from a sparse teacher on a mesh that splits the experts, and logs
    router statistics."""
    experts = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }
    models = tuple(tiny_model(tmp_path / name, i, **experts) for i, name in enumerate("st"))
    one, eight = (
        curve(models, tmp_path / f"run{sizes[-1]}", *sizes, stages=("opd",))
        for sizes in ((1, 1, 1), (2, 1, 4))
    )
    assert len(one) == len(eight) == 3
    figures = ("loss", "grad_norm", "router_entropy", "load_balancing_loss", "expert_load_max")
    for row, expected in zip(eight, one, strict=True):
        for name in (f"train/{figure}" for figure in figures):
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4)
        assert row["train/expert_dropped"] == 0
        assert row["train/expert_load_min"] <= 1 <= row["train/expert_load_max"] <= 4
        assert row.get("train/sampler_delta", 0) < 1e-4
