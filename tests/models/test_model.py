"""Tests Qwen3 against transformers by module and as a whole; its cache, masks, config and
storage."""

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3 as reference

from distill.runtime import mesh as mesh_lib
from models import families, transformer, weights
from models.errors import UserError
from models.layers import dense, rope
from models.layers.pages import init_pages
from models.layers.slabs import init_slabs
from models.qwen3 import family, model
from models.qwen3.config import SIZES, Config
from tests.support.tiny_models import tiny_qwen3

T = 33
SHAPES = {
    "tied, H = D/N": {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 8},
    "untied, H != D/N": {"head_dim": 14},
    "N = K": {"num_key_value_heads": 6, "rope_theta": 5e6},
    "one kv head, long rope": {"num_key_value_heads": 1, "rope_theta": 1e4, "head_dim": 16},
    "yarn": {
        "head_dim": 16,
        "rope_theta": 100.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 2.0,
            "beta_slow": 0.1,
        },
    },
    "one layer": {"num_hidden_layers": 1, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
}


def load(directory):
    config = families.read_config(directory)
    abstract = mesh_lib.make_abstract_params(config, mesh_lib.make_mesh(1, 1, 1))
    shardings = jax.tree.map(lambda p: p.sharding, abstract)
    return config, weights.load(directory, config, abstract, shardings, jnp.dtype("float32"))


def tokens_of(config, rows=2, length=T, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length))


@functools.partial(jax.jit, static_argnums=0)
def logits(qwen3, params, tokens, segments=None):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    segments = jnp.ones_like(tokens) if segments is None else segments
    hidden, _ = qwen3.apply({"params": params}, tokens, positions, segments)
    return hidden @ transformer.get_output_head(params).T


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "_"))
def pair(request, tmp_path_factory):
    """Returns (transformers' model, config, our parameters) of one odd shape, loaded from files."""
    directory = tmp_path_factory.mktemp("model")
    network = tiny_qwen3(directory, **SHAPES[request.param])
    return network, *load(directory)


def test_logits_equal_those_of_transformers(pair):
    network, config, params = pair
    tokens = tokens_of(config)
    with torch.no_grad():
        expected = network(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 1
    ours = logits(families.make_model(config), params, tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)


def test_transformers_uses_the_rope_theta_of_the_config(pair):
    """Checks the fixture itself: the reference must compute with the theta of the shape."""
    network, config, _ = pair
    inverse = network.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(inverse, rope.compute_frequencies(config)[0], rtol=1e-5)
    if config.rope_scaling is None:
        expected = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        np.testing.assert_allclose(inverse, expected, rtol=1e-5)


def test_exported_directory_loads_in_transformers(pair, tmp_path):
    network, config, params = pair
    weights.save(params, config, tmp_path, jnp.dtype("float32"))
    again = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.tensor(tokens_of(config))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, network(tokens).logits)
    assert families.read_config(tmp_path) == config


def test_sharded_files_load_as_one_file_does(pair, tmp_path, monkeypatch):
    """Small files with an index, ours and transformers', load to the same parameters."""
    network, config, params = pair
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    weights.save(params, config, tmp_path / "ours", jnp.dtype("float32"))
    network.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    for directory in (tmp_path / "ours", tmp_path / "theirs"):
        assert len(list(directory.glob("*.safetensors"))) > 1
        _, loaded = load(directory)
        same = jax.tree.map(np.array_equal, loaded, params)
        assert all(jax.tree.leaves(same))


# Module by module: each against transformers, on the same numbers.


def layer_inputs(config, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, T, config.hidden_size)).astype(np.float32)
    positions = np.broadcast_to(np.arange(T), (2, T))
    return x, positions, np.ones((2, T), np.int32)


def first_layer(params):
    return jax.tree.map(lambda p: p[0], params["layers"])


def test_norm_equals_that_of_transformers(pair):
    network, config, params = pair
    x, _, _ = layer_inputs(config)
    norm = dense.RMSNorm(config.rms_norm_eps)
    ours: Any = norm.apply({"params": first_layer(params)["attention_norm"]}, x)
    with torch.no_grad():
        expected = network.model.layers[0].input_layernorm(torch.tensor(x)).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_rotary_equals_that_of_transformers(pair):
    network, config, _ = pair
    x, positions, _ = layer_inputs(config)
    H = config.head_dim
    q = np.random.default_rng(2).normal(size=(2, T, 3, H)).astype(np.float32)
    ours = rope.apply_rotary(jnp.asarray(q), rope.compute_rotary(jnp.asarray(positions), config))
    cos, sin = network.model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    q_torch = torch.tensor(q).transpose(1, 2)
    expected, _ = reference.apply_rotary_pos_emb(q_torch, q_torch, cos, sin)
    np.testing.assert_allclose(ours, expected.transpose(1, 2).numpy(), atol=1e-5)


def causal(length):
    return torch.full((length, length), -torch.inf).triu(1)[None, None]


def test_attention_mlp_and_block_equal_those_of_transformers(pair):
    network, config, params = pair
    x, positions, segments = layer_inputs(config)
    layer, theirs = first_layer(params), network.model.layers[0]
    turns = rope.compute_rotary(jnp.asarray(positions), config)
    attention, mlp, block = model.Attention(config), dense.MLP(config), model.Block(config)
    ours: Any = (
        attention.apply({"params": layer["attention"]}, x, turns, segments, None, 0)[0],
        mlp.apply({"params": layer["mlp"]}, x),
        block.apply({"params": layer}, (x, None), 0, turns, segments)[0][0],
    )
    torch_rope = network.model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    with torch.no_grad():
        inputs = {"position_embeddings": torch_rope, "attention_mask": causal(T)}
        expected = (
            theirs.self_attn(torch.tensor(x), **inputs)[0],
            theirs.mlp(torch.tensor(x)),
            theirs(torch.tensor(x), **inputs),
        )
    for mine, other in zip(ours, expected, strict=True):
        other = other[0] if isinstance(other, tuple) else other
        np.testing.assert_allclose(mine, other.numpy(), atol=1e-4)


# Properties of the model itself.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    tiny_qwen3(directory)
    return load(directory)


def test_scan_over_layers_equals_a_loop(small):
    config, params = small
    tokens = tokens_of(config)
    unstacked = transformer.unstack_layers(params, config.num_hidden_layers)
    np.testing.assert_allclose(
        logits(families.make_model(config), params, tokens),
        logits(families.make_model(config, scan=False), unstacked, tokens),
        atol=1e-4,
    )


@pytest.mark.parametrize(("kind", "stacked"), [("slabs", False), ("plain", False), ("plain", True)])
def test_decoding_with_a_cache_equals_one_forward_pass(small, kind, stacked):
    """Two prompts are read in lines, the second starting in one line and ending in the next, then
    tokens follow one by one; the hidden states equal those of one forward pass."""
    config, params = small
    tokens = tokens_of(config, length=12)
    qwen3 = families.make_model(config, scan=stacked)
    variables = {
        "params": params
        if stacked
        else transformer.unstack_layers(params, config.num_hidden_layers)
    }
    forward = jax.jit(qwen3.apply)
    positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    whole, _ = forward(variables, tokens, positions, np.ones_like(tokens))
    if kind == "slabs":
        cache, table = init_slabs(config, 2, 16, jnp.dtype("float32")), np.array([[1], [0]])
    else:
        cache = init_pages(config, 1, 8, 4, jnp.dtype("float32"), kind)
        table = np.array([[7, 0, 5, 2], [1, 6, 3, 4]])
    actual = np.zeros_like(whole)
    # Lines of 8 tokens: the row of each token, and its position.
    for row, position, order in (
        ([0] * 5 + [1] * 3, [*range(5), *range(3)], [0, 1]),
        ([1] * 4 + [0] * 2 + [-1] * 2, [*range(3, 7), 5, 6, 0, 0], [1, 0]),
    ):
        if (
            kind == "slabs" and order[0]
        ):  # only the first row in a line may have started in an earlier one
            row, position = [1] * 4 + [-1] * 4, [*range(3, 7), 0, 0, 0, 0]
        row, position = np.array(row), np.array(position)
        mine = row >= 0
        token_rows = np.array([order.index(r) if r >= 0 else -1 for r in row])
        counts = [(token_rows == i).sum() for i in range(2)]
        length = [position[token_rows == i].max(initial=-1) + 1 for i in range(2)]
        line = np.where(mine, tokens[np.maximum(row, 0), position], 0)
        starts = np.array([[0, counts[0], sum(counts)]])
        index = (table[order], np.array(length), starts, token_rows[None], position[None])
        view = cache.bind_tokens(*(jnp.asarray(x, jnp.int32) for x in index))
        hidden, view = forward(variables, line[None], position[None], mine[None] * 1, view)
        cache = view.unbind_tokens()
        actual[row[mine], position[mine]] = np.asarray(hidden)[0][mine]
    length = np.array([5 if kind == "slabs" else 7, 7])
    if kind == "slabs":
        table, length = table[::-1], length[::-1]  # a slab is a row of the batch
    cache = cache.begin_segment(jnp.asarray(length), 12)
    who = [1, 0] if kind == "slabs" else [0, 1]
    for _ in range(5):
        view = cache.bind_next_tokens(jnp.asarray(table), jnp.asarray(length + 1))
        hidden, view = forward(
            variables, tokens[who, length][:, None], length[:, None], np.ones((2, 1)), view
        )
        cache = view.unbind_tokens()
        actual[who, length] = np.asarray(hidden)[:, 0]
        length = length + 1
    known = 10 if kind == "slabs" else 12
    np.testing.assert_allclose(actual[0, :known], np.asarray(whole)[0, :known], atol=1e-4)
    np.testing.assert_allclose(actual[1], np.asarray(whole)[1], atol=1e-4)


def test_later_tokens_do_not_change_earlier_logits(small):
    config, params = small
    tokens = tokens_of(config)
    changed = tokens.copy()
    changed[:, 20] = (changed[:, 20] + 1) % config.vocab_size
    a, b = (np.asarray(logits(families.make_model(config), params, t)) for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :20], b[:, :20])
    assert (np.abs(a[:, 20:] - b[:, 20:]).max(-1) > 1e-3).all()


def test_segments_do_not_see_each_other(small):
    """Two sequences packed into one row give what each gives alone."""
    config, params = small
    tokens = tokens_of(config, rows=1, length=20)
    segments = np.array([[1] * 9 + [2] * 8 + [0] * 3])
    positions = np.array([[*range(9), *range(8), 0, 0, 0]])
    apply = jax.jit(families.make_model(config).apply)
    packed, _ = apply({"params": params}, tokens, positions, segments)
    for a, b in ((0, 9), (9, 17)):
        alone, _ = apply(
            {"params": params}, tokens[:, a:b], positions[:, a:b], np.ones((1, b - a), int)
        )
        np.testing.assert_allclose(packed[:, a:b], alone, atol=1e-4)


ALIVE = {
    "vocab_size": 140,
    "hidden_size": 44,
    "intermediate_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_theta": 100.0,
    "rms_norm_eps": 0.1,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("field", ALIVE)
def test_every_config_field_has_an_effect(small, field):
    """Another value changes the shapes or the logits of a dense model; test_moe.py covers the
    fields of sparse ones."""
    config, params = small
    other = dataclasses.replace(config, **{field: ALIVE[field]})
    shapes = [
        jax.tree.map(lambda x: x.shape, families.get_abstract_params(c)[0]) for c in (config, other)
    ]
    if shapes[0] == shapes[1]:
        tokens = tokens_of(config)
        a, b = (np.asarray(logits(families.make_model(c), params, tokens)) for c in (config, other))
        assert np.abs(a - b).max() > 1e-2


@pytest.mark.parametrize("name", SIZES)
def test_released_sizes_have_their_parameter_counts(shared_data, name):
    entry = json.loads((shared_data / "qwen3_configs.json").read_text())["models"]
    assert Config.from_hf(entry[f"Qwen/Qwen3-{name.upper()}"]["config"]) == SIZES[name]


def test_published_models_have_their_shapes_and_shardings(shared_data):
    """Checks shapes, counts and shardings of every entry from its config alone, allocating
    nothing."""
    entries = json.loads((shared_data / "qwen3_configs.json").read_text())["models"]
    assert len(entries) > 15 and any("235B" in name for name in entries)
    for name, entry in entries.items():
        config = Config.from_hf(entry["config"])
        count = sum(x.size for x in jax.tree.leaves(families.get_abstract_params(config)[0]))
        assert count == config.num_parameters == entry["derived"]["parameters"], name
        for sizes in ((1, 8, 1, 1), (1, 2, 4, 1), (1, 1, 2, 4), (2, 1, 1, 4), (1, 1, 1, 8)):
            mesh = mesh_lib.make_mesh(*sizes)
            mesh_lib.check_divisible(config, mesh, name)
            for x in jax.tree.leaves(mesh_lib.make_abstract_params(config, mesh)):
                assert all(x.sharding.shard_shape(x.shape))  # raises if a dimension does not divide
        mesh, kv = mesh_lib.make_mesh(1, 2, 4), config.num_key_value_heads + 1
        with pytest.raises(UserError, match=f"{name}: num_key_value_heads={kv} does not divide by"):
            mesh_lib.check_divisible(
                dataclasses.replace(config, num_key_value_heads=kv), mesh, name
            )


def test_tensor_names_match_the_published_4b(shared_data):
    """The weights table gives every tensor name and shape of the published 4B checkpoint."""
    published = json.loads((shared_data / "qwen3_4b_param_shapes.json").read_text())
    published = published.get("tensors", published)
    config = SIZES["4b"]
    ours = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(families.get_abstract_params(config)[0]):
        name, transposed = family.TENSOR_NAMES[tuple(key.key for key in path)]
        stacked = "{}" in name
        shape = leaf.shape[1:] if stacked else leaf.shape
        for layer in range(config.num_hidden_layers if stacked else 1):
            ours[name.format(layer)] = list(shape[::-1] if transposed else shape)
    published = {k: list(v) for k, v in published.items() if k != "lm_head.weight"}
    assert ours == published


def test_configs_of_transformers_4_and_5_are_read():
    plain = SIZES["0.6b"].to_hf()
    old = {k: v for k, v in plain.items() if k != "rope_parameters"}
    new = {k: v for k, v in plain.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6}
    assert Config.from_hf(old).rope_theta == 1e6
    assert Config.from_hf(new).rope_theta == 5e6


# Errors.


def broken(name):
    def drop(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def add(tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)

    def reshape(tensors):
        tensors["model.norm.weight"] = np.zeros(7, np.float32)

    def integers(tensors):
        tensors["model.norm.weight"] = np.zeros(40, np.int32)

    return {"drop": drop, "add": add, "reshape": reshape, "integers": integers}[name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("drop", "model.layers.1.mlp.up_proj.weight is missing"),
        ("add", "model.layers.0.self_attn.q_proj.bias is no part"),
        ("reshape", "model.norm.weight has shape [7], config.json says [40]"),
        ("integers", "model.norm.weight is of I32, none of F64, F32, F16, BF16"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, change, words):
    tiny_qwen3(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    broken(change)(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("architectures", ["LlamaForCausalLM"], "LlamaForCausalLM"),
        ("attention_bias", True, "attention_bias"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config={"),
        ("rope_scaling", {"type": "longrope"}, "rope_scaling: type 'longrope' is none of"),
        ("rope_scaling", {"type": "yarn", "factor": 0.5}, "rope_scaling: factor=0.5 is below 1"),
        ("rope_scaling", {"type": "yarn", "factor": "4"}, "rope_scaling: factor='4' is of the wr"),
        ("rope_scaling", {"type": "yarn", "factor": 4, "beta_slow": 64}, "beta_slow=64 is not"),
        ("rope_scaling", "yarn", "rope_scaling is no object"),
        ("num_key_value_heads", 0, "num_key_value_heads=0 is below 1"),
        ("head_dim", None, "head_dim"),
        ("head_dim", 7, "head_dim=7 is odd"),
        ("hidden_size", "wide", "a field of the wrong type"),
        ("num_key_value_heads", 4, "num_attention_heads=6 is no multiple"),
    ],
)
def test_wrong_configs_are_refused(tmp_path, field, value, words):
    tiny_qwen3(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_damaged_files_are_refused(tmp_path):
    tiny_qwen3(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        load(tmp_path / "model")
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(UserError, match="no model directory"):
        load(tmp_path / "model")
