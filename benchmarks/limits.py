"""python -m benchmarks.limits: measures bandwidth and FLOP/s of this project's devices.

Answers a job like a contender (benchmarks/contest.py); tables show rates relative to these limits.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import workers

GIB = 2**30


def measure_limits(job: workers.Job) -> workers.Answer:
    """Measures all devices together: bytes/s of a memory read and of a copy in place (read +
    written), and FLOP/s of a large matrix product by dtype. Names the devices too."""
    del job  # there is only one
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.device_put(jnp.ones((4096, GIB // 4 // 4096)), split)
    v = jax.device_put(jnp.ones(GIB // 4 // 4096), whole)
    read = jax.jit(lambda x, v: x @ v)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    limits: dict[str, Any] = {"devices": f"{len(devices)} x {devices[0].device_kind}"}
    limits["read"] = GIB / _measure_best(read, x, v)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        x = jax.block_until_ready(copy(x))
        times.append(time.perf_counter() - start)
    limits["copy"] = 2 * GIB / min(times[1:])
    n = 2048 if devices[0].platform == "cpu" else 8192
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    for dtype in ("float32", "bfloat16"):
        a_NN = jax.device_put(jnp.ones((len(devices) * n, n), dtype), split)
        b_NN = jax.device_put(jnp.ones((n, n), dtype), whole)
        with jax.default_matmul_precision("highest" if dtype == "float32" else None):
            limits[dtype] = 2 * len(devices) * n**3 / _measure_best(product, a_NN, b_NN)
    return limits


def _measure_best(compute: Any, *args: jax.Array) -> float:
    """Returns the least seconds of several calls, not counting the first, which compiles."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(compute(*args))
        times.append(time.perf_counter() - start)
    return min(times[1:])


if __name__ == "__main__":
    workers.serve_jobs(lambda: measure_limits)
