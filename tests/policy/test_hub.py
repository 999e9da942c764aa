"""Tests which tokenizer and chat template go with a model, a run or an adapter."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import pytest
from transformers import AutoTokenizer

from distill.policy import compatibility, exporting, hub, policy
from distill.runtime import mesh as mesh_lib
from models.errors import UserError
from models.layers.lora import LoRA
from tests.support.paths import ROOT
from tests.support.runs import tiny_model

BASE = ROOT / "assets" / "student"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
LORA = LoRA(2, 4.0, rslora=False, targets=("q_proj",))


def make_policy(path) -> policy.Policy:
    return policy.make_abstract(str(path), "float32", False, mesh_lib.make_mesh(1, 1, 1))


def write_adapter(directory: Path, base: Path | str = BASE) -> Path:
    """Writes an adapter without tensors, which a description does not need."""
    directory.mkdir(parents=True)
    fields = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def add_tokenizer(directory: Path, *tokens: str, **fields: str) -> Path:
    """Saves the base's tokenizer with another template beside an adapter, as trainers do."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(list(tokens))
    for name, value in fields.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(directory)
    assert (directory / "chat_template.jinja").is_file()
    return directory


def write_run(directory: Path, student: Path, **fields: str) -> Path:
    directory.mkdir()
    about = {"path": str(student), "lora": dataclasses.asdict(LORA), **fields}
    (directory / "config.json").write_text(json.dumps({"stages": ["sft"], "student": about}))
    return directory


def template_of(path) -> str:
    tokenizer = make_policy(path).tokenizer
    assert tokenizer is not None and isinstance(tokenizer.chat_template, str)
    return tokenizer.chat_template


def test_the_tokenizer_beside_an_adapter_comes_first(tmp_path):
    plain = write_adapter(tmp_path / "plain")
    assert template_of(plain) == template_of(BASE) != TEMPLATE
    own = add_tokenizer(write_adapter(tmp_path / "own"))
    assert template_of(own) == TEMPLATE
    run = write_run(tmp_path / "run", own)
    assert template_of(run) == TEMPLATE
    other = write_run(tmp_path / "other", own, tokenizer=str(BASE))
    assert template_of(other) == template_of(BASE)
    # Ids that end a response are those of the base, and of both tokenizers.
    assert make_policy(own).stop_ids == make_policy(BASE).stop_ids


def test_an_export_has_the_tokenizer_of_its_adapter(tmp_path):
    base = tiny_model(tmp_path / "base", 0)
    student = add_tokenizer(write_adapter(tmp_path / "student", base))
    described = make_policy(write_run(tmp_path / "run", student))
    factors = policy.make_init_fn(described, LORA)(jax.random.key(0))
    exporting.save_adapter(described, factors, tmp_path / "adapter", "float32")
    whole = dataclasses.replace(policy.load(make_policy(base), "float32"), path=str(student))
    whole = dataclasses.replace(whole, tokenizer_dir=described.tokenizer_dir)
    exporting.save_model(whole, tmp_path / "model", "float32")
    for directory in (tmp_path / "adapter", tmp_path / "model"):
        assert AutoTokenizer.from_pretrained(directory).chat_template == TEMPLATE
    assert template_of(tmp_path / "adapter") == TEMPLATE


def test_an_adapter_with_another_pad_token_teaches(tmp_path):
    student = make_policy(BASE)
    other = add_tokenizer(write_adapter(tmp_path / "pad"), pad_token="<|im_end|>")
    compatibility.require_same_vocabulary(student, make_policy(other))
    other = add_tokenizer(write_adapter(tmp_path / "end"), eos_token="<|endoftext|>")
    with pytest.raises(UserError, match="eos_token_id is"):
        compatibility.require_same_vocabulary(student, make_policy(other))


def extend(path: Path) -> None:
    add_tokenizer(path, *(f"<tool-{i}>" for i in range(1000)))


def swap_ids(path: Path) -> None:
    add_tokenizer(path)
    content = json.loads((path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (path / "tokenizer.json").write_text(json.dumps(content))


def keep_template_only(path: Path) -> None:
    add_tokenizer(path)
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()


def add_model(path: Path) -> None:
    shutil.copy(BASE / "model.safetensors", path)


@pytest.mark.parametrize(
    ("apply", "words"),
    [
        (extend, "embeddings"),
        (swap_ids, "'a' is"),
        (keep_template_only, "has chat_template.jinja, but no tokenizer.json"),
        (add_model, "holds an adapter (adapter_config.json) and a model (model.safetensors)"),
    ],
)
def test_what_does_not_fit_an_adapters_base_is_named(tmp_path, apply, words):
    path = write_adapter(tmp_path / "adapter")
    apply(path)
    with pytest.raises(UserError) as error:
        make_policy(path)
    assert words in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_beside_an_adapter_is_no_model(tmp_path):
    """Some trainers save it; architecture and weights are the base's."""
    path = write_adapter(tmp_path / "adapter")
    shutil.copy(BASE / "config.json", path)
    assert hub.resolve_model_dir(path) == BASE and make_policy(path).config.hidden_size > 0


def test_the_model_of_a_run_is_found_from_any_directory(tmp_path, monkeypatch):
    """Its config has the path as it was given: relative to where the run was started."""
    run, started = tmp_path / "run", tmp_path / "started"
    shutil.copytree(BASE, started / "models" / "own")
    run.mkdir()
    fields = {"stages": ["opd"], "student": {"path": "models/own", "tokenizer": "assets/teacher"}}
    (run / "config.json").write_text(json.dumps(fields))
    (run / "environment.json").write_text(json.dumps({"directory": str(started)}))
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_model_dir(run) == started / "models" / "own"
    assert hub.resolve_tokenizer_dir(run) == ROOT / "assets" / "teacher"
    (run / "environment.json").unlink()
    with pytest.raises(UserError, match=r"student\.path: models/own: no model directory"):
        hub.resolve_model_dir(run)
    shutil.copytree(BASE, tmp_path / "models" / "own")
    assert hub.resolve_model_dir(run) == Path("models/own")
