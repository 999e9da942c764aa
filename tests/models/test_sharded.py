"""Tests that sharded activations equal those of one device and that no table is gathered whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.planning import hlo
from distill.runtime import mesh as mesh_lib
from models import families
from models.layers import attention, sharded
from models.qwen3.config import Config

B, T, V, D = 8, 16, 64, 32


def looked_up(table_VD: jax.Array, tokens_BT: jax.Array, weight_BTD: jax.Array):
    """Returns the embedding, and the gradient of the table for a weighted sum over it."""

    def total(table_VD):
        x_BTD = sharded.constrain_residual(sharded.embed_tokens(table_VD, tokens_BT, jnp.float32))
        return jnp.sum(x_BTD * weight_BTD), x_BTD

    (_, x_BTD), grad_VD = jax.value_and_grad(total, has_aux=True)(table_VD)
    return x_BTD, grad_VD


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4), (2, 2, 2), (1, 2, 2, 2), (1, 1, 2, 2, 2)])
def test_embedding_lookup_gathers_no_table(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(V, D)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    weight = rng.normal(size=(B, T, D)).astype(np.float32)
    expected_grad = np.zeros((V, D))
    np.add.at(expected_grad, tokens, weight)
    mesh = mesh_lib.make_mesh(*sizes)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh_lib.VOCABULARY_AXES))
    arguments = (
        jax.device_put(table, split),
        *jax.device_put((tokens, weight), mesh_lib.make_row_sharding(mesh)),
    )
    with mesh_lib.use_mesh(mesh):
        compiled = jax.jit(looked_up, out_shardings=(None, split)).lower(*arguments).compile()
    x, grad = compiled(*arguments)
    np.testing.assert_array_equal(x, table[tokens])
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-5)
    assert x.sharding.is_equivalent_to(
        jax.sharding.NamedSharding(mesh, mesh_lib.make_hidden_spec(mesh, T)), 3
    )
    collectives = hlo.parse_costs(str(compiled.as_text())).collectives
    fetched = collectives.get("all-gather", (0, 0))[1] + collectives.get("all-reduce", (0, 0))[1]
    # Tokens are exchanged and a shard's gradient is summed over data; the table has 8,192 bytes.
    assert fetched <= tokens.nbytes + (sizes[0] - 1) * 2 * table.nbytes / 4
    assert collectives["all-to-all"][1] > 0


@pytest.mark.parametrize(
    ("kernel", "sizes", "length"),
    [
        ("xla", (1, 1, 2, 1, 4), T),
        ("splash", (1, 2, 1, 1, 4), T),
        ("xla", (1, 2, 1, 1, 4), T - 1),
    ],
)
def test_tokens_split_over_context_equal_one_device(
    kernel: str, sizes: tuple[int, ...], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares hidden states and gradients for eight query heads and two key heads, which four or
    eight devices must repeat; a length that context does not divide is not split."""
    interpreted = functools.partial(attention.attend_splash, interpret=True)
    monkeypatch.setitem(attention.TABLE, "splash", interpreted)
    config = Config(V, D, 56, 1, 8, 2, 128, 1e4, 1e-6, True, 64)
    rng = np.random.default_rng(1)
    rows = 2
    tokens, positions, segments = (
        rng.integers(0, V, (rows, length)),
        np.tile(np.arange(length), (rows, 1)),
        np.repeat([[1, 2], [1, 0]], [length - 5, 5], axis=1),
    )
    params = families.init_params(config, jax.random.key(0))
    weight = rng.normal(size=(rows, length, D)).astype(np.float32) * (segments > 0)[..., None]

    def total(params, weight_BTD):
        x, _ = families.make_model(config, kernel=kernel).apply(
            {"params": params}, tokens, positions, segments
        )
        return jnp.sum(x * weight_BTD), jnp.where(segments[..., None] > 0, x, 0)

    step = jax.value_and_grad(total, has_aux=True)
    ((_, expected), gradient) = jax.jit(step)(params, weight)
    mesh = mesh_lib.make_mesh(*sizes)
    mesh_lib.check_divisible(config, mesh, "config.json")
    shardings = jax.tree.map(lambda p: p.sharding, mesh_lib.make_abstract_params(config, mesh))
    with mesh_lib.use_mesh(mesh):
        compiled = jax.jit(step).lower(jax.device_put(params, shardings), weight).compile()
    text, F = str(compiled.as_text()), 56 // sizes[2]  # rows, tokens and features on one device
    some, every = (f"f32[{rows // sizes[1]},{n},{F}]" for n in (length // sizes[4], length))
    assert (some in text, every in text) == ((True, False) if length == T else (False, True))
    ((_, x), grads) = compiled(jax.device_put(params, shardings), weight)
    np.testing.assert_allclose(x, expected, atol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()),
        grads,
        gradient,
    )


@pytest.mark.parametrize("shape", [(8, 15), (3, 16), (1, 1)])
def test_shapes_that_do_not_divide_use_a_plain_lookup(shape: tuple[int, int]) -> None:
    mesh = mesh_lib.make_mesh(1, 2, 4)
    tokens, table = jnp.arange(np.prod(shape)).reshape(shape) % V, np.eye(V, D)
    with mesh_lib.use_mesh(mesh):
        x = jax.jit(
            lambda table: sharded.constrain_residual(
                sharded.embed_tokens(table, tokens, jnp.float32)
            )
        )(table)
    np.testing.assert_array_equal(x, table[tokens])
