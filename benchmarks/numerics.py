"""python -m benchmarks.numerics [--model=DIR]: rounding errors on this machine's device.

Compares log-probabilities of 16 sampled responses with those in float32 on a CPU: in float32 with
the project's precision (no TF32), in float32 with the device's default (TF32 on a GPU), and in
bfloat16. Then compares the sampler's log-probabilities with the scorer's in both dtypes. Last,
compares two runs of the tiny quick start with --config.deterministic, which should be identical.

On a GPU the CPU must be visible too: JAX_PLATFORMS unset, or cuda,cpu.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from distill import rollout
from distill.policy import policy
from distill.rollout import RolloutOptions, Sequence
from distill.rollout.sampling import Sampling
from distill.runtime import cli
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import microbatches

ROOT = Path(__file__).parent.parent
ROWS, PROMPT, RESPONSE = 16, 16, 48

OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string("model", "assets/student", "Model directory.", flag_values=OPTIONS)


def load_policy(path: str, dtype: str, device: Any) -> policy.Policy:
    mesh = mesh_lib.make_mesh(1, 1, 1, devices=[device])
    with mesh_lib.use_mesh(mesh):
        return policy.load(policy.make_abstract_for_inference(path, dtype, mesh), dtype)


def sample_responses(subject: policy.Policy) -> list[Sequence]:
    """Samples responses to random prompts; the seeds are fixed."""
    rng, rows = np.random.default_rng(0), []
    keys = rollout.make_row_keys(jax.random.key(0), list(range(ROWS)), [0] * ROWS)
    for key in keys:
        prompt = rng.integers(0, subject.config.vocab_size, PROMPT).tolist()
        rows.append(Sequence(prompt, key, RESPONSE))
    options = RolloutOptions(ROWS, PROMPT + RESPONSE)
    with policy.use(subject):
        model = rollout.SamplingModel(subject.model, subject.params, subject.stop_ids)
        return list(rollout.sample(model, rows, sampling=Sampling(), options=options))


def compute_logprobs(
    subject: policy.Policy, rows: list[Sequence], precision: str | None = None
) -> np.ndarray:
    """Returns log-probabilities [tokens] of the responses; `precision` overrides the project's."""
    with policy.use(subject), jax.default_matmul_precision(precision or "highest"):
        batch = microbatches.make_unpacked_batch(rows, ROWS, PROMPT + RESPONSE)
        device_batch = jax.device_put(batch, mesh_lib.make_row_sharding(policy.get_mesh(subject)))
        return np.asarray(local.compute_logp(subject, device_batch, 128.0))[
            np.asarray(batch.mask_BT)
        ]


def describe_distance(values: np.ndarray, expected: np.ndarray) -> str:
    gap = np.abs(values.astype(np.float64) - expected)
    return f"mean {gap.mean():.2e}, largest {gap.max():.2e} nats"


def compare_repeats() -> str:
    """Runs two steps twice, each time in a new process, and says which metrics differ."""
    figures = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as run:
            command = [sys.executable, "-m", "distill.train", "--config=configs/quickstart.py:tiny"]
            arguments = [f"--workdir={run}", "--config.deterministic=true"]
            done = subprocess.run(
                [*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ
            )
            if done.returncode:
                return f"the run failed: {(done.stderr or done.stdout).splitlines()[-1]}"
            rows = [json.loads(x) for x in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        parts = ("train/", "rollout/mean_length")
        figures.append([{k: v for k, v in row.items() if k.startswith(parts)} for row in rows])
    assert any(figures[0])
    different = {k for a, b in zip(*figures, strict=True) for k in a if a[k] != b.get(k)}
    count = sum(map(len, figures[0]))
    return f"{count} figures, all the same" if not different else f"differ: {sorted(different)}"


def compare_precisions(path: str) -> dict[str, str]:
    """Returns what was compared -> how far apart it is, in words."""
    device = jax.devices()[0]
    float32 = load_policy(path, "float32", device)
    rows = sample_responses(float32)
    exact = compute_logprobs(load_policy(path, "float32", jax.devices("cpu")[0]), rows)
    bfloat16 = load_policy(path, "bfloat16", device)
    cases = {
        "float32 from float32 on a CPU": (float32, None),
        "float32, the device's default": (float32, "default"),
        "bfloat16 from float32 on a CPU": (bfloat16, "default"),
    }
    distances = {
        name: describe_distance(compute_logprobs(subject, rows, precision), exact)
        for name, (subject, precision) in cases.items()
    }
    for subject in (float32, bfloat16):
        own = sample_responses(subject)
        scored = compute_logprobs(subject, own, "highest" if subject is float32 else "default")
        drawn = np.concatenate([row.logprobs for row in own])
        name = f"sampler from scorer, {np.dtype(subject.model.dtype)}"
        distances[name] = describe_distance(drawn, scored)
    return {
        "on": f"{device.device_kind}, {path}, {len(exact)} sampled tokens",
        **distances,
        "two runs, --config.deterministic": compare_repeats(),
    }


def main() -> None:
    for name, result in compare_precisions(MODEL.value).items():
        print(f"{name}: {result}")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
