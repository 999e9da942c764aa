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

from distill import engine, losses, optim, policy, prepare, slots, stages, teacher, update
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.policy import Policy
from models.qwen3 import model
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
    where the student is; `lower` is to be called within its use.
    """

    name: str
    lower: Callable[[], Any]
    turns: float
    useful: float
    holds: tuple[str, ...]
    beside: int = 0
    mesh: Mesh | None = None


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
    c: ConfigDict, s: ConfigDict, loss: losses.Loss, sampled: int, models: Models, mesh: Mesh
) -> list[Call]:
    """The programs of one step of a stage, in their order; how often they are called if no response
    is shorter than it may be.

    To be called, and its results lowered, within `mesh_lib.use(mesh)`, or of the call's own mesh.
    """
    readers = [*models.teachers.values(), *([models.reference] if models.reference else [])]
    rows = stages.microbatch_rows(s, sampled, mesh, *map(policy.mesh_of, readers))
    turns = s.minibatches * -(-s.batch_size // (s.minibatches * rows))
    calls = _sampling(s, sampled, models, mesh) if sampled else []
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


def _sampling(s: ConfigDict, sampled: int, models: Models, mesh: Mesh) -> list[Call]:
    """What sampling runs, on the devices of `mesh`: the weights as it reads them, the prompts, and
    one segment."""
    student, options = models.student, stages.rollout_options(s)
    mesh = mesh_lib.decoding(mesh)
    shards = mesh_lib.row_shards(mesh)
    trained = models.trained
    if student.model.lora:  # merged with its base before
        trained = cast(mesh_lib.parameters(student.config, mesh), student.model.dtype)
    stacked = engine.prefers_stacked(mesh)
    qwen3 = student.model.clone(scan=stacked, remat=False, lora=None)
    rules = mesh_lib.GATHERED if options.gathered else mesh_lib.RULES
    as_read = (mesh, rules, stacked, options.param_dtype)
    dtype = options.cache_dtype or jnp.dtype(qwen3.dtype).name
    decoder = engine.Decoder(qwen3, stages.sampling(s), student.stop_ids, dtype, options.segment, 0)
    count = slots.sizes(min(options.slots, sampled), engine.least_rows(mesh))[0]
    width = options.longest
    if options.cache_tokens:
        least = engine.least_rows(mesh)
        count = min(count, options.cache_tokens // width // least * least)
    chunk = slots.prompt_width(s.max_prompt_tokens, options.chunk)
    chunk, long = min(chunk, options.chunk), chunk
    together = max(1, options.chunk // chunk // shards) * shards
    replicated = mesh_lib.replicated(mesh)

    def told(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated)

    def prepared() -> Any:
        return engine.for_decoding.lower(qwen3, trained, *as_read)

    with mesh_lib.use(mesh):
        read_from = _weights(student, qwen3, trained, *as_read)
        cache = like(engine.empty_cache, decoder, together, long)
        state = like(engine.empty, decoder, count, width)

    def prompts() -> Any:
        return engine.read.lower(decoder, read_from, cache, told(2, together, chunk))

    def decode() -> Any:
        return engine.decode.lower(decoder, read_from, state, told(2), told(count))

    P, R = s.max_prompt_tokens, s.max_response_tokens
    pieces = -(-P // chunk) * -(-(sampled // s.samples) // together)
    base = ("parameters", *(("base",) if student.model.lora else ()))

    def within(lower: Callable[[], Any]) -> Callable[[], Any]:
        def inner() -> Any:
            with mesh_lib.use(mesh):
                return lower()

        return inner

    return [
        Call("weights", within(prepared), 1, 0.0, base),
        Call(
            "prompts",
            within(prompts),
            pieces,
            operations(student.config, together * chunk, (P + 1) / 2, head=False),
            (),
            bytes_of(state),
        ),
        Call(
            "decode",
            within(decode),
            R * -(-sampled // count),
            operations(student.config, count, P + R / 2, head=True),
            (),
            bytes_of(cache),
        ),
    ]


def _weights(
    student: Policy, qwen3: Any, trained: Any, mesh: Mesh, rules: Any, stacked: bool, kind: str
) -> Any:
    """Within `use`: shapes of the weights that decode, in the dtype `kind` ("": the model's)."""
    if not stacked:
        return like(engine.for_decoding, qwen3, trained, mesh, rules, stacked, kind)
    shapes = mesh_lib.parameters(student.config, mesh, rules=rules)
    shaped = dataclasses.replace(student, params=shapes)
    return policy.loaded(shaped, kind or jnp.dtype(qwen3.dtype).name)


def like(function: Any, *args: Any) -> Any:
    """What a jitted function of static arguments returns, as shapes with its own shardings."""
    lowered = function.lower(*args)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        lowered.compile().output_shardings,
    )
