"""python -m benchmarks.numerics [--model=DIR]: what rounding does on this machine's device.

Of 16 sampled responses, against the same log-probabilities in float32 on a CPU: in float32 as the
project computes it (no TF32), in float32 as the device does by default (TF32, on a GPU), and in
bfloat16. Then how far the sampler's own log-probabilities are from the scorer's, in both dtypes.
Then whether two runs of the tiny quick start are the same bits, with --config.deterministic.

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
from distill.rollout import Options, Sequence
from distill.rollout.sampling import Sampling
from distill.runtime import cli
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import microbatches

ROOT = Path(__file__).parent.parent
ROWS, PROMPT, RESPONSE = 16, 16, 48

OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string("model", "assets/student", "Model directory.", flag_values=OPTIONS)


def load(dtype: str, device: Any) -> policy.Policy:
    mesh = mesh_lib.make(1, 1, 1, devices=[device])
    with mesh_lib.use(mesh):
        return policy.load(policy.reader(MODEL.value, dtype, mesh), dtype)


def sample(subject: policy.Policy) -> list[Sequence]:
    """Random prompts and what the model says to them, the same ones for the same numbers."""
    rng, rows = np.random.default_rng(0), []
    keys = rollout.row_keys(jax.random.key(0), list(range(ROWS)), [0] * ROWS)
    for key in keys:
        prompt = rng.integers(0, subject.config.vocab_size, PROMPT).tolist()
        rows.append(Sequence(prompt, key, RESPONSE))
    options = Options(ROWS, PROMPT + RESPONSE)
    with policy.use(subject):
        given = {"sampling": Sampling(), "stop_ids": subject.stop_ids, "options": options}
        return list(rollout.sample(subject.model, subject.params, rows, **given))


def scored(
    subject: policy.Policy, rows: list[Sequence], precision: str | None = None
) -> np.ndarray:
    """[tokens] log-probabilities of the responses; `precision` in place of the project's."""
    with policy.use(subject), jax.default_matmul_precision(precision or "highest"):
        batch = microbatches.unpacked(rows, ROWS, PROMPT + RESPONSE)
        put = jax.device_put(batch, mesh_lib.rows(policy.mesh_of(subject)))
        return np.asarray(local.logp(subject, put, 128.0))[np.asarray(batch.mask_BT)]


def distance(of: np.ndarray, by: np.ndarray) -> str:
    gap = np.abs(of.astype(np.float64) - by)
    return f"mean {gap.mean():.2e}, largest {gap.max():.2e} nats"


def repeated() -> str:
    """Two runs of two steps, in processes of their own: which of their figures differ."""
    found = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as run:
            command = [sys.executable, "-m", "distill.train", "--config=configs/quickstart.py:tiny"]
            flags_ = [f"--workdir={run}", "--config.deterministic=true"]
            done = subprocess.run(
                [*command, *flags_], cwd=ROOT, capture_output=True, text=True, env=os.environ
            )
            if done.returncode:
                return f"the run failed: {(done.stderr or done.stdout).splitlines()[-1]}"
            rows = [json.loads(x) for x in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        parts = ("train/", "rollout/mean_length")
        found.append([{k: v for k, v in row.items() if k.startswith(parts)} for row in rows])
    assert any(found[0])
    different = {k for a, b in zip(*found, strict=True) for k in a if a[k] != b.get(k)}
    count = sum(map(len, found[0]))
    return f"{count} figures, all the same" if not different else f"differ: {sorted(different)}"


def main() -> None:
    device = jax.devices()[0]
    wide = load("float32", device)
    rows = sample(wide)
    exact = scored(load("float32", jax.devices("cpu")[0]), rows)
    print(f"{device.device_kind}, {MODEL.value}: {len(exact)} sampled tokens")
    print("float32 from float32 on a CPU:", distance(scored(wide, rows), exact))
    print("float32, the device's default:", distance(scored(wide, rows, "default"), exact))
    narrow = load("bfloat16", device)
    print("bfloat16 from float32 on a CPU:", distance(scored(narrow, rows, "default"), exact))
    for subject in (wide, narrow):
        own = sample(subject)
        by = scored(subject, own, "highest" if subject is wide else "default")
        drawn = np.concatenate([row.logprobs for row in own])
        print(f"sampler from scorer, {np.dtype(subject.model.dtype)}:", distance(drawn, by))
    print("two runs, --config.deterministic:", repeated())


if __name__ == "__main__":
    cli.run(main, OPTIONS)
