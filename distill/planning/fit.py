"""Which programs a config runs on a slice, compiled: whether they fit, and how fast they can be."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.planning import aot, forecast, programs, roofline
from distill.planning.roofline import GIB, ProgramCost
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import memory, sampling_programs, stages
from distill.training.calls import StageModels
from models import families
from models.errors import UserError

SLICES = {  # whole slices of a generation, smallest first
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
SAMPLING_PROGRAMS = ("merge", "weights", "cache", "prompts", "few prompts", "decode", "remember")
RELEASED_STOP_IDS = (151645, 151643)  # what a released model stops at: <|im_end|>, <|endoftext|>


class TooLarge(Exception):
    """A program does not fit."""

    def __init__(self, name: str, needs_gib: float, largest: list[tuple[str, str]]) -> None:
        self.program, self.needs_gib, self.largest = name, needs_gib, largest
        super().__init__(name)


def describe_policy(
    path: str, dtype: str, remat: bool, mesh: Mesh, flag: str, **options: Any
) -> Policy:
    """A model of which only the shape is known: a directory's, or a released size's.

    Raises:
      UserError: for neither, or where the mesh does not divide it.
    """
    if not path:
        raise UserError(f"config.{flag}.path: name a model directory")
    config = None if Path(path).exists() else families.find_released(path)
    if config is not None:
        mesh_lib.check_divisible(config, mesh, path)
        return policy.make_abstract_from_config(path, config, dtype, remat, mesh, **options)
    described = policy.make_abstract(path, dtype, remat, mesh, **options)
    return described


def describe_models(
    c: ConfigDict, mesh: Mesh, teacher_mesh: Mesh, teachers: tuple[str, ...], with_reference: bool
) -> StageModels:
    """The run's models, in the dtypes that `train` loads them in; on `apart` those only read."""
    m, lora = c.student, stages.make_lora(c.student)
    options: dict[str, Any] = {"kernel": c.attention, "packed": stages.has_packed_rows(c)}
    student = describe_policy(
        m.path, m.dtype, m.remat, mesh, "student", lora_config=lora, **options
    )
    if not student.stop_ids:
        student = dataclasses.replace(student, stop_ids=RELEASED_STOP_IDS)
    trained = mesh_lib.make_abstract_params(student.config, mesh, lora)
    plain = dataclasses.replace(student, model=student.model.clone(remat=False, lora=None))
    on_teacher_mesh = dataclasses.replace(
        plain, params=mesh_lib.make_abstract_params(student.config, teacher_mesh)
    )
    if lora:
        student = dataclasses.replace(
            student, params=policy.make_abstract_params(student, m.param_dtype)
        )
    teacher_policies = {}
    for name in teachers:
        t = c[name]
        if t.path == local.EMA:
            teacher_policies[name] = dataclasses.replace(
                plain, params=mesh_lib.make_abstract_params(student.config, mesh)
            )
            if lora:
                without_remat = student.model.clone(remat=False)
                teacher_policies[name] = dataclasses.replace(student, model=without_remat)
        elif t.path == local.INITIAL:
            base = plain if local.is_base(student) else on_teacher_mesh
            teacher_policies[name] = dataclasses.replace(
                plain, params=policy.make_abstract_params(base, t.param_dtype)
            )
        else:
            teacher = describe_policy(t.path, t.dtype, False, teacher_mesh, name, **options)
            teacher_policies[name] = dataclasses.replace(
                teacher, params=policy.make_abstract_params(teacher, t.param_dtype)
            )
    reference = None
    if with_reference and not local.is_base(student):
        reference = dataclasses.replace(
            plain, params=policy.make_abstract_params(on_teacher_mesh, m.param_dtype)
        )
    return StageModels(student, trained, teacher_policies, reference)


def compile_stage(
    c: ConfigDict, name: str, topology: str, mesh: Mesh, teacher_mesh: Mesh
) -> list[ProgramCost]:
    """Compiles the programs of a stage; `apart` is the mesh of what is only read.

    Raises:
      TooLarge: at the first that does not fit beside what else is in memory.
    """
    chip, s = aot.get_chip(topology), c[name]
    loss, sampled = stages.resolve_objective(name, s)
    teachers = tuple(s.teachers) if stages.needs_teacher(s, loss) else ()
    local.check_teachers(c, name, s, bool(teachers))
    models = describe_models(c, mesh, teacher_mesh, teachers, loss.reference > 0)
    stages.check_row_split(name, s, mesh, teacher_mesh)
    stages.check_token_split(name, s, mesh, teacher_mesh)
    resident_bytes = {
        at: memory.count_resident_bytes(c, models, s, at) for at in {mesh, teacher_mesh}
    }
    largest = {
        at: sorted(((f"{size / GIB:.2f}G", n) for n, size in of.items()), key=lambda x: -of[x[1]])
        for at, of in resident_bytes.items()
    }
    for at, of in resident_bytes.items():
        if sum(of.values()) > chip.hbm_gib * GIB:
            raise TooLarge("what the run keeps", sum(of.values()) / GIB, largest[at])
    if sampled:
        needs = _count_min_cache_bytes(c, s, models) + sum(resident_bytes[mesh].values())
        if needs > chip.hbm_gib * GIB:
            raise TooLarge("cache", needs / GIB, largest[mesh])
    costs = []
    with mesh_lib.use_mesh(mesh), jax.default_matmul_precision(None):
        calls = programs.list_stage_calls(c, s, loss, sampled, models, mesh, chip.hbm_gib * GIB)
    for call in calls:
        at = call.mesh or mesh
        beside = (
            sum(
                size for of, size in resident_bytes[at].items() if of not in call.resident_arguments
            )
            + call.other_bytes
        )
        with mesh_lib.use_mesh(at), jax.default_matmul_precision(None):
            try:
                program = aot.compile_program(call.name, call.lower, chip.hbm_gib)
            except aot.OutOfMemory as error:
                needs = error.needs_gib + beside / GIB
                raise TooLarge(call.name, needs, [*error.largest, *largest[at]][:6]) from None
        row = roofline.estimate_cost(call, program, beside, chip, at.size)
        if row.total_bytes > chip.hbm_gib * GIB:
            raise TooLarge(call.name, row.total_bytes / GIB, largest[at])
        costs.append(row)
    return costs


def _count_min_cache_bytes(c: ConfigDict, s: ConfigDict, models: StageModels) -> float:
    """Bytes on each device without which nothing is sampled: the weights that decode and, of the
    share of what is left that the cache takes, one of the longest rows."""
    sampler = sampling_programs.make_stage_sampler(c, s, 1, models, None)
    share = s.rollout.cache_tokens or stages.CACHE_MEMORY_FRACTION
    longest = s.max_prompt_tokens + s.max_response_tokens
    return sampler.weight_bytes + longest * sampler.token_bytes / min(1.0, share)


def compile_run(c: ConfigDict, topology: str) -> dict[str, list[ProgramCost]]:
    """Stage -> its programs, compiled for a slice. Raises TooLarge as `rows_of` does."""
    mesh, teacher_mesh = mesh_lib.make_meshes(c, aot.get_devices(topology))
    size = mesh.size + (teacher_mesh.size if teacher_mesh != mesh else 0)
    if size < len(aot.get_devices(topology)):
        raise UserError(
            f"config.mesh: {size} devices, but {topology} has {len(aot.get_devices(topology))}"
        )
    return {name: compile_stage(c, name, topology, mesh, teacher_mesh) for name in c.stages}


def forecast_stages(
    c: ConfigDict, topology: str, stage_costs: dict[str, list[ProgramCost]], mean_tokens: int
) -> dict[str, forecast.Forecast]:
    """Stage -> its step at responses of a mean length, of programs that are compiled."""
    mesh, teacher_mesh = mesh_lib.make_meshes(c, aot.get_devices(topology))
    forecasts = {}
    for name, rows in stage_costs.items():
        s = c[name]
        loss, sampled = stages.resolve_objective(name, s)
        teachers = tuple(s.teachers) if stages.needs_teacher(s, loss) else ()
        models = describe_models(c, mesh, teacher_mesh, teachers, loss.reference > 0)
        chip = aot.get_chip(topology)
        forecasts[name] = forecast.forecast_stage(
            c, s, sampled, models, mesh, chip, rows, mean_tokens
        )
    return forecasts


def list_remedies(c: ConfigDict, program: str) -> list[tuple[str, ConfigDict]]:
    """What makes this program smaller, the cheapest first: what it is called, and the config."""
    remedies: list[tuple[str, ConfigDict]] = []

    def add_remedy(flag: str, value: Any) -> None:
        changed = copy.deepcopy(c)
        with changed.unlocked():
            at = changed
            *path, last = flag.split(".")
            for key in path:
                at = at[key]
            if at[last] == value:
                return
            at[last] = value
        remedies.append((f"--config.{flag}={value}", changed))

    sampling = program in SAMPLING_PROGRAMS
    training = program in ("accumulate", "old log-probs", "reference")
    training |= program.startswith(("score", "judge"))
    if training:
        add_remedy("student.remat", True)
    if sampling:
        for parts in (2, 4, 8):
            add_remedy("mesh.tensor", max(parts, c.mesh.tensor))
    for name in c.stages:
        s = c[name]
        if training:
            add_remedy(f"{name}.rollout.asynchronous", False)
            for more in (2, 4, 8):
                add_remedy(f"{name}.accumulate", s.accumulate * more)
        if sampling:
            add_remedy(f"{name}.rollout.gather_weights", False)
            add_remedy(f"{name}.rollout.cache_dtype", "float8_e4m3fn")
            if s.rollout.cache_tokens < 1:
                for share in (0.6, 0.4):
                    add_remedy(f"{name}.rollout.cache_tokens", share)
            elif s.rollout.slots:
                for fewer in (2, 4, 8):
                    add_remedy(f"{name}.rollout.slots", max(1, s.rollout.slots // fewer))
    if c.teacher.path:
        add_remedy("teacher.param_dtype", "int8")
    if not c.student.lora.rank:
        add_remedy("student.lora.rank", 32)
    return remedies


def find_remedy(c: ConfigDict, topology: str, program: str) -> dict[str, Any] | None:
    """The first change with which the run fits, and the slice's fullest program then."""
    for flag, changed in list_remedies(c, program):
        try:
            stage_costs = compile_run(changed, topology)
        except (TooLarge, UserError):
            continue
        return {"change": flag, "peak_gib": roofline.find_peak_gib(stage_costs)}
    generation, _, shape = topology.partition(":")
    shapes = SLICES[generation]
    size = math.prod(map(int, shape.split("x")))
    for larger in shapes:
        if math.prod(map(int, larger.split("x"))) > size:
            try:
                stage_costs = compile_run(c, f"{generation}:{larger}")
            except (TooLarge, UserError):
                continue
            change = f"--topology={generation}:{larger}"
            return {"change": change, "peak_gib": roofline.find_peak_gib(stage_costs)}
    return None
