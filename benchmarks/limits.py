"""python -m benchmarks.limits: measures bandwidth and FLOP/s of this project's devices.

Answers a job like a contender (benchmarks/contest.py); tables show rates relative to these limits.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import workers

GIB = 2**30
ROUNDS, CALLS = 5, 4  # measured rounds, and calls that follow one another in each


def measure_limits(job: workers.Job) -> workers.Answer:
    """Measures all devices together: bytes/s of a memory read and of a copy in place (read +
    written), and FLOP/s of a large matrix product by dtype. Names the devices too.

    Values are random: processors are faster on zeros and ones. A GPU copies 8 GiB, beside which its
    cache and the start of a program are small.
    """
    del job  # there is only one
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    is_gpu = devices[0].platform in ("gpu", "cuda")
    rows, width = (16384 if is_gpu else 4096), (131072 if is_gpu else 65536)
    size = 4 * rows * width

    def draw(shape: tuple[int, ...], dtype: str, sharding: Any) -> jax.Array:
        draw_array = functools.partial(jax.random.uniform, shape=shape, dtype=dtype)
        return jax.jit(draw_array, out_shardings=sharding)(jax.random.key(0))

    x, v = draw((rows, width), "float32", split), draw((width,), "float32", whole)
    limits: dict[str, Any] = {"devices": f"{len(devices)} x {devices[0].device_kind}"}
    limits["read"] = size / _measure_best(_repeat(jax.jit(jnp.matmul), x, v))
    limits["copy"] = 2 * size / _measure_best(_repeat_copy(x))
    del x
    n = 8192 if is_gpu else 2048
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    for dtype in ("float32", "bfloat16"):
        a_NN = draw((len(devices) * n, n), dtype, split)
        b_NN = draw((n, n), dtype, whole)
        with jax.default_matmul_precision("highest" if dtype == "float32" else None):
            seconds = _measure_best(_repeat(product, a_NN, b_NN))
        limits[dtype] = 2 * len(devices) * n**3 / seconds
    return limits


def _measure_best(run_calls: Callable[[], Any]) -> float:
    """Returns the least seconds of a call over several rounds of CALLS, after one that compiles.

    A round's calls are queued together, so that the device does not wait for the host.
    """
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run_calls())
        times.append((time.perf_counter() - start) / CALLS)
    return min(times[1:])


def _repeat(compute: Callable[..., jax.Array], *args: jax.Array) -> Callable[[], Any]:
    """Returns a round of calls with the same arguments."""
    return lambda: [compute(*args) for _ in range(CALLS)]


def _repeat_copy(x: jax.Array) -> Callable[[], Any]:
    """Returns a round of copies in place, each of the one before it."""
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run_round() -> jax.Array:
        nonlocal x
        for _ in range(CALLS):
            x = copy(x)
        return x

    return run_round


if __name__ == "__main__":
    workers.serve_jobs(lambda: measure_limits)
