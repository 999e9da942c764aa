"""Counts the bytes on each device during a stage from shapes.

Used by `plan`, by the summary before step 0, and to size the sampler's cache.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import host_memory
from distill.runtime import mesh as mesh_lib
from distill.teachers import external, local
from distill.training import optim, sampling_programs, stages, update
from distill.training.calls import AbstractStage, count_device_bytes
from distill.training.setup import RunSetup, StageSetup
from models import transformer
from models.layers import blockwise

# Arrays [B, N, T, T] in float32 in a compiled update on a CPU: 4.4 to 4.7 by XLA's own count, for
# T from 250 to 2048.
CPU_SCORE_COPIES = 4


def describe_stage(
    c: ConfigDict, run_setup: RunSetup, stage: StageSetup, trained_params: Any
) -> AbstractStage:
    """Describes a stage of a run; its models may be loaded or not."""
    teachers = {name: run_setup.teachers[name] for name in stage.local_teachers}
    student = run_setup.student
    if student.model.lora:  # its frozen base
        student = _to_loaded_shapes(student, c.student.param_dtype)
    reference = run_setup.reference if stage.loss.reference else None
    if reference and not local.is_base(run_setup.student):
        reference = _to_loaded_shapes(reference, c.student.param_dtype)
    else:
        reference = None
    return AbstractStage(
        c,
        stage.name,
        stage.loss,
        stage.sampled_rows,
        stage.microbatch_rows,
        student,
        trained_params,
        {name: _to_loaded_shapes(t.policy, t.c.param_dtype) for name, t in teachers.items()},
        reference,
        stage.external,
    )


def _to_loaded_shapes(reader: Policy, param_dtype: str) -> Policy:
    """Returns a loaded policy unchanged, any other with the shapes that loading would give it."""
    if policy.is_loaded(reader):
        return reader
    return dataclasses.replace(reader, params=policy.make_abstract_params(reader, param_dtype))


def get_memory_limit() -> int | None:
    """Returns the memory of this process's first device in bytes; None if not reported (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def get_free_memory(mesh: Mesh) -> int | None:
    """Returns the bytes that each of this process's devices on `mesh` may take before anything is
    loaded; CPU devices share what their host has free. None if unknown."""
    limit = get_memory_limit()
    if limit is not None or jax.default_backend() != "cpu":
        return limit
    free = host_memory.measure_free_bytes()
    return None if free is None else free // len(mesh.local_devices)


def count_resident_bytes(stage: AbstractStage, mesh: Mesh | None = None) -> dict[str, int]:
    """Returns name -> bytes on each device of `mesh` (default: the student's) for every array that
    stays there throughout a stage."""
    mesh, resident_bytes = mesh or stage.mesh, {}
    if mesh == stage.mesh:
        optimizer = optim.make_optimizer(stage.s.optim, 1)
        state = update.make_abstract_state(optimizer, stage.trained_params)
        resident_bytes |= {
            "parameters": count_device_bytes(state.params),
            "optimiser": count_device_bytes(state.opt_state),
        }
        if stage.c.student.ema_decay:
            resident_bytes["average"] = resident_bytes["parameters"]
        if stage.student.model.lora:
            resident_bytes["base"] = count_device_bytes(stage.student.params)
    readers = {
        name: teacher for name, teacher in stage.teachers.items() if not get_alias(stage, name)
    }
    if stage.reference:
        readers["reference"] = stage.reference
    for name, reader in readers.items():
        if policy.get_mesh(reader) == mesh:
            resident_bytes[name] = count_device_bytes(reader.params)
        elif mesh == stage.mesh and name in stage.teachers:
            head_VE = make_abstract_head(reader, mesh)
            resident_bytes[f"head of {name}"] = count_device_bytes(head_VE)
    for teacher in stage.external if mesh == stage.mesh else ():
        if teacher.hidden_form:
            head_VE = external.make_abstract_head(teacher, mesh)
            resident_bytes[f"head of {teacher.name}"] = count_device_bytes(head_VE)
    return resident_bytes


def count_teacher_mesh_bytes(stage: AbstractStage) -> int:
    """Counts the resident bytes on each device of the teachers' mesh; 0 if they have no separate
    mesh."""
    meshes = (policy.get_mesh(reader) for reader in stage.readers)
    teacher_mesh = next((mesh for mesh in meshes if mesh != stage.mesh), None)
    return sum(count_resident_bytes(stage, teacher_mesh).values()) if teacher_mesh else 0


def make_abstract_head(teacher: Policy, mesh: Mesh) -> Any:
    """Returns the shape [V, E] of a teacher's output head on the student's mesh."""
    head_VE = transformer.get_output_head(teacher.params)
    on_mesh = transformer.get_output_head(mesh_lib.make_abstract_params(teacher.config, mesh))
    return jax.ShapeDtypeStruct(head_VE.shape, head_VE.dtype, sharding=on_mesh.sharding)


def get_alias(stage: AbstractStage, teacher: str) -> str:
    """Returns the key of resident bytes that a teacher shares; "" if it has weights of its own."""
    path = stage.c[teacher].path
    if path == local.EMA:
        return "average"
    return "base" if path == local.INITIAL and local.is_base(stage.student) else ""


def estimate_update_bytes(stage: AbstractStage) -> dict[str, float]:
    """Estimates name -> bytes on each device that an update takes beside the resident arrays.

    Activations are those that rematerialisation keeps, and the teachers' hidden states; attention
    scores those of one layer. What XLA fuses and frees in time does not count, so a program takes
    rather more than less.
    """
    student, mesh, T = stage.student, stage.mesh, stages.get_row_tokens(stage.s)
    shards = mesh_lib.count_row_shards(mesh) * mesh_lib.count_token_shards(mesh, T)
    scores = 0.0
    if student.model.kernel == "xla":  # the others hold none in the memory of the device
        heads = student.config.num_attention_heads // mesh.shape["tensor"]
        rows = stage.microbatch_rows / mesh_lib.count_row_shards(mesh)
        row_scores = blockwise.count_score_bytes(heads, T)
        if mesh.devices.flat[0].platform == "cpu":  # all blocks at once, and this often
            row_scores = CPU_SCORE_COPIES * 4 * heads * T * T
        scores = rows * row_scores
    width = student.config.hidden_size * (1 if student.model.remat else 12)
    itemsize = jnp.dtype(student.model.dtype).itemsize
    row_bytes = T * itemsize * width * (student.config.num_hidden_layers + 2)
    for teacher in stage.teachers.values():
        row_bytes += T * teacher.config.hidden_size * jnp.dtype(teacher.model.dtype).itemsize
    for E, dtype in stage.layout.external_hidden:
        row_bytes += T * E * dtype.itemsize
    num_gradients = 1 if stage.has_single_microbatch else 2  # a micro-batch's and their sum
    return {
        "gradient": num_gradients * count_device_bytes(stage.trained_params),
        "activations": stage.microbatch_rows / shards * row_bytes,
        "attention scores": scores,
        "logits": stages.get_loss_chunk_mib(stage.c, mesh) / mesh.size * 2**20,
    }


def estimate_stage_bytes(stage: AbstractStage, memory_limit: float | None) -> dict[str, float]:
    """Estimates name -> bytes on each of the student's devices at the peak of a stage."""
    stage_bytes: dict[str, float] = {**count_resident_bytes(stage)}
    update_bytes = estimate_update_bytes(stage)
    if not stage.sampled_rows:
        return stage_bytes | update_bytes
    cache_capacity = compute_cache_capacity(stage, memory_limit)
    sampler = sampling_programs.make_stage_sampler(stage, cache_capacity)
    sampling_bytes = sampler.weight_bytes + sampler.cache_bytes
    if stage.s.rollout.asynchronous:
        return stage_bytes | {"sampling": sampling_bytes} | update_bytes
    if sampling_bytes > sum(update_bytes.values()):  # one after the other
        return stage_bytes | {"sampling": sampling_bytes}
    return stage_bytes | update_bytes


def compute_cache_capacity(stage: AbstractStage, memory_limit: float | None) -> int | None:
    """Computes how many tokens the sampler's cache could hold on all devices of the student's mesh.

    Of `memory_limit` bytes per device, the cache gets those that the resident arrays and the
    decoding copy of the weights leave; asynchronous rollouts also leave room for an update. None if
    the limit is unknown or the stage samples nothing.
    """
    if memory_limit is None or not stage.sampled_rows:
        return None
    free_bytes = memory_limit - sum(count_resident_bytes(stage).values())
    if stage.s.rollout.asynchronous:
        free_bytes -= sum(estimate_update_bytes(stage).values())
    sampler = sampling_programs.make_stage_sampler(dataclasses.replace(stage, sampled_rows=1))
    tokens = max(0, int(free_bytes) - sampler.weight_bytes) // sampler.token_bytes
    return tokens * mesh_lib.count_row_shards(sampler.mesh)
