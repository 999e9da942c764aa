"""Which programs a config runs on a slice, compiled: whether they fit, and how fast they can be."""

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.planning import aot, forecast, programs, roofline
from distill.planning.roofline import GIB, Row
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import memory, sampling_programs, stages
from distill.training.calls import Models
from models.errors import UserError
from models.qwen3.config import SIZES

SLICES = {  # whole slices of a generation, smallest first
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
SAMPLING = ("merge", "weights", "cache", "prompts", "few prompts", "decode", "remember")
STOPS = (151645, 151643)  # what a released model stops at: <|im_end|>, <|endoftext|>


class TooLarge(Exception):
    """A program does not fit."""

    def __init__(self, name: str, needs_gib: float, largest: list[tuple[str, str]]) -> None:
        self.program, self.needs_gib, self.largest = name, needs_gib, largest
        super().__init__(name)


def describe(path: str, dtype: str, remat: bool, mesh: Mesh, flag: str, **kinds: Any) -> Policy:
    """A model of which only the shape is known: a directory's, or a released size's.

    Raises:
      UserError: for neither, or where the mesh does not divide it.
    """
    if not path:
        raise UserError(f"config.{flag}.path: name a model directory")
    released = re.fullmatch(r"Qwen/Qwen3-([\w.-]+?)(-Base)?", path)
    name = released.group(1).lower() if released else ""
    if name in SIZES and not Path(path).exists():
        config = SIZES[name]
        mesh_lib.check(config, mesh, path)
        return policy.shaped(path, config, dtype, remat, mesh, **kinds)
    described = policy.describe(path, dtype, remat, mesh, **kinds)
    return described


def models_of(
    c: ConfigDict, mesh: Mesh, apart: Mesh, teachers: tuple[str, ...], referred: bool
) -> Models:
    """The run's models, in the dtypes that `train` loads them in; on `apart` those only read."""
    m, lora = c.student, stages.lora(c.student)
    kind: dict[str, Any] = {"kernel": c.attention, "packed": stages.packs(c)}
    student = describe(m.path, m.dtype, m.remat, mesh, "student", trained=lora, **kind)
    if not student.stop_ids:
        student = dataclasses.replace(student, stop_ids=STOPS)
    trained = mesh_lib.parameters(student.config, mesh, lora)
    plain = dataclasses.replace(student, model=student.model.clone(remat=False, lora=None))
    there = dataclasses.replace(plain, params=mesh_lib.parameters(student.config, apart))
    if lora:
        student = dataclasses.replace(student, params=policy.loaded(student, m.param_dtype))
    read = {}
    for name in teachers:
        t = c[name]
        if t.path == local.EMA:
            read[name] = dataclasses.replace(
                plain, params=mesh_lib.parameters(student.config, mesh)
            )
            if lora:
                beside = student.model.clone(remat=False)
                read[name] = dataclasses.replace(student, model=beside)
        elif t.path == local.INITIAL:
            at = plain if local.is_base(student) else there
            read[name] = dataclasses.replace(plain, params=policy.loaded(at, t.param_dtype))
        else:
            found = describe(t.path, t.dtype, False, apart, name, **kind)
            read[name] = dataclasses.replace(found, params=policy.loaded(found, t.param_dtype))
    reference = None
    if referred and not local.is_base(student):
        reference = dataclasses.replace(plain, params=policy.loaded(there, m.param_dtype))
    return Models(student, trained, read, reference)


def rows_of(c: ConfigDict, name: str, topology: str, mesh: Mesh, apart: Mesh) -> list[Row]:
    """Compiles the programs of a stage; `apart` is the mesh of what is only read.

    Raises:
      TooLarge: at the first that does not fit beside what else is in memory.
    """
    chip, s = aot.chip(topology), c[name]
    loss, sampled = stages.objective(name, s)
    teachers = tuple(s.teachers) if stages.taught(s, loss) else ()
    local.check(c, name, s, bool(teachers))
    models = models_of(c, mesh, apart, teachers, loss.reference > 0)
    stages.require_rows(name, s, mesh, apart)
    stages.require_tokens(name, s, mesh, apart)
    kept = {at: memory.held(c, models, s, at) for at in {mesh, apart}}
    largest = {
        at: sorted(((f"{size / GIB:.2f}G", n) for n, size in of.items()), key=lambda x: -of[x[1]])
        for at, of in kept.items()
    }
    for at, of in kept.items():
        if sum(of.values()) > chip.hbm_gib * GIB:
            raise TooLarge("what the run keeps", sum(of.values()) / GIB, largest[at])
    if sampled:
        needs = _least_cache(c, s, models) + sum(kept[mesh].values())
        if needs > chip.hbm_gib * GIB:
            raise TooLarge("cache", needs / GIB, largest[mesh])
    found = []
    with mesh_lib.use(mesh), jax.default_matmul_precision(None):
        calls = programs.of_stage(c, s, loss, sampled, models, mesh, chip.hbm_gib * GIB)
    for call in calls:
        at = call.mesh or mesh
        beside = sum(size for of, size in kept[at].items() if of not in call.holds) + call.beside
        with mesh_lib.use(at), jax.default_matmul_precision(None):
            try:
                program = aot.compile(call.name, call.lower, chip.hbm_gib)
            except aot.OutOfMemory as error:
                needs = error.needs_gib + beside / GIB
                raise TooLarge(call.name, needs, [*error.largest, *largest[at]][:6]) from None
        row = roofline.row(call, program, beside, chip, at.size)
        if row.total > chip.hbm_gib * GIB:
            raise TooLarge(call.name, row.total / GIB, largest[at])
        found.append(row)
    return found


def _least_cache(c: ConfigDict, s: ConfigDict, models: Models) -> float:
    """Bytes on each device without which nothing is sampled: the weights that decode and, of the
    share of what is left that the cache takes, one of the longest rows."""
    sampler = sampling_programs.of_stage(c, s, 1, models, None)
    share = s.rollout.cache_tokens or stages.SHARE
    longest = s.max_prompt_tokens + s.max_response_tokens
    return sampler.copy + longest * sampler.token / min(1.0, share)


def compiled(c: ConfigDict, topology: str) -> dict[str, list[Row]]:
    """Stage -> its programs, compiled for a slice. Raises TooLarge as `rows_of` does."""
    mesh, apart = mesh_lib.meshes(c, aot.devices(topology))
    size = mesh.size + (apart.size if apart != mesh else 0)
    if size < len(aot.devices(topology)):
        raise UserError(
            f"config.mesh: {size} devices, but {topology} has {len(aot.devices(topology))}"
        )
    return {name: rows_of(c, name, topology, mesh, apart) for name in c.stages}


def forecasts(
    c: ConfigDict, topology: str, found: dict[str, list[Row]], mean: int
) -> dict[str, forecast.Forecast]:
    """Stage -> its step at responses of a mean length, of programs that are compiled."""
    mesh, apart = mesh_lib.meshes(c, aot.devices(topology))
    told = {}
    for name, rows in found.items():
        s = c[name]
        loss, sampled = stages.objective(name, s)
        teachers = tuple(s.teachers) if stages.taught(s, loss) else ()
        models = models_of(c, mesh, apart, teachers, loss.reference > 0)
        chip = aot.chip(topology)
        told[name] = forecast.of_stage(c, s, sampled, models, mesh, chip, rows, mean)
    return told


def remedies(c: ConfigDict, program: str) -> list[tuple[str, ConfigDict]]:
    """What makes this program smaller, the cheapest first: what it is called, and the config."""
    found: list[tuple[str, ConfigDict]] = []

    def add(flag: str, value: Any) -> None:
        changed = copy.deepcopy(c)
        with changed.unlocked():
            at = changed
            *path, last = flag.split(".")
            for key in path:
                at = at[key]
            if at[last] == value:
                return
            at[last] = value
        found.append((f"--config.{flag}={value}", changed))

    sampling = program in SAMPLING
    training = program in ("accumulate", "old log-probs", "reference")
    training |= program.startswith(("score", "judge"))
    if training:
        add("student.remat", True)
    if sampling:
        for parts in (2, 4, 8):
            add("mesh.tensor", max(parts, c.mesh.tensor))
    for name in c.stages:
        s = c[name]
        if training:
            add(f"{name}.rollout.ahead", False)
            for more in (2, 4, 8):
                add(f"{name}.accumulate", s.accumulate * more)
        if sampling:
            add(f"{name}.rollout.gathered", False)
            add(f"{name}.rollout.cache_dtype", "float8_e4m3fn")
            if s.rollout.cache_tokens < 1:
                for share in (0.6, 0.4):
                    add(f"{name}.rollout.cache_tokens", share)
            elif s.rollout.slots:
                for fewer in (2, 4, 8):
                    add(f"{name}.rollout.slots", max(1, s.rollout.slots // fewer))
    if c.teacher.path:
        add("teacher.param_dtype", "int8")
    if not c.student.lora.rank:
        add("student.lora.rank", 32)
    return found


def helped(c: ConfigDict, topology: str, program: str) -> dict[str, Any] | None:
    """The first change with which the run fits, and the slice's fullest program then."""
    for flag, changed in remedies(c, program):
        try:
            found = compiled(changed, topology)
        except (TooLarge, UserError):
            continue
        return {"change": flag, "peak_gib": roofline.fullest(found)}
    generation, _, shape = topology.partition(":")
    shapes = SLICES[generation]
    size = math.prod(map(int, shape.split("x")))
    for larger in shapes:
        if math.prod(map(int, larger.split("x"))) > size:
            try:
                found = compiled(c, f"{generation}:{larger}")
            except (TooLarge, UserError):
                continue
            change = f"--topology={generation}:{larger}"
            return {"change": change, "peak_gib": roofline.fullest(found)}
    return None
