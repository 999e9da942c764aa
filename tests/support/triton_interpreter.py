"""Prints the largest error of tokamax's Triton kernels for grouped rows, interpreted on a CPU.

    TRITON_INTERPRET=1 python tests/support/triton_interpreter.py '[[rows, in, out, [sizes]], ...]'

Compares product, gradient of the rows and gradient of the kernels, through models.layers.grouped,
with a loop over groups. Rows after the last group are not a number.
"""

import json
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton  # pyright: ignore[reportMissingImports]
import numpy as np

from models.layers import grouped

TRITON_NAMES = {"float32": "fp32", "int32": "i32"}


class HostTensor:
    """As much of torch.Tensor as Triton's interpreter reads: memory of a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype = array, TRITON_NAMES[array.dtype.name]
        self.data_ptr = self.storage_offset = lambda: array.ctypes.data
        self.cpu = self.untyped_storage = lambda: self
        self.size, self.stride = (lambda: array.shape), (lambda: None)
        self.copy_ = self.set_ = lambda *_: None
        self.new_empty = lambda *_, **__: self


def interpret_kernel(
    *args: Any, kernel: Any, out_type: Any, grid: Any, num_warps: int, num_stages: int, **meta: Any
) -> jax.Array:
    """Stands in for jax_triton.triton_call; memory that the kernel does not write is NaN."""
    meta.pop("name")

    def run(*arrays: Any) -> np.ndarray:
        out, host = np.full(out_type.shape, np.nan, out_type.dtype), iter(arrays)
        tensors = [x if x is None else HostTensor(np.array(next(host))) for x in args]
        kernel[grid](*tensors, HostTensor(out), **meta)
        return out

    return jax.pure_callback(run, out_type, *(x for x in args if x is not None))


def find_largest_error(M: int, D: int, F: int, sizes: list[int]) -> float:
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(M, D)), rng.normal(size=(M, F))
    kernel, end = rng.normal(size=(len(sizes), D, F)), sum(sizes)
    x[end:] = dy[end:] = np.nan
    x, dy, kernel = (a.astype(np.float32) for a in (x, dy, kernel))
    product = jax.jit(lambda x, kernel: grouped.dot(x, kernel, jnp.array(sizes)))
    y, transpose = jax.vjp(product, x, kernel)
    dx, dkernel = transpose(dy)
    errors, stop = [0.0], 0
    for e, size in enumerate(sizes):
        rows = slice(stop, stop := stop + size)
        errors += np.abs(y[rows] - x[rows] @ kernel[e]).ravel().tolist()
        errors += np.abs(dx[rows] - dy[rows] @ kernel[e].T).ravel().tolist()
        errors += np.abs(dkernel[e] - x[rows].T @ dy[rows]).ravel().tolist()
    return float(np.max(errors))  # NaN if any is


def main() -> None:
    device = types.SimpleNamespace(platform="gpu", device_kind="", compute_capability="9.0")
    grouped.backend.get_default_device = lambda: device
    jax.lax.platform_dependent = lambda *args, cuda, **_: cuda(*args)
    jax_triton.triton_call = interpret_kernel
    jax.config.update("jax_default_matmul_precision", "float32")
    print(max(find_largest_error(*case) for case in json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
