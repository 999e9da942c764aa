"""The optimiser against optax by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from distill import optim
from models.errors import UserError


def config(**changes) -> ConfigDict:
    c = ConfigDict(
        {
            "learning_rate": 0.1,
            "schedule": "cosine",
            "warmup_steps": 4,
            "final_fraction": 0.1,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
        }
    )
    c.update(changes)
    return c


def params() -> dict:
    k1, k2 = jax.random.split(jax.random.key(0))
    return {
        "layers": {"norm": {"scale": 1 + jax.random.normal(k1, (3, 4))}},
        "head": jax.random.normal(k2, (5, 4)),
    }


@pytest.mark.parametrize(
    ("name", "middle"),
    [("cosine", 0.1 * (0.1 + 0.9 * 0.5)), ("linear", 0.055), ("constant", 0.1)],
)
def test_schedule_values(name, middle):
    rate = optim.schedule(config(schedule=name), 24)
    np.testing.assert_allclose([rate(i) for i in range(4)], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rate(4), 0.1, rtol=1e-6)
    np.testing.assert_allclose(rate(14), middle, rtol=1e-6)
    last = 0.1 if name == "constant" else 0.01
    np.testing.assert_allclose([rate(24), rate(99)], [last, last], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_short_warmup_starts_at_the_peak(warmup):
    rate = optim.schedule(config(warmup_steps=warmup, schedule="linear"), 10)
    np.testing.assert_allclose(rate(0), 0.1, rtol=1e-6)


def test_warmup_longer_than_the_run():
    rate = optim.schedule(config(warmup_steps=10), 5)
    np.testing.assert_allclose(rate(4), 0.05, rtol=1e-6)


def test_unknown_schedule():
    with pytest.raises(UserError, match="cosine, linear and constant"):
        optim.make(config(schedule="step"), 10)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_equals_adamw_by_hand(clip):
    """Clip, moments, bias correction and decoupled decay, in numpy; norms do not decay."""
    c, p = config(clip_norm=clip, schedule="constant", warmup_steps=0), params()
    tx = optim.make(c, 10)
    state = tx.init(p)
    step = jax.jit(tx.update)
    want = jax.tree.map(np.float64, p)
    m = v = jax.tree.map(np.zeros_like, want)
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x * (i + 1)) * 3, p)
        updates, state = step(grads, state, p)
        p = optax.apply_updates(p, updates)

        g = jax.tree.map(np.float64, grads)
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
        if clip:
            g = jax.tree.map(lambda x, norm=norm: x * min(1, clip / norm), g)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, v, g)
        decay = {"layers": {"norm": {"scale": 0.0}}, "head": 0.01}
        want = jax.tree.map(
            lambda w, m, v, d, i=i: (
                w
                - 0.1
                * (m / (1 - 0.9 ** (i + 1)) / (np.sqrt(v / (1 - 0.95 ** (i + 1))) + 1e-8) + d * w)
            ),
            want,
            m,
            v,
            decay,
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), p, want)


def test_without_gradient_only_weights_shrink():
    p = params()
    tx = optim.make(config(warmup_steps=0, schedule="constant"), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    assert not np.any(updates["layers"]["norm"]["scale"])
    np.testing.assert_allclose(updates["head"], -0.1 * 0.01 * p["head"], rtol=1e-6)
