"""python -m benchmarks.fingerprints --out=FILE.json [--devices=8] [--only=NAME,...]: run checksums.

Trains the tiny variant of every recipe, and the tiny quick start with every objective and every
option that changes the path through a step: a LoRA, experts, two teachers, a context, partial and
asynchronous rollouts. Writes SHA-256 checksums of each run's exported weights, of its metrics
without times, and of the tokens in its transcripts. On one machine with the same packages, two
revisions that compute the same have the same checksums: a refactoring must not change any.
"""

import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from distill.runtime import cli

OPTIONS = flags.FlagValues()
OUT = flags.DEFINE_string("out", None, "JSON file for the checksums.", OPTIONS, required=True)
DEVICES = flags.DEFINE_integer(
    "devices", 1, "CPU devices; 8 form a mesh of fsdp=4, tensor=2.", 1, 8, OPTIONS
)
ONLY = flags.DEFINE_list("only", [], "Names of runs; default: all.", OPTIONS)

RECIPES = (
    *("quickstart:tiny", "colab:tiny", "one_prompt:tiny", "recall:tiny"),
    *("manual:sft,tiny", "manual:opd,tiny", "opd_math:tiny", "opd_math:lora=32,tiny"),
    "strong_to_weak:student=8b,teacher=32b,tiny",
    *("tiny_student:tiny", "tiny_teacher:tiny"),
)
STORED = {"data.source": "assets/rows/traces_no_think.jsonl", "max_prompt_tokens": 128}
REWARD = {"samples": 4, "reward.correct": 0.0, "reward.format": 1.0, "reward.length": 1.0}
REWARD |= {"reward.length_margin": 8, "max_response_tokens": 16}
# Name -> changes to the tiny quick start: keys of its stage `opd`, or of the whole config if they
# begin with a dot.
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"objective": kind} for kind in ("opd", "opd_sampled")},
    **{kind: {"objective": kind, **STORED} for kind in ("sft", "distill", "gkd")},
    **{
        kind: {"objective": kind, **REWARD}
        for kind in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "hybrid")
    },
    "packed traces": {"objective": "sft", **STORED, "pack_tokens": 256},
    "several updates": {"objective": "grpo", **REWARD, "minibatches": 2, "epochs": 2},
    "accumulation": {"accumulate": 4},
    "reference": {"objective": "grpo", **REWARD, "loss.reference": 0.1},
    "top k": {"loss.estimator": "topk", "loss.k": 8},
    "warm": {"objective": "opd_sampled", "sampling.temperature": 0.7, "sampling.top_p": 0.9},
    "judge": {"objective": "grpo", **REWARD, "reward.teacher_logprob": 1.0},
    "replaced groups": {"objective": "grpo", **REWARD, "reward.zero_variance_groups": "replace"},
    "LoRA": {".student.lora.rank": 4},
    "moving average": {".student.ema_decay": 0.9},
    "own past as the teacher": {".student.ema_decay": 0.9, ".teacher.path": "ema"},
    "int8 teacher": {".teacher.param_dtype": "int8"},
    "context": {"context.text": "assets/rows/manual.md", "context.max_tokens": 48},
    "two teachers": {"teachers": ("teacher", "original"), "teacher_weights": (1.0, 3.0)},
    "partial rollouts": {"rollout.token_budget": 64, "rollout.segment": 8},
    "asynchronous rollouts": {"rollout.asynchronous": True},
    "evaluation": {".eval.every": 1, ".eval.limit": 8, ".eval.max_new_tokens": 16},
    "experts": {".student.path": "EXPERTS", ".student.random_init": True},
    "recorded experts": {
        ".student.path": "EXPERTS",
        ".student.random_init": True,
        ".student.replay_routing": True,
    },
}
# Metrics renamed since the checksums in benchmarks/results/ were made: current -> former name.
FORMER_NAMES = {
    "reward/zero_variance_groups": "reward/constant_groups",
    "reward/teacher_logprob": "reward/judge",
    "reward/teacher_logprob_std": "reward/judge_std",
}
# Metrics added since then.
ADDED_NAMES = ("train/skipped_updates", "rollout/failed")
MESH = {1: {}, 8: {"fsdp": 4, "tensor": 2}}


def make_config(name: str, experts: Path) -> Any:
    """Returns the config of a run, on the mesh for --devices."""
    from configs import base, conditions  # only after JAX_NUM_CPU_DEVICES is set

    if name.startswith("conditions:"):
        assert name.removeprefix("conditions:").partition(",")[0] in conditions.CONDITIONS
    file, _, argument = name.partition(":") if name not in VARIANTS else ("quickstart", "", "tiny")
    c = importlib.import_module(f"configs.{file}").get_config(argument)
    changes = VARIANTS.get(name, {})
    if "teachers" in changes:
        c.original = base.make_teacher()
        c.original.path, c.original.param_dtype = "assets/student", "float32"
        c.original.dtype = "float32"
    overrides = {key[1:] if key[0] == "." else f"opd.{key}": x for key, x in changes.items()}
    c.update_from_flattened_dict(
        {key: str(experts) if x == "EXPERTS" else x for key, x in overrides.items()}
    )
    if name == "accumulation" and DEVICES.value == 8:  # each micro-batch splits over four shards
        c.opd.batch_size = 32
    for axis in ("data", "fsdp", "tensor", "context", "expert"):
        c.mesh[axis] = MESH[DEVICES.value].get(axis, 1)
    c.log.transcripts, c.log.transcripts_every = 8, 1
    return c


def list_runs() -> list[str]:
    from configs import conditions

    return [*RECIPES, *(f"conditions:{name},tiny" for name in conditions.CONDITIONS), *VARIANTS]


def write_expert_model(folder: Path) -> Path:
    """Copies the student's directory with a mixture-of-experts config and without weights."""
    target = folder / "experts"
    shutil.copytree("assets/student", target, ignore=shutil.ignore_patterns("*.safetensors"))
    fields = json.loads((target / "config.json").read_text())
    fields |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    fields |= {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    fields |= {"moe_intermediate_size": 64, "mlp_only_layers": [], "norm_topk_prob": True}
    (target / "config.json").write_text(json.dumps(fields))
    return target


def digest_run(run: Path, exported: Path) -> dict[str, str]:
    """Returns the checksums of a run's weights, metrics and tokens."""
    weights = hashlib.sha256()
    for file in sorted(exported.rglob("*.safetensors")):
        weights.update(file.read_bytes())
    metrics = hashlib.sha256()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line).items()
        row = {
            FORMER_NAMES.get(k, k): x for k, x in row if not is_timing(k) and k not in ADDED_NAMES
        }
        metrics.update(json.dumps(row, sort_keys=True).encode())
    tokens = hashlib.sha256()
    for file in sorted((run / "rollouts").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            tokens.update(json.dumps([row["prompt_tokens"], row["tokens"]]).encode())
    return {
        "weights": weights.hexdigest()[:16],
        "metrics": metrics.hexdigest()[:16],
        "tokens": tokens.hexdigest()[:16],
    }


def is_timing(name: str) -> bool:
    """Returns true for metrics that depend on the clock or the machine."""
    return name.startswith(("time", "memory", "device")) or "per_second" in name or "mfu" in name


def main() -> None:
    os.environ["JAX_NUM_CPU_DEVICES"] = str(DEVICES.value)
    os.environ["NPROC"] = "32"
    # Compilation takes most of the time, as each program runs only a few times.
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )
    import jax

    from distill.policy import exporting
    from distill.training import loop

    known = list_runs()
    if unknown := set(ONLY.value) - set(known):
        sys.exit(f"--only: {sorted(unknown)} are none of {', '.join(known)}")
    out, digests = Path(OUT.value).resolve(), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        experts = write_expert_model(folder)
        for name in ONLY.value or known:
            run, exported = folder / "run", folder / "exported"
            loop.run(make_config(name, experts), run)
            exporting.export_run(run, exported)
            digests[name] = digest_run(run, exported)
            print(name, *digests[name].values(), flush=True)
            out.write_text(json.dumps(digests, indent=1) + "\n")
            shutil.rmtree(run)
            shutil.rmtree(exported)
            jax.clear_caches()


if __name__ == "__main__":
    cli.run(main, OPTIONS)
