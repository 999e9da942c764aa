"""A config made into a plan: everything a user can get wrong is found here, before any weight is
read or file written."""

import dataclasses
import functools

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import data, optim, packing, policy, rollout
from distill import mesh as mesh_lib
from distill.policy import Policy
from models.errors import UserError
from models.qwen3.lora import LoRA

OBJECTIVES = ("sft", "opd")
TRACES = ("sft",)  # those of them that read written responses; the others sample


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage with all that it needs checked and at hand; `first` is its first global step."""

    name: str
    c: ConfigDict
    first: int
    source: data.Source
    optimizer: optax.GradientTransformation
    packer: packing.Packer | None = None  # where rows hold several examples
    parked: rollout.Parked | None = None  # where a budget of tokens ends its steps

    @property
    def end(self) -> int:
        return self.first + self.c.steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run: models described but not loaded, stages in order.

    `run` loads the teacher, and the student where it is the frozen base of a LoRA.
    """

    student: Policy
    teacher: Policy | None
    stages: tuple[Stage, ...]


def prepare(c: ConfigDict, mesh: Mesh) -> Plan:
    """Checks everything a user can get wrong, before any weight is read or file written.

    Raises:
      UserError: naming the flag, file or row at fault.
    """
    if c.seed < 0:
        raise UserError(f"config.seed={c.seed}: must be 0 or more")
    if not c.stages:
        raise UserError("config.stages: names no stage")
    for name in c.stages:
        if name not in c or not isinstance(c[name], ConfigDict) or "objective" not in c[name]:
            raise UserError(f"config.stages: {name!r} is no stage of this config")
        if c[name].objective not in OBJECTIVES:
            raise UserError(
                f"config.{name}.objective: {c[name].objective!r} is none of {', '.join(OBJECTIVES)}"
            )
    for field in ("student", "teacher"):
        needed = field == "student" or any(c[name].objective == "opd" for name in c.stages)
        if needed and not c[field].path:
            raise UserError(f"config.{field}.path: name a model directory")
    for field, dtype, allowed in (
        ("student.dtype", c.student.dtype, policy.DTYPES),
        ("student.param_dtype", c.student.param_dtype, policy.DTYPES),
        ("teacher.dtype", c.teacher.dtype, policy.DTYPES),
        ("teacher.param_dtype", c.teacher.param_dtype, policy.PARAM_DTYPES),
    ):
        if dtype not in allowed:
            raise UserError(f"config.{field}: {dtype!r} is none of {', '.join(allowed)}")
    m = c.student
    student = policy.describe(
        m.path,
        m.dtype,
        m.remat,
        mesh,
        trained=_lora(m),
        kernel=c.attention,
        tokenizer_of=m.tokenizer,
    )
    if c.student.balance_loss and not any(student.config.sparse_layers):
        raise UserError(f"config.student.balance_loss: {c.student.path} has no experts to balance")
    if not c.student.random_init:
        policy.check(student)
    taught = None
    if any(c[name].objective == "opd" for name in c.stages):
        taught = policy.describe(c.teacher.path, c.teacher.dtype, False, mesh, kernel=c.attention)
        policy.require_same_vocabulary(student, taught)
        policy.check(taught)
    stages, first = [], 0
    for name in c.stages:
        s = c[name]
        _check_stage(name, s, student, taught, mesh)
        require = functools.partial(
            data.require,
            limit=s.max_prompt_tokens,
            field=f"config.{name}.max_prompt_tokens",
            vocab_size=student.config.vocab_size,
        )
        traces = s.objective in TRACES
        source = data.load(s.data, student.tokenizer, c.seed, traces, require)
        packer = None
        if s.pack_tokens:
            packer = packing.Packer(
                source, c.seed, s.batch_size, s.pack_tokens, s.max_response_tokens
            )
        parked = rollout.Parked() if s.rollout.budget else None
        stages.append(Stage(name, s, first, source, optim.make(s.optim, s.steps), packer, parked))
        first += s.steps
    return Plan(student, taught, tuple(stages))


def _lora(s: ConfigDict) -> LoRA | None:
    if not s.lora.rank:
        return None
    if s.random_init:
        raise UserError("config.student.lora.rank: nothing keeps a random base; train all of it")
    try:
        return LoRA(s.lora.rank, s.lora.alpha, s.lora.rslora, tuple(s.lora.targets))
    except UserError as error:
        raise UserError(f"config.student.{error}") from None


def _check_stage(
    name: str, s: ConfigDict, student: Policy, taught: Policy | None, mesh: Mesh
) -> None:
    counts = ("steps", "batch_size", "samples", "accumulate")
    for field in (*counts, "max_prompt_tokens", "max_response_tokens"):
        if s[field] < 1:
            raise UserError(f"config.{name}.{field}={s[field]}: must be at least 1")
    if s.rollout.budget < 0:
        raise UserError(f"config.{name}.rollout.budget={s.rollout.budget}: must be 0 (off) or more")
    try:
        options = rollout_options(s)
    except UserError as error:
        raise UserError(f"config.{name}.rollout.{error}") from None
    sampling(s).require(student.config.vocab_size)  # the former refuses what is no distribution
    total = s.max_prompt_tokens + s.max_response_tokens
    room = options.room(mesh_lib.row_shards(mesh))
    if room < total:
        raise UserError(
            f"config.{name}.rollout.cache_tokens={options.cache_tokens}: leaves {room} tokens for "
            f"a row, which may have max_prompt_tokens + max_response_tokens = {total}"
        )
    for reader in (student, taught) if taught and s.objective == "opd" else (student,):
        limit = reader.config.context_length
        if total > limit:
            raise UserError(
                f"config.{name}: max_prompt_tokens + max_response_tokens = {total} exceeds the "
                f"model's {limit} positions ({reader.path})"
            )
    if s.pack_tokens and s.objective not in TRACES:
        raise UserError(f"config.{name}.pack_tokens: {s.objective} samples, and packs nothing")
    if s.pack_tokens < 0 or 0 < s.pack_tokens < total:
        raise UserError(
            f"config.{name}.pack_tokens={s.pack_tokens}: a row must hold max_prompt_tokens + "
            f"max_response_tokens = {total}"
        )
    rows = s.accumulate * mesh_lib.row_shards(mesh)
    for field, parts in (("accumulate times the devices", rows), ("samples", s.samples)):
        if s.batch_size % parts:
            raise UserError(
                f"config.{name}.batch_size={s.batch_size} does not divide by {field} ({parts})"
            )


def sampling(s: ConfigDict) -> rollout.Sampling:
    """What a stage draws its tokens from."""
    return rollout.Sampling(**s.sampling)


def rollout_options(s: ConfigDict) -> rollout.Options:
    """How the device samples a stage's rows."""
    r = s.rollout
    return rollout.Options(
        slots=r.slots or s.batch_size,
        longest=s.max_prompt_tokens + s.max_response_tokens,
        segment=r.segment,
        chunk=r.chunk,
        cache_tokens=r.cache_tokens,
        cache_dtype=r.cache_dtype,
        gathered=r.gathered,
    )
