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

from distill.batch import Batch, TeacherOutput
from distill.objectives import losses
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import memory, optim, sampling_programs, setup, stages
from distill.training import update as update_lib
from distill.training.calls import ProgramCall, StageModels, count_device_bytes
from distill.training.memory import get_resident_name, has_single_microbatch, make_head_shape
from models import families, transformer


def list_stage_calls(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    sampled: int,
    models: StageModels,
    mesh: Mesh,
    memory_limit: float | None = None,
) -> list[ProgramCall]:
    """The programs of one step of a stage, in their order; how often they are called if no response
    is shorter than it may be.

    To be called, and its results lowered, within `mesh_lib.use(mesh)`, or of the call's own mesh.
    limit: bytes of memory that a device has, where that is known.
    """
    readers = [*models.teachers.values(), *([models.reference] if models.reference else [])]
    rows = stages.compute_microbatch_rows(s, sampled, mesh, *map(policy.get_mesh, readers))
    turns = s.minibatches * -(-s.batch_size // (s.minibatches * rows))
    calls, async_bytes = [], (0, 0)
    if sampled:
        cache_capacity = (
            memory.compute_cache_capacity(c, s, sampled, models, rows, memory_limit)
            if memory_limit
            else None
        )
        sampler = sampling_programs.make_stage_sampler(c, s, sampled, models, cache_capacity)
        calls += sampling_programs.list_sampling_calls(sampler)
        if s.rollout.asynchronous:  # the next step's weights lie there, and soon its cache
            async_bytes = (sampler.weight_bytes, sampler.weight_bytes + sampler.cache_bytes)
    calls += _list_reader_calls(c, s, loss, models, mesh, rows, turns, async_bytes)
    calls += _list_update_calls(c, s, loss, sampled, models, mesh, rows, turns, async_bytes)
    if c.eval.every:
        calls += sampling_programs.list_eval_calls(c, s, models)
    return calls


def _list_update_calls(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    sampled: int,
    models: StageModels,
    mesh: Mesh,
    rows: int,
    turns: int,
    async_bytes: tuple[int, int],
) -> list[ProgramCall]:
    """What trains, and what begins the state that is trained."""
    optimizer = optim.make_optimizer(s.optim, s.steps * s.epochs * s.minibatches)
    state = update_lib.make_abstract_state(
        optimizer, models.trained_params, c.student.ema_decay > 0
    )
    programs = setup.make_stage_update(c, s, loss, optimizer, models.student, mesh, state)
    student, frozen, calls = models.student, None, _list_init_calls(c, s, models, optimizer, mesh)
    if student.model.lora:
        frozen = student.params
    base = ("base",) if frozen is not None else ()
    micro, shared = _make_microbatch(c, s, loss, sampled, models, mesh, rows)
    tokens, mean = rows * stages.get_row_tokens(s), (stages.get_row_tokens(s) + 1) / 2
    forward = families.count_forward_flops(student.config, tokens, mean, with_head=True)
    head = 2.0 * tokens * student.config.hidden_size * student.config.vocab_size
    if s.epochs * s.minibatches > 1:
        logp_batch = dataclasses.replace(micro, teacher=None, old_logp_BT=None)
        logp_batch = dataclasses.replace(logp_batch, reference_logp_BT=None)
        before = functools.partial(programs.compute_logp.lower, state.params, logp_batch, frozen)
        holds = ("parameters", *base)
        read = ProgramCall(
            "old log-probs", before, turns, forward, holds, async_bytes[0], call_scaling="read"
        )
        calls.append(dataclasses.replace(read, head_flops=head))
    # With a LoRA, the gradient of the base's own products is that of their inputs alone.
    passes = 2 if student.model.lora else 3
    heads = micro.teacher.heads_VE if micro.teacher else ()
    of_heads = sum(2.0 * tokens * x.shape[0] * x.shape[1] for x in heads)
    useful, head = passes * forward + of_heads, passes * head + of_heads
    gradient = None if has_single_microbatch(s, sampled) else state.params
    updates = s.epochs * s.minibatches
    if gradient is not None:
        zeros = functools.partial(programs.init_gradient.lower, state.params)
        calls.append(ProgramCall("zeros", zeros, updates, 0.0, (), async_bytes[1]))
    accumulate_args = (gradient, state.params, micro, frozen)
    train = functools.partial(programs.accumulate.lower, *accumulate_args)
    holds = ("parameters", *base, *(f"head of {name}" for name in models.teachers))
    resident_bytes = async_bytes[1] - shared
    read = ProgramCall(
        "accumulate", train, turns * s.epochs, useful, holds, resident_bytes, call_scaling="train"
    )
    calls.append(dataclasses.replace(read, head_flops=head))
    _, figures, stats = jax.eval_shape(programs.accumulate, *accumulate_args)
    end = functools.partial(programs.apply.lower, state, state.params, figures, 1)
    holds = ("parameters", "optimiser", "average")
    calls.append(ProgramCall("apply", end, updates, 0.0, holds, async_bytes[1]))
    if c.log.transcripts:
        split = jax.tree.map(lambda x: _make_array_factory(mesh, *x.shape)(x.dtype), stats)
        transcript_arrays = (
            micro.tokens_BT,
            micro.mask_BT,
            micro.segments_BT,
            micro.finished_BT,
            split,
        )
        taken = functools.partial(mesh_lib.gather_first_rows.lower, transcript_arrays, rows)
        calls.append(
            ProgramCall("transcripts", taken, 1 / c.log.transcripts_every, 0.0, (), async_bytes[1])
        )
    return calls


def _list_init_calls(
    c: ConfigDict, s: ConfigDict, models: StageModels, optimizer: Any, mesh: Mesh
) -> list[ProgramCall]:
    """What runs once, before a stage's first step."""
    model_bytes, student, calls = memory.count_resident_bytes(c, models, s), models.student, []
    first = s is c[c.stages[0]]
    # Of the first stage no teacher is there yet; of a later one the last one's optimiser still is.
    read = sum(model_bytes.get(name, 0) for name in (*models.teachers, "reference"))
    resident_bytes = -read if first else model_bytes["optimiser"]
    if first and (c.student.random_init or student.model.lora):
        drawn = policy.make_init_fn(student, student.model.lora)
        init_params = functools.partial(drawn.lower, jax.eval_shape(jax.random.key, 0))
        holds = ("parameters", "optimiser", "average")
        calls.append(ProgramCall("first parameters", init_params, 0, 0.0, holds, resident_bytes))
    init_optimiser = functools.partial(
        update_lib.make_optimizer_init(optimizer, models.trained_params).lower,
        models.trained_params,
    )
    calls.append(
        ProgramCall(
            "optimiser", init_optimiser, 0, 0.0, ("parameters", "optimiser"), resident_bytes
        )
    )
    for name, teacher in models.teachers.items():
        teacher_mesh = policy.get_mesh(teacher)
        if teacher_mesh != mesh:  # between processes it travels whole
            whole = functools.partial(
                jax.jit(mesh_lib.replicate_array).lower, transformer.get_output_head(teacher.params)
            )
            calls.append(ProgramCall(f"head of {name}", whole, 0, 0.0, (), 0, teacher_mesh))
            calls[-1] = dataclasses.replace(
                calls[-1],
                other_bytes=-count_device_bytes(transformer.get_output_head(teacher.params)),
            )
    return calls


def _make_array_factory(mesh: Mesh, rows: int, *shape: int) -> Callable[..., Any]:
    """What makes shapes of arrays [rows, *shape, ...], split by rows."""

    def make_array(dtype: Any, *trailing: int, sharding: Any = None) -> Any:
        sharding = sharding or mesh_lib.make_row_sharding(mesh)
        return jax.ShapeDtypeStruct((rows, *shape, *trailing), jnp.dtype(dtype), sharding=sharding)

    return make_array


def _make_token_batch(mesh: Mesh, rows: int, T: int) -> Batch:
    """Shapes of what models read."""
    array = _make_array_factory(mesh, rows, T)
    return Batch(array("int32"), array("int32"), array("int32"), array("bool"))


def _make_microbatch(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    sampled: int,
    models: StageModels,
    mesh: Mesh,
    rows: int,
) -> tuple[Batch, int]:
    """Shapes of a micro-batch as the update reads it, and how many of its bytes on a device are
    heads of teachers that the run keeps there anyway."""
    T, fields, shared = stages.get_row_tokens(s), {}, 0
    array = _make_array_factory(mesh, rows, T)
    if sampled == s.batch_size:
        fields |= {"sampler_logp_BT": array("float32"), "finished_BT": array("bool")}
    if loss.reward:
        fields["advantages_BT"] = array("float32")
    if loss.reference:
        fields["reference_logp_BT"] = array("float32")
    if s.epochs * s.minibatches > 1:
        fields["old_logp_BT"] = array("float32")
    if loss.teacher_output == "top":
        topk_arrays = array("int32", loss.teacher_topk), array("float32", loss.teacher_topk)
        fields["teacher_top_BTK"] = topk_arrays
    if loss.teacher and models.teachers:
        stream = NamedSharding(mesh, mesh_lib.make_hidden_spec(mesh, T))
        teachers, N = models.teachers.values(), len(models.teachers)
        heads = tuple(make_head_shape(x, mesh) for x in teachers)
        fields["teacher"] = TeacherOutput(
            hidden_BTE=tuple(
                array(x.model.dtype, x.config.hidden_size, sharding=stream) for x in teachers
            ),
            weight_BTN=array("float32", N) if N > 1 else None,
            heads_VE=heads,
        )
        shared = sum(
            count_device_bytes(head)
            for head, x in zip(heads, teachers, strict=True)
            if policy.get_mesh(x) == mesh
        )
    if sampled and c.student.replay_routing:
        fields["experts_BTLA"] = array("int16", *models.student.config.routing_shape)
    read = _make_token_batch(mesh, rows, T)
    return dataclasses.replace(read, thinking_BT=array("bool"), **fields), shared


def _list_reader_calls(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    models: StageModels,
    mesh: Mesh,
    rows: int,
    turns: int,
    async_bytes: tuple[int, int],
) -> list[ProgramCall]:
    """What models that are only read make of the micro-batches: judges, teachers, a reference.

    The latter two do so beside the gradient so far, or before the first update; several teachers
    beside what those before them found."""
    T, mib, calls = stages.get_row_tokens(s), stages.compute_logits_mib(c, mesh), []
    context_tokens = s.context.max_tokens if s.context.text or s.context.column else 0
    sampled = stages.resolve_objective("", s)[1]
    gradient = 0 if has_single_microbatch(s, sampled) else count_device_bytes(models.trained_params)
    hidden_bytes, average = 0, models.trained_params if models.student.model.lora else None

    def name_call(what: str, name: str) -> str:
        return what if name == "teacher" else f"{what} {name}"

    def make_call(
        name: str,
        reader: Policy,
        lower: Any,
        turns: int,
        useful: float,
        holds: str,
        resident_bytes: int,
        head: float = 0.0,
    ) -> ProgramCall:
        reader_mesh = policy.get_mesh(reader)
        resident_bytes = resident_bytes if reader_mesh == mesh else 0
        names = ("average", "base") if holds == "average" else (holds,)  # of a LoRA, its base too
        return ProgramCall(
            name,
            lower,
            turns,
            useful,
            names,
            resident_bytes,
            reader_mesh,
            call_scaling="read",
            head_flops=head,
        )

    def make_logps_call(
        name: str, reader: Policy, T: int, temperature: float, holds: str, resident_bytes: int
    ) -> ProgramCall:
        logps_args = (
            reader.model,
            mib,
            temperature,
            reader.params,
            average if holds == "average" else None,
        )
        lower = functools.partial(
            local.compute_logp_jit.lower,
            *logps_args,
            _make_token_batch(policy.get_mesh(reader), rows, T),
        )
        useful = families.count_forward_flops(reader.config, rows * T, (T + 1) / 2, with_head=True)
        head = 2.0 * rows * T * reader.config.hidden_size * reader.config.vocab_size
        return make_call(name, reader, lower, turns, useful, holds, resident_bytes, head)

    for name, of in models.teachers.items():
        there, holds = policy.get_mesh(of), get_resident_name(c, name, models) or name
        if loss.reward and s.reward.teacher_logprob:
            calls.append(
                make_logps_call(
                    name_call("judge", name), of, T + context_tokens, 1.0, holds, async_bytes[0]
                )
            )
        if loss.teacher:
            at_BT = _make_array_factory(there, rows, T)("int32") if context_tokens else None
            lora = average if holds == "average" else None
            given = (
                of.model,
                of.params,
                lora,
                _make_token_batch(there, rows, T + context_tokens),
                at_BT,
            )
            lower = functools.partial(local.compute_hidden.lower, *given)
            useful = families.count_forward_flops(
                of.config,
                rows * (T + context_tokens),
                (T + context_tokens + 1) / 2,
                with_head=False,
            )
            beside = gradient + async_bytes[1] + hidden_bytes
            named = name_call("score", name)
            calls.append(make_call(named, of, lower, turns * s.epochs, useful, holds, beside))
            stream = NamedSharding(mesh, mesh_lib.make_hidden_spec(mesh, T))
            array = _make_array_factory(mesh, rows, T)
            hidden_bytes += count_device_bytes(
                array(of.model.dtype, of.config.hidden_size, sharding=stream)
            )
    if loss.reference:
        of, holds = models.reference or models.student, "reference" if models.reference else "base"
        at = stages.get_temperature(s, loss)
        calls.append(make_logps_call("reference", of, T, at, holds, gradient + async_bytes[1]))
    return calls
