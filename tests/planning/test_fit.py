"""Plans of a tiny model, compiled for slices that need not exist, agree with arithmetic by hand."""

import json

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from configs import base
from distill import plan, rollout
from distill.planning import aot, fit, forecast, hlo, programs, roofline
from distill.runtime import mesh as mesh_lib
from distill.training import memory
from models.errors import UserError
from models.qwen3.config import SIZES

pytestmark = pytest.mark.usefixtures("compiled_anew")

V, D, F, L, N, K, H = 1024, 256, 512, 2, 4, 2, 128
B, P, R = 8, 128, 128


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """Returns a model directory with only a config.json."""
    path = tmp_path_factory.mktemp("shape")
    fields = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "eos_token_id": 7,
    }
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


def config(shape, **changes):
    c = base.get_config()
    c.student.path = c.teacher.path = shape
    c.opd.batch_size, c.opd.max_prompt_tokens, c.opd.max_response_tokens = B, P, R
    c.update_from_flattened_dict(changes)
    return c


PARAMETERS = V * D + D + L * (D * H * (2 * N + 2 * K) + 2 * H + 3 * D * F + 2 * D)


@pytest.fixture(scope="module")
def rows(shape, compiled_anew):
    """Returns the costs of the programs of on-policy distillation by name."""
    return {row.name: row for row in fit.compile_run(config(shape), "v5e:2x2")["opd"]}


def test_every_program_of_a_step_is_listed_in_order(rows):
    sampling = ["weights", "cache", "few prompts", "prompts", "decode"]
    once = ["optimiser", "zeros"]
    assert list(rows) == [*sampling, "score", *once, "accumulate", "apply", "transcripts"]
    assert rows["decode"].calls == R and rows["accumulate"].calls == 1


def test_memory_beside_each_program(rows, shape):
    mesh = mesh_lib.make_mesh(1, 4, 1, devices=aot.get_devices("v5e:2x2"))
    resident = memory.count_resident_bytes(fit.describe_stage(config(shape), "opd", mesh, mesh))
    norms = D + L * (2 * H + 2 * D)  # the heads' norms are not sharded
    assert resident["parameters"] == pytest.approx(4 * PARAMETERS / 4, abs=4 * norms)
    assert resident["optimiser"] == pytest.approx(2 * resident["parameters"], abs=64)
    assert resident["teacher"] == resident["parameters"] // 2  # bfloat16
    gradient, head = resident["parameters"], 2 * V * D / 4
    assert rows["score"].beside == resident["parameters"] + resident["optimiser"] + gradient
    # The teacher's head is an argument of the program.
    assert rows["accumulate"].beside == resident["optimiser"] + resident["teacher"] - head
    assert rows["apply"].beside == resident["teacher"]
    assert rows["decode"].beside == rows["prompts"].beside == sum(resident.values())
    copy = 2 * PARAMETERS
    expected = sum(resident.values()) + copy
    assert rows["cache"].beside == pytest.approx(expected, abs=4 * norms)
    assert rows["weights"].beside == resident["optimiser"] + resident["teacher"]


def test_asynchronous_rollouts_lie_beside_the_update(rows, shape):
    mesh = mesh_lib.make_mesh(1, 4, 1, devices=aot.get_devices("v5e:2x2"))
    c = config(shape, **{"opd.rollout.asynchronous": True})
    with mesh_lib.use_mesh(mesh):
        stage = fit.describe_stage(c, "opd", mesh, mesh)
        calls = programs.list_stage_calls(stage, 15.75 * fit.GIB)
    beside = {call.name: call.other_bytes for call in calls}
    cache = 2 * 2 * L * K * H * B * (P + R) / 4  # each device has a quarter of the rows
    copy = rows["cache"].beside - rows["decode"].beside
    for name in ("zeros", "apply"):
        assert beside[name] == copy + cache
    assert beside["decode"] == 0 and beside["score"] > copy + cache


def test_flops_of_the_compiled_text_agree_with_the_formula(rows):
    """Matrix products of all layers, and attention."""
    useful = B * (P + R) * 2 * (PARAMETERS - V * D - D - L * (2 * H + 2 * D)) / 4
    assert rows["score"].useful == pytest.approx(
        useful + 4 * N * H * (P + R + 1) / 2 * B * (P + R) * L / 4
    )
    attention = 4 * B * N * H * (P + R) ** 2 * L / 4  # splash computes one unmasked block
    assert rows["score"].compiled == pytest.approx(useful + attention, rel=0.01)
    update = rows["accumulate"]
    assert update.mfu <= update.useful / update.compiled < 1
    peak = aot.CHIPS["v5e"].bf16_tflops * 1e12
    assert update.seconds * update.mfu * peak == pytest.approx(update.useful)
    assert update.compiled > update.useful * 0.8


def test_decoding_reads_the_weights_and_the_cache(rows):
    weights = 2 * PARAMETERS  # whole on every device
    cache = 2 * 2 * L * (P + R) * K * H * B / 4
    assert weights + cache <= rows["decode"].traffic <= 6 * (weights + cache)


def test_auto_finds_the_smallest_slice(shape):
    lengths = {"sft.max_prompt_tokens": P, "sft.max_response_tokens": R}
    c = config(shape, **{"stages": ("sft",), "sft.batch_size": 2, **lengths})
    topology, stage_costs = plan.find_smallest(c, "v5e")
    assert topology == "v5e:1x1"
    names = ["optimiser", "accumulate", "apply", "transcripts"]  # no accumulated gradient
    assert [(row.name, row.collectives) for row in stage_costs["sft"]] == [(n, {}) for n in names]


def test_forecast_of_the_longest_responses_agrees_with_the_plan(rows, shape, monkeypatch):
    monkeypatch.setattr(rollout, "draw_lengths", lambda count, mean, most: [most] * count)
    monkeypatch.setattr(forecast, "PROMPT_TOKENS", P)
    c, costs = config(shape), {"opd": list(rows.values())}
    longest = fit.forecast_stages(c, "v5e:2x2", costs, R)["opd"]
    assert longest.decoding and longest.decoding.steps == R
    assert longest.decoding.simulation.num_parked == 0
    assert longest.packing.num_microbatches == 1 and longest.packing.attention_share == 1
    seconds = longest.program_seconds
    for name in ("score", "apply", "weights", "prompts"):
        assert seconds[name] == pytest.approx(rows[name].seconds)
    assert seconds["accumulate"] <= rows["accumulate"].seconds
    stage = roofline.summarise_run(c, "v5e:2x2", costs)["stages"]["opd"]
    forecast.add_to_summary(stage, longest)
    assert stage["seconds_per_step_at_mean"] == pytest.approx(sum(seconds.values()))
    assert stage["at_mean"]["decoding_steps"] == R and stage["at_mean"]["micro_batches"] == 1
    assert "128 tokens in the mean" in forecast.render_forecast("opd", longest)


def test_shorter_responses_take_less_time(rows, shape):
    costs = {"opd": list(rows.values())}
    shorter = fit.forecast_stages(config(shape), "v5e:2x2", costs, 16)["opd"]
    assert shorter.decoding and shorter.decoding.steps < R
    most = 1.001 * rows["decode"].seconds * shorter.decoding.steps / R
    assert shorter.program_seconds["decode"] <= most
    assert shorter.total_seconds < sum(row.seconds for row in rows.values())
    with pytest.raises(UserError, match=f"--mean_response_tokens={R + 1}: from 1 to "):
        fit.forecast_stages(config(shape), "v5e:2x2", costs, R + 1)
    with pytest.raises(UserError, match=r"--tokens_per_step=2: from 1 to 1 \(config.opd.rollout"):
        fit.forecast_stages(config(shape), "v5e:2x2", costs, 16, 2.0)


@pytest.mark.parametrize("lengths", [[40], [3, 5, 7, 2], [8, 8, 8], [17, 1, 20], []])
def test_blocks_of_attention_that_hold_a_visible_key_are_counted(lengths):
    """The padding of a row counts as a sequence."""
    T, block = 40, 8
    segments = np.repeat(np.arange(len(lengths) + 1), [*lengths, T - sum(lengths)])
    sees = (segments[:, None] == segments[None]) & np.tri(T, dtype=bool)
    expected = sees.reshape(T // block, block, T // block, block).any((1, 3))
    assert forecast._count_blocks(lengths, T, block) == expected.sum()


def test_resident_arrays_that_do_not_fit_are_refused_before_compiling(shape, monkeypatch):
    chip = aot.Chip(**{**vars(aot.CHIPS["v5e"]), "hbm_gib": 9 * PARAMETERS / 4 / fit.GIB})
    monkeypatch.setitem(aot.CHIPS, "v5e", chip)
    with pytest.raises(fit.TooLarge) as error:
        fit.compile_run(config(shape), "v5e:2x2")
    assert error.value.program == "what the run keeps"
    assert error.value.needs_gib == pytest.approx(14 * PARAMETERS / 4 / fit.GIB, rel=0.01)
    assert "optimiser" in error.value.largest[0]


def test_no_room_for_a_row_is_refused_before_compiling_and_remedies_are_listed(shape, monkeypatch):
    """Each of four devices has room for its resident arrays (14 bytes a parameter in all), the copy
    of the weights, which is whole, and a fifth of one row of the maximum length."""
    row = (P + R) * 2 * 2 * L * K * H
    hbm = (14 / 4 + 2) * PARAMETERS + row / 5
    chip = aot.Chip(**{**vars(aot.CHIPS["v5e"]), "hbm_gib": hbm / fit.GIB})
    monkeypatch.setitem(aot.CHIPS, "v5e", chip)
    with pytest.raises(fit.TooLarge) as error:
        fit.compile_run(config(shape), "v5e:2x2")
    assert error.value.program == "cache"
    assert error.value.needs_gib * fit.GIB == pytest.approx(hbm + row, rel=0.05)
    changes = [flag for flag, _ in fit.list_remedies(config(shape), "cache")]
    assert "--config.opd.rollout.cache_dtype=float8_e4m3fn" in changes


def test_released_sizes_need_no_directory():
    mesh = mesh_lib.make_mesh(1, 4, 1, devices=aot.get_devices("v5e:2x2"))
    for path, size in (("Qwen/Qwen3-0.6B", "0.6b"), ("Qwen/Qwen3-30B-A3B-Base", "30b-a3b")):
        described = fit.describe_policy(path, "bfloat16", True, mesh, "student")
        assert described.config == SIZES[size]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh.tensor": 3, "mesh.fsdp": 1}, "3 devices, but v5e:2x2 has 4"),
        (
            {"mesh.context": 4, "opd.max_response_tokens": 15},
            "config.opd: rows of .* tokens do not divide by context times tensor .* .4.",
        ),
        ({"mesh.tensor": 4}, "num_key_value_heads=2 does not divide by mesh axis tensor=4"),
        ({"opd.batch_size": 6}, "does not divide"),
        ({"student.path": ""}, "config.student.path: name a model directory"),
        ({"student.path": "nowhere"}, "nowhere: no model directory"),
    ],
)
def test_mistakes_in_a_config_are_named(shape, changes, words):
    with pytest.raises(UserError, match=words):
        fit.compile_run(config(shape, **changes), "v5e:2x2")


@pytest.mark.parametrize(
    ("message", "needs", "largest"),
    [
        (
            "CompileTimeHbmOom: XLA:TPU compile permanent error. Used 16.60G of 15.75G hbm.\n"
            "  1. Size: 2.50G\n     Operator: x\n     Shape: bf16[8,4096]\n",
            16.60,
            [("2.50G", "bf16[8,4096]")],
        ),
        (
            "CompileTimeHbmOom: the total memory required for HLO temporaries (24.17G) exceeds "
            "available HBM (15.75G).",
            24.17,
            [("24.17G", "temporaries and results of the program")],
        ),
    ],
)
def test_both_out_of_memory_messages_are_parsed(message, needs, largest):
    error = aot.OutOfMemory("update", message, 15.75)
    assert error.needs_gib == needs and error.largest == largest


def test_several_slices_split_only_the_rows():
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x2", num_slices=2
    ).devices
    mesh = mesh_lib.make_mesh(2, -1, 2, devices=list(devices))
    slices = [{device.slice_index for device in part.flat} for part in mesh.devices]
    assert slices == [{0}, {1}] and mesh.shape["fsdp"] == 2
    with pytest.raises(UserError, match="data=1: must be a multiple of the 2 slices"):
        mesh_lib.make_mesh(1, -1, 2, devices=list(devices))


def test_a_mesh_spans_a_slice_of_every_generation():
    for topology, size in (("v4:2x2x1", 8), ("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v6e:2x2", 4)):
        assert mesh_lib.make_mesh(1, -1, 1, devices=aot.get_devices(topology)).size == size


def test_a_mesh_axis_lies_along_one_dimension_of_the_torus():
    mesh = mesh_lib.make_mesh(1, 8, 8, devices=aot.get_devices("v5e:8x8"))
    for axis in ("fsdp", "tensor"):
        for line in np.moveaxis(mesh.devices, mesh_lib.AXES.index(axis), -1).reshape(-1, 8):
            assert sum(len({device.coords[i] for device in line}) > 1 for i in range(3)) == 1


@pytest.mark.parametrize(
    "message", ["JAX TPU support not installed; cannot generate TPU topology.", "No module named x"]
)
def test_without_libtpu_the_error_names_the_package(message, monkeypatch):
    def missing(**_):
        raise RuntimeError(f"{message}\nmore of it")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=f"^--topology=.*: pip install libtpu .{message[:20]}"):
        aot.get_devices("v5e:2x2")


def test_slices_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="v5e:3x3: no such slice"):
        aot.get_devices("v5e:3x3")
    with pytest.raises(UserError, match="name one of v4, v5e, v5p, v6e"):
        plan.find_smallest(base.get_config(), "v9")


def test_traffic_counts_operands_and_results_in_hbm():
    """Slices count only the elements read or written; fast memory does not count."""
    text = """\
%cut (p0: f32[10,256], p1: s32[]) -> f32[256] {
  %p0 = f32[10,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %one = f32[1,256]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,256}
  ROOT %out = f32[256]{0} bitcast(%one)
}

%put (p0: f32[10,256], p1: f32[1,256], p2: s32[]) -> f32[10,256] {
  %p0 = f32[10,256]{1,0} parameter(0)
  %p1 = f32[1,256]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %out = f32[10,256]{1,0} dynamic-update-slice(%p0, %p1, %p2)
}

ENTRY %main (x: f32[10,256], i: s32[]) -> f32[10,256] {
  %x = f32[10,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[256]{0} fusion(%x, %i), kind=kLoop, calls=%cut
  %fast = f32[256]{0:T(256)S(1)} copy(%row)
  %wide = f32[1,256]{1,0} reshape(%fast)
  ROOT %new = f32[10,256]{1,0} fusion(%x, %wide, %i), kind=kLoop, calls=%put
}
"""
    row, scalar = 4 * 256, 4
    expected = (row + scalar + row) + row + row + (2 * row + row + scalar)
    assert hlo.parse_costs(text).hbm_bytes == expected


def test_a_matrix_that_a_loop_reads_in_slices_counts_once():
    w, x = (jax.ShapeDtypeStruct(s, np.float32) for s in ((16, 512, 512), (512, 512)))

    def layers(w_LDD, x_DD):
        return jax.lax.scan(lambda x, w: (jax.numpy.tanh(x @ w), None), x_DD, w_LDD)[0]

    text = jax.jit(layers).lower(w, x).compile().as_text()
    once = 4 * 512 * 512
    assert 16 * 3 * once <= hlo.parse_costs(str(text)).hbm_bytes <= 16 * 8 * once
