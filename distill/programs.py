"""The programs of a stage as `train` calls them, lowered from shapes alone.

Nothing is read or allocated, and the devices of the mesh need not exist: what a slice will have to
run can be compiled on a laptop. Each program knows what lies in memory beside it while it runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from distill import losses, optim, policy, prepare, sampling_programs, stages, teacher, update
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.calls import Call, Models, bytes_of, operations
from distill.policy import Policy
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
    read = {name: x for name, x in models.teachers.items() if not _own(c, name, models)}
    if models.reference:
        read["reference"] = models.reference
    for name, reader in read.items():
        if policy.mesh_of(reader) == mesh:
            kept[name] = bytes_of(reader.params)
        elif mesh == home and name in models.teachers:
            kept[f"head of {name}"] = bytes_of(_head(reader, home))
    return kept


def _head(reader: Policy, mesh: Mesh) -> Any:
    """The output head of a teacher as the update reads it: on the student's mesh."""
    head_VE, like = model.head(reader.params), model.head(mesh_lib.parameters(reader.config, mesh))
    return jax.ShapeDtypeStruct(head_VE.shape, head_VE.dtype, sharding=like.sharding)


def _own(c: ConfigDict, name: str, models: Models) -> str:
    """Where a teacher is what the run keeps anyway: what that is called."""
    path = c[name].path
    if path == teacher.EMA:
        return "average"
    return "base" if path == teacher.INITIAL and teacher.is_base(models.student) else ""


def of_stage(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    sampled: int,
    models: Models,
    mesh: Mesh,
    limit: float | None = None,
) -> list[Call]:
    """The programs of one step of a stage, in their order; how often they are called if no response
    is shorter than it may be.

    To be called, and its results lowered, within `mesh_lib.use(mesh)`, or of the call's own mesh.
    limit: bytes of memory that a device has, where that is known.
    """
    readers = [*models.teachers.values(), *([models.reference] if models.reference else [])]
    rows = stages.microbatch_rows(s, sampled, mesh, *map(policy.mesh_of, readers))
    turns = s.minibatches * -(-s.batch_size // (s.minibatches * rows))
    calls, room = [], None
    if sampled and limit:
        left = limit - sum(held(c, models, s).values())
        room = sampling_programs.cache_room(s, models, mesh, left)
    if sampled:
        calls += sampling_programs.of_sampling(s, sampled, models, mesh, room)
    # The gradient so far lies beside what is called between two micro-batches.
    gradient = 0 if single(s, sampled) else bytes_of(models.trained)
    calls += _reading(c, s, loss, models, mesh, rows, turns, gradient)
    optimizer = optim.make(s.optim, s.steps * s.epochs * s.minibatches)
    state = update.abstract(optimizer, models.trained, c.student.ema > 0)
    programs = prepare.updater(c, s, loss, optimizer, models.student, mesh, state)
    student, frozen = models.student, None
    if student.model.lora:
        frozen = student.params
    base = ("base",) if frozen is not None else ()
    micro, heads = _microbatch(s, loss, sampled, models, mesh, rows)
    tokens, mean = rows * stages.row_tokens(s), (stages.row_tokens(s) + 1) / 2
    forward = operations(student.config, tokens, mean, head=True)
    if s.epochs * s.minibatches > 1:
        known = dataclasses.replace(micro, teacher_hidden_BTD=None, old_logp_BT=None)
        before = functools.partial(programs.logp.lower, state.params, known, frozen)
        calls.append(Call("old log-probs", before, turns, forward, ("parameters", *base)))
    # With a LoRA, the gradient of the base's own products is that of their inputs alone.
    useful = (2 if student.model.lora else 3) * forward
    useful += sum(2.0 * tokens * head.shape[0] * head.shape[1] for head in heads)
    so_far = None if single(s, sampled) else state.params
    train = functools.partial(programs.accumulate.lower, so_far, state.params, micro, heads, frozen)
    holds = ("parameters", *base, *(f"head of {name}" for name in models.teachers))
    calls.append(Call("accumulate", train, turns * s.epochs, useful, holds))
    figures = jax.eval_shape(programs.accumulate, so_far, state.params, micro, heads, frozen)[1]
    end = functools.partial(programs.apply.lower, state, state.params, figures, 1)
    holds = ("parameters", "optimiser", "average")
    return [*calls, Call("apply", end, s.epochs * s.minibatches, 0.0, holds)]


def single(s: ConfigDict, sampled: int) -> bool:
    """Whether an update has one micro-batch, always, and no gradient lies beside its own."""
    return not sampled and s.accumulate == 1


def _arrays(mesh: Mesh, rows: int, *shape: int) -> Callable[..., Any]:
    """What makes shapes of arrays [rows, *shape, ...], split by rows."""

    def array(dtype: Any, *more: int, sharding: Any = None) -> Any:
        sharding = sharding or mesh_lib.rows(mesh)
        return jax.ShapeDtypeStruct((rows, *shape, *more), jnp.dtype(dtype), sharding=sharding)

    return array


def _tokens(mesh: Mesh, rows: int, T: int) -> Batch:
    """Shapes of what models read."""
    array = _arrays(mesh, rows, T)
    return Batch(array("int32"), array("int32"), array("int32"), array("bool"))


def _microbatch(
    s: ConfigDict, loss: losses.Loss, sampled: int, models: Models, mesh: Mesh, rows: int
) -> tuple[Batch, tuple[Any, ...]]:
    """Shapes of a micro-batch as the update reads it, and of the teachers' heads."""
    T, known, heads = stages.row_tokens(s), {}, ()
    array = _arrays(mesh, rows, T)
    if sampled == s.batch_size:
        known |= {"sampler_logp_BT": array("float32"), "finished_BT": array("bool")}
    if loss.reward:
        known["advantages_BT"] = array("float32")
    if loss.reference:
        known["reference_logp_BT"] = array("float32")
    if s.epochs * s.minibatches > 1:
        known["old_logp_BT"] = array("float32")
    if loss.served == "top":
        of = array("int32", loss.served_k), array("float32", loss.served_k)
        known["teacher_top_BTK"] = of
    if loss.teacher and models.teachers:
        stream = NamedSharding(mesh, mesh_lib.stream(mesh, T))
        known["teacher_hidden_BTD"] = tuple(
            array(of.model.dtype, of.config.hidden_size, sharding=stream)
            for of in models.teachers.values()
        )
        heads = tuple(_head(of, mesh) for of in models.teachers.values())
    if len(models.teachers) > 1:
        known["teacher_share_BTN"] = array("float32", len(models.teachers))
    read = _tokens(mesh, rows, T)
    return dataclasses.replace(read, thinking_BT=array("bool"), **known), heads


def _reading(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    models: Models,
    mesh: Mesh,
    rows: int,
    turns: int,
    gradient: int,
) -> list[Call]:
    """What models that are only read make of the micro-batches: judges, teachers, a reference; of
    which the latter two do so beside a `gradient` of so many bytes."""
    T, mib, calls = stages.row_tokens(s), stages.logits_mib(c, mesh), []
    room = s.context.max_tokens if s.context.text or s.context.column else 0

    def called(what: str, name: str) -> str:
        return what if name == "teacher" else f"{what} {name}"

    def logps(name: str, of: Policy, T: int, temperature: float, holds: str, beside: int) -> Call:
        there = policy.mesh_of(of)
        given = (of.model, mib, temperature, of.params, None, _tokens(there, rows, T))
        lower = functools.partial(teacher.logps.lower, *given)
        useful = operations(of.config, rows * T, (T + 1) / 2, head=True)
        beside = beside if there == mesh else 0
        return Call(name, lower, turns, useful, (holds,), beside, there)

    for name, of in models.teachers.items():
        there, holds = policy.mesh_of(of), _own(c, name, models) or name
        if loss.reward and s.reward.judge:
            calls.append(logps(called("judge", name), of, T + room, 1.0, holds, 0))
        if loss.teacher:
            at_BT = _arrays(there, rows, T)("int32") if room else None
            given = (of.model, of.params, None, _tokens(there, rows, T + room), at_BT)
            lower = functools.partial(teacher.hidden.lower, *given)
            useful = operations(of.config, rows * (T + room), (T + room + 1) / 2, head=False)
            beside = gradient if there == mesh else 0
            calls.append(
                Call(
                    called("score", name), lower, turns * s.epochs, useful, (holds,), beside, there
                )
            )
    if loss.reference:
        of, holds = models.reference or models.student, "reference" if models.reference else "base"
        at = stages.read_at(s, loss)
        calls.append(logps("reference", of, T, at, holds, gradient))
    return calls
