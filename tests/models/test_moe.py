"""Tests mixtures of experts against transformers by module and as a whole, on meshes and at any
load."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from distill import rollout
from distill.objectives import losses
from distill.policy import forward
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files
from distill.training import microbatches, update
from models import families, transformer, weights
from models.config import RopeScaling
from models.errors import UserError
from models.layers import moe
from models.qwen3.config import Config
from tests.support.experts import (
    EVEN,
    EXPERTS,
    SHAPES,
    T,
    batch_of,
    load,
    tokens_of,
    torch_gradients,
)
from tests.support.heads import token_stats
from tests.support.tiny_models import tiny_qwen3
from tests.support.updates import one_update

# data, fsdp, tensor, expert
MESHES = [(1, 1, 1, 8), (1, 2, 1, 4), (1, 2, 2, 2), (2, 1, 1, 4), (2, 2, 2, 1)]


@functools.partial(jax.jit, static_argnums=0)
def logits(qwen3, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    hidden, _ = qwen3.apply({"params": params}, tokens, positions, jnp.ones_like(tokens))
    return hidden @ transformer.get_output_head(params).T


routed_of = jax.jit(forward.compute_hidden_and_router_stats, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def scored_of(qwen3, params, batch):
    """Log-probability of each token of `batch` from one plain forward pass."""
    hidden, targets = forward.compute_hidden(qwen3, params, batch), losses.shift(batch.tokens_BT)
    stats = token_stats(hidden, transformer.get_output_head(params), targets, loss_chunk_mib=1)
    return losses.unshift(stats["logp"])


FURTHER = ("one expert a token", "a dense layer by name", "no sparse layer")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            name,
            id=name.replace(" ", "_"),
            marks=[pytest.mark.long] if name in FURTHER else [],
        )
        for name in SHAPES
    ],
)
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


def test_gradients_equal_those_of_transformers(pair):
    network, config, params = pair
    tokens = tokens_of(config)

    def loss(params):
        logp = jax.nn.log_softmax(logits(families.make_model(config), params, tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    ours = dict(weights.iter_tensors(grads, config, jnp.dtype("float32")))
    network.zero_grad()
    theirs = network(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
    theirs.backward()
    assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
    expected = torch_gradients(network)
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        scale = np.abs(grad).max()
        np.testing.assert_allclose(ours[name], grad, atol=1e-4 * scale + 1e-9, rtol=0, err_msg=name)


@pytest.mark.parametrize("stacked", [False, pytest.param(True, marks=pytest.mark.long)])
def test_greedy_decoding_equals_that_of_transformers(pair, stacked):
    """Both cache layouts decode as transformers does and record the forward pass's
    log-probabilities."""
    network, config, params = pair
    prompts = [tokens_of(config, rows=1, length=n, seed=n)[0].tolist() for n in (5, 9)]
    mesh = mesh_lib.make_mesh(1, 1, 1)
    shardings = jax.tree.map(lambda p: p.sharding, mesh_lib.make_abstract_params(config, mesh))
    with mesh_lib.use_mesh(mesh):
        done = rollout.sample(
            rollout.SamplingModel(
                families.make_model(config), jax.device_put(params, shardings), (-1,)
            ),
            [rollout.Sequence(prompt, (0, 0), 8) for prompt in prompts],
            sampling=rollout.Sampling(temperature=0),
            options=rollout.RolloutOptions(
                slots=2, stacked=stacked, cache_backend="plain" if stacked else ""
            ),
        )
        rows = list(done)
    for row, prompt in enumerate(prompts):
        out = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                out.append(int(network(torch.tensor([out])).logits[0, -1].argmax()))
        assert rows[row].tokens == out[len(prompt) :]
    batch = microbatches.make_unpacked_batch(rows, 2, 17)
    scored = np.asarray(scored_of(families.make_model(config), params, batch))[
        np.asarray(batch.mask_BT)
    ]
    np.testing.assert_allclose([row.logprobs for row in rows], scored.reshape(2, 8), atol=1e-4)


def test_exported_directory_loads_in_transformers(pair, tmp_path):
    network, config, params = pair
    weights.save(params, config, tmp_path, jnp.dtype("float32"))
    again = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.tensor(tokens_of(config))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, network(tokens).logits)
    assert families.read_config(tmp_path) == config


def test_exported_tensor_names_are_the_published_ones(pair, tmp_path):
    """Each matrix of each expert is its own tensor, as in checkpoints on the hub."""
    _, config, params = pair
    weights.save(params, config, tmp_path, jnp.dtype("float32"))
    names = load_file(tmp_path / "model.safetensors").keys()
    expected = {
        f"model.layers.{layer}.mlp.{rest}"
        for layer, sparse in enumerate(config.sparse_layers)
        for rest in (
            [
                "gate.weight",
                *(
                    f"experts.{e}.{part}_proj.weight"
                    for e in range(config.num_experts)
                    for part in ("gate", "up", "down")
                ),
            ]
            if sparse
            else [f"{part}_proj.weight" for part in ("gate", "up", "down")]
        )
    }
    assert {name for name in names if ".mlp." in name} == expected


# Module by module.


@pytest.fixture(scope="module", params=[True, False], ids=["renormalised", "as they are"])
def rung(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("rung")
    network = tiny_qwen3(directory, **EXPERTS | {"norm_topk_prob": request.param})
    config, params = load(directory)
    x = np.random.default_rng(1).normal(size=(2, T, config.hidden_size)).astype(np.float32)
    return network.model.layers[0], config, jax.tree.map(lambda p: p[0], params["layers"]), x


def test_router_equals_that_of_transformers(rung):
    theirs, config, layer, x = rung
    flat = x.reshape(-1, config.hidden_size)
    p, kept, chosen = moe.route_tokens(
        flat @ layer["moe"]["router"], config.num_experts_per_tok, config.norm_topk_prob
    )
    with torch.no_grad():
        expected_logits, expected_kept, expected_chosen = theirs.mlp.gate(torch.tensor(x))
    np.testing.assert_array_equal(chosen, expected_chosen.numpy())
    np.testing.assert_allclose(kept, expected_kept.numpy(), atol=1e-6)
    np.testing.assert_allclose(p, expected_logits.softmax(-1).numpy(), atol=1e-6)
    total = np.asarray(kept.sum(-1))
    assert np.allclose(total, 1) == config.norm_topk_prob and p.dtype == jnp.float32


def test_experts_equal_those_of_transformers(rung):
    theirs, config, layer, x = rung
    rng = np.random.default_rng(2)
    flat = x.reshape(-1, config.hidden_size)
    chosen = rng.permuted(np.tile(np.arange(7), (len(flat), 1)), axis=1)[:, :3].astype(np.int32)
    kept = rng.uniform(size=chosen.shape).astype(np.float32)
    kernels = layer["moe"]["gate"], layer["moe"]["up"], layer["moe"]["down"]
    ours, sizes = moe.compute_local_experts(flat, jnp.asarray(kept), jnp.asarray(chosen), kernels)
    with torch.no_grad():
        expected = theirs.mlp.experts(*map(torch.tensor, (flat, chosen.astype(int), kept)))
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)
    np.testing.assert_array_equal(sizes, np.bincount(chosen.ravel(), minlength=7))


def test_block_equals_that_of_transformers(rung):
    theirs, config, layer, x = rung
    ones = np.ones((2, T), np.int32)
    ours: Any = moe.MoE(config).apply({"params": layer["moe"]}, x, ones)
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs.mlp(torch.tensor(x)).numpy(), atol=1e-4)


# On meshes.


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    directory = tmp_path_factory.mktemp("even")
    tiny_qwen3(directory, **EVEN)
    return directory


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_loading_and_logits_on_a_mesh_equal_one_device(even, sizes):
    """Loading straight into shards gives the parameters and logits of one device, also with fewer
    tokens than devices."""
    config, params = load(even)
    _, sharded = load(even, sizes)
    same = jax.tree.map(np.array_equal, sharded, params)
    assert all(jax.tree.leaves(same))
    for shape in ((8, T), (1, 3)):
        tokens = tokens_of(config, *shape)
        expected = np.asarray(logits(families.make_model(config), params, tokens))
        with mesh_lib.use_mesh(mesh_lib.make_mesh(*sizes)):
            actual = logits(families.make_model(config), sharded, tokens)
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def one_step(directory, sizes, accumulate=1, remat=False):
    """Metrics and gradients (Adam's first moments, unclipped) of one training step."""
    mesh = mesh_lib.make_mesh(*sizes)
    with mesh_lib.use_mesh(mesh):
        config, params = load(directory, sizes)
        optimizer = optax.adam(1e-3, b1=0.0)
        state = update.init_train_state(optimizer, params, 0)
        qwen3 = families.make_model(config, remat=remat)
        options = update.UpdateOptions(1, 1.0)
        programs = update.make_update(qwen3, optimizer, losses.OBJECTIVES["sft"], options, state)
        state, measured, _ = one_update(programs, state, batch_of(config), accumulate=accumulate)
    return {k: float(v) for k, v in measured.items()}, state


@pytest.fixture(scope="module")
def alone(even):
    return one_step(even, (1, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [
        ((1, 2, 2, 2), 1),
        ((1, 1, 1), 8),
        *(pytest.param(s, 1, marks=pytest.mark.long) for s in MESHES if s != (1, 2, 2, 2)),
        pytest.param((1, 1, 1, 4), 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_training_on_a_mesh_equals_one_device(even, alone, sizes, accumulate):
    """Compares the loss, the gradients and the router statistics, also with micro-batches."""
    measured, state = one_step(even, sizes, accumulate, remat=accumulate > 1)
    assert measured == pytest.approx(alone[0], rel=1e-5, abs=1e-6)
    for ours, theirs in zip(
        jax.tree.leaves(state.opt_state[0].mu),
        jax.tree.leaves(alone[1].opt_state[0].mu),
        strict=True,
    ):
        scale = np.abs(np.asarray(theirs)).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0)


def test_experts_and_moments_have_their_shardings(even):
    """After a step, experts and both moments are split: E over expert, D over fsdp, F over
    tensor."""
    _, state = one_step(even, (1, 2, 2, 2))
    adam = state.opt_state[0]
    for tree in (state.params, adam.mu, adam.nu):
        leaves = tree["layers"]["moe"]
        # [L, E, D, F] = [3, 8, 32, 24]
        shapes = {k: x.sharding.shard_shape(x.shape) for k, x in leaves.items()}
        assert shapes == {
            "router": (3, 16, 8),
            "gate": (3, 4, 16, 12),
            "up": (3, 4, 16, 12),
            "down": (3, 4, 12, 16),
        }
        assert tuple(leaves["gate"].sharding.spec) == (
            None,
            "expert",
            ("fsdp", "context"),
            "tensor",
        )
        assert tuple(leaves["down"].sharding.spec) == (
            None,
            "expert",
            "tensor",
            ("fsdp", "context"),
        )


def test_tokens_are_exchanged_and_expert_kernels_stay(even):
    """Tokens are gathered and scattered over the expert axis; kernels are never moved."""
    config, params = load(even, (1, 1, 1, 8))
    with mesh_lib.use_mesh(mesh_lib.make_mesh(1, 1, 1, 8)):
        text = (
            logits.lower(families.make_model(config), params, tokens_of(config, 8))
            .compile()
            .as_text()
        )
    assert text is not None
    assert "reduce-scatter" in text and "all-gather" in text
    for E in (8, 7):
        assert f"f32[{E},32,24]" not in text and f"f32[3,{E},32,24]" not in text
    assert "f32[3,1,32,24]" in text or "f32[1,32,24]" in text


def test_indivisible_experts_are_refused(even):
    config = dataclasses.replace(families.read_config(even), num_experts=6)
    with pytest.raises(UserError, match="num_experts=6 does not divide by mesh axis expert=4"):
        mesh_lib.check_divisible(config, mesh_lib.make_mesh(1, 2, 1, 4), "config.json")
    config = dataclasses.replace(config, num_experts=8, moe_intermediate_size=21)
    with pytest.raises(UserError, match="moe_intermediate_size=21 does not divide by mesh axis te"):
        mesh_lib.check_divisible(config, mesh_lib.make_mesh(1, 2, 2, 2), "config.json")


def test_a_dense_model_splits_rows_over_the_expert_axis(tmp_path):
    """The case of a dense student beside a sparse teacher."""
    tiny_qwen3(tmp_path, **{k: v for k, v in EVEN.items() if k not in EXPERTS})
    config, params = load(tmp_path)
    tokens = tokens_of(config, 8)
    expected = logits(families.make_model(config), params, tokens)
    _, sharded = load(tmp_path, (1, 2, 1, 4))
    with mesh_lib.use_mesh(mesh_lib.make_mesh(1, 2, 1, 4)):
        actual = logits(families.make_model(config), sharded, tokens)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_spread_mesh_splits_the_experts(even):
    config = families.read_config(even)
    assert mesh_lib.make_reader_mesh(config) == mesh_lib.make_mesh(1, 1, 4, 2)
    odd = dataclasses.replace(config, num_experts=7, num_key_value_heads=1)
    assert mesh_lib.make_reader_mesh(odd) == mesh_lib.make_mesh(1, 8, 1)


# At any load.


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 1, 8), (2, 1, 1, 4)], ids=str)
def test_nothing_is_dropped_when_all_tokens_want_the_same_experts(even, sizes):
    """A zero router sends every token to experts 0, 1 and 2 with equal weights."""
    config, params = load(even, sizes)
    params["layers"]["moe"]["router"] = jnp.zeros_like(params["layers"]["moe"]["router"])
    batch = batch_of(config)
    with mesh_lib.use_mesh(mesh_lib.make_mesh(*sizes)):
        hidden, sums = routed_of(families.make_model(config), params, batch)
    means = run_files.compute_means(sums)
    assert float(means["expert_dropped"]) == 0
    figures = moe.summarise_load(means["load_LE"], means["p_LE"])
    assert float(figures["expert_load_max"]) == pytest.approx(8 / 3)
    assert float(figures["expert_load_min"]) == 0
    assert float(means["router_entropy"]) == pytest.approx(np.log(8), rel=1e-5)
    assert float(figures["load_balancing_loss"]) == pytest.approx(3, rel=1e-5)
    # the same as a dense feed-forward of three experts side by side
    _, whole = load(even)
    layers = whole["layers"]
    first = {k: layers["moe"][k][:, :3] for k in ("gate", "up", "down")}
    wide = {k: first[k].transpose(0, 2, 1, 3).reshape(3, 32, 72) for k in ("gate", "up")}
    wide["down"] = first["down"].reshape(3, 72, 32) / 3
    dense = dataclasses.replace(config, num_experts=0, intermediate_size=72)
    layers = {k: v for k, v in layers.items() if k != "moe"}
    layers["mlp"] = {k: {"kernel": v} for k, v in wide.items()}
    hidden_of = jax.jit(forward.compute_hidden, static_argnums=0)
    expected = hidden_of(families.make_model(dense), whole | {"layers": layers}, batch)
    real = np.asarray(batch.segments_BT) > 0
    np.testing.assert_allclose(
        np.asarray(hidden)[real], np.asarray(expected)[real], atol=1e-4, rtol=1e-4
    )


def test_padding_to_the_device_count_is_not_counted(even):
    """57 tokens on eight devices have the router statistics of one device."""
    config, params = load(even)
    batch = batch_of(config, 3)
    expected = run_files.compute_means(routed_of(families.make_model(config), params, batch)[1])
    _, sharded = load(even, (1, 1, 1, 8))
    with mesh_lib.use_mesh(mesh_lib.make_mesh(1, 1, 1, 8)):
        means = run_files.compute_means(routed_of(families.make_model(config), sharded, batch)[1])
    assert float(means["expert_dropped"]) == float(expected["expert_dropped"]) == 0
    np.testing.assert_allclose(means["load_LE"], expected["load_LE"], atol=1e-6)


def test_dropped_tokens_would_be_counted(even):
    """The number of dropped tokens is measured: with experts missing, it is not zero."""
    _, params = load(even)
    layer = jax.tree.map(lambda p: p[0], params["layers"]["moe"])
    few = {k: v[:5] if k != "router" else v for k, v in layer.items()}
    x = np.random.default_rng(0).normal(size=(2, T, 32)).astype(np.float32)
    flat = x.reshape(-1, 32)
    _, kept, chosen = moe.route_tokens(flat @ layer["router"], 3, True)
    _, sizes = moe.compute_local_experts(
        jnp.asarray(flat), kept, chosen, (few["gate"], few["up"], few["down"])
    )
    assert int(sizes.sum()) == int((np.asarray(chosen) < 5).sum()) < chosen.size


def test_router_statistics_equal_those_of_transformers(pair):
    """Compares the load-balancing loss over real tokens of all layers with transformers', and the
    entropy with a direct computation."""
    network, config, params = pair
    if not any(config.sparse_layers):
        assert (
            forward.compute_hidden_and_router_stats(
                families.make_model(config), params, batch_of(config)
            )[1]
            == {}
        )
        return
    batch = batch_of(config)
    mask = torch.tensor(np.asarray(batch.segments_BT))
    with torch.no_grad():
        out = network(
            torch.tensor(np.asarray(batch.tokens_BT)),
            attention_mask=mask,
            output_router_logits=True,
        )
    E, A = config.num_experts, config.num_experts_per_tok
    expected: Any = load_balancing_loss_func(out.router_logits, E, A, mask)
    _, sums = routed_of(families.make_model(config), params, batch)
    means = run_files.compute_means(sums)
    figures = moe.summarise_load(means["load_LE"], means["p_LE"])
    assert float(figures["load_balancing_loss"]) == pytest.approx(float(expected), rel=1e-4)
    real = mask.numpy().ravel() > 0
    logp = torch.stack(out.router_logits).log_softmax(-1).numpy()[:, real]
    entropy = -(np.exp(logp) * logp).sum(-1).mean()
    assert float(means["router_entropy"]) == pytest.approx(entropy, rel=1e-4)
    loads = [np.bincount(np.argsort(-p)[:, :A].ravel(), minlength=E) for p in logp]
    np.testing.assert_allclose(means["load_LE"], np.stack(loads) / real.sum(), atol=1e-5)


# Config and files.

ALIVE = {
    "vocab_size": 140,
    "hidden_size": 44,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rope_theta": 100.0,
    "rms_norm_eps": 0.1,
    "tie_word_embeddings": True,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (3,),
    "rope_scaling": RopeScaling("yarn", 4.0, 16),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mixed")
    tiny_qwen3(directory, **SHAPES["every second layer"])
    return load(directory)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config)])
def test_every_moe_field_has_an_effect(mixed, field):
    """Another value changes the shapes or the logits (test_rope.py covers the position limit)."""
    config, params = mixed
    if field == "max_position_embeddings":
        return
    other = dataclasses.replace(config, **{field: ALIVE[field]})
    shapes = [
        jax.tree.map(lambda x: x.shape, families.get_abstract_params(c)[0]) for c in (config, other)
    ]
    if shapes[0] == shapes[1]:
        tokens = tokens_of(config)
        a, b = (np.asarray(logits(families.make_model(c), params, tokens)) for c in (config, other))
        assert np.abs(a - b).max() > 1e-2


def test_sparse_layers_follow_the_config():
    c = dataclasses.replace(Config.from_hf(tiny_fields()), num_hidden_layers=6)
    assert c.sparse_layers == (True,) * 6
    stepped = dataclasses.replace(c, decoder_sparse_step=3, mlp_only_layers=(2,))
    assert stepped.sparse_layers == (False, False, False, False, False, True)


def tiny_fields(**fields):
    shape = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 131,
        "hidden_size": 40,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "max_position_embeddings": 128,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    }
    return shape | EXPERTS | fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts": None}, "field 'num_experts' is missing"),
        ({"norm_topk_prob": None}, "field 'norm_topk_prob' is missing"),
        ({"num_experts_per_tok": 8}, "num_experts_per_tok=8 is not between 1 and num_experts=7"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 is below 1"),
        (
            {"architectures": ["Qwen2MoeForCausalLM"]},
            "'Qwen2MoeForCausalLM' is none of Qwen3ForCausalLM, ",
        ),
    ],
    ids=str,
)
def test_wrong_moe_configs_are_refused(fields, words):
    with pytest.raises(UserError) as error:
        families.parse_config(tiny_fields(**fields), "config.json")
    assert words in str(error.value) and str(error.value).startswith("config.json: ")


EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "fields", "words"),
    [
        (EXPERT, None, {}, f"tensor {EXPERT} is missing"),
        (EXPERT, (20, 41), {}, f"{EXPERT} has shape [20, 41], config.json says [20, 40]"),
        (
            "model.layers.2.mlp.gate.weight",
            (6, 40),
            {},
            "mlp.gate.weight has shape [6, 40], config.json says [7, 40]",
        ),
        (EXPERT, (20, 40), {"num_experts": 6}, "has shape [7, 40], config.json says [6, 40]"),
        (
            "model.layers.0.mlp.experts.7.up_proj.weight",
            (20, 40),
            {},
            "tensor model.layers.0.mlp.experts.7.up_proj.weight is no part of this model",
        ),
        (EXPERT, (20, 40), {"mlp_only_layers": [1]}, "model.layers.1.mlp.down_proj.weight is mis"),
        (
            EXPERT,
            (20, 40),
            {"architectures": ["Qwen3ForCausalLM"]},
            "model.layers.0.mlp.down_proj.weight is missing",
        ),
    ],
)
def test_wrong_expert_tensors_are_refused(tmp_path, name, tensor, fields, words):
    tiny_qwen3(tmp_path, **EXPERTS)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = np.zeros(tensor, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    stored["num_experts"] = fields.get("num_experts", 7)
    path.write_text(json.dumps(stored | fields))
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert words in str(error.value)
