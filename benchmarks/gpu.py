"""python -m benchmarks.gpu [--out=DIR] [--minutes=25]: this project on one GPU, in one command.

Random models with the shapes of Qwen3-1.7B and 8B; nothing is downloaded. The stages, in order:

limits              memory bandwidth and FLOP/s of matrix products, as measured
train               a training step, exact reverse KL of 1.7B from 8B, and its loss alone
score               8B reads rows: to its hidden states, and to log-probabilities
decode-ROWSxFILLED  1.7B decodes, with so many tokens in the cache of each row
step                whole steps of on-policy distillation
generate            1.7B's sampler beside transformers' `generate`
numerics            rounding errors (benchmarks/numerics.py)
train-trl           the training step with TRL's loss
score-transformers  hidden states by transformers
generate-static     `generate` with a cache of fixed size, compiled
generate-vllm       the same prompts by vLLM

Each is measured in processes of its own, within a time limit. As each ends, the numbers (gpu.json),
the tables (gpu.md) and a figure of the whole step (gpu-step.svg) are written to --out. A stage that
fails, for want of memory or of a package, is recorded with the reason. The same command goes on
where it stopped: it repeats no stage that was measured with the same settings, source and version
of JAX, and tries again those that failed, after the others.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import contest, figures, gpu_report, gpu_stages
from benchmarks.contest import ROOT, JsonDict
from benchmarks.gpu_stages import Host, Stage, StageError
from distill.runtime import cli, paths, run_files
from models.errors import UserError

OPTIONS = flags.FlagValues()
OUT = flags.DEFINE_string("out", "benchmarks/results", "Directory for the results.", OPTIONS)
MINUTES = flags.DEFINE_float(
    "minutes", 25.0, "Minutes after which no stage begins or goes on.", 0, flag_values=OPTIONS
)
SIZES = flags.DEFINE_enum(
    "sizes", "real", list(gpu_stages.ALL_SIZES), "toy: tiny ones, also on a CPU.", OPTIONS
)
STAGES = flags.DEFINE_list(
    "stages", [], "Stages to measure, by the first words of their names; default: all.", OPTIONS
)
HF_PYTHON = flags.DEFINE_string(
    "hf_python", sys.executable, "Interpreter with torch and TRL.", OPTIONS
)
VLLM_PYTHON = flags.DEFINE_string("vllm_python", sys.executable, "Interpreter with vLLM.", OPTIONS)

SOURCES = ("benchmarks", "configs", "distill", "models")
MEMORY_FRACTION = "0.9"  # of the GPU's; JAX's default is 0.75


def choose_stages(stages: list[Stage], words: list[str]) -> list[Stage]:
    """Returns `limits` and the stages whose names begin with one of `words`; all without words.

    Raises:
      UserError: for a word that begins no name.
    """
    for word in words:
        if not any(stage.name.startswith(word) for stage in stages):
            known = ", ".join(stage.name for stage in stages)
            raise UserError(f"--stages={word}: none of {known} begins so")
    wanted = ("limits", *words) if words else ("",)
    return [stage for stage in stages if stage.name.startswith(wanted)]


def compute_revision() -> str:
    """Returns a checksum of the source that is measured."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def find_device(host: Host) -> JsonDict:
    """Returns the device of JAX in a new process, and the versions there.

    Raises:
      UserError: if it has none, or real sizes would run on a CPU.
    """
    try:
        found = host.ask("benchmarks.gpu_workers", what="device")
    except StageError as error:
        raise UserError(str(error)) from None
    if found["platform"] == "cpu" and SIZES.value == "real":
        raise UserError(
            "--sizes=real: JAX finds no GPU here (docs/gpus.md has the installation); "
            "--sizes=toy runs on a CPU"
        )
    return found


def read_report(path: Path, device: str) -> JsonDict:
    """Reads what an earlier call has written; an empty report if there is none.

    Raises:
      UserError: if the file is damaged, or of another device.
    """
    report: JsonDict = {"device": device, "sizes": SIZES.value, "stages": {}}
    if not path.exists():
        return report
    try:
        report = json.loads(path.read_text())
        entries, other = report["stages"].values(), report["device"]
        whole = all(
            {"settings", "revision"} <= {*entry["key"]} and {"result", "failed"} & {*entry}
            for entry in entries
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        whole, other = False, ""
    if not whole:
        raise UserError(f"{path}: not a report of benchmarks.gpu; remove it")
    if other != device:
        raise UserError(f"{path}: measured on {other}, and this is {device}; name another --out")
    return report


def make_key(stage: Stage, revision: str, jax_version: str) -> JsonDict:
    """Returns what must be the same for a result to stand."""
    key = {"settings": stage.job, "revision": revision, "jax": jax_version}
    return json.loads(run_files.to_json(key))


def write_report(path: Path, report: JsonDict) -> None:
    """Writes the numbers, the tables and, once it is measured, the figure of the step."""
    run_files.write_json(path, report)
    paths.write_text(path.with_suffix(".md"), "\n".join(gpu_report.render_report(report)) + "\n")
    if step := report["stages"].get("step", {}).get("result"):
        title = f"A step on {report['device']}"
        figure = path.with_name(gpu_report.get_figure_name(report))
        figures.save_figure(figures.draw_step, {**step, "title": title}, figure)


def main() -> None:
    stages = gpu_stages.list_stages(gpu_stages.ALL_SIZES[SIZES.value])
    chosen, end = choose_stages(stages, STAGES.value), time.monotonic() + 60 * MINUTES.value
    path = paths.check_output(f"{OUT.value}/{gpu_report.get_name(SIZES.value)}.json")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one device
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)
    found = find_device(Host("", HF_PYTHON.value, VLLM_PYTHON.value, deadline=end))
    host = Host(found["platform"], HF_PYTHON.value, VLLM_PYTHON.value)
    report = read_report(path, found["device"])
    report["memory_bytes"], revision = found["memory_bytes"], compute_revision()
    report["machine"] = contest.describe_machine({"ours": found["versions"]})
    keys = {stage.name: make_key(stage, revision, found["versions"]["jax"]) for stage in chosen}
    known = {
        stage.name: entry
        for stage in chosen
        if (entry := report["stages"].get(stage.name, {})).get("key") == keys[stage.name]
    }
    todo = [stage for stage in chosen if "result" not in known.get(stage.name, {})]
    late: list[str] = []
    for stage in sorted(todo, key=lambda stage: stage.name in known):  # those that failed: last
        left = end - time.monotonic()
        if left <= 0:
            late.append(stage.name)
            continue
        run_files.log_line(f"{stage.name}: at most {min(stage.seconds, left):.0f} s")
        entry: dict[str, Any] = gpu_stages.run_stage(stage, host, min(stage.seconds, left))
        report["stages"][stage.name] = {"key": keys[stage.name], **entry}
        write_report(path, report)
        run_files.log_line(f"{stage.name}: {entry.get('failed', 'measured')}")
    write_report(path, report)
    print(path.with_suffix(".md").read_text(), end="")
    if late:
        run_files.log_line(f"no time left for {', '.join(late)}; the same command goes on")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
