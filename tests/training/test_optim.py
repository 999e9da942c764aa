"""Tests the optimisers against optax and against direct computations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from distill.training import optim, update
from models.errors import UserError


def config(**changes) -> ConfigDict:
    c = ConfigDict(
        {
            "name": "adamw",
            "momentum_dtype": "float32",
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
def test_schedules_have_their_values(name, middle):
    rate = optim.make_schedule(config(schedule=name), 24)
    np.testing.assert_allclose([rate(i) for i in range(4)], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rate(4), 0.1, rtol=1e-6)
    np.testing.assert_allclose(rate(14), middle, rtol=1e-6)
    last = 0.1 if name == "constant" else 0.01
    np.testing.assert_allclose([rate(24), rate(99)], [last, last], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_short_warmup_starts_at_the_peak(warmup):
    rate = optim.make_schedule(config(warmup_steps=warmup, schedule="linear"), 10)
    np.testing.assert_allclose(rate(0), 0.1, rtol=1e-6)


def test_warmup_longer_than_the_run_is_refused():
    rate = optim.make_schedule(config(warmup_steps=10), 5)
    np.testing.assert_allclose(rate(4), 0.05, rtol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="'step': must be one of 'cosine', 'linear', 'constant'"):
        optim.make_optimizer(config(schedule="step"), 10)
    with pytest.raises(UserError, match="'lion': must be one of 'adamw', 'muon', 'adafact"):
        optim.make_optimizer(config(name="lion"), 10)
    with pytest.raises(UserError, match="momentum_dtype='int4'"):
        optim.make_optimizer(config(momentum_dtype="int4"), 10)
    with pytest.raises(UserError, match="adafactor keeps no first moment"):
        optim.make_optimizer(config(name="adafactor", momentum_dtype="bfloat16"), 10)
    for field, value in (("learning_rate", -1e-3), ("b2", 1.0), ("clip_norm", float("nan"))):
        with pytest.raises(UserError, match=f"{field}={value}: must be at least 0"):
            optim.make_optimizer(config(**{field: value}), 10)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_adamw_equals_its_definition(clip):
    """Checks clipping, moments, bias correction and decoupled decay in numpy; norms do not
    decay."""
    c, p = config(clip_norm=clip, schedule="constant", warmup_steps=0), params()
    tx = optim.make_optimizer(c, 10)
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


def test_zero_gradient_only_decays_weights():
    p = params()
    tx = optim.make_optimizer(config(warmup_steps=0, schedule="constant"), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    assert not np.any(updates["layers"]["norm"]["scale"])
    np.testing.assert_allclose(updates["head"], -0.1 * 0.01 * p["head"], rtol=1e-6)


def test_muon_orthogonalises_each_matrix_of_a_stack():
    """The singular values of an update are nearly equal, with the RMS of AdamW; a stack of layers
    is updated like its layers separately."""
    c = config(name="muon", schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.0)
    tx = optim.make_optimizer(c, 10)
    grad_LDF = jax.random.normal(jax.random.key(1), (3, 16, 24))

    def update(grad):
        tree = {"layers": {"q": {"kernel": grad}, "norm": {"scale": jnp.ones(4)}}}
        return tx.update(tree, tx.init(tree), tree)[0]["layers"]

    together = update(grad_LDF)
    alone = jnp.stack([update(g)["q"]["kernel"] for g in grad_LDF])
    np.testing.assert_allclose(together["q"]["kernel"], alone, rtol=1e-4, atol=1e-6)
    size = 0.1 * 0.2 * 24**0.5  # rate, RMS, and the norm of an orthogonal row of 24
    singular = jnp.linalg.svd(together["q"]["kernel"], compute_uv=False) / size
    assert float(singular.min()) > 0.65 and float(singular.max()) < 1.35
    nesterov = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # AdamW's first step has the size of the rate
    np.testing.assert_allclose(together["norm"]["scale"], -0.1 * nesterov, rtol=1e-4)


def test_sgd_equals_its_definition():
    c = config(name="sgd", schedule="constant", warmup_steps=0, clip_norm=0.0)
    p, tx = params(), optim.make_optimizer(c, 10)
    state = tx.init(p)
    grads = jax.tree.map(jnp.sin, p)
    first, state = tx.update(grads, state, p)
    second, _ = tx.update(grads, state, p)
    decayed = grads["head"] + 0.01 * p["head"]
    np.testing.assert_allclose(first["head"], -0.1 * decayed, rtol=1e-6)
    np.testing.assert_allclose(second["head"], -0.1 * 1.9 * decayed, rtol=1e-5)
    scale = grads["layers"]["norm"]["scale"]
    np.testing.assert_allclose(first["layers"]["norm"]["scale"], -0.1 * scale, rtol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_moments_have_the_shardings_and_size_of_the_table(name):
    """Moments with a parameter's shape have its sharding; bfloat16 halves the first moment, and
    Adafactor stores only rows and columns."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    kernel = jax.device_put(jnp.ones((2, 128, 256)), split)
    p = {"layers": {"q": {"kernel": kernel}}}

    def moments(dtype: str) -> list[jax.Array]:
        tx = optim.make_optimizer(config(name=name, momentum_dtype=dtype), 10)
        state = update.init_train_state(tx, p, 0).opt_state
        return [x for x in jax.tree.leaves(state) if x.ndim]

    wide = moments("float32")
    narrow = wide if name == "adafactor" else moments("bfloat16")
    for x in wide:
        assert x.shape != kernel.shape or x.sharding.is_equivalent_to(split, 3)
    total = sum(x.nbytes for x in wide) / kernel.nbytes
    saved = total - sum(x.nbytes for x in narrow) / kernel.nbytes
    want = {"adamw": (2, 0.5), "muon": (1, 0.5), "adafactor": (0, 0), "sgd": (1, 0.5)}[name]
    np.testing.assert_allclose((total, saved), want, atol=0.02)
