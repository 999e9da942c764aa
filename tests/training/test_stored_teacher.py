"""Tests that a run whose teacher's scores are stored trains as with the teacher's model, on the
student's own responses that were sampled before (arXiv 2604.13010)."""

import io
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from distill import score
from distill.runtime import mesh as mesh_lib
from distill.teachers import stored_files
from distill.training import loop, setup
from models.errors import UserError
from tests.support.runs import config, final, numbers, tiny_model
from tests.support.verbs import call, read, verb_module, write

K = 8
TOP = {"estimator": "topk", "k": K}
train_verb = verb_module("train")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return tiny_model(root / "student", 0), tiny_model(root / "teacher", 1, hidden_size=48)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    """Two responses to each of eight prompts, as `generate` writes them."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        prompt = rng.integers(0, 380, 12 + i).tolist()
        responses = [rng.integers(0, 380, 16 - i).tolist() for _ in range(2)]
        samples = [
            {
                "tokens": ids,
                "finish_reason": "stop",
                "logprobs": (-5 - rng.random(len(ids))).tolist(),
            }
            for ids in responses
        ]
        rows.append({"question": f"Add {i}.", "prompt_tokens": prompt, "samples": samples})
    return write(tmp_path_factory.mktemp("rows") / "rollouts.jsonl", rows)


@pytest.fixture(scope="module")
def scores(models, rollouts, tmp_path_factory) -> dict[str, str]:
    """Directories of the teacher's scores, by output."""
    root = tmp_path_factory.mktemp("scores")
    return {
        "hidden": store(models[1], rollouts, root / "hidden", "--output=hidden"),
        "top": store(models[1], rollouts, root / "top", "--output=top", f"--top_k={K}"),
        "token": store(models[1], rollouts, root / "token", "--output=token"),
    }


def store(model: str, rollouts: Path, out: Path, *flags: str) -> str:
    shared = (f"--model={model}", f"--tokens={rollouts}", f"--out={out}", "--dtype=float32")
    assert call(score, *shared, *flags) == 0
    return str(out)


def make_config(models, rollouts: Path, teacher: str = "", steps: int = 30, **loss) -> ConfigDict:
    c = config(models)
    c.stages, c.checkpoint.every = ("sft",), 15
    c.teacher.path = teacher or models[1]
    s = c.sft
    s.objective, s.steps = "distill", steps
    s.data.source = str(rollouts)
    s.loss.update({"divergence": "reverse", **loss})
    return c


def find_difference(one, other) -> float:
    """Returns the largest difference of two trees of arrays."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def read_losses(workdir: Path) -> list[float]:
    return [row["train/loss"] for row in numbers(workdir)]


@pytest.mark.parametrize(
    ("output", "steps"),
    [
        ("hidden", 3),
        pytest.param("hidden", 30, marks=pytest.mark.long),
        pytest.param("top", 30, marks=pytest.mark.long),
        pytest.param("token", 30, marks=pytest.mark.long),
    ],
)
def test_a_run_equals_that_with_the_teacher_here(output, steps, models, rollouts, scores, tmp_path):
    """In float32 to the rounding of rows of other widths: the model scores them padded."""
    loss = TOP if output == "top" else {}
    outside = {"teacher_output": output, **({"teacher_topk": K} if output == "top" else {})}
    for name, teacher, options in (("here", models[1], {}), ("stored", scores[output], outside)):
        c = make_config(models, rollouts, teacher, steps, **loss, **options)
        if output == "token":
            c.sft.objective, c.sft.on_policy_share = "opd_sampled", 0.0
        loop.run(c, tmp_path / name)
    here, stored = (final(tmp_path / name, None) for name in ("here", "stored"))
    assert find_difference(here, stored) < 1e-5
    assert find_difference(here, final(models[0], None)) > 1e-4  # the run has trained
    np.testing.assert_allclose(
        *(read_losses(tmp_path / name) for name in ("here", "stored")), rtol=1e-4
    )


@pytest.mark.long
def test_traces_of_text_and_the_teachers_context_are_scored_by_the_config(models, tmp_path):
    rows = [{"question": f"Add {i} to 3.", "response": f"It is {i + 3}."} for i in range(6)]
    c = make_config(models, write(tmp_path / "rows.jsonl", rows), steps=4)
    c.sft.data.template = "Solve this: {question}"
    c.sft.context.text, c.sft.context.max_tokens = str(tmp_path / "hint.txt"), 20
    (tmp_path / "hint.txt").write_text("Add.")
    c.sft.pack_tokens = 0
    loop.run(c, tmp_path / "here")
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import json\nfrom configs import base\n\n\ndef get_config():\n"
        "    c = base.get_config()\n"
        f"    c.update(json.loads({c.to_json()!r}))\n    return c\n"
    )
    flags = (f"--model={models[1]}", f"--config={recipe}", "--stage=sft", "--dtype=float32")
    assert call(score, *flags, "--output=hidden", f"--out={tmp_path / 'scores'}") == 0
    c.teacher.path = str(tmp_path / "scores")
    loop.run(c, tmp_path / "stored")
    here, stored = (final(tmp_path / name, None) for name in ("here", "stored"))
    assert find_difference(here, stored) < 1e-5


@pytest.mark.long
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(models, rollouts, scores, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    loop.run(make_config(models, rollouts, scores["hidden"]), whole)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "30")
    moved = shutil.copytree(scores["hidden"], tmp_path / "moved")  # its content counts
    loop.run(make_config(models, rollouts, str(moved)), cut)
    assert numbers(cut) == numbers(whole)
    assert find_difference(final(cut, None), final(whole, None)) == 0


@pytest.mark.long
def test_a_run_does_not_go_on_with_other_scores(models, rollouts, scores, tmp_path):
    c = make_config(models, rollouts, scores["hidden"], 2)
    loop.run(c, tmp_path / "run")
    other = tmp_path / "other"
    store(models[0], rollouts, other, "--output=hidden")
    with pytest.raises(UserError, match="inputs have changed"):
        loop.run(make_config(models, rollouts, str(other), 4), tmp_path / "run")


@pytest.mark.long
def test_a_flipped_bit_stops_the_run_at_a_checkpoint(models, rollouts, scores, tmp_path):
    """And the run goes on, with the same bits, once the file is as it was."""
    damaged = shutil.copytree(scores["hidden"], tmp_path / "scores")
    shard = damaged / "shard-00000.safetensors"
    intact = shard.read_bytes()
    changed = bytearray(intact)
    index, _ = stored_files.parse_index(io.BytesIO(intact), len(intact), shard.name)
    changed[index.fields["hidden"][0] + 4 * 48 * int(index.starts_R[5]) + 7] ^= 64
    shard.write_bytes(changed)
    c = make_config(models, rollouts, str(damaged), 8)
    loop.run(make_config(models, rollouts, scores["hidden"], 8), tmp_path / "whole")
    with pytest.raises(UserError, match=r"shard-00000\.safetensors: hidden of its response 5 was"):
        loop.run(c, tmp_path / "run")
    shard.write_bytes(intact)
    loop.run(c, tmp_path / "run")
    assert find_difference(final(tmp_path / "run", None), final(tmp_path / "whole", None)) == 0


def set_up(c: ConfigDict) -> setup.RunSetup:
    return setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))


def test_what_stored_scores_cannot_give_is_refused_at_the_start(models, rollouts, scores, tmp_path):
    def change(**fields) -> ConfigDict:
        c = make_config(models, rollouts, scores["hidden"])
        for name, value in fields.items():
            *groups, field = name.split("__")
            part = c
            for group in groups:
                part = part[group]
            part[field] = value
        return c

    own = {"sft__objective": "opd", "sft__data__source": "arithmetic"}
    top = {"sft__loss__estimator": "topk", "sft__loss__k": 2, "sft__loss__teacher_output": "top"}
    for fields, message in (
        (own, "holds scores of given responses, but 4 of 4 rows are sampled"),
        ({"sft__on_policy_share": 0.5}, "but 2 of 4 rows are sampled"),
        ({"teacher__path": scores["top"]}, "holds top and token, but hidden is asked for"),
        ({**top, "sft__loss__teacher_topk": 2}, "holds hidden and token, but top is asked for"),
        (
            {**top, "teacher__path": scores["top"], "sft__loss__teacher_topk": 9},
            "holds the 8 likeliest tokens, but 9 are asked for",
        ),
        ({"teacher__kind": "vllm"}, "config.teacher.kind='vllm': is read for"),
        ({"teacher__step": 3}, "config.teacher.step=3: "),
        ({"teacher__path": str(tmp_path)}, str(tmp_path)),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            set_up(change(**fields))
    assert set_up(change()).stages[0].source.size == 16


def test_rows_that_were_not_scored_are_named_at_the_start(models, rollouts, scores, tmp_path):
    rows = read(rollouts)
    rows[5]["samples"][1]["tokens"][3] ^= 1
    other = write(tmp_path / "other.jsonl", rows)
    with pytest.raises(
        UserError, match=r"other\.jsonl:6 sample 1: its prompt of .* not among the 1"
    ):
        set_up(make_config(models, other, scores["hidden"]))
    c = make_config(models, other, scores["hidden"])
    c.sft.data.on_bad_row = "skip"
    assert set_up(c).stages[0].source.size == 15
    c.sft.data.on_bad_row = "fail"
    c.sft.context.text = str(write(tmp_path / "hint.txt", ["Add."]))
    with pytest.raises(UserError, match=r"other\.jsonl:1 sample 0: its prompt"):  # the teacher's
        set_up(c)


def test_stored_samples_need_their_log_probabilities(models, rollouts, scores, tmp_path):
    for change, message in (
        (lambda sample: sample.pop("logprobs"), "no logprobs beside its 16 response_tokens"),
        (lambda sample: sample["logprobs"].pop(), "logprobs of 15 tokens beside its 16"),
        (lambda sample: sample["logprobs"].__setitem__(1, None), "logprobs has None"),
    ):
        rows = read(rollouts)
        change(rows[0]["samples"][1])
        c = make_config(models, write(tmp_path / "other.jsonl", rows), scores["token"])
        c.sft.objective, c.sft.on_policy_share, c.sft.loss.teacher_output = (
            "opd_sampled",
            0,
            "token",
        )
        with pytest.raises(UserError, match=rf"other\.jsonl:1 sample 1: {message}"):
            set_up(c)
        c.sft.objective, c.teacher.path = "distill", scores["hidden"]  # does not read them
        c.sft.loss.teacher_output = "hidden"
        assert set_up(c).stages[0].source.size == 16


def test_another_vocabulary_is_refused(models, rollouts, scores, tmp_path):
    size = json.loads((Path(models[0]) / "config.json").read_text())["vocab_size"]
    larger = tiny_model(tmp_path / "larger", 0, vocab_size=size + 8)
    with pytest.raises(UserError, match=f"vocab_size={size}, but {larger} has {size + 8}"):
        set_up(make_config((larger, models[1]), rollouts, scores["hidden"]))
    bare = shutil.copytree(scores["hidden"], tmp_path / "bare")
    shutil.rmtree(bare / "tokenizer")
    with pytest.raises(UserError, match=r"bare/tokenizer: was altered since it was written"):
        set_up(make_config(models, rollouts, str(bare)))
    renamed = shutil.copytree(models[0], tmp_path / "renamed")
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    token = next(t for t, i in tokenizer["model"]["vocab"].items() if i == 300)
    vocab = {("ZZ" if t == token else t): i for t, i in tokenizer["model"]["vocab"].items()}
    tokenizer["model"] |= {"vocab": vocab, "merges": []}
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        UserError, match=r"the tokenizers of .*renamed and .*hidden/tokenizer differ"
    ):
        set_up(make_config((str(renamed), models[1]), rollouts, scores["hidden"]))


def test_damaged_scores_end_a_run_with_one_line(models, rollouts, scores, tmp_path, capsys):
    damaged = shutil.copytree(scores["hidden"], tmp_path / "scores")
    shard = damaged / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    flags = {
        "config": "configs/base.py",
        "config.stages": '("sft",)',
        "config.student.path": models[0],
        "config.teacher.path": damaged,
        "config.sft.objective": "distill",
        "config.sft.data.source": rollouts,
        "workdir": tmp_path / "run",
    }
    assert call(train_verb, *(f"--{name}={value}" for name, value in flags.items())) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: config.teacher.path={shard}: has ")
    assert not (tmp_path / "run").exists()
