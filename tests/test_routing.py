"""The load-balancing loss in training, and replay of the experts that another pass chose."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from distill import losses, metrics, policy, update
from distill import mesh as mesh_lib
from models.qwen3 import model, moe, weights
from tests.helpers import tiny_qwen3
from tests.test_moe import EVEN, SHAPES, T, batch_of, load, tokens_of, torch_gradients


@pytest.fixture(scope="module", params=["renormalised", "every second layer"])
def pair(request, tmp_path_factory):
    """(transformers' model, config, our parameters), through files."""
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


def test_the_gradient_of_the_balance_is_that_of_transformers(pair):
    """Cross-entropy + 0.5 · balance, of all layers' routers, as both libraries add them up."""
    network, config, params = pair
    tokens = tokens_of(config)
    batch = batch_of(config, 2)
    ones = jnp.ones_like(batch.segments_BT)
    batch = dataclasses.replace(
        batch, tokens_BT=jnp.asarray(tokens, jnp.int32), segments_BT=ones, mask_BT=ones > 0
    )
    sums = functools.partial(
        update.loss_sums, model.Qwen3(config), losses.TABLE["sft"], 1, 1.0, balance=0.5
    )
    (total, (measured, _)), grads = jax.jit(jax.value_and_grad(sums, has_aux=True))(
        params, batch, None
    )
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
    ours = dict(weights.tensors(grads, jnp.dtype("float32")))
    for name, grad in expected.items():
        scale = np.abs(grad).max()
        found = ours[name] / np.asarray(count)
        np.testing.assert_allclose(found, grad, atol=1e-4 * scale + 1e-9, rtol=0, err_msg=name)


def test_balance_evens_the_load(even):
    """Trained on it alone: no token counts, the loads meet."""
    config, params = load(even)
    batch = batch_of(config)
    params["layers"]["moe"]["router"] *= 3

    def balance(router):
        inner = params["layers"] | {"moe": params["layers"]["moe"] | {"router": router}}
        _, sums = policy.routed(model.Qwen3(config), params | {"layers": inner}, batch)
        means = metrics.finalize(sums)
        return moe.summary(means["load_LE"], means["p_LE"])["load_balancing_loss"]

    descend = jax.jit(lambda router: router - 0.3 * jax.grad(balance)(router))
    router = params["layers"]["moe"]["router"]
    before = float(balance(router))
    for _ in range(20):
        router = descend(router)
    after = float(balance(router))
    assert after < before - 0.1, (before, after)  # 3, of three experts a token, is even


def replayed(qwen3, params, batch, experts):
    return policy.routed(qwen3, params, dataclasses.replace(batch, experts_BTLA=experts))


def test_replaying_its_own_choice_changes_nothing(pair):
    """Not the states, nor the gradients, which flow into the router as before."""
    _, config, params = pair
    batch, qwen3 = batch_of(config, 2), model.Qwen3(config)
    experts = jax.jit(policy.chosen, static_argnums=0)(qwen3, params, batch)
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


def test_replay_against_a_loop_over_experts(pair):
    """One block with experts that its own router would not choose, at that router's weights."""
    _, config, params = pair
    layer = {"moe": first_experts(params)}
    x = np.random.default_rng(1).normal(size=(2, T, config.hidden_size)).astype(np.float32)
    E, A = config.num_experts, config.num_experts_per_tok
    rng = np.random.default_rng(5)
    experts = np.stack([rng.permutation(E)[:A] for _ in range(2 * T)]).reshape(2, T, A)
    held = {name: np.asarray(value) for name, value in layer["moe"].items()}
    logits = x @ held["router"]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = np.zeros_like(x)
    for place in np.ndindex(2, T):
        chosen = experts[place]
        kept = p[place][chosen] / (p[place][chosen].sum() if config.norm_topk_prob else 1)
        for weight, e in zip(kept, chosen, strict=True):
            gate, up = x[place] @ held["gate"][e], x[place] @ held["up"][e]
            expected[place] += weight * (gate / (1 + np.exp(-gate)) * up) @ held["down"][e]
    ones = np.ones((2, T), np.int32)
    block = moe.MoE(config)
    ours: Any = block.apply({"params": layer["moe"]}, x, ones, jnp.asarray(experts, jnp.int16))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    free: Any = block.apply({"params": layer["moe"]}, x, ones)
    assert np.abs(np.asarray(free) - expected).max() > 1e-2


def test_replay_undoes_what_noise_does_to_the_choice(even):
    """What another precision does to a sampler's router: the states jump where a choice flips, and
    with the recorded experts they do not. On eight devices as on one."""
    config, params = load(even)
    batch, qwen3 = batch_of(config), model.Qwen3(config)
    experts = jax.jit(policy.chosen, static_argnums=0)(qwen3, params, batch)
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
        mesh = mesh_lib.make(*sizes)
        whole = jax.device_put(batch, mesh_lib.rows(mesh))
        if recorded is not None:
            recorded = jax.device_put(np.asarray(recorded), mesh_lib.rows(mesh))
        with mesh_lib.use(mesh):
            found, _ = jax.jit(replayed, static_argnums=0)(qwen3, moved, whole, recorded)
        states[name] = np.asarray(found)
    first = np.asarray(jax.jit(policy.hidden, static_argnums=0)(qwen3, params, batch))
    real = np.asarray(batch.segments_BT) > 0
    jump, smooth = (np.abs(states[name] - first)[real].max() for name in ("free", "replayed"))
    assert smooth < 0.2 * jump, (smooth, jump)
    np.testing.assert_allclose(
        states["replayed on a mesh"][real], states["replayed"][real], atol=1e-4
    )
