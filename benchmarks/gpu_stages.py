"""The stages of `benchmarks.gpu`: what each measures, in which sizes, and with which time limit.

Nothing here uses a device: that is left to workers, which can be killed.
"""

import dataclasses
import functools
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rollout
from benchmarks.contest import ROOT, JsonDict, Worker
from models.qwen3.config import SIZES, Config

# Imports packages, and ends with a line if torch would run on another device than JAX.
PROBE = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
import torch
if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit("torch finds no GPU")
"""


class StageError(Exception):
    """Says in a line why a stage has no result."""


@dataclasses.dataclass(frozen=True)
class Host:
    """Where a stage runs, and until when."""

    platform: str  # of the device, as JAX names it
    torch_python: str  # interpreter with torch, transformers and TRL
    vllm_python: str  # and one with vLLM
    deadline: float = math.inf  # of time.monotonic(), when workers are killed

    def start(self, module: str, *args: str, python: str = sys.executable) -> Worker:
        return Worker(python, module, *args, deadline=self.deadline)

    def ask(self, module: str, *args: str, python: str = sys.executable, **job: Any) -> JsonDict:
        """Returns the answer of a worker of its own to a job. Raises StageError without one."""
        worker = self.start(module, *args, python=python)
        answer = worker.send_job(**job)
        worker.close()
        if answer is None:
            raise StageError(worker.absent)
        return answer

    def require_packages(self, python: str, *packages: str) -> None:
        """Raises StageError if `python` lacks a package, or its torch the GPU that JAX has."""
        command = [python, "-c", PROBE, self.platform, *packages]
        seconds = min(self.deadline - time.monotonic(), 300.0)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, timeout=seconds
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StageError(f"left out: {python} does not run: {error}") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"ended ({done.returncode})"])[-1]
            raise StageError(f"left out: {reason}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A measurement with a result and a time limit of its own."""

    name: str
    seconds: float  # the limit
    measure: Callable[[Host, JsonDict], JsonDict]
    job: JsonDict  # its settings


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all stages."""

    student: Config
    teacher: Config
    dtype: str
    rows: int  # that are trained and scored at once
    tokens: int  # of each
    batches: tuple[int, ...]  # rows that decode together
    filled: tuple[int, ...]  # tokens in the cache of each
    segment: int  # decoding steps in one call
    generate: tuple[int, int, int]  # rows, tokens of their prompts, new tokens
    step: tuple[int, int, int]  # the same of a whole step
    steps: int  # measured calls, after one that compiles


_TOY = dataclasses.replace(
    SIZES["0.6b"],
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
)
ALL_SIZES = {
    "real": Sizes(
        *(SIZES["1.7b"], SIZES["8b"], "bfloat16", 8, 4096),
        *((1, 32, 256), (2048, 8192), 64, (32, 512, 512), (64, 256, 1792), 5),
    ),
    "toy": Sizes(
        *(_TOY, dataclasses.replace(_TOY, hidden_size=96, num_hidden_layers=3), "float32", 2, 32),
        *((1, 2), (32,), 8, (2, 4, 128), (4, 8, 24), 2),
    ),
}


def list_stages(sizes: Sizes) -> list[Stage]:
    """Lists the stages in the order in which they are measured: this project's own come first."""
    models = {"student": sizes.student.to_hf(), "teacher": sizes.teacher.to_hf()}
    job: JsonDict = {**models, "dtype": sizes.dtype, "steps": sizes.steps}
    rows = {**job, "rows": sizes.rows, "tokens": sizes.tokens}
    train = {**rows, "what": "reverse_kl", "remat": True}
    score = {**rows, "student": sizes.teacher.to_hf(), "what": "hidden"}
    trl = "trl" if sizes.dtype == "float32" else "trl, autocast"
    decode = [
        {**job, "what": "decode", "rows": batch, "filled": filled, "segment": sizes.segment}
        for filled in sizes.filled
        for batch in sizes.batches
    ]
    names = ("rows", "prompt_tokens", "new_tokens")
    step = {**job, "what": "step", "steps": 2, **dict(zip(names, sizes.step, strict=True))}
    generate = {**job, "steps": 2, **dict(zip(names, sizes.generate, strict=True))}
    samplers = ["ours", "transformers", "transformers, static cache", "vllm"]
    numerics = {"what": "numerics", "model": "assets/student"}
    return [
        Stage("limits", 120, measure_limits, {}),
        Stage("train", 300, measure_train, train),
        Stage("score", 240, measure_score, score),
        *(Stage(f"decode-{x['rows']}x{x['filled']}", 150, measure_on_device, x) for x in decode),
        Stage("step", 480, measure_on_device, step),
        Stage("generate", 300, measure_generate, {**generate, "samplers": samplers[:2]}),
        Stage("numerics", 240, measure_on_device, numerics),
        Stage("train-trl", 240, measure_torch, {**train, "contender": trl}),
        Stage("score-transformers", 150, measure_torch, {**score, "contender": "transformers"}),
        Stage("generate-static", 240, measure_generate, {**generate, "samplers": samplers[2:3]}),
        Stage("generate-vllm", 240, measure_generate, {**generate, "samplers": samplers[3:]}),
    ]


def measure_limits(host: Host, job: JsonDict) -> JsonDict:
    return host.ask("benchmarks.limits", **job)


def measure_on_device(host: Host, job: JsonDict) -> JsonDict:
    return host.ask("benchmarks.gpu_workers", **job)


def measure_train(host: Host, job: JsonDict) -> JsonDict:
    """Measures a training step and, with hidden states of the same shapes, the loss alone."""
    step = host.ask("benchmarks.trainers", "ours", **job)
    loss = host.ask("benchmarks.trainers", "ours", **{**job, "what": "loss"})
    return {**step, "loss_seconds": loss["seconds"]}


def measure_score(host: Host, job: JsonDict) -> JsonDict:
    """Measures a call to final hidden states, as a teacher answers it, and one to
    log-probabilities."""
    ask_ours = functools.partial(host.ask, "benchmarks.trainers", "ours")
    return {**ask_ours(**job), "logp": ask_ours(**{**job, "what": "logp"})}


def measure_torch(host: Host, job: JsonDict) -> JsonDict:
    """Measures a contender on torch with as many rows as its memory takes: all, half and so on."""
    contender, rows, python = job["contender"], job["rows"], host.torch_python
    host.require_packages(python, "trl.experimental.gkd" if "trl" in contender else "transformers")
    while True:
        try:
            shape = {**job, "rows": rows}
            return {
                **host.ask("benchmarks.trainers", contender, python=python, **shape),
                "rows": rows,
            }
        except StageError as error:
            if rows == 1 or "out of memory" not in str(error).lower():
                raise
            rows //= 2


def measure_generate(host: Host, job: JsonDict) -> JsonDict:
    """Measures samplers on the same prompts and weights, which lie in a file meanwhile."""
    pythons = {
        "ours": sys.executable,
        "transformers": host.torch_python,
        "vllm": host.vllm_python,
    }
    names, missing = list(job["samplers"]), {}
    for name in job["samplers"]:
        worker, _ = rollout.SAMPLERS[name]
        try:
            if worker != "ours":
                host.require_packages(pythons[worker], worker)
        except StageError as error:
            names.remove(name)
            missing[name] = {"sampler": name, "absent": str(error)}
    if not names:
        raise StageError(next(iter(missing.values()))["absent"])
    prompt, new, dtype = job["prompt_tokens"], job["new_tokens"], job["dtype"]
    shape = rollout.DecodeShape((job["rows"],), prompt, new, job["steps"], dtype)
    config = Config.from_hf(job["student"])
    with tempfile.TemporaryDirectory() as folder:
        path = rollout.make_random_model(config, dtype, Path(folder) / "model")
        arguments = str(path), dtype, str(prompt + new)
        workers = {
            worker: host.start("benchmarks.workers", worker, *arguments, python=pythons[worker])
            for worker in {rollout.SAMPLERS[name][0]: None for name in names}
        }
        rows = rollout.measure_decode(workers, config, {"read": math.nan}, shape, names)
        for worker in workers.values():
            worker.close()
    if "absent" in rows[0]:
        raise StageError(rows[0]["absent"])
    return {"samplers": [*rows, *missing.values()]}


def run_stage(stage: Stage, host: Host, seconds: float) -> JsonDict:
    """Measures a stage in at most `seconds`; returns its "result", or why it "failed"."""
    start = time.monotonic()
    try:
        entry = {
            "result": stage.measure(dataclasses.replace(host, deadline=start + seconds), stage.job)
        }
    except StageError as error:
        entry = {"failed": str(error)}
    except Exception as error:  # of a measurement that makes no sense: the other stages go on
        entry = {"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    return {**entry, "seconds": time.monotonic() - start}
