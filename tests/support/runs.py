"""A short run with two stages on tiny random models, and the files it writes."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base
from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from distill.runtime import tensorboard
from distill.runtime.checkpoint import Checkpoints
from distill.training import trainer
from models import weights
from tests.support.evaluations import untimed
from tests.support.paths import ROOT


def tiny_model(directory, seed, **fields):
    """Writes a random model for the embedded task: two layers of the shape in `assets`."""
    shutil.copytree(
        ROOT / "assets" / "student", directory, ignore=shutil.ignore_patterns("*.safetensors")
    )
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    described = policy.make_abstract(str(directory), "float32", False, mesh_lib.make_mesh(1, 1, 1))
    random = policy.init_random_policy(described, jax.random.key(seed))
    weights.save(random.params, random.config, directory, np.dtype("float32"))
    return str(directory)


def config(models) -> ConfigDict:
    """Configures two stages of 2 + 3 steps: packed rows in the first, two responses per prompt in
    the second."""
    c = base.get_config()
    c.stages = ("sft", "opd")
    c.student.path, c.teacher.path = models
    c.student.dtype = c.teacher.dtype = c.teacher.param_dtype = "float32"
    c.student.remat = False
    c.mesh.fsdp = 1
    c.checkpoint.every = 2
    c.log.transcripts_every = 2
    c.log.transcripts = 3
    for stage, steps in ((c.sft, 2), (c.opd, 3)):
        stage.steps = steps
        stage.batch_size = 4
        stage.max_prompt_tokens, stage.max_response_tokens = 60, 16
        stage.optim.learning_rate = 1e-3
    c.sft.pack_tokens = 100
    c.opd.samples = 2
    return c


def final(workdir, models):
    """Restores the trained parameters of a run."""
    described = policy.make_abstract(str(workdir), "float32", False, mesh_lib.make_mesh(1, 1, 1))
    return jax.tree.map(np.asarray, policy.load(described, "float32").params)


def numbers(workdir):
    """Returns the rows of metrics.jsonl without timings."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "rollout/tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def transcripts(workdir):
    return {p.name: p.read_text() for p in sorted((workdir / "rollouts").glob("*"))}


def read_scalars(folder):
    """Returns (step, name, value) of all scalars in TensorBoard's files, in order of steps."""
    values = _read_values(folder)
    return sorted((step, v.tag, v.simple_value) for step, v in values if v.HasField("simple_value"))


def read_texts(folder):
    """Returns (step, name, text) of all texts in TensorBoard's files, in order of steps."""
    values = _read_values(folder)
    return sorted(
        (step, v.tag, v.tensor.string_val[0].decode()) for step, v in values if v.HasField("tensor")
    )


def _read_values(folder):
    for path in folder.iterdir():
        with path.open("rb") as file:
            while event := tensorboard._read_event(file):
                for value in event.summary.value:
                    yield event.step, value
            assert file.read() == b"", "TensorBoard does not read what follows damage"


def read_run(workdir: Path) -> dict[str, Any]:
    """Returns all of a run that is the same however often it was stopped, by name: steps of its
    checkpoints with the checksum of all arrays, from the newest; rows without times; names and
    contents of files."""
    found: dict[str, Any] = {}
    for name, folder in (("checkpoints", workdir), ("best", workdir / "best")):
        with Checkpoints(folder / "checkpoints") as checkpoints:
            steps = [step for step, _ in checkpoints.read_all()]
            found[name] = [checkpoints.describe_step(step) for step in steps]
    found["metrics"] = numbers(workdir)
    found["transcripts"] = transcripts(workdir)
    timed = ("time/", "rollout/tokens_per_second")
    events = read_scalars(workdir / "tensorboard")
    found["TensorBoard"] = [event for event in events if not event[1].startswith(timed)]
    for path in sorted((workdir / "eval").rglob("*.json*")):
        text = path.read_text().replace(str(workdir), "RUN")
        rows = [text] if path.suffix == ".jsonl" else [untimed(json.loads(text))]
        found[str(path.relative_to(workdir))] = rows
    found["files"] = sorted(
        str(path.relative_to(workdir))
        for path in workdir.rglob("*")
        if not {"checkpoints", "tensorboard"} & {*path.parts}
    )
    return found


def stop_after(monkeypatch, step):
    """Sends SIGTERM to this process during step `step`."""
    take = trainer.Trainer.step

    def interrupted(self, state, *arguments):
        if int(state.step) == step:
            signal.raise_signal(signal.SIGTERM)
        return take(self, state, *arguments)

    monkeypatch.setattr(trainer.Trainer, "step", interrupted)
