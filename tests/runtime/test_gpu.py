"""Tests XLA's flags for GPUs, that XLA accepts them and reads them in time, and the programs of a
step compiled for an H100, which need not be present.

The latter needs NVIDIA's compiler: `pip install "jax-cuda12-plugin[with-cuda]"` of jax's version.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from configs import base
from distill.planning import fit, hlo, programs
from distill.policy import policy
from distill.runtime import gpu, xla
from distill.runtime import mesh as mesh_lib
from models import families
from models.layers import grouped
from tests.support.paths import ROOT

# An H100 as XLA describes it: openxla/xla, xla/backends/gpu/target_config/specs/h100_sxm.txtpb.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the CUDA plugin installed."""
    (tmp_path / "jax_cuda13_plugin").mkdir()
    (tmp_path / "jax_cuda13_plugin" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")


def test_gpu_flags_are_added_and_users_flags_kept(
    plugin: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=true"
    gpu.set_xla_flags(deterministic=True)
    twice = os.environ["XLA_FLAGS"].split()
    assert twice[1:] == ["--xla_gpu_deterministic_ops=true"]
    gpu.set_xla_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"].split() == twice
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false --xla_x=1")
    gpu.set_xla_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_latency_hiding_scheduler=false --xla_x=1"


@pytest.mark.parametrize(
    ("platforms", "expected"),
    [("", True), ("cuda", True), ("cuda,cpu", True), ("cpu", False), ("tpu", False)],
)
def test_flags_are_set_only_if_a_gpu_is_expected(
    plugin: None, monkeypatch: pytest.MonkeyPatch, platforms: str, expected: bool
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    gpu.set_xla_flags()
    assert bool(os.environ["XLA_FLAGS"]) == expected


def test_no_flags_are_set_without_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(gpu, "GPU_PLUGINS", ("no_such_plugin",))
    monkeypatch.setenv("XLA_FLAGS", "")
    gpu.set_xla_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"] == ""


def test_xla_accepts_the_flags_set_after_importing_train() -> None:
    """Flags are set after `train` is imported and before devices are looked up. XLA ends a process
    with unknown flags: it accepts these and refuses another."""
    code = (
        "import os, sys, importlib; train = importlib.import_module('distill.train');"
        "from distill.runtime import gpu;"
        "gpu.is_gpu_expected = lambda: True;"
        "gpu.DEFAULT_FLAGS |= dict(a.split('=') for a in sys.argv[1:]); gpu.set_xla_flags(True);"
        "import jax; jax.devices(); print('deterministic' in os.environ['XLA_FLAGS'])"
    )
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for extra in ([], ["xla_no_such_flag=1"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *extra],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
        )
        if extra:
            assert done.returncode and "xla_no_such_flag" in done.stderr
        else:
            assert done.stdout.strip() == "True", done.stderr


def test_slow_experts_are_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU without kernels for them, in one line, wherever a model is described."""
    released = families.find_released("Qwen/Qwen3-30B-A3B")
    dense = families.find_released("Qwen/Qwen3-0.6B")
    assert released and dense
    monkeypatch.setattr(grouped, "_explain_missing_packages", lambda: "tokamax is not installed")

    def make_mesh(platform: str, capability: str = "9.0") -> Any:
        device = types.SimpleNamespace(
            platform=platform, device_kind="a GPU", compute_capability=capability
        )
        return types.SimpleNamespace(devices=np.array([[device]]))

    xla.log_slow_experts(dense, make_mesh("gpu"))
    xla.log_slow_experts(released, make_mesh("cpu"))
    assert not capsys.readouterr().err
    for _ in range(2):
        xla.log_slow_experts(released, make_mesh("gpu"))
    assert capsys.readouterr().err == (
        "experts: each token is multiplied by all 128 of them, at 128 times the operations and "
        "memory: tokamax is not installed\n"
    )
    monkeypatch.setattr(grouped, "_explain_missing_packages", lambda: "")
    xla.log_slow_experts(released, make_mesh("gpu"))
    assert not capsys.readouterr().err
    described = []
    monkeypatch.setattr(xla, "log_slow_experts", lambda *args: described.append(args))
    mesh, _ = mesh_lib.make_meshes(base.get_config())
    policy.make_abstract_from_config("", released, "bfloat16", False, mesh)
    assert described == [(released, mesh)]


@pytest.fixture(scope="module")
def devices() -> list[Any]:
    """Returns the description of an H100."""
    if not any(importlib.util.find_spec(name) for name in gpu.GPU_PLUGINS):
        pytest.skip("no CUDA plugin for JAX")
    try:
        options = {"target_config": H100, "topology": "1x1x1"}
        return list(topologies.get_topology_desc("h100", "cuda", **options).devices)
    except Exception as error:  # the plugin raises many kinds
        pytest.skip(f"the CUDA plugin does not compile without a GPU: {error}")


@pytest.fixture(scope="module")
def compiled(devices: list[Any]) -> dict[str, tuple[Any, hlo.Costs, str]]:
    """Compiles decoding, scoring and the update of 0.6B from 1.7B for an H100, 8 rows of 1,024
    tokens."""
    c = base.get_config()
    c.student.path, c.teacher.path = "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"
    c.opd.batch_size, c.opd.max_prompt_tokens, c.opd.max_response_tokens = 8, 256, 768
    mesh, teacher_mesh = mesh_lib.make_meshes(c, devices)
    stage = fit.describe_stage(c, "opd", mesh, teacher_mesh)
    programs_by_name = {}
    with mesh_lib.use_mesh(mesh), jax.default_matmul_precision(None):
        for call in programs.list_stage_calls(stage):
            if call.name in ("decode", "score", "accumulate"):
                executable = call.lower().compile()
                programs_by_name[call.name] = (
                    executable,
                    hlo.parse_costs(executable.as_text()),
                    executable.as_text(),
                )
    return programs_by_name


@pytest.mark.long
def test_decoding_reads_weights_and_cache_once(compiled) -> None:
    """It has no second copy of either. With stacked weights and cache it read 2.7 to 5.8 times as
    much."""
    program, costs, _ = compiled["decode"]
    memory = program.memory_analysis()
    assert costs.open_loops == 1  # one iteration of the loop is counted
    assert costs.hbm_bytes < 1.15 * memory.argument_size_in_bytes
    assert memory.temp_size_in_bytes < 2**27


@pytest.mark.long
def test_attention_uses_cudnn_without_a_mask(compiled) -> None:
    """Key-value heads are not repeated, and there is no mask: the bias would be [8, 1, 1024,
    1024]."""
    for name in ("score", "accumulate"):
        text = compiled[name][2]
        assert "__cudnn$fmhaSoftmax" in text and "[8,1,1024,1024]" not in text
        calls = re.findall(r'"__cudnn\$fmhaSoftmax".*', text)
        assert all("bf16[8,1024,8,128]" in call for call in calls)


@pytest.mark.long
def test_the_loss_keeps_one_chunk_of_logits(compiled) -> None:
    """It never has the logits of all 8,192 tokens, and casts the head once, not in each chunk."""
    _, costs, text = compiled["accumulate"]
    assert "[8,128,151936]" in text or "[1024,151936]" in text
    assert "[8,1024,151936]" not in text and "[8192,151936]" not in text
    assert costs.hbm_bytes < 350e9  # 311; 504 in chunks of 128 MiB


@pytest.fixture
def default_gpu(devices: list[Any]) -> Iterator[SingleDeviceSharding]:
    """An H100 for which tokamax's kernels are chosen."""
    if reason := grouped.explain_missing_gpu_kernels(devices[0]):
        pytest.skip(reason)
    with jax.default_device(devices[0]):
        yield SingleDeviceSharding(devices[0])


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_expert_products_compile_to_grouped_kernels(
    default_gpu: SingleDeviceSharding, dtype: str
) -> None:
    """Forward and both gradients at the sizes of 30B-A3B: rows are not spread over all experts
    (XLA's own product takes 8 GiB in bfloat16), and only the transposed kernel is a temporary."""
    M, D, F, E = 8192, 2048, 768, 128
    x, dy, kernel = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=default_gpu)
        for shape in ((M, D), (M, F), (E, D, F))
    )
    sizes_E = jax.ShapeDtypeStruct((E,), "int32", sharding=default_gpu)

    def both(x, kernel, dy, sizes_E):
        y, transpose = jax.vjp(lambda *arrays: grouped.dot(*arrays, sizes_E), x, kernel)
        return y, transpose(dy)

    program: Any = jax.jit(both).lower(x, kernel, dy, sizes_E).compile()
    costs = hlo.parse_costs(program.as_text())
    assert costs.flops == 3 * 2 * M * D * F
    itemsize = jnp.dtype(dtype).itemsize
    assert program.memory_analysis().temp_size_in_bytes < 1.01 * E * D * F * itemsize


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_8_bit_experts_are_read_without_a_copy(
    default_gpu: SingleDeviceSharding, kind: str
) -> None:
    x = jax.ShapeDtypeStruct((8192, 2048), "bfloat16", sharding=default_gpu)
    kernel = jax.ShapeDtypeStruct((128, 2048, 768), kind, sharding=default_gpu)
    sizes_E = jax.ShapeDtypeStruct((128,), "int32", sharding=default_gpu)
    program = jax.jit(functools.partial(grouped.multiply_groups, dtype=jnp.float32))
    memory: Any = program.lower(x, kernel, sizes_E).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**20
