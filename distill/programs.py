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
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from distill import losses, optim, policy, prepare, rollout, stages, teacher, update
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.policy import Policy
from distill.rollout import decode
from models.qwen3 import model, pages
from models.qwen3.config import Config


@dataclasses.dataclass(frozen=True)
class Models:
    """Described models, whose `params` have the dtypes that `train` would load them in."""

    student: Policy  # its base, where it trains a LoRA
    trained: Any  # shapes of what is trained: float32
    teachers: dict[str, Policy]  # by the names of their sub-configs
    reference: Policy | None


@dataclasses.dataclass(frozen=True)
class Call:
    """A program, how often a step calls it, and what it does that was asked for.

    lower: what compiles it. turns: calls a step, or turns of its open loop. useful: operations of
    the formula that one call computes, over all devices: no recomputation, no padding of a mask.
    holds: of what the run keeps on the devices, the names that are among its arguments. beside:
    bytes that lie on each device beside it and what the run keeps. mesh: where it runs, if not
    where the student is; `lower` is to be called within its use. reads: bytes of memory that a
    kernel reads in a call, of which the compiled text says nothing.
    """

    name: str
    lower: Callable[[], Any]
    turns: float
    useful: float
    holds: tuple[str, ...]
    beside: int = 0
    mesh: Mesh | None = None
    reads: int = 0


def bytes_of(tree: Any) -> int:
    """Bytes that a tree of ShapeDtypeStructs with shardings takes on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def cast(tree: Any, dtype: Any) -> Any:
    """The same shapes and shardings in another dtype."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), tree
    )


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


def operations(config: Config, tokens: float, context: float, head: bool) -> float:
    """Operations of one forward pass over `tokens`, each of which attends to `context` others."""
    D, H = config.hidden_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    per_layer = 2 * D * H * (2 * N + 2 * K) + 4 * N * H * context
    total = per_layer * config.num_hidden_layers
    for sparse in config.sparse_layers:
        width = config.intermediate_size
        if sparse:
            width = config.moe_intermediate_size * config.num_experts_per_tok
            total += 2 * D * config.num_experts
        total += 6 * D * width
    return tokens * (total + (2 * D * config.vocab_size if head else 0))


def of_stage(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    sampled: int,
    models: Models,
    mesh: Mesh,
    limit: float | None = None,
) -> list[Call]:
    """The programs of one step of a stage, in their order.

    To be called, and its results lowered, within `mesh_lib.use(mesh)`, or of the call's own mesh.
    limit: bytes of memory that a device has, where that is known.
    """
    student, rows = models.student, mesh_lib.rows(mesh)
    B, T = s.batch_size, s.pack_tokens or s.max_prompt_tokens + s.max_response_tokens
    mean, stream = (T + 1) / 2, NamedSharding(mesh, mesh_lib.stream(mesh, T))

    def array(dtype: Any, *shape: int, sharding: Any = rows) -> Any:
        return jax.ShapeDtypeStruct((B, *shape), jnp.dtype(dtype), sharding=sharding)

    def read(T: int) -> Batch:
        return Batch(array("int32", T), array("int32", T), array("int32", T), array("bool", T))

    batch = dataclasses.replace(read(T), thinking_BT=array("bool", T))
    if sampled == B:
        changes = {"sampler_logp_BT": array("float32", T), "finished_B": array("bool")}
        batch = dataclasses.replace(batch, **changes)
    room = cache_room(c, s, models, mesh, limit) if limit and sampled else None
    calls, heads = _sampling(s, sampled, models, mesh, room) if sampled else [], ()
    if loss.teacher and models.teachers:
        room = s.context.max_tokens if s.context.text or s.context.column else 0
        told, at_BT = (read(T + room), array("int32", T)) if room else (batch, None)
        hidden = []
        for name, of in models.teachers.items():
            there = policy.mesh_of(of)
            given = (of.model, s.accumulate, of.params, None, *lying(there, (told, at_BT)))
            lower = functools.partial(teacher.hidden.lower, *given)
            useful = operations(of.config, B * (T + room), mean + room / 2, head=False)
            holds = (_own(c, name, models) or name,)
            called = f"score {name}" if name != "teacher" else "score"
            calls.append(Call(called, lower, 1, useful, holds, mesh=there))
            hidden.append(array(of.model.dtype, T, of.config.hidden_size, sharding=stream))
        heads = tuple(_head(of, mesh) for of in models.teachers.values())
        batch = dataclasses.replace(batch, teacher_hidden_BTD=tuple(hidden))
        if len(hidden) > 1:
            share_BN = array("float32", len(hidden))
            batch = dataclasses.replace(batch, teacher_share_BN=share_BN)
    if loss.reward:
        batch = dataclasses.replace(batch, advantages_B=array("float32"))
    if loss.reference:
        calls.append(_reference(models, batch, stages.logits_mib(c, mesh)))
        batch = dataclasses.replace(batch, reference_logp_BT=array("float32", T))
    if loss.served == "top":
        top = (array("int32", T, loss.served_k), array("float32", T, loss.served_k))
        batch = dataclasses.replace(batch, teacher_top_BTK=top)

    optimizer = optim.make(s.optim, s.steps * s.epochs * s.minibatches)
    state = update.abstract(optimizer, models.trained, c.student.ema > 0)
    step = prepare.updater(c, s, loss, optimizer, student, mesh, state)
    frozen = student.params if student.model.lora else None
    # With a LoRA, the gradient of the base's own products is that of their inputs alone.
    passes = 2 if student.model.lora else 3
    useful = passes * operations(student.config, B * T, mean, head=True)
    useful += sum(2.0 * B * T * head.shape[0] * head.shape[1] for head in heads)
    holds = ("parameters", "optimiser", "average", *(("base",) if frozen is not None else ()))
    holds += tuple(f"head of {name}" for name in models.teachers)
    calls.append(
        Call(
            "update",
            lambda: step.lower(state, batch, heads, frozen),  # pyright: ignore
            1,
            useful * s.epochs,
            holds,
        )
    )
    return calls


def _reference(models: Models, batch: Batch, logits_mib: float) -> Call:
    """What says how likely the student of before step 0 finds a batch."""
    reader, (B, T) = models.reference or models.student, batch.tokens_BT.shape
    there = policy.mesh_of(reader)
    given = (reader.model, logits_mib, reader.params, None, lying(there, batch))
    return Call(
        "reference",
        functools.partial(teacher.logps.lower, *given),
        1,
        operations(reader.config, B * T, (T + 1) / 2, head=True),
        ("reference",) if models.reference else ("base",),
        mesh=there,
    )


def cache_room(c: ConfigDict, s: ConfigDict, models: Models, mesh: Mesh, limit: float) -> int:
    """Tokens that the sampler's cache could hold on all devices of the student's mesh, each with
    `limit` bytes, beside what the run keeps and the copy of the weights that decodes."""
    mesh = mesh_lib.decoding(mesh)
    decoder, read_from = _decoder(s, 1, models, mesh, None)
    left = limit - sum(held(c, models, s).values()) - bytes_of(read_from)
    dtype = jnp.dtype(decoder.cache.dtype)
    token = pages.token_bytes(models.student.config, mesh.shape["tensor"], dtype)
    return max(0, int(left)) // token * mesh_lib.row_shards(mesh)


def _decoder(
    s: ConfigDict, sampled: int, models: Models, mesh: Mesh, room: int | None
) -> tuple[decode.Decoder, Any]:
    """What the sampler's programs are compiled for, and the shapes of the weights that decode."""
    student, options = models.student, stages.rollout_options(s, room)
    stacked = decode.prefers_stacked(mesh)
    qwen3 = student.model.clone(scan=stacked, remat=False, lora=None)
    config, dtype = student.config, jnp.dtype(qwen3.dtype).name
    shape = rollout.cache_shape(options, config, mesh, dtype, sampled, options.longest)
    decoder = decode.Decoder(qwen3, stages.sampling(s), student.stop_ids, shape, options.segment, 0)
    rules = mesh_lib.GATHERED if options.gathered else mesh_lib.RULES
    with mesh_lib.use(mesh):
        read_from = _weights(
            student, qwen3, _merged(models, mesh), mesh, rules, stacked, options.param_dtype
        )
    return decoder, read_from


def _merged(models: Models, mesh: Mesh) -> Any:
    """What the sampler's weights are made of: what is trained, a LoRA merged with its base."""
    if not models.student.model.lora:
        return models.trained
    return cast(mesh_lib.parameters(models.student.config, mesh), models.student.model.dtype)


def _sampling(
    s: ConfigDict, sampled: int, models: Models, mesh: Mesh, room: int | None
) -> list[Call]:
    """What sampling runs, on the devices of `mesh`: all that distill/rollout calls."""
    student, options = models.student, stages.rollout_options(s, room)
    mesh = mesh_lib.decoding(mesh)
    decoder, read_from = _decoder(s, sampled, models, mesh, room)
    shape, config = decoder.cache, student.config
    rules = mesh_lib.GATHERED if options.gathered else mesh_lib.RULES
    as_read = (decoder.qwen3, _merged(models, mesh), mesh, rules, decoder.qwen3.scan)
    replicated = mesh_lib.replicated(mesh)
    X, N = shape.shards, shape.columns

    def told(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated)

    def state(rows: int) -> Any:
        sized = dataclasses.replace(shape, rows=rows, pages=rows // X)
        of = dataclasses.replace(decoder, cache=sized if rows != shape.rows else shape)
        return like(decode.init_state, of)

    def prefill(T: int) -> Callable[[], Any]:
        R = shape.rows // X
        given = (told(3, X, T), told(X * R, N), told(X * R), told(X, R + 1))
        return lambda: decode.prefill.lower(decoder, read_from, state(shape.rows), *given)

    def segment(rows: int) -> Callable[[], Any]:
        given = (told(2), told(len(decode.ABOUT), rows), told(rows, N), told(2, X, rows // X))
        return lambda: decode.decode.lower(decoder, read_from, state(rows), *given)

    def within(lower: Callable[[], Any]) -> Callable[[], Any]:
        def inner() -> Any:
            with mesh_lib.use(mesh):
                return lower()

        return inner

    P, R = s.max_prompt_tokens, s.max_response_tokens
    base = ("parameters", *(("base",) if student.model.lora else ()))
    copy = bytes_of(read_from)
    turns = R * -(-sampled // shape.rows)
    reads = pages.read_bytes(
        [P + R // 2] * (shape.rows // X),
        shape.page,
        N,
        pages.token_bytes(config, mesh.shape["tensor"], jnp.dtype(shape.dtype)),
        shape.kind,
    )
    calls = [
        Call(
            "weights",
            within(lambda: decode.for_decoding.lower(*as_read, options.param_dtype)),
            1,
            0.0,
            base,
        ),
        Call("cache", within(lambda: decode.init_state.lower(decoder)), 1, 0.0, (), copy),
    ]
    few, *many = rollout.line_sizes(options, shape)
    tokens = P * sampled // s.samples
    for T in (few, *many):
        read = -(-tokens // (T * X)) if (many or [few])[-1] == T else 0
        useful = operations(config, X * T, (P + 1) / 2, head=False)
        name = "prompts" if read else "few prompts"
        calls.append(Call(name, within(prefill(T)), read, useful, ()))
    useful = operations(config, shape.rows, P + R / 2, head=True)
    calls.append(Call("decode", within(segment(shape.rows)), turns, useful, (), reads=reads))
    less = rollout.fewer_rows(shape)
    if less:
        moved = lambda: decode.resize.lower(state(shape.rows), told(X, less // X))  # noqa: E731
        useful = operations(config, less, P + R / 2, head=True)
        calls.append(Call("fewer rows", within(moved), 0, 0.0, (), copy))
        calls.append(Call("decode fewer", within(segment(less)), 0, useful, ()))
    if decoder.sampling.presence_penalty:
        given = told(shape.rows), told(2, rollout.REMEMBER)
        noted = lambda: decode.remember.lower(state(shape.rows), *given)  # noqa: E731
        calls.append(Call("remember", within(noted), 0, 0.0, (), copy))
    return calls


def _weights(
    student: Policy, qwen3: Any, trained: Any, mesh: Mesh, rules: Any, stacked: bool, kind: str
) -> Any:
    """Within `use`: shapes of the weights that decode, in the dtype `kind` ("": the model's)."""
    if not stacked:
        return like(decode.for_decoding, qwen3, trained, mesh, rules, stacked, kind)
    shapes = mesh_lib.parameters(student.config, mesh, rules=rules)
    shaped = dataclasses.replace(student, params=shapes)
    return policy.loaded(shaped, kind or jnp.dtype(qwen3.dtype).name)


def lying(mesh: Mesh, tree: Any) -> Any:
    """The same shapes, of arrays whose first axis is the batch, on a mesh."""
    rows = mesh_lib.rows(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), tree)


def like(function: Any, *args: Any) -> Any:
    """What a jitted function of static arguments returns, as shapes with its own shardings."""
    lowered = function.lower(*args)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        lowered.compile().output_shardings,
    )
