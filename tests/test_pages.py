"""Pages: attention over them is attention, whoever shares them, and the pool stays in one place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from distill import mesh as mesh_lib
from models.qwen3 import paged_attention
from models.qwen3 import pages as pages_lib
from models.qwen3.config import SIZES

L, K, N, H, PAGE = 2, 4, 8, 16, 4
TINY = dataclasses.replace(
    SIZES["0.6b"], num_hidden_layers=L, num_key_value_heads=K, num_attention_heads=N, head_dim=H
)


def texts(lengths, seed=0, heads=(N, K, K), width=H):
    """Queries, keys and values of L layers, for each row a text of its length."""
    rng = np.random.default_rng(seed)
    return [
        [rng.normal(size=(L, n, count, width)).astype(np.float32) for n in lengths]
        for count in heads
    ]


def dense(q, k, v, layer):
    """Causal attention of one row's text, [T, N, H], written out."""
    q, k, v = q[layer], k[layer], v[layer]
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool)[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nts,snh->tnh", weights, v)


@jax.jit
def run(held, index, q, k, v):
    """What a program does: each layer writes its tokens, then attends."""
    held, out = held.at(*index), []

    def one(held, layer_qkv):
        layer, q, k, v = layer_qkv
        held = held.write(layer, k, v)
        return held, held.attend(layer, q)

    held, out = jax.lax.scan(one, held, (jnp.arange(L), q, k, v))
    return held, out


def lines(parts, rows, width, chunks, texts):
    """`chunks`: for each part, in order, (row, first, end). The call's index and its tokens."""
    starts = np.zeros((parts, rows + 1), np.int32)
    row = np.full((parts, width), -1, np.int32)
    position = np.zeros((parts, width), np.int32)
    length = np.zeros((parts, rows), np.int32)
    out = [np.zeros((L, parts, width, *x[0].shape[2:]), np.float32) for x in texts]
    for part, some in enumerate(chunks):
        at = 0
        for i, (text, first, end) in enumerate(some):
            span = slice(at, at + end - first)
            row[part, span], position[part, span] = i, np.arange(first, end)
            length[part, i] = end
            for into, x in zip(out, texts, strict=True):
                into[:, part, span] = x[text][:, first:end]
            at += end - first
            starts[part, i + 1 :] = at
    return length.reshape(-1), starts, row, position, out


def tables(parts, rows, columns, chunks, owned):
    found = np.full((parts, rows, columns), -1, np.int32)
    for part, some in enumerate(chunks):
        for i, (text, *_) in enumerate(some):
            found[part, i, : len(owned[text])] = owned[text]
    return found.reshape(-1, columns)


def check_run(held, mesh_parts, tolerance, qkv=None, lengths=(13, 9, 2, 17, 6, 11)):
    """Prompts in ragged chunks, then steps of one token, against `dense`; some rows idle."""
    X = mesh_parts
    q, k, v = qkv or texts(lengths)
    lengths = [x.shape[1] for x in q]
    rng = np.random.default_rng(1)
    part_of = [i % X for i in range(len(lengths))]
    columns = max(-(-n // held.page) for n in lengths) + 1
    free = [list(rng.permutation(held.pages)) for _ in range(X)]
    owned = [
        [free[part_of[i]].pop() for _ in range(-(-n // held.page))] for i, n in enumerate(lengths)
    ]
    want = [[dense(a, b, c, layer) for a, b, c in zip(q, k, v, strict=True)] for layer in range(L)]
    R, done = 3, [0] * len(lengths)
    got = [[np.full_like(w, np.nan) for w in of] for of in want]

    def note(chunks, out):
        for part, some in enumerate(chunks):
            at = 0
            for text, first, end in some:
                for layer in range(L):
                    got[layer][text][first:end] = out[layer, part, at : at + end - first]
                at += end - first

    # Two ragged calls: of each row about a third, then another.
    for share in (3, 2):
        chunks = [[] for _ in range(X)]
        for i, n in enumerate(lengths):
            if len(chunks[part_of[i]]) < R - (X > 1):
                end = done[i] + max(1, (n - done[i]) // share)
                chunks[part_of[i]].append((i, done[i], end))
                done[i] = end
        length, starts, row, position, tokens = lines(X, R, 16, chunks, (q, k, v))
        index = (tables(X, R, columns, chunks, owned), length, starts, row, position)
        held, out = run(held, index, *tokens)
        assert np.all(np.isfinite(out)) and not np.any(np.asarray(out)[:, row < 0])
        note(chunks, np.asarray(out))
    # Then a token of each row a step, a row that has ended being idle.
    R = len(lengths) // X
    order = [[i for i in range(len(lengths)) if part_of[i] == x] for x in range(X)]
    flat = [i for some in order for i in some]
    while any(done[i] < lengths[i] for i in flat):
        live = np.array([done[i] < lengths[i] for i in flat])
        table = tables(X, R, columns, [[(i, 0, 0) for i in some] for some in order], owned)
        length = np.where(live, [done[i] + 1 for i in flat], 0).astype(np.int32)
        at = held.step(jnp.asarray(table), jnp.asarray(length))
        index = (at.table_RN, at.length_R, at.starts_XR, at.row_BT, at.position_BT)
        tokens = [
            np.stack([x[i][:, min(done[i], lengths[i] - 1)] for i in flat], axis=1)[:, :, None]
            for x in (q, k, v)
        ]
        held, out = run(held, index, *tokens)
        assert np.all(np.isfinite(out)) and not np.any(np.asarray(out)[:, ~live])
        for r, i in enumerate(flat):
            if live[r]:
                for layer in range(L):
                    got[layer][i][done[i]] = out[layer, r, 0]
                done[i] += 1
    for layer in range(L):
        for a, b in zip(got[layer], want[layer], strict=True):
            assert np.max(np.abs(a - b)) <= tolerance
    return held


def empty(parts, pages=24, page=PAGE, dtype=jnp.float32, kind="plain", config=TINY):
    return pages_lib.init_pages(config, parts, pages, page, jnp.dtype(dtype), kind)


def test_plain():
    check_run(empty(1), 1, 2e-6)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(2, 1, 1), (1, 2, 2), (2, 1, 4), (1, 1, 4)])
def test_on_a_mesh(data, fsdp, tensor):
    mesh = mesh_lib.make(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])
    with mesh_lib.use(mesh):
        held = jax.jit(lambda: empty(data * fsdp))()
        held = check_run(held, data * fsdp, 2e-6)
        shard = held.pools[0].addressable_shards[0].data.shape
    assert shard == (1, K // tensor, L * 24, PAGE, H)


def test_gpu_kernel(monkeypatch):
    interpreted = functools.partial(paged_attention.gpu, interpret=True)
    monkeypatch.setitem(paged_attention.TABLE, "gpu", interpreted)
    check_run(empty(1, page=16, kind="gpu"), 1, 2e-6)


def test_tpu_kernel(monkeypatch):
    interpreted = functools.partial(kernel.pl.pallas_call, interpret=True)
    monkeypatch.setattr(kernel.pl, "pallas_call", interpreted)

    def store(ref, x, mask):
        """Pallas's own of part of a block is not interpreted where a head is taken by a number."""
        ref[...] = jnp.where(mask, x, ref[...])

    monkeypatch.setattr(kernel.pltpu, "store", store)
    config = dataclasses.replace(TINY, head_dim=128)
    held = empty(1, kind="ragged", config=config, page=8)
    check_run(held, 1, 2e-6, qkv=texts((13, 9, 2, 17, 6, 11), width=128))
