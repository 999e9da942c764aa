"""Tests adapters as peft and the trainers around it save them: every form against peft itself."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.numpy import load_file, save_file

from distill import score
from models import adapter, families
from models.errors import UserError
from models.layers.lora import LoRA
from tests.support.tiny_models import logprobs, tiny_qwen3
from tests.support.verbs import call, read, write

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Returns a directory and its network for a dense, a sparse and a mixed model."""
    root = tmp_path_factory.mktemp("bases")
    kinds: dict[str, dict[str, Any]] = {
        "dense": {},
        "sparse": EXPERTS,
        "mixed": EXPERTS | {"mlp_only_layers": [0]},
    }
    return {k: (root / k, tiny_qwen3(root / k, num_hidden_layers=2, **f)) for k, f in kinds.items()}


def save_adapter(base, directory: Path, **fields: Any) -> Any:
    """Writes a random adapter with peft; returns peft's model."""
    path, network = base
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # peft's, about interfaces and odd forms
        fresh = type(network).from_pretrained(path)
        other = get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM", **fields))
        with torch.no_grad():
            for parameter in (p for p in other.parameters() if p.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
        other.save_pretrained(str(directory))
    return other


def list_layers(other) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in other.named_modules() if isinstance(layer, LoraLayer)]


def peft_updates(other) -> dict[str, np.ndarray]:
    """Returns what peft adds to each projection: [out, in], by its name in transformers 4."""
    updates = {}
    for name, layer in list_layers(other):
        module = name.removeprefix("base_model.model.").replace(".base_layer", "")
        update = layer.get_delta_weight("default").detach().numpy()
        if not isinstance(layer, ParamWrapper) or update.ndim == 2:
            updates[module] = update
            continue
        for e, expert in enumerate(update):
            if layer.parameter_name == "down_proj":
                updates[f"{module}.{e}.down_proj"] = expert
            else:
                gate, up = np.split(expert, 2)
                updates |= {f"{module}.{e}.gate_proj": gate, f"{module}.{e}.up_proj": up}
    return updates


def read_updates(base: Path, directory: Path) -> tuple[LoRA, dict[str, np.ndarray]]:
    """Returns the LoRA that is read, and what it adds to each projection."""
    updates = {}
    with adapter.open_adapter(directory, families.read_config(base)) as (lora, tensors):
        for name in (n for n in tensors if n.endswith(".lora_A.weight")):
            a, b = (tensors[n][:, :] for n in (name, name.replace(".lora_A.", ".lora_B.")))
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            updates[module] = lora.scale * b @ a
    return lora, updates


FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    # Experts by the usual names: peft turns them into parameters, gate and up with twice the rank.
    "names": ("sparse", {"r": 2, "lora_alpha": 4, "target_modules": ALL}),
    "names rslora": ("sparse", {"r": 2, "lora_alpha": 4, "target_modules": ALL, "use_rslora": 1}),
    "gate and up": ("sparse", {"r": 3, "target_modules": ["gate_proj", "up_proj"]}),
    "down": ("sparse", {"r": 3, "target_modules": ["down_proj"]}),
    "pattern of names": ("sparse", {"r": 2, "target_modules": r".*\.(v|gate|up|down)_proj"}),
    "names and ranks": (
        "sparse",
        {
            "r": 2,
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 5, "experts.down_proj": 3},
            "alpha_pattern": {"q_proj": 7},
        },
    ),
    "mixed layers": ("mixed", {"r": 2, "target_modules": ALL}),
    "parameters": ("sparse", {"r": 2, "target_modules": [], "target_parameters": FUSED}),
    "one layer's": (
        "sparse",
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "target_parameters": ["layers.1.mlp.experts.gate_up_proj"],
            "rank_pattern": {"gate_up_proj": 3},
        },
    ),
    "weights": (
        "dense",
        {"r": 2, "target_modules": ["v_proj"], "target_parameters": ["self_attn.q_proj.weight"]},
    ),
    # Ranks and alphas of single modules.
    "ranks": (
        "dense",
        {"r": 4, "target_modules": ALL, "rank_pattern": {"q_proj": 2, "down_proj": 7}},
    ),
    "alphas": ("dense", {"r": 4, "target_modules": ALL, "alpha_pattern": {"q_proj": 2.5}}),
    "ranks rslora": (
        "dense",
        {
            "r": 4,
            "use_rslora": True,
            "target_modules": ALL,
            "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2, "^model.layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "all ranks": ("dense", {"target_modules": ["q_proj"], "rank_pattern": {".*": 2}}),
    # Some layers only.
    "layers": ("dense", {"r": 4, "target_modules": ALL, "layers_to_transform": [1]}),
    "a layer": (
        "dense",
        {"target_modules": ALL, "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "a layer by pattern": ("dense", {"r": 4, "target_modules": r".*\.layers\.1\..*_proj"}),
    "full names": (
        "dense",
        {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    ),
    "excluded": ("dense", {"target_modules": ALL, "exclude_modules": ["0.self_attn.q_proj"]}),
    "excluded pattern": ("dense", {"target_modules": ALL, "exclude_modules": r".*layers\.0.*"}),
    "transposed": ("dense", {"target_modules": ["q_proj"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_peft_are_read(bases, form, tmp_path):
    """Each projection changes as in peft; those that peft does not adapt do not change."""
    kind, fields = FORMS[form]
    other = save_adapter(bases[kind], tmp_path, **fields)
    expected = peft_updates(other)
    lora, updates = read_updates(bases[kind][0], tmp_path)
    assert expected.keys() <= updates.keys()
    for module, update in updates.items():
        if module in expected:
            assert np.abs(update).max() > 1e-3, module
            np.testing.assert_allclose(update, expected[module], atol=1e-5, err_msg=module)
        else:
            assert not update.any(), module
    assert lora.rank == max(layer.r["default"] for _, layer in list_layers(other))


@pytest.mark.parametrize("form", ["names rslora", "ranks rslora"])
def test_scores_of_adapters_are_pefts(bases, form, tmp_path):
    kind, fields = FORMS[form]
    other = save_adapter(bases[kind], tmp_path / "adapter", **fields)
    ids = np.random.default_rng(0).integers(0, 131, 30).tolist()
    rows, out = write(tmp_path / "in.jsonl", [{"tokens": ids}]), tmp_path / "out.jsonl"
    flags = (f"--tokens={rows}", f"--out={out}", "--dtype=float32")
    assert call(score, f"--model={tmp_path / 'adapter'}", *flags) == 0
    actual, expected = read(out)[0]["logprobs"][1:], logprobs(other, ids)
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert np.abs(np.subtract(actual, logprobs(bases[kind][1], ids))).max() > 0.1


NAMES = {
    "an adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_other_names_of_factors_are_read(bases, kind, form, tmp_path):
    other = save_adapter(bases[kind], tmp_path, r=2, target_modules=ALL)
    rename(NAMES[form])(tmp_path)
    _, updates = read_updates(bases[kind][0], tmp_path)
    for module, update in peft_updates(other).items():
        np.testing.assert_allclose(updates[module], update, atol=1e-5, err_msg=module)


@pytest.mark.parametrize("width", [20, 24])  # at 20, gate and up have as many inputs as outputs
def test_experts_of_older_pefts_are_read(width, tmp_path):
    """Before 0.19, peft added einsum("ore,eri->eio") of its factors to parameters [e, o, i]."""
    D, E, R = 40, 5, 2
    rng = np.random.default_rng(0)
    sparse: dict[str, Any] = EXPERTS | {"moe_intermediate_size": width}
    tiny_qwen3(tmp_path / "base", num_hidden_layers=1, **sparse)
    stem, tensors, expected = "base_model.model.model.layers.0.mlp.experts", {}, {}
    for wrapper, rows, columns in ((".base_layer", 2 * width, D), ("", D, width)):
        a = rng.standard_normal((E * R, rows)).astype(np.float32)
        b = rng.standard_normal((columns, R * E)).astype(np.float32)
        tensors |= {f"{stem}{wrapper}.lora_A.weight": a, f"{stem}{wrapper}.lora_B.weight": b}
        factors = b.reshape(columns, R, E), a.reshape(E, R, rows)
        expected[wrapper] = 2 * np.einsum("ore,eri->eio", *factors)
    save_file(tensors, tmp_path / adapter.TENSORS_FILE)
    fields = {"peft_type": "LORA", "r": R, "lora_alpha": 2 * R, "target_parameters": FUSED}
    fields |= {"bias": "none", "peft_version": "0.18.1"}
    (tmp_path / adapter.CONFIG_FILE).write_text(json.dumps(fields))
    _, updates = read_updates(tmp_path / "base", tmp_path)
    for e in range(E):
        gate, up = np.split(expected[".base_layer"][e], 2)
        parts = {"gate": gate, "up": up, "down": expected[""][e]}
        for name, part in parts.items():
            update = updates[f"model.layers.0.mlp.experts.{e}.{name}_proj"]
            np.testing.assert_allclose(update, part, atol=1e-5)


def rename(function):
    def apply(directory):
        tensors = load_file(directory / adapter.TENSORS_FILE)
        save_file({function(k): x for k, x in tensors.items()}, directory / adapter.TENSORS_FILE)

    return apply


def change(**fields):
    def apply(directory):
        path = directory / adapter.CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def as_pickle(directory):
    (directory / adapter.TENSORS_FILE).rename(directory / "adapter_model.bin")


def drop_layer(directory):
    tensors = load_file(directory / adapter.TENSORS_FILE)
    kept = {name: x for name, x in tensors.items() if ".layers.1." not in name}
    save_file(kept, directory / adapter.TENSORS_FILE)


def twice(directory):
    tensors = load_file(directory / adapter.TENSORS_FILE)
    tensors |= {name.replace(".weight", ".default.weight"): x for name, x in tensors.items()}
    save_file(tensors, directory / adapter.TENSORS_FILE)


Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "head": ({"target_modules": ["q_proj", "lm_head"]}, None, "target 'lm_head' is not supported"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, None, "target 'embed_tokens' is"),
    "head by pattern": (
        {"target_modules": r".*(q_proj|lm_head)"},
        None,
        "tensor base_model.model.",
    ),
    "saved": ({"modules_to_save": ["embed_tokens"]}, None, "modules_to_save=['embed_tokens'] is"),
    "tokens": ({"trainable_token_indices": [3, 4]}, None, "trainable_token_indices=[3, 4] is not"),
    "bias": ({"lora_bias": True}, None, "lora_bias=True is not supported; merge it in peft"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 2]]}, None, "layer_replication=[[0, 2], ["),
    "other prefix": ({}, rename(lambda n: n.replace("model.model.", "model.")), "of no projection"),
    "other layer": (
        {},
        rename(lambda n: n.replace("s.1.", "s.7.")),
        "layers.7.self_attn.q_proj.lo",
    ),
    "lost layer": (
        {},
        drop_layer,
        "targets model.layers.1.self_attn.q_proj, adapter_model.safeten",
    ),
    "twice": ({}, twice, "of model.layers.0.self_attn.q_proj is there twice"),
    "pickle": ({}, as_pickle, "adapter_model.safetensors: no such file; adapter_model.bin is not"),
    "no match": (
        {},
        change(target_modules=["q_proj", "up_proj"]),
        "target_modules has 'up_proj', ",
    ),
    "no parameter": (
        {},
        change(target_parameters=["down_proj"]),
        "target_parameters has 'down_pro",
    ),
    "not targeted": (
        {},
        change(target_modules=r".*\.0\..*q_proj"),
        f"{Q1} is of a module that ada",
    ),
    "pattern": ({}, change(target_modules="("), "wrong type or value (missing )"),
    "alpha": ({}, change(alpha_pattern={"q_proj": float("nan")}), "alpha nan of model.layers.0."),
    "rank of text": ({}, change(rank_pattern={"q_proj": "2"}), "rank '2' of model.layers.0.self_"),
    "other rank": (
        {},
        change(rank_pattern={"0.self_attn.q_proj": 4}),
        "adapter_config.json says r=4",
    ),
    "revision": ({}, change(revision="v1.1"), "revision='v1.1' is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(bases, name, tmp_path):
    fields, apply, words = REFUSED[name]
    save_adapter(bases["dense"], tmp_path, **{"r": 2, "target_modules": ["q_proj"], **fields})
    if apply:
        apply(tmp_path)
    with pytest.raises(UserError) as error:
        read_updates(bases["dense"][0], tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_adapted_router_is_named(bases, tmp_path):
    """all-linear includes it."""
    save_adapter(bases["sparse"], tmp_path, r=2, target_modules="all-linear")
    with pytest.raises(UserError, match=r"target 'gate\.weight' is not supported"):
        read_updates(bases["sparse"][0], tmp_path)


def test_experts_of_another_size_are_named(bases, tmp_path):
    save_adapter(bases["sparse"], tmp_path / "adapter", r=2, target_modules=ALL)
    wide: dict[str, Any] = EXPERTS | {"moe_intermediate_size": 24}
    tiny_qwen3(tmp_path / "wide", num_hidden_layers=2, **wide)
    with pytest.raises(UserError, match="fit no projection of 5 experts of sizes 40 and 24"):
        read_updates(tmp_path / "wide", tmp_path / "adapter")
