"""Compiles a config's programs for a TPU slice or a host of GPUs, to tell whether it fits and how
fast it can be."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.planning import aot, forecast, gpus, programs, roofline
from distill.planning.roofline import GIB, ProgramCost
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import external, local
from distill.training import memory, sampling_programs, stages
from distill.training.calls import AbstractStage
from models import families
from models.errors import UserError

SLICES = {  # whole slices of a generation, and GPUs of a host, smallest first
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    **dict.fromkeys(gpus.GPUS, ("1", "2", "4", "8")),
}
SAMPLING_PROGRAMS = ("merge", "weights", "cache", "prompts", "few prompts", "decode", "remember")
RELEASED_STOP_IDS = (151645, 151643)  # of the released models: <|im_end|>, <|endoftext|>


class TooLarge(Exception):
    """Raised if a program does not fit; `largest` lists (size, name) of the largest arrays."""

    def __init__(self, name: str, needs_gib: float, largest: list[tuple[str, str]]) -> None:
        self.program, self.needs_gib, self.largest = name, needs_gib, largest
        super().__init__(name)


def describe_policy(
    path: str, dtype: str, remat: bool, mesh: Mesh, flag: str, **options: Any
) -> Policy:
    """Describes a model by its directory's config.json, or a released model by its name on the hub.

    flag: the sub-config that names the model. options: passed to policy.make_abstract.

    Raises:
      UserError: if `path` is neither, or the mesh does not divide the model.
    """
    if not path:
        raise UserError(f"config.{flag}.path: name a model directory")
    config = None if Path(path).exists() else families.find_released(path)
    if config is None:
        return policy.make_abstract(path, dtype, remat, mesh, **options)
    mesh_lib.check_divisible(config, mesh, path)
    return policy.make_abstract_from_config(path, config, dtype, remat, mesh, **options)


def describe_stage(c: ConfigDict, name: str, mesh: Mesh, teacher_mesh: Mesh) -> AbstractStage:
    """Describes a stage and its models in the dtypes in which `train` loads them. Models that are
    only read lie on `teacher_mesh`.

    Raises:
      UserError: naming the invalid key.
    """
    s = c[name]
    loss, sampled_rows = stages.resolve_objective(name, s)
    teacher_names = stages.check_teachers(c, name, loss, sampled_rows)
    outside = external.list_external(c, teacher_names)
    m, lora = c.student, stages.make_lora(c.student)
    options: dict[str, Any] = {"kernel": c.attention, "packed": stages.has_packed_rows(c)}
    student = describe_policy(
        m.path, m.dtype, m.remat, mesh, "student", lora_config=lora, **options
    )
    if not student.stop_ids:
        student = dataclasses.replace(student, stop_ids=RELEASED_STOP_IDS)
    trained = mesh_lib.make_abstract_params(student.config, mesh, lora)
    initial = dataclasses.replace(
        student,
        model=student.model.clone(remat=False, lora=None),
        params=mesh_lib.make_abstract_params(student.config, teacher_mesh),
    )
    if lora:
        student = _cast_params(student, m.param_dtype)
    teachers = {}
    for teacher in (name for name in teacher_names if name not in outside):
        t = c[teacher]
        if t.path == local.EMA and lora:
            teachers[teacher] = dataclasses.replace(student, model=student.model.clone(remat=False))
        elif t.path == local.EMA:
            teachers[teacher] = dataclasses.replace(initial, params=trained)
        elif t.path == local.INITIAL and local.is_base(student):
            on_mesh = mesh_lib.make_abstract_params(student.config, mesh)
            own = dataclasses.replace(initial, params=on_mesh)
            teachers[teacher] = _cast_params(own, t.param_dtype)
        elif t.path == local.INITIAL:
            teachers[teacher] = _cast_params(initial, t.param_dtype)
        else:
            other = describe_policy(t.path, t.dtype, False, teacher_mesh, teacher, **options)
            teachers[teacher] = _cast_params(other, t.param_dtype)
    reference = None
    if loss.reference and not local.is_base(student):
        reference = _cast_params(initial, m.param_dtype)
    stages.check_row_split(name, s, mesh, teacher_mesh)
    stages.check_token_split(name, s, mesh, teacher_mesh)
    return AbstractStage(
        c,
        name,
        loss,
        sampled_rows,
        stages.compute_microbatch_rows(s, sampled_rows, mesh, teacher_mesh),
        student,
        trained,
        teachers,
        reference,
        external.open_teachers(c, s, loss, teacher_names, student, asks_probe=False),
    )


def _cast_params(model: Policy, param_dtype: str) -> Policy:
    return dataclasses.replace(model, params=policy.make_abstract_params(model, param_dtype))


def compile_stage(stage: AbstractStage, topology: str, teacher_mesh: Mesh) -> list[ProgramCost]:
    """Compiles the programs of a stage.

    Raises:
      TooLarge: at the first program that does not fit beside everything else in memory.
    """
    chip, mesh = aot.get_chip(topology), stage.mesh
    memory_limit = chip.hbm_gib * GIB
    resident = {m: memory.count_resident_bytes(stage, m) for m in {mesh, teacher_mesh}}
    for sizes in resident.values():
        if sum(sizes.values()) > memory_limit:
            needs_gib = sum(sizes.values()) / GIB
            raise TooLarge("what the run keeps", needs_gib, _list_largest(sizes))
    if stage.sampled_rows:
        needs = _count_min_sampling_bytes(stage) + sum(resident[mesh].values())
        if needs > memory_limit:
            raise TooLarge("cache", needs / GIB, _list_largest(resident[mesh]))
    with mesh_lib.use_mesh(mesh), jax.default_matmul_precision(None):
        calls = programs.list_stage_calls(stage, memory_limit)
    costs = []
    for call in calls:
        call_mesh = call.mesh or mesh
        largest = _list_largest(resident[call_mesh])
        beside = call.other_bytes + sum(
            size
            for name, size in resident[call_mesh].items()
            if name not in call.resident_arguments
        )
        with aot.use_devices(call_mesh):
            try:
                program = aot.compile_program(call.name, call.lower, chip.hbm_gib)
            except aot.OutOfMemory as error:
                needs_gib = error.needs_gib + beside / GIB
                raise TooLarge(call.name, needs_gib, [*error.largest, *largest][:6]) from None
        cost = roofline.estimate_cost(call, program, beside, chip, call_mesh.size)
        if cost.total_bytes > memory_limit:
            raise TooLarge(call.name, cost.total_bytes / GIB, largest)
        costs.append(cost)
    return costs


def _list_largest(sizes: dict[str, int]) -> list[tuple[str, str]]:
    """Returns (size as text, name) pairs, the largest first."""
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [(f"{size / GIB:.2f}G", name) for name, size in ordered]


def _count_min_sampling_bytes(stage: AbstractStage) -> float:
    """Counts the least bytes on each device with which sampling works: the decoding weights, and
    enough memory for the cache's share of it to hold one row of the maximum length."""
    s = stage.s
    sampler = sampling_programs.make_stage_sampler(dataclasses.replace(stage, sampled_rows=1))
    share = s.rollout.cache_tokens or stages.CACHE_MEMORY_FRACTION
    longest = s.max_prompt_tokens + s.max_response_tokens
    return sampler.weight_bytes + longest * sampler.token_bytes / min(1.0, share)


def compile_run(c: ConfigDict, topology: str) -> dict[str, list[ProgramCost]]:
    """Compiles the programs of every stage for a slice; returns stage -> the costs of its programs.

    Raises:
      TooLarge: if a program does not fit.
      UserError: if the config does not use every device, or is otherwise invalid.
    """
    devices = aot.get_devices(topology)
    mesh, teacher_mesh = mesh_lib.make_meshes(c, devices)
    size = mesh.size + (teacher_mesh.size if teacher_mesh != mesh else 0)
    if size < len(devices):
        raise UserError(f"config.mesh: {size} devices, but {topology} has {len(devices)}")
    return {
        name: compile_stage(describe_stage(c, name, mesh, teacher_mesh), topology, teacher_mesh)
        for name in c.stages
    }


def forecast_stages(
    c: ConfigDict, topology: str, stage_costs: dict[str, list[ProgramCost]], mean_tokens: int
) -> dict[str, forecast.Forecast]:
    """Forecasts a step of each compiled stage at a mean response length."""
    mesh, teacher_mesh = mesh_lib.make_meshes(c, aot.get_devices(topology))
    return {
        name: forecast.forecast_stage(
            describe_stage(c, name, mesh, teacher_mesh), aot.get_chip(topology), costs, mean_tokens
        )
        for name, costs in stage_costs.items()
    }


def list_remedies(c: ConfigDict, program: str) -> list[tuple[str, ConfigDict]]:
    """Lists changes that make a program smaller, the cheapest first, as (flag, changed config)."""
    remedies: list[tuple[str, ConfigDict]] = []

    def add_remedy(key: str, value: Any) -> None:
        changed = copy.deepcopy(c)
        with changed.unlocked():
            changed.update_from_flattened_dict({key: value})
        if changed != c:
            remedies.append((f"--config.{key}={value}", changed))

    is_sampling = program in SAMPLING_PROGRAMS
    is_training = program in ("accumulate", "old log-probs", "reference")
    is_training |= program.startswith(("score", "judge"))
    if is_training:
        add_remedy("student.remat", True)
    if is_sampling:
        for tensor in (2, 4, 8):
            add_remedy("mesh.tensor", max(tensor, c.mesh.tensor))
    for name in c.stages:
        s = c[name]
        if is_training:
            add_remedy(f"{name}.rollout.asynchronous", False)
            for factor in (2, 4, 8):
                add_remedy(f"{name}.accumulate", s.accumulate * factor)
        if is_sampling:
            add_remedy(f"{name}.rollout.gather_weights", False)
            for dtype in ("float8_e4m3fn", "int8"):  # of TPUs, of GPUs
                add_remedy(f"{name}.rollout.cache_dtype", dtype)
            if s.rollout.cache_tokens < 1:
                for share in (0.6, 0.4):
                    add_remedy(f"{name}.rollout.cache_tokens", share)
            elif s.rollout.slots:
                for divisor in (2, 4, 8):
                    add_remedy(f"{name}.rollout.slots", max(1, s.rollout.slots // divisor))
    if c.teacher.path:
        add_remedy("teacher.param_dtype", "int8")
    if not c.student.lora.rank:
        add_remedy("student.lora.rank", 32)
    return remedies


def find_remedy(c: ConfigDict, topology: str, program: str) -> dict[str, Any] | None:
    """Finds the first change with which the run fits: to the config, or else to a larger slice.

    Returns {"change": a flag, "peak_gib": of the largest program with that change}, or None.
    """
    generation, _, shape = topology.partition(":")
    size = math.prod(map(int, shape.split("x")))
    candidates = [(flag, changed, topology) for flag, changed in list_remedies(c, program)]
    for larger in SLICES[generation]:
        if math.prod(map(int, larger.split("x"))) > size:
            candidates.append((f"--topology={generation}:{larger}", c, f"{generation}:{larger}"))
    for change, changed, slice_name in candidates:
        try:
            stage_costs = compile_run(changed, slice_name)
        except (TooLarge, UserError):
            continue
        return {"change": change, "peak_gib": roofline.find_peak_gib(stage_costs)}
    return None
