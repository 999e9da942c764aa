# ruff: noqa: E501
"""Costs parsed from compiled programs agree with arithmetic by hand."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill.planning import aot, hlo
from models.errors import UserError

L, B, D = 12, 64, 256


@functools.cache
def compile_layers() -> aot.Program:
    """Compiles a gradient through L layers whose weights are sharded over eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(w_LDD, x_BD):
        y_BD, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)
        return jnp.sum(y_BD**2)

    def make_shape(shape, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    w, x = make_shape((L, D, D), None, "x"), make_shape((B, D), "x")
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=w.sharding)
        return aot.compile_program("layers", lambda: step.lower(w, x), hbm_gib=16)


def test_matrix_products_in_loops_count_once_per_iteration():
    program = compile_layers()
    assert program.flops == 3 * L * 2 * (B // 8) * D * D  # one forward and two backward
    assert program.open_loops == 0


def test_collectives_of_sharded_layers_are_counted():
    collectives = compile_layers().collectives
    assert collectives is not None
    count, size = collectives["all-gather"]
    assert (count, size) == (2 * L, 2 * L * D * D * 4 * 7 // 8)  # each weight, in both directions
    received = sum(size for kind, (_, size) in collectives.items() if kind != "all-gather")
    # The gradients: at least the bytes of a reduce-scatter, at most those of an all-reduce.
    assert L * D * D * 4 * 7 // 8 <= received <= 2 * L * D * D * 4 * 7 // 8 + 1000


def test_argument_and_output_bytes_are_those_of_one_device():
    program = compile_layers()
    assert program.argument_bytes == (L * D * D + B * D) * 4 / 8
    assert program.output_bytes == L * D * D * 4 / 8
    assert program.peak_bytes >= program.argument_bytes


TPU = """\
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}

%product (a: bf16[32,512], b: bf16[4,512,64]) -> bf16[32,64,1] {
  ROOT %conv = bf16[32,64,1]{1,0,2:T(8,128)} convolution(bf16[32,4,512]{2,0,1} %a, bf16[4,512,64]{2,1,0} %b), window={size=4}, dim_labels=b0f_0io->bf0
}

%body (p: (u32[], bf16[8,4])) -> (u32[], bf16[8,4]) {
  %p = (u32[], bf16[8,4], /*index=5*/u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %two = u32[]{:T(128)} constant(2)
  %next = u32[] add(%i, %two)
  %w = bf16[8,4] get-tuple-element(%p), index=1
  %f = bf16[32,64,1] fusion(%w, %w), kind=kOutput, calls=%product
  %ag-start = (bf16[1,4], bf16[8,4]) all-gather-start(%w), channel_id=3, replica_groups=[2,8]<=[16], dimensions={0}
  %ag-done = bf16[8,4] all-gather-done(%ag-start), channel_id=3
  %rs = bf16[1,4] reduce-scatter(%w), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, to_apply=%add
  %cp = bf16[8,4] collective-permute(%w), channel_id=5, source_target_pairs={{0,1},{1,0}}
  ROOT %r = (u32[], bf16[8,4]) tuple(%next, %ag-done)
}

%condition (q: (u32[], bf16[8,4])) -> pred[] {
  %q = (u32[], /*index=5*/bf16[8,4]) parameter(0)
  %limit = u32[]{:T(128)} constant(10)
  %j = u32[] get-tuple-element(%q), index=0
  ROOT %lt = pred[] compare(%j, %limit), direction=LT
}

%sampler_condition (q: (u32[], pred[])) -> pred[] {
  %q = (u32[], pred[]) parameter(0)
  %limit = u32[] constant(10)
  ROOT %go = pred[] and(%q, %q)
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4] parameter(0)
  %loop = (u32[], bf16[8,4]) while(%t), condition=%condition, body=%body
  %open = (u32[], bf16[8,4]) while(%t), condition=%sampler_condition, body=%add
  %ar = f32[100] all-reduce(%y), channel_id=9, replica_groups=mesh['a'=8,'b'=2] {'b'}, to_apply=%add
  ROOT %out = bf16[8,4] get-tuple-element(%loop), index=1
}
"""


def test_syntax_of_tpu_programs_is_parsed():
    """Strides of unrolled loops, windows for matrices, start and done pairs, three notations for
    groups, and loops that may end early."""
    costs = hlo.parse_costs(TPU)
    assert costs.flops == 5 * 2 * 32 * 64 * (4 * 512)
    assert costs.open_loops == 1
    assert costs.collectives == {
        "all-gather": (5, 5 * 64 * 7 // 8),
        "reduce-scatter": (5, 5 * 8 * 7),
        "collective-permute": (5, 5 * 64),
        "all-reduce": (1, 400),
    }


FUSED = """\
%start (p: bf16[4,8]) -> bf16[32,8] {
  %ag.1 = bf16[32,8] all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
}

%piece (p: bf16[4,8]) -> bf16[32,8] {
  %ag.2 = bf16[32,8] all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="0"}
}

%other (p: bf16[4,8]) -> bf16[32,8] {
  %ag.3 = bf16[32,8] all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], frontend_attributes={chain_id="1"}
}

%all-reduce-scatter.1 (p: bf16[32,8]) -> bf16[4,8] {
  %ar = bf16[32,8] all-reduce(%p), channel_id=2, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %own = bf16[4,8] dynamic-slice(%ar), dynamic_slice_sizes={4,8}
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8] parameter(0)
  %a = bf16[32,8] fusion(%x), kind=kCustom, calls=%start
  %b = bf16[32,8] fusion(%x), kind=kCustom, calls=%piece
  %c = bf16[32,8] fusion(%x), kind=kCustom, calls=%other
  %splash_mha_dkv_segmented.1 = (bf16[2,4,64,16], bf16[2,4,64,16]) custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, bf16[2,4,64,16]{3,2,1,0}}, frontend_attributes={}
  ROOT %d = bf16[4,8] fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_in_fusions_and_flops_of_attention_kernels_are_counted():
    """A collective in pieces counts once, two chains on one channel count twice, and an all-reduce of
    which each device keeps its shard is a reduce-scatter. Splash attention computes 36 of 64 blocks.
    """
    costs = hlo.parse_costs(FUSED)
    assert costs.collectives == {
        "all-gather": (2, 2 * 32 * 8 * 2 * 7 // 8),
        "reduce-scatter": (1, 32 * 8 * 2 * 7 // 8),
    }
    assert costs.flops == 4 * 2 * 2 * 4 * 16 * 36 * 8 * 8


GROUPED = """\
ENTRY %main (x: bf16[64,32], w: s8[8,32,16], sizes: s32[9]) -> f32[64,16] {
  %x = bf16[64,32] parameter(0)
  %w = s8[8,32,16] parameter(1)
  %sizes = s32[9] parameter(2)
  %y = f32[64,16] custom-call(%x, %w, %sizes), custom_call_target="triton_kernel_call_ffi", operand_layout_constraints={bf16[64,32]{1,0}, s8[8,32,16]{2,1,0}, s32[9]{0}}, metadata={metadata_payload="tokamax:{TritonRaggedDot}"}
  ROOT %dw = f32[8,16,32] custom-call(%y, %x, %sizes), custom_call_target="triton_kernel_call_ffi", operand_layout_constraints={f32[64,16]{1,0}, bf16[64,32]{1,0}, s32[9]{0}}, metadata={metadata_payload="tokamax:{TritonRaggedDot}"}
}
"""


def test_flops_and_traffic_of_grouped_products_on_gpus_are_counted():
    """A product, and a gradient with respect to the kernel: each row is multiplied once."""
    costs = hlo.parse_costs(GROUPED)
    assert costs.flops == 2 * (2 * 64 * 32 * 16) and costs.attention_flops == 0
    x, w, y = 64 * 32 * 2, 8 * 32 * 16, 64 * 16 * 4
    assert costs.hbm_bytes == (x + w + 9 * 4 + y) + (y + x + 9 * 4 + 4 * w)


def test_only_the_most_expensive_branch_counts():
    """The width of the product is known only at run time; the widest counts."""

    def product(width, x):
        return x[:, :width] @ x[:width]

    def switch(i, x):
        return jax.lax.switch(i, [functools.partial(product, w) for w in (16, 64, 32)], x)

    program = jax.jit(switch).lower(jnp.int32(0), jnp.ones((64, 64))).compile()
    text = program.as_text()
    assert text is not None and hlo.parse_costs(text).flops == 2 * 64 * 64 * 64


PREFETCHED = """\
%async_computation (param_0: f32[8,64]) -> f32[2,64] {
  %param_0 = f32[8,64]{1,0} parameter(0)
  ROOT %cut = f32[2,64]{1,0:S(1)} slice(%param_0), slice={[0:2], [0:64]}
}

ENTRY %main (x: f32[8,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %slice-start = ((f32[8,64]{1,0}), f32[2,64]{1,0:S(1)}, s32[]{:S(2)}) SLICE
  %slice-done = f32[2,64]{1,0:S(1)} slice-done(%slice-start)
  %copy-start = (f32[8,64]{1,0:S(1)}, f32[8,64]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %copy-done = f32[8,64]{1,0:S(1)} copy-done(%copy-start)
  ROOT %out = f32[8,64]{1,0} fusion(%slice-done, %copy-done), kind=kLoop, calls=%add
}
"""


@pytest.mark.parametrize(
    "start",
    [
        "slice-start(%x), slice={[0:2], [0:64]}",
        "async-start(%x), calls=%async_computation",  # libtpu's own notation for the same
    ],
)
def test_prefetched_bytes_count_once(start):
    """The slice and the source of the copy are read into fast memory; only the result is written."""
    assert hlo.parse_costs(PREFETCHED.replace("SLICE", start)).hbm_bytes == (2 + 8 + 8) * 64 * 4


@pytest.mark.parametrize(
    ("window", "taps"),
    [
        ((1, 32, 32, "size=32 pad=31_31"), 1),  # 63 results, each of one element
        ((16, 16, 16, "size=16 stride=15 pad=0_0 lhs_dilate=16"), 1),  # a batch
        ((2, 2, 1, "size=2"), 2),  # a sum over two blocks
    ],
)
def test_taps_of_windows_outside_the_image_do_not_count(window, taps):
    image, kernel, out, text = window
    out = image + 62 - kernel + 1 if "pad=31" in text else out
    counted = hlo._count_taps(f"convolution(), window={{{text}}}, x", 0, image, kernel, out)
    np.testing.assert_allclose(counted, taps)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v7x:2x2", "TPU7x is not served"),
        ("v9:2x2", "name one of v4, v5e"),
        ("v5e", "its shape"),
        ("v5e:2*4", "its shape"),
    ],
)
def test_slices_of_unknown_chips_or_shapes_are_refused(name, words):
    with pytest.raises(UserError, match=words):
        aot.get_chip(name)


@pytest.mark.parametrize(
    ("dumped", "expected"),
    [("%y = add(%x, %x)", "%y = add(%x, %x)"), ("%y = add(%x#0, %x#1)", "printed")],
)
def test_text_with_elements_of_tuples_in_short_is_not_read(tmp_path, dumped, expected):
    (tmp_path / "module.after_codegen.txt").write_text(dumped)
    compiled = types.SimpleNamespace(as_text=lambda: "printed")
    assert aot._read_hlo_text(compiled, tmp_path) == expected
