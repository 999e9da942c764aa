"""python -m benchmarks.kernels [--topology=h100:1] [--only=experts]: what kernels cost, compiled.

Compiles a teacher's scoring and the student's update (exact reverse KL) for a device that need not
be there, with the kernels that this project chooses and with XLA's own in their place, and prints
FLOPs, traffic and memory by the compiled text. Nothing is executed, so there are no seconds.

experts    4 layers of Qwen3-30B-A3B from themselves, 8 x 1,024 tokens
attention  Qwen3-1.7B from 8B, 8 x 4,096 tokens, one sequence a row
packed     the same, several sequences a row

FLOPs are those of matrix products and of kernels; what cuDNN multiplies is not in the text.
"""

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import base
from distill.planning import aot, fit, programs
from distill.runtime import cli
from distill.runtime import mesh as mesh_lib
from models import families
from models.layers import grouped

OPTIONS = flags.FlagValues()
TOPOLOGY = flags.DEFINE_string("topology", "h100:1", "One device: h100:1, v5e:1x1.", OPTIONS)
# Student, teacher, tokens of a row, layers (None: all), what XLA's own replaces.
CASES: dict[str, tuple[str, str, int, int | None, str]] = {
    "experts": ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", 1024, 4, "experts"),
    "attention": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", 4096, None, "attention"),
    "packed": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", 4096, None, "attention"),
}
ONLY = flags.DEFINE_multi_enum("only", list(CASES), list(CASES), "Cases.", flag_values=OPTIONS)
LAYERS = flags.DEFINE_integer("layers", None, "Layers of both models.", 1, flag_values=OPTIONS)
ROWS = flags.DEFINE_integer("rows", 8, "Rows of a batch.", 1, flag_values=OPTIONS)
GIB = 2**30


def make_config(case: str, kernels: str) -> ConfigDict:
    """Returns the config of a case's run; `kernels` is "chosen" or "xla"."""
    student, teacher, tokens, _, replaced = CASES[case]
    c = base.get_config()
    c.student.path, c.teacher.path = student, teacher
    c.opd.batch_size = ROWS.value
    c.opd.max_prompt_tokens, c.opd.max_response_tokens = tokens // 4, tokens - tokens // 4
    if case == "packed":
        c.opd.pack_tokens = tokens
    if kernels == "xla" and replaced == "attention":
        c.attention = "xla"
    return c


def compile_case(case: str, kernels: str) -> list[aot.Program]:
    """Compiles the scoring and the update of a case."""
    c, layers = make_config(case, kernels), LAYERS.value or CASES[case][3]
    mesh, teacher_mesh = mesh_lib.make_meshes(c, aot.get_devices(TOPOLOGY.value))
    find_released, hbm_gib = families.find_released, aot.get_chip(TOPOLOGY.value).hbm_gib

    def find_cut(name: str) -> Any:
        config: Any = find_released(name)
        return dataclasses.replace(config, num_hidden_layers=layers) if layers else config

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(families, "find_released", find_cut))
        if kernels == "xla" and CASES[case][4] == "experts":
            none = mock.patch.object(grouped, "_make_gpu_product", lambda *_: {})
            stack.enter_context(none)
        stage = fit.describe_stage(c, "opd", mesh, teacher_mesh)
        stack.enter_context(aot.use_devices(mesh))
        calls = programs.list_stage_calls(stage)
        return [
            aot.compile_program(call.name, call.lower, hbm_gib)
            for call in calls
            if call.name in ("score", "accumulate")
        ]


def main() -> None:
    print(f"jax {jax.__version__}, {TOPOLOGY.value}, {ROWS.value} rows\n")
    print("| | kernels | TFLOP | GB of HBM | temporary GiB | peak GiB | compiled in s |")
    print("|---|---|---|---|---|---|---|")
    for case in ONLY.value:
        for kernels in ("chosen", "xla"):
            for p in compile_case(case, kernels):
                name = {"score": "score", "accumulate": "update"}[p.name]
                print(
                    f"| {case}, {name} | {kernels} | {(p.flops or 0) / 1e12:.1f} "
                    f"| {(p.hbm_bytes or 0) / 1e9:.0f} | {p.temporary_bytes / GIB:.2f} "
                    f"| {p.peak_bytes / GIB:.2f} | {p.compile_seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)  # for devices that are not here
    cli.run(main, OPTIONS)
