"""The programs of a stage as `train` calls them, lowered from shapes alone.

Nothing is read or allocated, and the devices of the mesh need not exist: what a slice will have to
run can be compiled on a laptop. Each program knows what lies in memory beside it while it runs.
What is left out is in calls.SMALL.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from distill.batch import Batch
from distill.objectives import losses
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import memory, optim, sampling_programs, setup, stages
from distill.training import update as update_lib
from distill.training.calls import Call, Models, bytes_of, operations
from distill.training.memory import head_of, own, single
from models.qwen3 import model


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
    calls, ahead = [], (0, 0)
    if sampled:
        room = memory.cache_room(c, s, sampled, models, rows, limit) if limit else None
        sampler = sampling_programs.of_stage(c, s, sampled, models, room)
        calls += sampling_programs.programs(sampler)
        if s.rollout.ahead:  # the next step's weights lie there, and soon its cache
            ahead = (sampler.copy, sampler.copy + sampler.cache)
    calls += _reading(c, s, loss, models, mesh, rows, turns, ahead)
    calls += _update(c, s, loss, sampled, models, mesh, rows, turns, ahead)
    if c.eval.every:
        calls += sampling_programs.evaluation(c, s, models)
    return calls


def _update(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    sampled: int,
    models: Models,
    mesh: Mesh,
    rows: int,
    turns: int,
    ahead: tuple[int, int],
) -> list[Call]:
    """What trains, and what begins the state that is trained."""
    optimizer = optim.make(s.optim, s.steps * s.epochs * s.minibatches)
    state = update_lib.abstract(optimizer, models.trained, c.student.ema > 0)
    programs = setup.updater(c, s, loss, optimizer, models.student, mesh, state)
    student, frozen, calls = models.student, None, _beginning(c, s, models, optimizer, mesh)
    if student.model.lora:
        frozen = student.params
    base = ("base",) if frozen is not None else ()
    micro, heads, shared = _microbatch(c, s, loss, sampled, models, mesh, rows)
    tokens, mean = rows * stages.row_tokens(s), (stages.row_tokens(s) + 1) / 2
    forward = operations(student.config, tokens, mean, head=True)
    head = 2.0 * tokens * student.config.hidden_size * student.config.vocab_size
    if s.epochs * s.minibatches > 1:
        known = dataclasses.replace(micro, teacher_hidden_BTD=None, old_logp_BT=None)
        known = dataclasses.replace(known, reference_logp_BT=None)
        before = functools.partial(programs.logp.lower, state.params, known, frozen)
        holds = ("parameters", *base)
        read = Call("old log-probs", before, turns, forward, holds, ahead[0], kind="read")
        calls.append(dataclasses.replace(read, head=head))
    # With a LoRA, the gradient of the base's own products is that of their inputs alone.
    passes = 2 if student.model.lora else 3
    of_heads = sum(2.0 * tokens * x.shape[0] * x.shape[1] for x in heads)
    useful, head = passes * forward + of_heads, passes * head + of_heads
    so_far = None if single(s, sampled) else state.params
    updates = s.epochs * s.minibatches
    if so_far is not None:
        zeros = functools.partial(programs.zeros.lower, state.params)
        calls.append(Call("zeros", zeros, updates, 0.0, (), ahead[1]))
    given = (so_far, state.params, micro, heads, frozen)
    train = functools.partial(programs.accumulate.lower, *given)
    holds = ("parameters", *base, *(f"head of {name}" for name in models.teachers))
    beside = ahead[1] - shared
    read = Call("accumulate", train, turns * s.epochs, useful, holds, beside, kind="train")
    calls.append(dataclasses.replace(read, head=head))
    _, figures, stats = jax.eval_shape(programs.accumulate, *given)
    end = functools.partial(programs.apply.lower, state, state.params, figures, 1)
    holds = ("parameters", "optimiser", "average")
    calls.append(Call("apply", end, updates, 0.0, holds, ahead[1]))
    if c.log.transcripts:
        split = jax.tree.map(lambda x: _arrays(mesh, *x.shape)(x.dtype), stats)
        shown = (micro.tokens_BT, micro.mask_BT, micro.segments_BT, micro.finished_BT, split)
        taken = functools.partial(mesh_lib.first_rows.lower, shown, rows)
        calls.append(Call("transcripts", taken, 1 / c.log.transcripts_every, 0.0, (), ahead[1]))
    return calls


def _beginning(
    c: ConfigDict, s: ConfigDict, models: Models, optimizer: Any, mesh: Mesh
) -> list[Call]:
    """What runs once, before a stage's first step."""
    kept, student, calls = memory.held(c, models, s), models.student, []
    first = s is c[c.stages[0]]
    # Of the first stage no teacher is there yet; of a later one the last one's optimiser still is.
    read = sum(kept.get(name, 0) for name in (*models.teachers, "reference"))
    beside = -read if first else kept["optimiser"]
    if first and (c.student.random_init or student.model.lora):
        drawn = policy.drawing(student, student.model.lora)
        begun = functools.partial(drawn.lower, jax.eval_shape(jax.random.key, 0))
        holds = ("parameters", "optimiser", "average")
        calls.append(Call("first parameters", begun, 0, 0.0, holds, beside))
    started = functools.partial(update_lib.starter(optimizer, models.trained).lower, models.trained)
    calls.append(Call("optimiser", started, 0, 0.0, ("parameters", "optimiser"), beside))
    for name, of in models.teachers.items():
        there = policy.mesh_of(of)
        if there != mesh:  # between processes it travels whole
            whole = functools.partial(jax.jit(mesh_lib.whole).lower, model.head(of.params))
            calls.append(Call(f"head of {name}", whole, 0, 0.0, (), 0, there))
            calls[-1] = dataclasses.replace(calls[-1], beside=-bytes_of(model.head(of.params)))
    return calls


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
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    sampled: int,
    models: Models,
    mesh: Mesh,
    rows: int,
) -> tuple[Batch, tuple[Any, ...], int]:
    """Shapes of a micro-batch as the update reads it, and of the teachers' heads; of which so many
    bytes are of parameters that the run keeps on these devices."""
    T, known, heads, shared = stages.row_tokens(s), {}, (), 0
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
        heads = tuple(head_of(of, mesh) for of in models.teachers.values())
        here = [policy.mesh_of(of) == mesh for of in models.teachers.values()]
        shared = sum(bytes_of(head) for head, at in zip(heads, here, strict=True) if at)
    if sampled and c.student.replay_routing:
        known["experts_BTLA"] = array("int16", *models.student.config.routing)
    if len(models.teachers) > 1:
        known["teacher_share_BTN"] = array("float32", len(models.teachers))
    read = _tokens(mesh, rows, T)
    return dataclasses.replace(read, thinking_BT=array("bool"), **known), heads, shared


def _reading(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    models: Models,
    mesh: Mesh,
    rows: int,
    turns: int,
    ahead: tuple[int, int],
) -> list[Call]:
    """What models that are only read make of the micro-batches: judges, teachers, a reference.

    The latter two do so beside the gradient so far, or before the first update; several teachers
    beside what those before them found."""
    T, mib, calls = stages.row_tokens(s), stages.logits_mib(c, mesh), []
    room = s.context.max_tokens if s.context.text or s.context.column else 0
    sampled = stages.objective("", s)[1]
    gradient = 0 if single(s, sampled) else bytes_of(models.trained)
    found, average = 0, models.trained if models.student.model.lora else None

    def called(what: str, name: str) -> str:
        return what if name == "teacher" else f"{what} {name}"

    def call(
        name: str,
        of: Policy,
        lower: Any,
        turns: int,
        useful: float,
        holds: str,
        beside: int,
        head: float = 0.0,
    ) -> Call:
        there = policy.mesh_of(of)
        beside = beside if there == mesh else 0
        names = ("average", "base") if holds == "average" else (holds,)  # of a LoRA, its base too
        return Call(name, lower, turns, useful, names, beside, there, kind="read", head=head)

    def logps(name: str, of: Policy, T: int, temperature: float, holds: str, beside: int) -> Call:
        given = (of.model, mib, temperature, of.params, average if holds == "average" else None)
        lower = functools.partial(local.logps.lower, *given, _tokens(policy.mesh_of(of), rows, T))
        useful = operations(of.config, rows * T, (T + 1) / 2, head=True)
        head = 2.0 * rows * T * of.config.hidden_size * of.config.vocab_size
        return call(name, of, lower, turns, useful, holds, beside, head)

    for name, of in models.teachers.items():
        there, holds = policy.mesh_of(of), own(c, name, models) or name
        if loss.reward and s.reward.judge:
            calls.append(logps(called("judge", name), of, T + room, 1.0, holds, ahead[0]))
        if loss.teacher:
            at_BT = _arrays(there, rows, T)("int32") if room else None
            lora = average if holds == "average" else None
            given = (of.model, of.params, lora, _tokens(there, rows, T + room), at_BT)
            lower = functools.partial(local.hidden.lower, *given)
            useful = operations(of.config, rows * (T + room), (T + room + 1) / 2, head=False)
            beside = gradient + ahead[1] + found
            named = called("score", name)
            calls.append(call(named, of, lower, turns * s.epochs, useful, holds, beside))
            stream = NamedSharding(mesh, mesh_lib.stream(mesh, T))
            array = _arrays(mesh, rows, T)
            found += bytes_of(array(of.model.dtype, of.config.hidden_size, sharding=stream))
    if loss.reference:
        of, holds = models.reference or models.student, "reference" if models.reference else "base"
        at = stages.read_at(s, loss)
        calls.append(logps("reference", of, T, at, holds, gradient + ahead[1]))
    return calls
