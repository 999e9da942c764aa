"""Tests every implementation of attention against the formula, computed one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from distill.planning import aot
from distill.runtime import mesh as mesh_lib
from distill.training import stages
from models.errors import UserError
from models.layers import attention, blockwise


def inputs(B: int, T: int, N: int, K: int, H: int):
    """Random queries, keys and values; rows padded on the left and right, one packed with three
    segments."""
    keys = jax.random.split(jax.random.key(T), 3)
    q, k, v = (
        jax.random.normal(key, (B, T, heads, H)) for key, heads in zip(keys, (N, K, K), strict=True)
    )
    segments = np.ones((B, T), np.int32)
    segments[0, : T // 3] = 0
    segments[-1, -(T // 4) :] = 0
    segments[-1, : T // 2] = np.arange(T // 2) // (T // 6) + 2
    return q, k, v, jnp.asarray(segments)


def by_hand(q_BTNH, k_BTKH, v_BTKH, segments_BT):
    """Computes attention in float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH))
    out, (B, T, N, H) = np.zeros(q.shape), q.shape
    for b, t, n in np.ndindex(B, T, N):
        visible = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]]
        kv = n // (N // k.shape[2])
        scores = k[b, visible, kv] @ q[b, t, n] / H**0.5
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, visible, kv] / weights.sum()
    return out


@pytest.mark.parametrize(
    ("kind", "block"), [("plain", 64), ("plain", 8), ("plain", 7), ("plain", 2), ("masked", 64)]
)
def test_every_implementation_equals_the_formula(kind, block, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK", block)
    q, k, v, segments = inputs(B=2, T=24, N=6, K=3, H=10)
    # cuDNN's entry point, computed by XLA: this tests the mask that it passes on.
    attend = {
        "plain": attention.attend_xla,
        "masked": functools.partial(attention._attend_masked, implementation="xla"),
    }[kind]
    out = jax.jit(attend)(q, k, v, segments)
    np.testing.assert_allclose(out, by_hand(q, k, v, segments), atol=2e-6)


def gradients(attend, q, k, v, segments):
    def loss(q, k, v):
        out = attend(q, k, v, segments)
        return jnp.sum(jnp.where(segments[..., None, None] > 0, jnp.sin(3 * out), 0))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("T", [256, 200])
def test_splash_equals_xla_in_values_and_gradients(T):
    """Covers lengths that are a multiple of the tile and lengths that are not."""
    q, k, v, segments = inputs(B=2, T=T, N=4, K=2, H=128)
    splash = functools.partial(attention.attend_splash, interpret=True)
    want, got = (
        gradients(attention.attend_xla, q, k, v, segments),
        gradients(splash, q, k, v, segments),
    )
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


def packed(T: int) -> np.ndarray:
    """Packs segments of many lengths, within blocks of 128 and across them, one row being a single
    segment; padding behind, in front, and a row of padding only."""
    rows = np.zeros((5, T), np.int32)
    rows[0, : T - 50] = np.searchsorted(np.array([40, 128, 300, 301, 420]), np.arange(T - 50)) + 1
    rows[1] = 7
    rows[2, 200:] = 1
    rows[3, :140] = 1
    return rows


def test_splash_with_several_blocks_equals_xla(monkeypatch):
    """Compares values and gradients when a row has several blocks."""
    monkeypatch.setattr(attention, "_BLOCK_SIZES", (128,))
    q, k, v, _ = inputs(B=5, T=512, N=4, K=2, H=128)
    segments = jnp.asarray(packed(512))
    splash = functools.partial(attention.attend_splash, interpret=True)
    want, got = (
        gradients(attention.attend_xla, q, k, v, segments),
        gradients(splash, q, k, v, segments),
    )
    real = segments[..., None, None] > 0
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        a, b = (jnp.where(real, x, 0) if x.ndim else x for x in (a, b))
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_splash_reads_no_block_of_other_segments(grad, monkeypatch):
    """A NaN in one segment never reaches another, not even multiplied by zero."""
    monkeypatch.setattr(attention, "_BLOCK_SIZES", (128,))
    q, k, v, _ = inputs(B=1, T=512, N=2, K=1, H=128)
    segments = jnp.asarray(np.repeat([[1, 2, 3]], (128, 256, 128), axis=1))
    bad = (segments == 2)[..., None, None]

    def splash(q, k, v):
        return attention.attend_splash(q, k, v, segments, interpret=True)

    function = jax.grad(lambda *x: splash(*x).sum(), (0, 1, 2)) if grad else splash
    arguments = [jnp.where(bad, jnp.nan, x) for x in (q, k, v)]
    for x in jax.tree.leaves(function(*arguments)):
        np.testing.assert_array_equal(np.isfinite(x), np.broadcast_to(~bad, x.shape))


def test_splash_fetches_only_what_it_computes():
    """In visiting order, the block in fast memory changes at most once per computed block."""
    kernel = attention.make_splash_kernel(512, 2, 128, interpret=True)
    for segments in packed(512):
        own = attention._restrict_to_segments(kernel, jnp.asarray(segments), 128)
        seen = segments.reshape(4, 1, 128, 1) == segments.reshape(1, 4, 1, 128)
        for info, order in ((own.fwd_mask_info, 0), (own.dq_mask_info, 0), (own.dkv_mask_info, 1)):
            runs, data = (np.asarray(x[0], int) for x in (info.block_mask, info.data_next))
            index = np.indices(runs.shape)[1 - order]
            assert (data == index)[runs > 0].all()
            visited = (data, data.T)[order].ravel()
            assert (np.diff(visited) != 0).sum() < runs.sum()
            assert not (runs > (seen.any((2, 3)) & np.tri(4, dtype=bool))).any()
            assert np.diag(runs).all()


def test_blocks_follow_the_chip_and_divide_the_row():
    for kind, sizes in (("TPU v5 lite", (512, 512, 384)), ("TPU v6 lite", (1024, 512, 384))):
        for T, block in zip((16_384, 1_536, 1_152), sizes, strict=True):
            assert attention.choose_block_size(T, kind) == block
    assert attention.choose_block_size(128, "cpu") == 128


@pytest.mark.long
@pytest.mark.parametrize("T", [4_096, 16_384])
@pytest.mark.parametrize(
    ("topology", "block"), [("v5e:2x2", 512), ("v5p:2x2x1", 512), ("v6e:2x2", 1024)]
)
@pytest.mark.parametrize("B", [4, 8])
def test_mosaic_compiles_each_chips_blocks(topology, block, T, B):
    """Forward and backward fit in the chip's fast memory with the blocks chosen for it, with one
    and with two rows per device. The three kernels do at most the operations of the blocks on and
    below the diagonal."""
    N, K, H = 2, 1, 128
    mesh = mesh_lib.make_mesh(1, 4, 1, devices=aot.get_devices(topology))
    with mesh_lib.use_mesh(mesh), jax.default_matmul_precision(None):
        q, k, v, segments = (
            jax.ShapeDtypeStruct((B, T, *rest), dtype, sharding=mesh_lib.make_row_sharding(mesh))
            for dtype, rest in (*(("bfloat16", (n, H)) for n in (N, K, K)), ("int32", ()))
        )
        grad = jax.jit(
            jax.grad(lambda *x: attention.attend_splash(*x).astype("float32").sum(), (0, 1, 2))
        )
        program = aot.compile_program("splash", lambda: grad.lower(q, k, v, segments), hbm_gib=15)
    blocks = T // block
    triangle = blocks * (blocks + 1) / 2
    assert program.flops == (2 + 3 + 4) * 2 * (B / 4) * N * H * block**2 * triangle


def test_splash_runs_on_each_device_of_a_mesh():
    """Splits rows over data and fsdp and heads over tensor; each device runs its own kernel."""
    q, k, v, segments = inputs(B=4, T=128, N=4, K=2, H=128)
    mesh = mesh_lib.make_mesh(2, 2, 2)
    with mesh_lib.use_mesh(mesh):
        rows = [jax.device_put(x, mesh_lib.make_row_sharding(mesh)) for x in (q, k, v, segments)]
        got = jax.jit(functools.partial(attention.attend_splash, interpret=True))(*rows)
    assert got.sharding.shard_shape(got.shape) == (1, 128, 2, 128)
    np.testing.assert_allclose(got, attention.attend_xla(q, k, v, segments), atol=1e-5)


def test_cudnn_by_lengths_equals_xla():
    """Computes cuDNN's entry point for rows with one segment in XLA: rows padded on the left, on
    the right, on both sides, not at all, and padding only. Padding holds infinities, which must not
    spread."""
    q, k, v, _ = inputs(B=5, T=24, N=4, K=2, H=8)
    segments = np.ones((5, 24), np.int32)
    segments[0, :7] = segments[1, 15:] = segments[2, :3] = segments[2, 20:] = segments[4] = 0
    by_length = functools.partial(attention._attend_by_length, implementation="xla")
    want = gradients(attention.attend_xla, q, k, v, segments)
    got = gradients(by_length, q, k, v, segments)
    real = segments[..., None, None] > 0
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        a = np.where(real, a, 0) if a.ndim else a  # the reference lets padding attend to itself
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
    q, k, v = (jnp.where(real, x, jnp.inf) for x in (q, k, v))
    spoilt = gradients(by_length, q, k, v, segments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(spoilt), strict=True):
        np.testing.assert_array_equal(b, a)


def test_cudnn_by_lengths_takes_no_mask():
    """No array of shape [T, T] reaches cuDNN by lengths; the other entry point passes a mask."""

    def shapes(attend):
        x = jax.ShapeDtypeStruct((1, 512, 2, 16), jnp.bfloat16)
        s = jax.ShapeDtypeStruct((1, 512), jnp.int32)
        calls = []

        def record_shapes(q, k, v, mask=None, **options):
            calls.append((mask is not None, options))
            return q

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.nn, "dot_product_attention", record_shapes)
            jax.eval_shape(attend, x, x, x, s)
        return calls

    ((masked, options),) = shapes(attention.attend_cudnn_by_length)
    assert not masked and options["is_causal"] and options["implementation"] == "cudnn"
    assert options["query_seq_lengths"] is options["key_value_seq_lengths"]
    ((masked, _),) = shapes(attention.attend_cudnn)
    assert masked


def test_packed_rows_take_the_mask_and_others_lengths():
    """A run with packed rows at any stage needs the mask; otherwise lengths are enough."""
    for packed, kind in ((True, "cudnn"), (False, "cudnn_lengths")):
        for wanted in ("auto", "cudnn"):
            assert (
                attention.choose_kernel(wanted, "gpu", 128, jnp.dtype("bfloat16"), packed) == kind
            )
    c = base.get_config()
    assert stages.has_packed_rows(c)
    c.stages = ("sft",)
    assert not stages.has_packed_rows(c)
    c.sft.pack_tokens = 4096
    assert stages.has_packed_rows(c)


def test_blocks_of_queries_have_the_same_gradient(monkeypatch):
    q, k, v, segments = inputs(B=2, T=50, N=4, K=2, H=8)
    want = gradients(attention.attend_xla, q, k, v, segments)
    monkeypatch.setattr(blockwise, "_BLOCK", 16)
    got = gradients(attention.attend_xla, q, k, v, segments)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


def test_memory_grows_linearly_with_length():
    """Temporaries of the forward and backward passes grow with T, not with its square."""

    def temporaries(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        s = jax.ShapeDtypeStruct((1, T), jnp.int32)
        grad = jax.grad(
            lambda q, k, v, s: attention.attend_xla(q, k, v, s).sum(), argnums=(0, 1, 2)
        )
        memory = jax.jit(grad).lower(x, x, x, s).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)


@pytest.mark.parametrize(
    ("wanted", "platform", "H", "dtype", "kind"),
    [
        ("auto", "cpu", 128, "bfloat16", "xla"),
        ("auto", "tpu", 128, "bfloat16", "splash"),
        ("auto", "tpu", 64, "float32", "xla"),
        ("auto", "gpu", 128, "bfloat16", "cudnn"),
        ("auto", "gpu", 128, "float32", "xla"),
        ("xla", "tpu", 128, "bfloat16", "xla"),
    ],
)
def test_kernel_follows_platform_and_shape(wanted, platform, H, dtype, kind):
    assert attention.choose_kernel(wanted, platform, H, jnp.dtype(dtype)) == kind


@pytest.mark.parametrize(
    ("wanted", "platform", "H", "words"),
    [
        ("splash", "cpu", 128, "needs a TPU"),
        ("splash", "tpu", 64, "head_dim=64"),
        ("cudnn", "tpu", 128, "needs a GPU"),
        ("flash", "gpu", 128, "none of auto, xla, splash, cudnn"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(wanted, platform, H, words):
    with pytest.raises(UserError, match=words):
        attention.choose_kernel(wanted, platform, H, jnp.dtype("bfloat16"))
