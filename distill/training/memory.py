"""What lies on each device while a stage runs, counted by shapes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import optim, sampling_programs, stages, update
from distill.training.calls import Models, bytes_of
from models.qwen3 import model


def held(
    c: ConfigDict, models: Models, stage: ConfigDict, mesh: Mesh | None = None
) -> dict[str, int]:
    """What a run keeps on each device of a mesh, the student's by default, through all programs of
    a stage: name -> bytes."""
    home = policy.mesh_of(models.student)
    mesh, kept = mesh or home, {}
    if mesh == home:
        state = update.abstract(optim.make(stage.optim, 1), models.trained)
        kept |= {"parameters": bytes_of(state.params), "optimiser": bytes_of(state.opt_state)}
        if c.student.ema:
            kept["average"] = kept["parameters"]
        if models.student.model.lora:
            kept["base"] = bytes_of(models.student.params)
    read = {name: x for name, x in models.teachers.items() if not own(c, name, models)}
    if models.reference:
        read["reference"] = models.reference
    for name, reader in read.items():
        if policy.mesh_of(reader) == mesh:
            kept[name] = bytes_of(reader.params)
        elif mesh == home and name in models.teachers:
            kept[f"head of {name}"] = bytes_of(head_of(reader, home))
    return kept


def head_of(reader: Policy, mesh: Mesh) -> Any:
    """The output head of a teacher as the update reads it: on the student's mesh."""
    head_VE, like = model.head(reader.params), model.head(mesh_lib.parameters(reader.config, mesh))
    return jax.ShapeDtypeStruct(head_VE.shape, head_VE.dtype, sharding=like.sharding)


def own(c: ConfigDict, name: str, models: Models) -> str:
    """Where a teacher is what the run keeps anyway: what that is called."""
    path = c[name].path
    if path == local.EMA:
        return "average"
    return "base" if path == local.INITIAL and local.is_base(models.student) else ""


def single(s: ConfigDict, sampled: int) -> bool:
    """Whether an update has one micro-batch, always, and no gradient lies beside its own."""
    return not sampled and s.accumulate == 1


def training(
    c: ConfigDict, s: ConfigDict, sampled: int, models: Models, rows: int
) -> dict[str, float]:
    """About what an update of micro-batches of so many rows takes beside what the run keeps: of
    activations what rematerialisation keeps, and the teachers' hidden states."""
    student, T = models.student, stages.row_tokens(s)
    mesh = policy.mesh_of(student)
    shards = mesh_lib.row_shards(mesh) * mesh_lib.token_shards(mesh, T)
    item, config = jnp.dtype(student.model.dtype).itemsize, student.config
    width = config.hidden_size * (1 if student.model.remat else 12)
    kept = T * item * width * (config.num_hidden_layers + 2)
    for taught in models.teachers.values():
        kept += T * taught.config.hidden_size * jnp.dtype(taught.model.dtype).itemsize
    return {
        "gradient": bytes_of(models.trained) * (1 if single(s, sampled) else 2),  # and the sum
        "activations": rows / shards * kept,
        "logits": stages.logits_mib(c, mesh) / mesh.size * 2**20,
    }


def cache_room(
    c: ConfigDict, s: ConfigDict, sampled: int, models: Models, rows: int, limit: float
) -> int | None:
    """Tokens that the sampler's cache could hold on all devices, of which each has so many bytes;
    None of a stage that samples nothing. Rows that are sampled ahead leave room for an update."""
    if not sampled:
        return None
    left = limit - sum(held(c, models, s).values())
    if s.rollout.ahead:
        left -= sum(training(c, s, sampled, models, rows).values())
    return sampling_programs.cache_room(c, s, models, left)
