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
from distill.training.calls import StageModels, count_device_bytes
from models import transformer


def count_resident_bytes(
    c: ConfigDict, models: StageModels, stage: ConfigDict, mesh: Mesh | None = None
) -> dict[str, int]:
    """What a run keeps on each device of a mesh, the student's by default, through all programs of
    a stage: name -> bytes."""
    student_mesh = policy.get_mesh(models.student)
    mesh, resident_bytes = mesh or student_mesh, {}
    if mesh == student_mesh:
        state = update.make_abstract_state(
            optim.make_optimizer(stage.optim, 1), models.trained_params
        )
        resident_bytes |= {
            "parameters": count_device_bytes(state.params),
            "optimiser": count_device_bytes(state.opt_state),
        }
        if c.student.ema_decay:
            resident_bytes["average"] = resident_bytes["parameters"]
        if models.student.model.lora:
            resident_bytes["base"] = count_device_bytes(models.student.params)
    read_models = {
        name: x for name, x in models.teachers.items() if not get_resident_name(c, name, models)
    }
    if models.reference:
        read_models["reference"] = models.reference
    for name, reader in read_models.items():
        if policy.get_mesh(reader) == mesh:
            resident_bytes[name] = count_device_bytes(reader.params)
        elif mesh == student_mesh and name in models.teachers:
            resident_bytes[f"head of {name}"] = count_device_bytes(
                make_head_shape(reader, student_mesh)
            )
    return resident_bytes


def make_head_shape(reader: Policy, mesh: Mesh) -> Any:
    """The output head of a teacher as the update reads it: on the student's mesh."""
    head_VE, mesh_head = (
        transformer.get_output_head(reader.params),
        transformer.get_output_head(mesh_lib.make_abstract_params(reader.config, mesh)),
    )
    return jax.ShapeDtypeStruct(head_VE.shape, head_VE.dtype, sharding=mesh_head.sharding)


def get_resident_name(c: ConfigDict, name: str, models: StageModels) -> str:
    """Where a teacher is what the run keeps anyway: what that is called."""
    path = c[name].path
    if path == local.EMA:
        return "average"
    return "base" if path == local.INITIAL and local.is_base(models.student) else ""


def has_single_microbatch(s: ConfigDict, sampled_rows: int) -> bool:
    """Whether an update has one micro-batch, always, and no gradient lies beside its own."""
    return not sampled_rows and s.accumulate == 1


def estimate_update_bytes(
    c: ConfigDict, s: ConfigDict, sampled_rows: int, models: StageModels, rows: int
) -> dict[str, float]:
    """About what an update of micro-batches of so many rows takes beside what the run keeps: of
    activations what rematerialisation keeps, and the teachers' hidden states."""
    student, T = models.student, stages.get_row_tokens(s)
    mesh = policy.get_mesh(student)
    shards = mesh_lib.count_row_shards(mesh) * mesh_lib.count_token_shards(mesh, T)
    item, config = jnp.dtype(student.model.dtype).itemsize, student.config
    width = config.hidden_size * (1 if student.model.remat else 12)
    activation_bytes = T * item * width * (config.num_hidden_layers + 2)
    for teacher in models.teachers.values():
        activation_bytes += T * teacher.config.hidden_size * jnp.dtype(teacher.model.dtype).itemsize
    return {
        "gradient": count_device_bytes(models.trained_params)
        * (1 if has_single_microbatch(s, sampled_rows) else 2),  # and the sum
        "activations": rows / shards * activation_bytes,
        "logits": stages.compute_logits_mib(c, mesh) / mesh.size * 2**20,
    }


def compute_cache_capacity(
    c: ConfigDict,
    s: ConfigDict,
    sampled_rows: int,
    models: StageModels,
    rows: int,
    memory_limit: float,
) -> int | None:
    """Tokens that the sampler's cache could hold on all devices, of which each has so many bytes;
    None of a stage that samples nothing. Rows that are sampled ahead leave room for an update."""
    if not sampled_rows:
        return None
    free_bytes = memory_limit - sum(count_resident_bytes(c, models, s).values())
    if s.rollout.asynchronous:
        free_bytes -= sum(estimate_update_bytes(c, s, sampled_rows, models, rows).values())
    return sampling_programs.compute_cache_capacity(c, s, models, free_bytes)
