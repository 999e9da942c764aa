"""The streamed head against the naive one: values, gradients, memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill import losses

B, T, D, E, V = 3, 10, 16, 24, 57


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 6)
    return {
        "hidden": jax.random.normal(keys[0], (B, T, D)),
        "head": jax.random.normal(keys[1], (V, D)),
        "targets": jax.random.randint(keys[2], (B, T), 0, V),
        "teacher_hidden": jax.random.normal(keys[3], (B, T, E)),
        "teacher_head": jax.random.normal(keys[4], (V, E)) * 0.5,
        "weights": jax.random.uniform(keys[5], (4, B, T)),
    }


def naive(hidden, head, targets, teacher_hidden, teacher_head):
    """The definitions, with all logits at once."""
    logp = jax.nn.log_softmax(hidden @ head.T)
    logq = jax.nn.log_softmax(teacher_hidden @ teacher_head.T)
    p = jnp.exp(logp)
    at = targets[..., None]
    return {
        "logp": jnp.take_along_axis(logp, at, -1)[..., 0],
        "entropy": -(p * logp).sum(-1),
        "teacher_logp": jnp.take_along_axis(logq, at, -1)[..., 0],
        "reverse_kl": (p * (logp - logq)).sum(-1),
    }


# MiB of logits that make chunks of 10 (all), 4 (with padding: 3 chunks), and 1 token a row
@pytest.mark.parametrize("chunk", [10, 4, 1])
def test_streamed_equals_naive(arrays, chunk):
    a = arrays
    mib = chunk * 4 * B * V / 2**20
    names = ("logp", "entropy", "teacher_logp", "reverse_kl")

    def total(f, hidden, head):
        stats = f(hidden, head)
        return sum((stats[n] * w).sum() for n, w in zip(names, a["weights"], strict=True)), stats

    def streamed(hidden, head):
        return losses.token_stats(
            hidden, head, a["targets"], a["teacher_hidden"], a["teacher_head"], logits_mib=mib
        )

    def plain(hidden, head):
        return naive(hidden, head, a["targets"], a["teacher_hidden"], a["teacher_head"])

    results = [
        jax.jit(jax.value_and_grad(lambda h, w, f=f: total(f, h, w), (0, 1), has_aux=True))(
            a["hidden"], a["head"]
        )
        for f in (streamed, plain)
    ]
    for ours, reference in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


def test_without_teacher(arrays):
    a = arrays
    stats = losses.token_stats(a["hidden"], a["head"], a["targets"], logits_mib=1)
    assert set(stats) == {"logp", "entropy"}


def test_teacher_gets_no_gradient(arrays):
    a = arrays

    def loss(teacher_hidden, teacher_head):
        stats = losses.token_stats(
            a["hidden"], a["head"], a["targets"], teacher_hidden, teacher_head, logits_mib=1e-3
        )
        return sum(x.sum() for x in stats.values())

    grads = jax.grad(loss, (0, 1))(a["teacher_hidden"], a["teacher_head"])
    assert all(not g.any() for g in grads)


def test_teacher_is_student(arrays):
    a = arrays

    def loss(hidden, head):
        stats = losses.token_stats(
            hidden, head, a["targets"], a["hidden"], a["head"], logits_mib=1e-3
        )
        return stats["reverse_kl"].mean()

    value, grads = jax.value_and_grad(loss, (0, 1))(a["hidden"], a["head"])
    assert value == 0
    assert all(not g.any() for g in grads)  # not even rounding noise, which Adam would scale up


def test_reverse_kl_is_a_divergence(arrays):
    a = arrays
    stats = naive(a["hidden"], a["head"], a["targets"], a["teacher_hidden"], a["teacher_head"])
    assert (stats["reverse_kl"] > 0).all()


def test_bfloat16_is_summed_in_float32(arrays):
    """Hidden states in bfloat16 give float32 stats, and a float32 gradient of a float32 head."""
    a = arrays
    hidden = a["hidden"].astype(jnp.bfloat16)

    def loss(head):
        stats = losses.token_stats(hidden, head, a["targets"], logits_mib=1e-3)
        assert all(x.dtype == jnp.float32 for x in stats.values())
        return stats["logp"].sum()

    assert jax.grad(loss)(a["head"]).dtype == jnp.float32


def test_shift_aligns_prediction_with_target():
    x = jnp.array([[5, 6, 7]])
    np.testing.assert_array_equal(losses.shift(x), [[6, 7, 0]])
    np.testing.assert_array_equal(losses.unshift(losses.shift(x)), [[0, 6, 7]])


def test_memory_of_the_streamed_loss():
    """8,192 tokens and the real vocabulary: under a tenth of what the naive loss needs."""
    tokens, vocabulary, width, teacher_width = 8192, 151_936, 256, 320
    f32 = jnp.float32
    shapes = (
        jax.ShapeDtypeStruct((1, tokens, width), f32),
        jax.ShapeDtypeStruct((vocabulary, width), f32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        jax.ShapeDtypeStruct((1, tokens, teacher_width), f32),
        jax.ShapeDtypeStruct((vocabulary, teacher_width), f32),
    )

    def streamed(*args):
        return losses.token_stats(*args, logits_mib=128)["reverse_kl"].sum()

    def plain(*args):
        return naive(*args)["reverse_kl"].sum()

    def peak(f):
        compiled = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*shapes).compile()
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes

    ours, reference = peak(streamed), peak(plain)
    print(f"streamed {ours / 2**30:.2f} GiB, naive {reference / 2**30:.2f} GiB")
    assert ours < reference / 10
