"""The stacked cache: attention in pieces is attention, and TPU compilers keep it in one place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill import aot, hlo, programs
from distill import mesh as mesh_lib
from models.qwen3 import cache
from models.qwen3.config import SIZES

B, N, K, H = 3, 6, 2, 8
TINY = dataclasses.replace(
    SIZES["0.6b"], num_hidden_layers=2, num_key_value_heads=K, num_attention_heads=N, head_dim=H
)


def filled(slots, dtype):
    """Two layers of random tokens; half of the slots hold one, of the last row none."""
    keys = jax.random.split(jax.random.key(0), 3)
    found = cache.init_cache(TINY, B, slots, dtype, stacked=True)
    k, v = (jax.random.normal(key, (B, slots, K, H)) for key in keys[:2])
    valid = jax.random.bernoulli(keys[2], 0.5, (B, slots)).at[B - 1].set(False)
    return dataclasses.replace(found.write(1, k, v), valid_BS=valid)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(
    "slots", [128, 300, 512]
)  # one piece; a last one that overlaps; whole ones
def test_attention_in_pieces(slots, dtype, monkeypatch):
    held = filled(slots, jnp.dtype(dtype))
    q_BTNH = jax.random.normal(jax.random.key(9), (B, 1, N, H))
    whole = held.attend(1, q_BTNH)
    monkeypatch.setattr(cache, "PIECE", 1)  # the least: 128 slots
    pieces = jax.jit(lambda held, q_BTNH: held.attend(1, q_BTNH))(held, q_BTNH)
    np.testing.assert_allclose(pieces, whole, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_decoding_loop_on_tpu_reads_the_cache_once(dtype, monkeypatch):
    """No copy of the cache before, in or after the loop, and no second reading of a layer."""
    monkeypatch.setattr(cache, "PIECE", 2**19)
    rows, slots, L = 16, 4096, 4
    shape = dataclasses.replace(TINY, num_hidden_layers=L, head_dim=128, num_attention_heads=2 * K)
    mesh = mesh_lib.make(1, 1, 1, devices=aot.devices("v5e:1x1")[:1])
    empty = jax.jit(lambda: cache.init_cache(shape, rows, slots, jnp.dtype(dtype), stacked=True))

    def loop(held, q_BTNH):
        def layer(carry, i):
            held, x = carry
            held = held.write(i, x[:, :, :K], x[:, :, K:])
            return (held, x + held.attend(i, x)), None

        def step(_, carry):
            held, x = carry
            (held, x), _ = jax.lax.scan(layer, (held, x), jnp.arange(L))
            return held.move(1), x

        return jax.lax.fori_loop(0, 3, step, (held, q_BTNH))

    with mesh_lib.use(mesh):
        held = programs.like(empty)
        q = jax.ShapeDtypeStruct((rows, 1, 2 * K, 128), jnp.bfloat16, sharding=mesh_lib.rows(mesh))
        compiled = jax.jit(loop, donate_argnums=0).lower(held, q).compile()
    size = programs.bytes_of(held)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory and memory.temp_size_in_bytes < size / 4
    # Scales, where this small cache has them, are kept in fast memory through the loop.
    least = programs.bytes_of((held.keys, held.values))
    assert 3 * least <= hlo.read(str(text)).traffic <= 1.4 * 3 * size
