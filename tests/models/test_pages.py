"""Tests paged caches: attention over shared pages equals dense attention, and the pool is updated
in place."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from distill.planning import aot, hlo
from distill.runtime import mesh as mesh_lib
from distill.training import calls
from models import families, transformer
from models.errors import UserError
from models.layers import paged_attention
from models.layers import pages as pages_lib
from models.qwen3.config import SIZES

L, K, N, H, PAGE = 2, 4, 8, 16, 4
TINY = dataclasses.replace(
    SIZES["0.6b"], num_hidden_layers=L, num_key_value_heads=K, num_attention_heads=N, head_dim=H
)


def texts(lengths, seed=0, heads=(N, K, K), width=H):
    """Queries, keys and values of L layers for one text of each length."""
    rng = np.random.default_rng(seed)
    return [
        [rng.normal(size=(L, n, count, width)).astype(np.float32) for n in lengths]
        for count in heads
    ]


def dense(q: Any, k: Any, v: Any, layer: int):
    """Causal attention over one row's text, [T, N, H], from its definition."""
    q, k, v = q[layer], k[layer], v[layer]
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool)[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v)


@jax.jit
def run(cache, index, q, k, v):
    """Does what a program does: each layer writes its tokens, then attends."""
    cache, out = cache.bind_tokens(*index), []

    def run_layer(cache, layer_qkv):
        layer, q, k, v = layer_qkv
        cache = cache.write_tokens(layer, k, v)
        return cache, cache.attend(layer, q)

    cache, out = jax.lax.scan(run_layer, cache, (jnp.arange(L), q, k, v))
    return cache, out


def lines(parts, rows, width, chunks, texts):
    """Builds the index and tokens of a call from `chunks`: for each part, in order, (row, first,
    end)."""
    starts = np.zeros((parts, rows + 1), np.int32)
    row = np.full((parts, width), -1, np.int32)
    position = np.zeros((parts, width), np.int32)
    length = np.zeros((parts, rows), np.int32)
    out = [np.zeros((L, parts, width, *x[0].shape[2:]), np.float32) for x in texts]
    for part, some in enumerate(chunks):
        start = 0
        for i, (text, first, end) in enumerate(some):
            span = slice(start, start + end - first)
            row[part, span], position[part, span] = i, np.arange(first, end)
            length[part, i] = end
            for into, x in zip(out, texts, strict=True):
                into[:, part, span] = x[text][:, first:end]
            start += end - first
            starts[part, i + 1 :] = start
    return length.reshape(-1), starts, row, position, out


def tables(parts, rows, columns, chunks, owned):
    table = np.full((parts, rows, columns), -1, np.int32)
    for part, some in enumerate(chunks):
        for i, (text, *_) in enumerate(some):
            table[part, i, : len(owned[text])] = owned[text]
    return table.reshape(-1, columns)


def check_run(cache, mesh_parts, tolerance, qkv=None, lengths=(13, 9, 2, 17, 6, 11)):
    """Compares prompts in ragged chunks, then steps of one token, with `dense`; some rows are
    idle."""
    X = mesh_parts
    q, k, v = qkv or texts(lengths)
    lengths = [x.shape[1] for x in q]
    rng = np.random.default_rng(1)
    part_of = [i % X for i in range(len(lengths))]
    columns = max(-(-n // cache.page_size) for n in lengths) + 1
    free = [list(rng.permutation(cache.num_pages)) for _ in range(X)]
    owned = [
        [free[part_of[i]].pop() for _ in range(-(-n // cache.page_size))]
        for i, n in enumerate(lengths)
    ]
    want = [[dense(a, b, c, layer) for a, b, c in zip(q, k, v, strict=True)] for layer in range(L)]
    R, done = 3, [0] * len(lengths)
    got = [[np.full_like(w, np.nan) for w in arrays] for arrays in want]

    def note(chunks, out):
        for part, some in enumerate(chunks):
            start = 0
            for text, first, end in some:
                for layer in range(L):
                    got[layer][text][first:end] = out[layer, part, start : start + end - first]
                start += end - first

    # Two ragged calls: about a third of each row, then another third.
    for share in (3, 2):
        chunks = [[] for _ in range(X)]
        for i, n in enumerate(lengths):
            if len(chunks[part_of[i]]) < R - (X > 1):
                end = done[i] + max(1, (n - done[i]) // share)
                chunks[part_of[i]].append((i, done[i], end))
                done[i] = end
        length, starts, row, position, tokens = lines(X, R, 16, chunks, (q, k, v))
        index = (tables(X, R, columns, chunks, owned), length, starts, row, position)
        cache, out = run(cache, index, *tokens)
        assert np.all(np.isfinite(out)) and not np.any(np.asarray(out)[:, row < 0])
        note(chunks, np.asarray(out))
    # Then one token per row and step; a row that has ended is idle.
    R = len(lengths) // X
    order = [[i for i in range(len(lengths)) if part_of[i] == x] for x in range(X)]
    flat = [i for some in order for i in some]
    while any(done[i] < lengths[i] for i in flat):
        live = np.array([done[i] < lengths[i] for i in flat])
        table = tables(X, R, columns, [[(i, 0, 0) for i in some] for some in order], owned)
        length = np.where(live, [done[i] + 1 for i in flat], 0).astype(np.int32)
        bound = cache.bind_next_tokens(jnp.asarray(table), jnp.asarray(length))
        index = (bound.table_RN, bound.length_R, bound.starts_XR, bound.row_BT, bound.position_BT)
        tokens = [
            np.stack([x[i][:, min(done[i], lengths[i] - 1)] for i in flat], axis=1)[:, :, None]
            for x in (q, k, v)
        ]
        cache, out = run(cache, index, *tokens)
        assert np.all(np.isfinite(out)) and not np.any(np.asarray(out)[:, ~live])
        for r, i in enumerate(flat):
            if live[r]:
                for layer in range(L):
                    got[layer][i][done[i]] = out[layer, r, 0]
                done[i] += 1
    for layer in range(L):
        for a, b in zip(got[layer], want[layer], strict=True):
            assert np.max(np.abs(a - b)) <= tolerance
    return cache


def empty(parts, pages=24, page=PAGE, dtype=jnp.float32, kind="plain", config=TINY):
    return pages_lib.init_pages(config, parts, pages, page, jnp.dtype(dtype), kind)


def test_plain_pages_equal_dense_attention():
    check_run(empty(1), 1, 2e-6)


def test_lines_of_several_query_blocks_equal_dense_attention(monkeypatch):
    monkeypatch.setattr(paged_attention, "_MAX_QUERIES", 8)
    check_run(
        empty(1, pages=300, page=1), 1, 2e-6
    )  # also with a row that has more tokens than a block
    lengths = (40, 600, 33)
    cache, qkv = empty(1, pages=200), texts(lengths)
    owned = np.split(np.random.default_rng(2).permutation(200), [20, 180])
    chunks = [[(i, 0, n) for i, n in enumerate(lengths)]]
    length, starts, row, position, tokens = lines(1, 3, 680, chunks, qkv)
    table = tables(1, 3, 160, chunks, owned)
    _, out = run(cache, (table, length, starts, row, position), *tokens)
    for i, n in enumerate(lengths):
        got = np.asarray(out)[1, 0, starts[0, i] : starts[0, i] + n]
        assert np.max(np.abs(got - dense(*(x[i] for x in qkv), layer=1))) <= 2e-6


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(2, 1, 1), (1, 2, 2), (2, 1, 4), (1, 1, 4)])
def test_pages_on_a_mesh_equal_dense_attention(data, fsdp, tensor):
    mesh = mesh_lib.make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])
    with mesh_lib.use_mesh(mesh):
        cache = jax.jit(lambda: empty(data * fsdp))()
        cache = check_run(cache, data * fsdp, 2e-6)
        shard = cache.pools[0].addressable_shards[0].data.shape
    assert shard == (1, K // tensor, L * 24, H, PAGE)


# The largest of H values is about 2.5: int8 errs by 1 / 254 of it, float8 by 1 / 16 of each value.
@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.03), ("float8_e4m3fn", 0.15)])
def test_8_bit_pages_are_close_to_dense_attention(dtype, tolerance):
    cache = check_run(empty(1, dtype=dtype), 1, tolerance)
    assert cache.pools[0].dtype == dtype
    with pytest.raises(AssertionError):
        check_run(empty(1, dtype=dtype), 1, tolerance / 10)


def test_float8_pages_saturate():
    """float8 has no infinity: values that are too large become its largest number, not NaN."""
    k, v = paged_attention.to_pool_format(
        jnp.full((1, 1, K, H), 1e4), jnp.full((1, 1, K, H), -1e4), jnp.dtype("float8_e4m3fn"), ""
    )
    assert np.all(np.asarray(k, np.float32) == 448) and np.all(np.asarray(v, np.float32) == -448)


def interpret(monkeypatch):
    """Runs the kernels in (slow) interpret mode."""
    interpreted = functools.partial(paged_attention.attend_gpu, interpret=True)
    monkeypatch.setitem(paged_attention.TABLE, "gpu", interpreted)
    interpreted = functools.partial(kernel.pl.pallas_call, interpret=True)
    monkeypatch.setattr(kernel.pl, "pallas_call", interpreted)

    def store(ref, x, mask):
        """Replaces Pallas's masked store, which cannot be interpreted when a head is picked by
        number."""
        ref[...] = jnp.where(mask, x, ref[...])

    monkeypatch.setattr(kernel.pltpu, "store", store)


@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-6), ("int8", 0.03)])
def test_gpu_kernel_equals_dense_attention(monkeypatch, dtype, near):
    interpret(monkeypatch)
    check_run(empty(1, page=16, kind="gpu", dtype=dtype), 1, near)


WIDE = dataclasses.replace(TINY, head_dim=128)


@pytest.mark.parametrize(("parts", "tensor"), [(1, 1), (2, 2)])
def test_tpu_kernel_equals_dense_attention(monkeypatch, parts, tensor):
    interpret(monkeypatch)
    mesh = mesh_lib.make_mesh(parts, 1, tensor, devices=jax.devices()[: parts * tensor])
    with mesh_lib.use_mesh(mesh):
        cache = jax.jit(lambda: empty(parts, kind="ragged", config=WIDE, page=8))()
        check_run(cache, parts, 2e-6, qkv=texts((13, 9, 2, 17, 6, 11), width=128))


@pytest.mark.parametrize("kind", ["plain", "gpu", "ragged"])
def test_a_shared_page_is_copied_when_it_is_written(monkeypatch, kind):
    """Two rows continue one prompt: they share its full pages, and each has its own copy of the
    last."""
    interpret(monkeypatch)
    config, width = (WIDE, 128) if kind == "ragged" else (TINY, H)
    qkv = texts((22, 22), width=width)
    for x in qkv:
        x[1][:, :20] = x[0][:, :20]
    cache = empty(1, page=16, kind=kind, config=config)
    table = np.array([[7, 3, -1], [7, 9, -1]], np.int32)
    length, starts, row, position, tokens = lines(1, 2, 24, [[(0, 0, 20)]], qkv)
    cache, _ = run(cache, (table, length, starts, row, position), *tokens)
    before = [np.asarray(x) for x in cache.pools]
    none = jnp.full((1, 1), -1)
    source = jnp.concatenate([none, jnp.full((1, 1), 3), none], axis=1)
    cache = jax.jit(lambda cache, a, b: cache.copy_pages(a, b))(
        cache, source, jnp.where(source > 0, 9, -1)
    )
    for x, old in zip(cache.pools, before, strict=True):
        axis = 1 if kind == "ragged" else 2
        old, x = (np.split(np.asarray(of), L * 24, axis) for of in (old, x))
        for page, (a, b) in enumerate(zip(x, old, strict=True)):
            want = old[page - 6] if page % 24 == 9 else b
            np.testing.assert_array_equal(a, want)
    for n in (20, 21):
        bound = cache.bind_next_tokens(jnp.asarray(table), jnp.full(2, n + 1, jnp.int32))
        index = (bound.table_RN, bound.length_R, bound.starts_XR, bound.row_BT, bound.position_BT)
        tokens = [np.stack([x[i][:, n] for i in (0, 1)], axis=1)[:, :, None] for x in qkv]
        cache, out = run(cache, index, *tokens)
        for i in (0, 1):
            for layer in range(L):
                want = dense(*(x[i] for x in qkv), layer=layer)[n]
                assert np.max(np.abs(out[layer, i, 0] - want)) <= 2e-6


@pytest.mark.parametrize("kind", ["plain", "gpu", "ragged"])
@pytest.mark.parametrize("bad", [0, 1])
def test_non_finite_values_stay_in_their_row(monkeypatch, kind, bad):
    """A page that held NaN as a key (0) or a value (1) serves the next row like any other."""
    interpret(monkeypatch)
    config, width = (WIDE, 128) if kind == "ragged" else (TINY, H)
    qkv = texts((5, 3), width=width)
    qkv[1 + bad][0][:, 4] = np.nan
    cache = empty(1, page=16, kind=kind, config=config)
    table = np.array([[2]], np.int32)
    for text, n in ((0, 5), (1, 3)):
        length, starts, row, position, tokens = lines(1, 1, 5, [[(text, 0, n)]], qkv)
        cache, out = run(cache, (table, length, starts, row, position), *tokens)
        assert np.all(np.isfinite(np.asarray(out)[:, 0, :n])) == (text == 1)
    bound = cache.bind_next_tokens(jnp.asarray(table), jnp.full(1, 3, jnp.int32))
    index = (bound.table_RN, bound.length_R, bound.starts_XR, bound.row_BT, bound.position_BT)
    _, out = run(cache, index, *(x[1][:, None, 2:3] for x in qkv))
    want = dense(*(x[1] for x in qkv), layer=1)[2]
    assert np.max(np.abs(out[1, 0, 0] - want)) <= 2e-6


@pytest.mark.parametrize("kind", ["plain", "gpu", "ragged"])
def test_drafts_attend_as_if_read_one_by_one(monkeypatch, kind):
    """Rows read several tokens in one call, one fewer than the other; a bad one harms none before
    it."""
    interpret(monkeypatch)
    config, width = (WIDE, 128) if kind == "ragged" else (TINY, H)
    qkv, T = texts((24, 6), width=width), 4
    first, count = (20, 3), (4, 2)
    want = [[dense(*(x[i] for x in qkv), layer=layer) for i in (0, 1)] for layer in range(L)]
    qkv[2][0][:, 23] = np.nan
    cache = empty(1, page=16, kind=kind, config=config)
    table = np.array([[7, 3], [9, -1]], np.int32)
    length, starts, row, position, tokens = lines(1, 2, 24, [[(0, 0, 20), (1, 0, 3)]], qkv)
    cache, _ = run(cache, (table, length, starts, row, position), *tokens)
    length_R = jnp.array([n + c for n, c in zip(first, count, strict=True)], jnp.int32)
    bound = cache.bind_drafts(jnp.asarray(table), length_R, jnp.array(count, jnp.int32), T)
    drafted = [np.zeros((L, 2, T, *x[0].shape[2:]), np.float32) for x in qkv]
    for into, x in zip(drafted, qkv, strict=True):
        for i in (0, 1):
            into[:, i, T - count[i] :] = x[i][:, first[i] : first[i] + count[i]]
    for layer in range(L):
        out, bound = bound.write_and_attend(layer, *(jnp.asarray(x[layer]) for x in drafted))
        for i in (0, 1):
            new = np.asarray(out)[i, T - count[i] :]
            expected = want[layer][i][first[i] : first[i] + count[i]]
            assert np.max(np.abs(new[:3] - expected[:3])) <= 2e-6
        assert np.all(np.isnan(np.asarray(out)[0, 3]))


@pytest.mark.parametrize("scan", [True, False])
def test_the_model_decodes_with_pages(scan):
    """A prompt in two chunks and a step give the model's hidden states for the whole text."""
    config = dataclasses.replace(TINY, hidden_size=32, intermediate_size=48, vocab_size=64)
    params = families.init_params(config, jax.random.key(0))
    qwen3 = families.make_model(config, scan=scan)
    params = params if scan else transformer.unstack_layers(params, L)
    tokens = jax.random.randint(jax.random.key(1), (1, 9), 0, 64)
    positions = jnp.arange(9)[None]
    apply = jax.jit(lambda *of: qwen3.apply({"params": params}, *of))
    want, _ = apply(tokens, positions, jnp.ones_like(tokens))
    cache = empty(1, config=config)
    table, got = jnp.array([[5, 2, 11]], jnp.int32), []
    for first, end in ((0, 5), (5, 8), (8, 9)):
        span, one = slice(first, end), jnp.ones((1, end - first), jnp.int32)
        length, starts = jnp.array([end]), jnp.array([[0, end - first]])
        cache = cache.bind_tokens(table, length, starts, 0 * one, positions[:, span])
        out, cache = apply(tokens[:, span], positions[:, span], one, cache)
        got.append(out)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=2e-5, atol=2e-5)


QWEN = SIZES["8b"]


@pytest.mark.parametrize(
    ("words", "page", "tensor", "dtype", "kind", "config"),
    [
        ("at least one", 0, 1, "float32", "plain", TINY),
        ("head_dim=16", 16, 1, "bfloat16", "ragged", TINY),
        ("1 key/value heads a device in float8", 128, 8, "float8_e4m3fn", "ragged", QWEN),
        ("takes no int8", 128, 1, "int8", "ragged", QWEN),
        ("fast memory", 8192, 1, "bfloat16", "ragged", QWEN),
        ("16, 32, 64 or 128", 48, 1, "bfloat16", "gpu", QWEN),
        ("not of float8", 64, 1, "float8_e4m3fn", "gpu", QWEN),
    ],
)
def test_unreadable_page_sizes_are_refused(words, page, tensor, dtype, kind, config):
    with pytest.raises(UserError, match=words):
        pages_lib.check_page_size(page, config, tensor, jnp.dtype(dtype), kind, "config.page")


def test_readable_page_sizes_are_accepted():
    for page in (8, 16, 64, 128, 256):
        for tensor in (1, 2, 4, 8):
            pages_lib.check_page_size(page, QWEN, tensor, jnp.dtype("bfloat16"), "ragged", "")
    for tensor in (1, 2, 4):
        pages_lib.check_page_size(128, QWEN, tensor, jnp.dtype("float8_e4m3fn"), "ragged", "")
    pages_lib.check_page_size(64, QWEN, 8, jnp.dtype("int8"), "gpu", "")
    pages_lib.check_page_size(5, TINY, 1, jnp.dtype("int8"), "plain", "")


def test_page_bytes_equal_those_of_the_pool():
    token = pages_lib.count_token_bytes(QWEN, 8, jnp.dtype("bfloat16"))
    assert token == 36 * 2 * 128 * 2
    assert pages_lib.count_token_bytes(QWEN, 8, jnp.dtype("int8")) == 36 * 2 * (128 + 4)
    arrays = jax.eval_shape(lambda: empty(1, 7, 16, "int8", config=QWEN))
    arrays = jax.tree.leaves(arrays)
    assert sum(x.size * x.dtype.itemsize for x in arrays) == 7 * 16 * pages_lib.count_token_bytes(
        QWEN, 1, jnp.dtype("int8")
    )
    for kind, tokens in (("ragged", 512 + 512 + 1024), ("gpu", 512 + 640), ("plain", 512 + 640)):
        assert pages_lib.count_read_bytes([0, 512, 513], 128, 20, token, kind) == tokens * token


@functools.cache
def pool_on(topology, data, tensor, layers):
    """Returns a mesh and a pool on it: 8B's widths, 1,600 pages of 128 tokens per layer and
    part."""
    config = dataclasses.replace(QWEN, num_hidden_layers=layers, vocab_size=1024)
    mesh = mesh_lib.make_mesh(data, 1, tensor, devices=aot.get_devices(topology)[: data * tensor])
    kind = pages_lib.BACKENDS["tpu"]
    with mesh_lib.use_mesh(mesh):
        make = jax.jit(lambda: empty(data, 1600, 128, "bfloat16", kind, config))
        return config, mesh, calls.infer_output_shapes(make)


def compile_for(topology, data, tensor, T):
    """Compiles a decoding loop or, for T > 1, a chunk of T tokens per part; returns the program and
    the bytes of pool and weights on a device."""
    config, mesh, cache = pool_on(topology, data, tensor, 4)
    qwen3, R, N = families.make_model(config, dtype=jnp.bfloat16), 32 * data, 64

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=mesh_lib.make_row_sharding(mesh))

    def apply(cache, params, tokens_BT):
        real_BT = (cache.row_BT >= 0).astype(jnp.int32)
        arguments = tokens_BT, cache.position_BT, real_BT, cache
        applied: Any = qwen3.apply({"params": params}, *arguments)
        return applied[1].unbind_tokens(), applied[0][:, -1, 0]

    def decode(cache, params, table, length):
        def step(carry):
            cache, length = carry
            cache, hidden = apply(cache.bind_next_tokens(table, length), params, length[:, None])
            return cache, length + (hidden > 0)

        return jax.lax.while_loop(lambda carry: jnp.any(carry[1] < 99), step, (cache, length))

    def chunk(cache, params, *index):
        return apply(cache.bind_tokens(*index), params, index[-1])

    with mesh_lib.use_mesh(mesh), jax.default_matmul_precision(None):
        params = mesh_lib.make_abstract_params(config, mesh, rules=mesh_lib.GATHERED_RULES)
        params = calls.cast_shapes(params, jnp.bfloat16)
        args = (of(R, N), of(R))
        if T > 1:
            args = (*args, of(data, R // data + 1), of(data, T), of(data, T))
        lowered = jax.jit(chunk if T > 1 else decode, donate_argnums=0).lower(cache, params, *args)
        program = aot.compile_program("", lambda: lowered, 16)
    return program, calls.count_device_bytes(cache), calls.count_device_bytes(params)


@pytest.mark.parametrize(
    ("topology", "data", "tensor", "T"),
    [
        ("v5e:4x4", 2, 8, 1),
        ("v6e:4x4", 2, 8, 1),
        ("v5p:2x2x2", 2, 4, 1),
        ("v5e:4x4", 2, 8, 2048),
        pytest.param("v6e:4x4", 2, 8, 2048, marks=pytest.mark.long),
        pytest.param("v5p:2x2x2", 2, 4, 2048, marks=pytest.mark.long),
    ],
)
def test_the_pool_is_updated_in_place(topology, data, tensor, T):
    """No temporary has its size and nothing moves all of it, in a layer or overall: apart from the
    kernel's reads, a step moves little more than the weights."""
    program, pool, weights = compile_for(topology, data, tensor, T)
    assert program.aliased_bytes >= pool and program.temporary_bytes < 0.2 * pool
    assert program.hbm_bytes is not None
    assert weights < 0.6 * pool and 0.9 * weights < program.hbm_bytes
    assert program.hbm_bytes < weights + pool / 2


def test_a_page_is_copied_in_place():
    config, mesh, cache = pool_on("v5e:2x2", 2, 2, 36)
    ids = jax.ShapeDtypeStruct((2, 32), jnp.int32, sharding=mesh_lib.make_row_sharding(mesh))
    copy = jax.jit(lambda cache, a, b: cache.copy_pages(a, b), donate_argnums=0)
    with mesh_lib.use_mesh(mesh):
        program = aot.compile_program("", lambda: copy.lower(cache, ids, ids), 16)
    pool = calls.count_device_bytes(cache)
    assert program.aliased_bytes >= pool and program.temporary_bytes < 0.01 * pool
    assert program.hbm_bytes is not None
    page = 128 * pages_lib.count_token_bytes(config, 2, jnp.dtype("bfloat16"))
    assert program.open_loops == 1  # as many iterations as pages to copy: one is counted
    assert 2 * page <= program.hbm_bytes < 4.2 * page


@pytest.mark.parametrize(
    ("name", "order", "pools"),
    [
        ("ragged_paged_attention", "%x, %i, %f", 0),
        ("paged_attention", "%x, %f, %f, %i, %i", 0),
        ("attention", "%x, %f, %f, %i, %i", 2),
    ],
)
def test_traffic_of_scatters_into_a_pool(name, order, pools):
    """The HLO text gives the size of the pool, not how much a kernel reads of it, nor that a
    scatter only writes its updates."""
    text = f"""
%put (a: bf16[1000,8], b: s32[4,1], c: bf16[4,8]) -> bf16[1000,8] {{
  %a = bf16[1000,8]{{1,0}} parameter(0)
  %b = s32[4,1]{{1,0}} parameter(1)
  %c = bf16[4,8]{{1,0}} parameter(2)
  ROOT %scatter.1 = bf16[1000,8]{{1,0}} scatter(%a, %b, %c), update_window_dims={{1}}, to_apply=%add
}}

ENTRY %main (p: bf16[1000,8], i: s32[4,1], x: bf16[4,8]) -> bf16[4,8] {{
  %p = bf16[1000,8]{{1,0}} parameter(0)
  %i = s32[4,1]{{1,0}} parameter(1)
  %x = bf16[4,8]{{1,0}} parameter(2)
  %f = bf16[1000,8]{{1,0}} fusion(%p, %i, %x), kind=kCustom, calls=%put
  ROOT %y = bf16[4,8]{{1,0}} custom-call({order}), metadata={{op_name="jit(f)/jit({name})/kernel"}}
}}
"""
    put, called = 16 + 2 * 64 + 64, 64 + 16 * order.count("%i") + 64
    assert hlo.parse_costs(text).hbm_bytes == put + called + pools * 16000
