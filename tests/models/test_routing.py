"""Tests the load-balancing loss in training and the replay of recorded experts."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from distill import rollout
from distill.data import collate
from distill.data.examples import Example
from distill.objectives import losses
from distill.policy import forward
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files
from distill.training import loop, microbatches, setup, update
from models import families, weights
from models.errors import UserError
from models.layers import moe
from tests.support.experts import (
    EVEN,
    SHAPES,
    T,
    batch_of,
    compute_chosen_experts,
    load,
    tokens_of,
    torch_gradients,
)
from tests.support.runs import config, numbers, tiny_model
from tests.support.tiny_models import tiny_qwen3


@pytest.fixture(scope="module", params=["renormalised", "every second layer"])
def pair(request, tmp_path_factory):
    """Returns (transformers' model, config, our parameters), loaded from files."""
    directory = tmp_path_factory.mktemp("model")
    network = tiny_qwen3(directory, **SHAPES[request.param])
    return network, *load(directory)


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    directory = tmp_path_factory.mktemp("even")
    tiny_qwen3(directory, **EVEN)
    return directory


def first_experts(params):
    if "layers" in params:
        return jax.tree.map(lambda p: p[0], params["layers"]["moe"])
    return params["layers_1"]["moe"]


def test_load_balancing_gradient_equals_that_of_transformers(pair):
    """Cross-entropy + 0.5 · balance over the routers of all layers, as both libraries add them
    up."""
    network, config, params = pair
    tokens = tokens_of(config)
    batch = batch_of(config, 2)
    ones = jnp.ones_like(batch.segments_BT)
    batch = dataclasses.replace(
        batch, tokens_BT=jnp.asarray(tokens, jnp.int32), segments_BT=ones, mask_BT=ones > 0
    )
    options = update.UpdateOptions(1, 1.0, router_aux_loss_coef=0.5)
    sums = functools.partial(
        update.compute_loss_sums, families.make_model(config), losses.OBJECTIVES["sft"], options
    )
    (total, (measured, _)), grads = jax.jit(jax.value_and_grad(sums, has_aux=True))(params, batch)
    count = measured["loss"][1]
    network.zero_grad()
    network.router_aux_loss_coef = 0.5
    ids = torch.tensor(tokens)
    theirs = network(ids, labels=ids, output_router_logits=True)
    theirs.loss.backward()
    assert float(total / count) == pytest.approx(theirs.loss.item(), rel=1e-5)
    loss = measured["loss"][0] / count
    assert float(total / count - loss) == pytest.approx(0.5 * theirs.aux_loss.item(), rel=1e-4)
    expected = torch_gradients(network)
    ours = dict(weights.iter_tensors(grads, config, jnp.dtype("float32")))
    for name, grad in expected.items():
        scale = np.abs(grad).max()
        actual = ours[name] / np.asarray(count)
        np.testing.assert_allclose(actual, grad, atol=1e-4 * scale + 1e-9, rtol=0, err_msg=name)


def test_training_on_the_balance_loss_evens_the_load(even):
    """The balance loss alone, with no trained token, moves the loads together."""
    config, params = load(even)
    batch = batch_of(config)
    params["layers"]["moe"]["router"] *= 3

    def balance(router):
        inner = params["layers"] | {"moe": params["layers"]["moe"] | {"router": router}}
        _, sums = forward.compute_hidden_and_router_stats(
            families.make_model(config), params | {"layers": inner}, batch
        )
        means = run_files.compute_means(sums)
        return moe.summarise_load(means["load_LE"], means["p_LE"])["load_balancing_loss"]

    descend = jax.jit(lambda router: router - 0.3 * jax.grad(balance)(router))
    router = params["layers"]["moe"]["router"]
    before = float(balance(router))
    for _ in range(20):
        router = descend(router)
    after = float(balance(router))
    assert after < before - 0.1, (before, after)  # 3, with three experts per token, is even


def replayed(qwen3, params, batch, experts):
    return forward.compute_hidden_and_router_stats(
        qwen3, params, dataclasses.replace(batch, experts_BTLA=experts)
    )


def test_replaying_a_models_own_experts_changes_nothing(pair):
    """Hidden states and gradients stay the same, and gradients flow into the router as before."""
    _, config, params = pair
    batch, qwen3 = batch_of(config, 2), families.make_model(config)
    experts = jax.jit(compute_chosen_experts, static_argnums=0)(qwen3, params, batch)
    layers = sum(config.sparse_layers)
    assert experts.shape == (2, T, layers, config.num_experts_per_tok)
    assert experts.dtype == jnp.int16

    def loss(params, experts):
        hidden, sums = replayed(qwen3, params, batch, experts)
        return jnp.sum(jnp.sin(hidden)), sums

    grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (plain, sums), plain_grads = grad(params, None)
    (again, sums_again), grads = grad(params, experts)
    assert float(again) == pytest.approx(float(plain), rel=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-9, rtol=0)
    jax.tree.map(np.testing.assert_array_equal, sums["load_LE"], sums_again["load_LE"])


def test_replay_equals_a_loop_over_experts(pair):
    """Runs a block with experts that its router would not choose, at the router's weights."""
    _, config, params = pair
    layer = {"moe": first_experts(params)}
    x = np.random.default_rng(1).normal(size=(2, T, config.hidden_size)).astype(np.float32)
    E, A = config.num_experts, config.num_experts_per_tok
    rng = np.random.default_rng(5)
    experts = np.stack([rng.permutation(E)[:A] for _ in range(2 * T)]).reshape(2, T, A)
    layer_arrays = {name: np.asarray(value) for name, value in layer["moe"].items()}
    logits = x @ layer_arrays["router"]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = np.zeros_like(x)
    for place in np.ndindex(2, T):
        chosen = experts[place]
        kept = p[place][chosen] / (p[place][chosen].sum() if config.norm_topk_prob else 1)
        for weight, e in zip(kept, chosen, strict=True):
            gate, up = x[place] @ layer_arrays["gate"][e], x[place] @ layer_arrays["up"][e]
            expected[place] += weight * (gate / (1 + np.exp(-gate)) * up) @ layer_arrays["down"][e]
    ones = np.ones((2, T), np.int32)
    block = moe.MoE(config)
    ours: Any = block.apply({"params": layer["moe"]}, x, ones, jnp.asarray(experts, jnp.int16))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    free: Any = block.apply({"params": layer["moe"]}, x, ones)
    assert np.abs(np.asarray(free) - expected).max() > 1e-2


def test_replay_undoes_flips_of_the_expert_choice(even):
    """Noise in the router, like another precision, makes states jump where a choice flips; with
    recorded experts they do not, on eight devices as on one."""
    config, params = load(even)
    batch, qwen3 = batch_of(config), families.make_model(config)
    experts = jax.jit(compute_chosen_experts, static_argnums=0)(qwen3, params, batch)
    noise = np.random.default_rng(0).normal(size=params["layers"]["moe"]["router"].shape)
    states = {}
    for name, sizes, recorded in (
        ("free", (1, 1, 1), None),
        ("replayed", (1, 1, 1), experts),
        ("replayed on a mesh", (1, 2, 2, 2), experts),
    ):
        _, moved = load(even, sizes)
        router = moved["layers"]["moe"]["router"]
        by = jax.device_put((0.0015 * noise).astype(np.float32), router.sharding)
        moved["layers"]["moe"]["router"] = router + by
        mesh = mesh_lib.make_mesh(*sizes)
        whole = jax.device_put(batch, mesh_lib.make_row_sharding(mesh))
        if recorded is not None:
            recorded = jax.device_put(np.asarray(recorded), mesh_lib.make_row_sharding(mesh))
        with mesh_lib.use_mesh(mesh):
            actual, _ = jax.jit(replayed, static_argnums=0)(qwen3, moved, whole, recorded)
        states[name] = np.asarray(actual)
    first = np.asarray(jax.jit(forward.compute_hidden, static_argnums=0)(qwen3, params, batch))
    real = np.asarray(batch.segments_BT) > 0
    jump, smooth = (np.abs(states[name] - first)[real].max() for name in ("free", "replayed"))
    assert smooth < 0.2 * jump, (smooth, jump)
    np.testing.assert_allclose(
        states["replayed on a mesh"][real], states["replayed"][real], atol=1e-4
    )


# Recording the sampler's choice.

P, R = 12, 10


def make_rows(config, prompts=5, samples=2):
    """Makes rows of a few prompts, some longer than a prefill chunk."""
    rng, rows = np.random.default_rng(0), []
    for number in range(prompts):
        prompt = rng.integers(0, config.vocab_size, rng.integers(1, P + 1)).tolist()
        keys = rollout.make_row_keys(jax.random.key(5), [number] * samples, range(samples))
        rows += [rollout.Sequence(prompt, key, int(rng.integers(1, R + 1))) for key in keys]
    return rows


def sampled(config, params, rows, mesh, stacked, dtype="float32", **options):
    with mesh_lib.use_mesh(mesh):
        done = rollout.sample(
            rollout.SamplingModel(
                families.make_model(config, dtype=jnp.dtype(dtype)), params, (3, 7, 11)
            ),
            rows,
            sampling=rollout.Sampling(),
            options=rollout.RolloutOptions(
                8,
                P + R,
                segment=4,
                prefill_chunk=8,
                cache_tokens=96,
                page_size=4,
                cache_backend="plain" if stacked else "",
                stacked=stacked,
                routing=True,
            ),
            **options,
        )
        return list(done)


@pytest.mark.parametrize(
    ("layers", "sizes", "stacked"),
    [
        pytest.param("every second", (1, 1, 1), False, marks=pytest.mark.long),
        ("all", (1, 2, 2, 2), True),
    ],
)
def test_recorded_experts_equal_those_of_a_forward_pass(even, tmp_path, layers, sizes, stacked):
    """Covers prompts that samples share, prompts read in pieces, and rows that reuse slots, are
    parked and continue later."""
    directory = even
    if layers != "all":
        directory = tmp_path
        fields: dict[str, Any] = EVEN | {"decoder_sparse_step": 2, "num_hidden_layers": 4}
        tiny_qwen3(directory, **fields)
    config, params = load(directory, sizes)
    mesh = mesh_lib.make_mesh(*sizes)
    rows = sampled(config, params, make_rows(config), mesh, stacked, token_budget=24)
    assert any(row.tokens and not row.finish_reason for row in rows)
    rows = sampled(config, params, rows, mesh, stacked)
    batch = microbatches.make_unpacked_batch(rows, len(rows), P + R, routing=config.routing_shape)
    _, alone = load(directory)
    expected = np.asarray(
        jax.jit(compute_chosen_experts, static_argnums=0)(families.make_model(config), alone, batch)
    )
    actual, segments = np.asarray(batch.experts_BTLA), np.asarray(batch.segments_BT)
    assert actual.dtype == np.int16 and actual.shape == expected.shape
    for row, theirs, ours, real in zip(rows, expected, actual, segments > 0, strict=True):
        assert sum(map(len, row.experts)) == len(row.all_tokens) - 1  # the last token is never read
        np.testing.assert_array_equal(ours[real][:-1], theirs[real][:-1])
        assert (ours[real][-1] == -1).all() and (ours[~real] == -1).all()


def test_recorded_layers_are_ordered_by_number():
    """A tree of blocks that went through jit comes back sorted by name, so layer 10 before layer
    2."""
    recorded = {f"layers_{i}": {"moe": {"experts": jnp.full((1, 2, 3), i)}} for i in range(12)}
    actual = moe.get_chosen_experts(jax.tree.map(lambda x: x, recorded))
    np.testing.assert_array_equal(actual[0, 0, :, 0], np.arange(12))


SPARSE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    root = tmp_path_factory.mktemp("sparse")
    return tuple(tiny_model(root / name, i, **SPARSE) for i, name in enumerate("st"))


def config_of(sparse, dtype, replay):
    c = config(sparse)
    c.stages, c.student.dtype, c.student.replay_routing = ("opd",), dtype, replay
    return c


def test_replay_reduces_the_sampler_trainer_mismatch(even):
    """In bfloat16 the router sometimes chooses other experts in the update than in the sampler;
    with recorded experts it cannot."""
    config, params = load(even)
    rows = sampled(
        config, params, make_rows(config, 16, 4), mesh_lib.make_mesh(1, 1, 1), False, "bfloat16"
    )
    batch = microbatches.make_unpacked_batch(rows, len(rows), P + R, routing=config.routing_shape)
    loss = functools.partial(
        update.compute_loss_sums,
        families.make_model(config, dtype=jnp.bfloat16),
        losses.OBJECTIVES["sft"],
        update.UpdateOptions(R, 1.0),
    )
    stats = jax.jit(lambda batch: loss(params, batch)[1][0]["sampler_delta"])
    deltas = {}
    for name, experts in (("free", None), ("replayed", batch.experts_BTLA)):
        total, count = stats(dataclasses.replace(batch, experts_BTLA=experts))
        deltas[name] = float(total / count)
    assert count > 200
    assert deltas["replayed"] < 0.8 * deltas["free"], deltas


def test_training_replays_recorded_experts(sparse, tmp_path):
    """Trains a LoRA on a mesh that splits the experts; rows parked by a token budget keep
    theirs."""
    c = config_of(sparse, "float32", True)
    c.student.lora.rank = 2
    c.mesh.expert = 2
    c.opd.steps, c.opd.rollout.token_budget = 2, 30
    loop.run(c, tmp_path)
    first, second = numbers(tmp_path)
    assert first["train/trained_tokens"] == 0  # so the second step has the same weights
    assert second["rollout/stale"] > 0 and second["train/sampler_delta"] < 1e-4
    assert second["train/loss"] > 0


def test_checkpoint_restores_experts_of_parked_rows():
    rng = np.random.default_rng(0)
    pieces = [rng.integers(-1, 8, (n, 2, 3)).astype(np.int16) for n in (5, 2)]
    row = rollout.Sequence([1] * 5, (1, 2), 4, tokens=[3, 4], logprobs=[-1.0, -2.0], experts=pieces)
    position = json.loads(json.dumps(rollout.RolloutBuffer([row], 7).get_state()))
    again = rollout.RolloutBuffer()
    again.restore(position)
    assert again.num_started == 7 and again.partial == [row]
    for restored, expected in zip(again.partial[0].experts, pieces, strict=True):
        assert restored.dtype == np.int16
        np.testing.assert_array_equal(restored, expected)


def test_rows_that_were_not_sampled_are_routed_afresh():
    """If half of a batch is sampled from the student, the other half has no recorded experts."""
    recorded = np.ones((3, 2, 4), np.int16)
    rows = [rollout.Sequence([1, 2], (0, 0), 3, tokens=[5], logprobs=[-1.0], experts=[recorded])]
    read = Example([3, 4], [6, 7], "", "")
    form = collate.BatchLayout(7, 3, routing=(2, 4))
    experts = np.asarray(
        collate.collate_rows([[*microbatches.to_examples(rows), read], []], form).experts_BTLA
    )
    np.testing.assert_array_equal(experts[0, :, 0, 0], [1, 1, 1, -1, -1, -1, -1])
    assert experts.shape == (2, 7, 2, 4) and (experts[1] == -1).all()


def test_replay_with_a_dense_student_is_refused(tmp_path):
    dense = tiny_model(tmp_path / "dense", 0)
    c = config_of((dense, dense), "float32", True)
    with pytest.raises(UserError, match=r"config.student.replay_routing: \S+ has no experts to re"):
        setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))
