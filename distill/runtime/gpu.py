"""XLA's flags for NVIDIA GPUs, in one place, before JAX has looked for devices.

A flag that XLA_FLAGS already holds stays as it is. TPUs take theirs from LIBTPU_INIT_ARGS.
"""

import importlib.util
import os

# A collective runs behind whatever does not wait for it: weights of the next layer are fetched
# while this one computes. One GPU has no collectives, and loses nothing.
DEFAULT_FLAGS = {"xla_gpu_enable_latency_hiding_scheduler": "true"}

# The same program, run again, gives the same bits: no atomic additions (of scattered gradients,
# say), and no autotuning, which may choose another kernel in the next process. Slower.
DETERMINISTIC_FLAGS = {"xla_gpu_deterministic_ops": "true"}

# Left as XLA has them: matrix products are tuned between cuBLAS and Triton
# (xla_gpu_enable_triton_gemm; xla_gpu_triton_gemm_any would take Triton wherever it can), and
# programs are launched as CUDA graphs (xla_gpu_enable_command_buffer), which is what keeps a
# decoding step of many small kernels from waiting for the host.

GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # of requirements-gpu.txt


def is_gpu_expected() -> bool:
    """True if JAX will look for a GPU: a plugin is installed, and JAX_PLATFORMS allows it."""
    platforms = os.environ.get("JAX_PLATFORMS", "").split(",")
    wanted = platforms == [""] or {"cuda", "gpu"} & set(platforms)
    return bool(wanted) and any(importlib.util.find_spec(name) for name in GPU_PLUGINS)


def set_xla_flags(deterministic: bool = False) -> None:
    """Adds to XLA_FLAGS where a GPU is expected; has no effect once a device has been used."""
    if not is_gpu_expected():
        return
    xla_flags = os.environ.get("XLA_FLAGS", "").split()
    named = {flag.lstrip("-").partition("=")[0] for flag in xla_flags}
    wanted = DEFAULT_FLAGS | (DETERMINISTIC_FLAGS if deterministic else {})
    xla_flags += [f"--{name}={value}" for name, value in wanted.items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join(xla_flags)
