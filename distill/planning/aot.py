"""Compiles programs ahead of time for devices that need not exist, and reads their costs.

The compilers of libtpu and of JAX's CUDA plugin run on machines without a TPU or a GPU, so a
program's memory, matrix products and collectives are known before a device is rented. A number that
the compiler does not give is None, never a guess.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from distill.planning import gpus, hlo
from distill.runtime import mesh as mesh_lib
from distill.runtime.gpu import GPU_PLUGINS
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device: a TPU generation's (cloud.google.com/tpu/docs/system-architecture-tpu-vm), or
    a GPU (distill/planning/gpus.py).

    GB are 10^9 bytes, GiB 2^30.
    """

    hbm_gib: float  # available to a program, according to libtpu's compiler, or JAX's pool
    bf16_tflops: float
    hbm_gbs: float  # GB/s
    ici_gbs: float  # GB/s that a device can receive from all its neighbours together
    accelerator_type: str = ""  # libtpu's name for a host of this generation


CHIPS = {
    "v4": Chip(15.25, 137.5, 614.0, 75.0, "v4-8"),  # a device is one of the chip's two cores
    "v5e": Chip(15.75, 197.0, 819.0, 100.0, "v5litepod-4"),
    "v5p": Chip(95.73, 459.0, 2765.0, 300.0, "v5p-8"),
    "v6e": Chip(31.24, 918.0, 1640.0, 224.0, "v6e-4"),
}


def get_chip(topology: str) -> Chip:
    """Returns the chip of a slice such as v5e:8x8, or of a host of GPUs such as h100:8.

    Raises:
      UserError: if neither CHIPS nor GPUS has it, or the name has no shape.
    """
    generation, _, shape = topology.partition(":")
    if gpu := gpus.GPUS.get(generation):
        if not shape.isdecimal() or not 1 <= int(shape) <= gpus.LARGEST_HOST:
            raise UserError(
                f"--topology={topology}: name the GPUs of one host, {generation}:1 to "
                f"{generation}:{gpus.LARGEST_HOST}"
            )
        return Chip(gpu.pool_gib, gpu.bf16_tflops, gpu.memory_gbs, gpu.link_gbs)
    if generation in ("v7x", "tpu7x"):
        raise UserError(f"--topology={topology}: TPU7x is not served; take v6e or v5p")
    if generation not in CHIPS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", topology):
        raise UserError(
            f"--topology={topology}: name one of {', '.join(CHIPS)} and its shape, such as "
            f"v5e:8x8, or one of {', '.join(gpus.GPUS)} and a number, such as h100:8"
        )
    return CHIPS[generation]


def get_devices(topology: str) -> list[Any]:
    """Returns the devices of a slice or of a host of GPUs, which need not exist, in the order of
    their coordinates.

    Raises:
      UserError: if there is no such slice, or its compiler is not installed.
    """
    chip = get_chip(topology)
    if gpu := gpus.GPUS.get(topology.partition(":")[0]):
        return _get_gpus(topology, gpu)
    os.environ |= {  # keep libtpu from querying the metadata server, and from logging
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": chip.accelerator_type,
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # the plugin raises many types, with messages of several lines
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if any(words in reason for words in ("libtpu", "No module", "not installed")):
            raise UserError(
                f"--topology={topology}: planning for a TPU needs its compiler, also without the "
                f"device: pip install libtpu ({reason})"
            ) from None
        raise UserError(f"--topology={topology}: no such slice ({reason})") from None
    return list(description.devices)


def _get_gpus(topology: str, gpu: gpus.Gpu) -> list[Any]:
    if not any(importlib.util.find_spec(name) for name in GPU_PLUGINS):
        version = importlib.metadata.version("jax")
        raise UserError(
            f"--topology={topology}: planning for a GPU needs NVIDIA's compiler, also without the "
            f"device: pip install 'jax-cuda12-plugin[with-cuda]=={version}' (3 GB)"
        )
    shape = f"1x1x{topology.partition(':')[2]}"  # slices x hosts x GPUs
    try:
        description = topologies.get_topology_desc(
            topology, "cuda", target_config=gpu.describe_target(), topology=shape
        )
    except Exception as error:  # the plugin raises many types, with messages of several lines
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--topology={topology}: the CUDA plugin of JAX cannot compile without a GPU ({reason})"
        ) from None
    return list(description.devices)


@contextlib.contextmanager
def use_devices(mesh: Mesh) -> Iterator[None]:
    """Context in which programs are lowered for `mesh`, whose devices need not exist.

    A GPU is JAX's default device there, because kernels are chosen by its compute capability.
    """
    device = mesh.devices.flat[0]
    default = jax.default_device(device if device.platform == "gpu" else None)
    with mesh_lib.use_mesh(mesh), jax.default_matmul_precision(None), default:
        yield


@dataclasses.dataclass(frozen=True)
class Program:
    """The cost of one call of a compiled program on one device.

    A loop whose length is known only at run time counts as one iteration; `open_loops` is the
    number of such loops. Costs that are parsed from the compiled text are None if there is no text.
    """

    name: str
    compile_seconds: float
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int  # of outputs that reuse arguments
    temporary_bytes: int
    code_bytes: int
    peak_bytes: int
    flops: float | None  # of matrix products
    attention_flops: float | None  # the part of `flops` in kernels for attention over whole rows
    hbm_bytes: int | None  # moved to and from HBM
    hbm_bytes_outside_loops: int | None  # the part of `hbm_bytes` outside open loops
    collectives: dict[str, tuple[int, int]] | None  # kind -> (number, bytes received)
    open_loops: int


def compile_program(name: str, lower: Callable[[], Any], hbm_gib: float) -> Program:
    """Compiles the program that `lower()` lowers for devices of `hbm_gib` GiB.

    Raises:
      OutOfMemory: if the program does not fit.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        try:
            compiled = lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "CompileTimeHbmOom" not in str(error):
                raise
            raise OutOfMemory(name, str(error), hbm_gib) from None
        compile_seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
        text = _read_hlo_text(compiled, Path(dump))
    costs = hlo.parse_costs(text) if text else None
    return Program(
        name=name,
        compile_seconds=compile_seconds,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        flops=costs.flops if costs else None,
        attention_flops=costs.attention_flops if costs else None,
        hbm_bytes=costs.hbm_bytes if costs else None,
        hbm_bytes_outside_loops=costs.hbm_bytes_outside_loops if costs else None,
        collectives=costs.collectives if costs else None,
        open_loops=costs.open_loops if costs else 0,
    )


def _read_hlo_text(compiled: Any, dump: Path) -> str | None:
    """Returns the text of a program, or None if it cannot be read.

    libtpu writes the text into `dump`. jaxlib 0.10 cannot print programs for v5p and v6e: it does
    not know the operands of their async-update. jax 0.12 can, and has libtpu write the elements of
    tuples as %x#3, of which planning.hlo would take the whole tuple.
    """
    written = list(dump.glob("*.after_codegen.txt"))
    if len(written) == 1 and not re.search(r"%[\w.\-]+#\d", text := written[0].read_text()):
        return text
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


class OutOfMemory(Exception):
    """Raised if a program is larger than the device's memory; `message` is the compiler's."""

    def __init__(self, name: str, message: str, hbm_gib: float) -> None:
        match = re.search(
            r"Used ([0-9.]+)G of|required for HLO temporaries \(([0-9.]+)G\)", message
        )
        self.program = name
        self.needs_gib = float(next(g for g in match.groups() if g)) if match else math.nan
        self.largest = re.findall(r"Size: ([0-9.]+[KMG])\n.*?Shape: (\S+)", message, re.DOTALL)[:5]
        if match and match.group(2):  # this message gives only the total
            self.largest = [(f"{self.needs_gib:.2f}G", "temporaries and results of the program")]
        super().__init__(f"{name} needs {self.needs_gib:.2f} GiB of {hbm_gib:.2f}")
