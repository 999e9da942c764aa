"""Tests which files of a model's directory are read, and what is said about the others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import Qwen3ForCausalLM

from distill.policy import policy
from models import families, tensor_files, weights
from models.errors import UserError
from models.tensor_files import INDEX_FILE, WHOLE_FILE
from tests.support.loading import load
from tests.support.tiny_models import tiny_qwen3

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[bool, Path]:
    """Returns the directories of an untied and a tied model."""
    root = tmp_path_factory.mktemp("models")
    for tied in (False, True):
        tiny_qwen3(root / str(tied), num_hidden_layers=1, tie_word_embeddings=tied)
    return {tied: root / str(tied) for tied in (False, True)}


def copy(model: Path, target: Path) -> dict[str, np.ndarray]:
    """Copies a model; returns its tensors."""
    shutil.copytree(model, target)
    return load_file(target / WHOLE_FILE)


def write_shard(directory: Path, tensors: dict[str, np.ndarray], shard: str = SHARD) -> None:
    save_file(tensors, directory / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (directory / INDEX_FILE).write_text(json.dumps(index))


def embed_of(directory: Path) -> np.ndarray:
    return np.asarray(load(directory, (1, 1, 1))[0]["embed"])


def check(directory: Path) -> None:
    config = families.read_config(directory)
    weights.check_weights(directory, config, families.get_abstract_params(config)[0])


def refused(directory: Path) -> str:
    """Returns the message with which a model is refused before it is loaded."""
    with pytest.raises(UserError) as error:
        check(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_file_comes_before_an_index(models, tmp_path, capsys):
    """As transformers chooses; the log says that the index is not read."""
    tensors = copy(models[False], tmp_path / "model")
    write_shard(tmp_path / "model", {name: x / 2 for name, x in tensors.items()})
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path / "model").model.embed_tokens.weight
    np.testing.assert_array_equal(embed_of(tmp_path / "model"), theirs.detach().numpy())
    np.testing.assert_array_equal(theirs.detach().numpy(), tensors[EMBED])
    policy.make_abstract_for_inference(str(tmp_path / "model"), "float32")
    line = f"{tmp_path / 'model' / INDEX_FILE}: not read, because {WHOLE_FILE} is beside it"
    assert line in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("stale", ["no shards", "a broken index", "shards of another model"])
def test_what_lies_beside_a_whole_file_is_not_read(models, tmp_path, stale):
    tensors = copy(models[False], tmp_path / "model")
    write_shard(tmp_path / "model", {"another": np.zeros(3, np.float32)})
    if stale == "no shards":
        (tmp_path / "model" / SHARD).unlink()
    if stale == "a broken index":
        (tmp_path / "model" / INDEX_FILE).write_text("{")
    check(tmp_path / "model")
    np.testing.assert_array_equal(embed_of(tmp_path / "model"), tensors[EMBED])


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "consolidated.safetensors", SHARD, "model.Q4_K_M.gguf"]
)
def test_weights_under_other_names_are_named(models, tmp_path, name):
    copy(models[False], tmp_path / "model")
    (tmp_path / "model" / WHOLE_FILE).rename(tmp_path / "model" / name)
    message = refused(tmp_path / "model")
    assert f"model.safetensors: no such file; {name} is not read" in message
    assert "save_pretrained writes model.safetensors" in message


def test_a_tensor_in_two_shards_is_refused(models, tmp_path):
    """transformers would take the last, others what the index says."""
    tensors = copy(models[False], tmp_path / "model")
    (tmp_path / "model" / WHOLE_FILE).unlink()
    save_file({EMBED: tensors[EMBED] / 2}, tmp_path / "model" / "model-2.safetensors")
    write_shard(tmp_path / "model", tensors)
    check(tmp_path / "model")  # the index does not name the second
    index = {"weight_map": dict.fromkeys(tensors, SHARD) | {EMBED: "model-2.safetensors"}}
    (tmp_path / "model" / INDEX_FILE).write_text(json.dumps(index))
    assert f"tensor {EMBED} is also in another file" in refused(tmp_path / "model")


@pytest.mark.parametrize("differs", [False, True])
def test_the_head_of_a_tied_model_must_be_its_embedding(models, tmp_path, differs):
    """transformers 5 would use a head that differs, and others the embedding."""
    tensors = copy(models[True], tmp_path / "model")
    tensors[HEAD] = tensors[EMBED].copy()
    tensors[HEAD][-1, -1] += differs
    save_file(tensors, tmp_path / "model" / WHOLE_FILE)
    if not differs:
        np.testing.assert_array_equal(embed_of(tmp_path / "model"), tensors[EMBED])
        return
    with pytest.raises(UserError, match=f"tie_word_embeddings, but {HEAD} differs from {EMBED}"):
        embed_of(tmp_path / "model")


def test_a_tied_model_may_store_its_head_only(models, tmp_path):
    tensors = copy(models[True], tmp_path / "model")
    embed = tensors.pop(EMBED)
    save_file(tensors | {HEAD: embed}, tmp_path / "model" / WHOLE_FILE)
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path / "model").model.embed_tokens.weight
    np.testing.assert_array_equal(theirs.detach().numpy(), embed)
    np.testing.assert_array_equal(embed_of(tmp_path / "model"), embed)


def test_rotary_constants_of_old_files_are_ignored(models, tmp_path):
    tensors = copy(models[False], tmp_path / "model")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    save_file(tensors, tmp_path / "model" / WHOLE_FILE)
    check(tmp_path / "model")


def test_weights_of_automodel_are_named(models, tmp_path):
    """Saved without the head, and so without the prefix that a head needs."""
    tensors = copy(models[True], tmp_path / "model")
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    save_file(bare, tmp_path / "model" / WHOLE_FILE)
    assert "embed_tokens.weight is there: load it with AutoModelForCausalLM" in refused(
        tmp_path / "model"
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config={'bits': 4, 'quant_method': 'gptq'} is not supported (gptq); name",
        ),
        (
            {"quantization": {"group_size": 64, "bits": 4}},
            "quantization={'bits': 4, 'group_size': 6",
        ),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors'"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "'Qwen2ForCausalLM' is"),
    ],
)
def test_variants_that_would_be_misread_are_named(models, tmp_path, fields, words):
    copy(models[False], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert words in refused(tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_models_within_a_directory_are_named(tmp_path, name):
    for folder in ("checkpoint-500", "default"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    with pytest.raises(UserError) as error:
        families.read_config(tmp_path)
    within = f"{tmp_path / 'checkpoint-500'}, {tmp_path / 'default'}"
    assert str(error.value).endswith(f"it has no config.json); name one within: {within}")


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "x/a", "", ".", "a\0", "a" * 300]
)
def test_an_index_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    index = tmp_path / tensor_files.INDEX_FILE
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match="is no name of a file beside it"):
        tensor_files.list_files(tmp_path)
