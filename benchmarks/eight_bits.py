"""python -m benchmarks.eight_bits: speed of scoring and decoding by the dtype of the weights.

A random model of Qwen3-0.6B widths and few layers scores rows (like a teacher) and decodes rows
(like a sampler) with weights in float32, bfloat16, int8 and fp8, which take turns: A B C D A B C D.
Prints medians, and their ratios to the first dtype for the same dtype of activations.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from distill import rollout
from distill.batch import Batch
from distill.policy import policy
from distill.runtime import cli
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from models import families
from models.layers import quantised
from models.qwen3.config import SIZES

OPTIONS = flags.FlagValues()
LAYERS = flags.DEFINE_integer("layers", 4, "Layers of the model.", flag_values=OPTIONS)
ROUNDS = flags.DEFINE_integer(
    "rounds", 7, "Measured rounds, after one to warm up.", flag_values=OPTIONS
)
SCORED = flags.DEFINE_list("scored", ["8", "64"], "Rows, and tokens per row.", flag_values=OPTIONS)
DECODED = flags.DEFINE_list(
    "decoded", ["4", "32"], "Rows, and new tokens per row.", flag_values=OPTIONS
)

PARAM_DTYPES = {
    "float32": ("float32", "bfloat16", "int8", "float8_e4m3fn"),
    "bfloat16": ("bfloat16", "int8", "float8_e4m3fn"),
}


def make_cases(dtype: str) -> dict[tuple[str, str], Callable[[], int]]:
    """Returns (task, dtype of parameters) -> a function that runs it and counts its tokens."""
    config = dataclasses.replace(SIZES["0.6b"], num_hidden_layers=LAYERS.value, vocab_size=4096)
    shapes = mesh_lib.make_abstract_params(config, mesh_lib.make_mesh(1, 1, 1))
    network = families.make_model(config, dtype=jnp.dtype(dtype))
    plain = policy.init_random_policy(
        policy.Policy("random", config, network, shapes, None, ()), jax.random.key(0)
    )
    rows, length = map(int, SCORED.value)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    positions_BT = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ones_BT = np.ones_like(tokens_BT)
    arrays: Any = map(jnp.asarray, (tokens_BT, positions_BT, ones_BT, ones_BT > 0))
    batch = Batch(*arrays)
    cases = {}
    for param_dtype in PARAM_DTYPES[dtype]:
        kernel_dtype, other_dtype = quantised.split_dtypes(param_dtype, jnp.dtype(dtype))
        quantise = jax.jit(quantised.quantise_params, static_argnums=(1, 2))
        params = quantise(plain.params, kernel_dtype, other_dtype)
        subject = dataclasses.replace(plain, params=params)

        def score(subject: policy.Policy = subject) -> int:
            hidden_BTD = local.compute_hidden(subject.model, subject.params, None, batch, None)
            jax.block_until_ready(hidden_BTD)
            return tokens_BT.size

        def decode(param_dtype: str = param_dtype) -> int:
            rows, new = map(int, DECODED.value)
            sequences = [rollout.Sequence([1, 2, 3 + i], (0, i), new) for i in range(rows)]
            options = rollout.RolloutOptions(rows, param_dtype=param_dtype)
            sampling = rollout.Sampling()
            with policy.use(plain):
                done = rollout.sample(
                    rollout.SamplingModel(network, plain.params, ()),
                    sequences,
                    sampling=sampling,
                    options=options,
                )
                return sum(len(row.tokens) for row in done)

        cases |= {("score", param_dtype): score, ("decode", param_dtype): decode}
    return cases


def main() -> None:
    print(
        "| activations | what | weights | tokens/s | quartiles | ratio |\n|---|---|---|---|---|---|"
    )
    for dtype, param_dtypes in PARAM_DTYPES.items():
        cases = make_cases(dtype)
        seconds: dict[tuple[str, str], list[float]] = {name: [] for name in cases}
        tokens = {name: cases[name]() for name in cases}
        for _ in range(ROUNDS.value):
            for name, run_case in cases.items():
                start = time.perf_counter()
                run_case()
                seconds[name].append(time.perf_counter() - start)
        for task in ("score", "decode"):
            first = param_dtypes[0]
            first_rate = tokens[task, first] / statistics.median(seconds[task, first])
            for name in param_dtypes:
                rates = sorted(tokens[task, name] / x for x in seconds[task, name])
                low, middle, high = statistics.quantiles(rates, n=4)
                spread = f"{low:.0f} to {high:.0f}"
                ratio = f"{middle / first_rate:.2f}"
                print(
                    f"| {dtype} | {task} | {name} | {middle:.0f} | {spread} | {ratio} |", flush=True
                )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
