"""Lists the programs of a stage as `train` calls them, lowered from shapes alone.

Nothing is read or allocated, and the mesh's devices need not exist: a laptop can compile the
programs of a slice. Each program records the bytes in memory beside it. The list omits
calls.UNPLANNED_PROGRAMS.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from distill.batch import Batch, TeacherOutput
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import external, local
from distill.training import memory, optim, sampling_programs, setup, stages
from distill.training import update as update_lib
from distill.training.calls import (
    AbstractStage,
    ProgramCall,
    count_device_bytes,
    count_head_flops,
)
from models import families, transformer

# The first words of a program's name -> what it does.
MEANINGS = {
    "weights": "copies the student's weights for the sampler",
    "cache": "makes the sampler's cache of keys and values",
    "few prompts": "reads prompts, where only some rows begin anew",
    "prompts": "reads the prompts of all rows",
    "decode": "samples a token of each row, again and again",
    "fewer rows": "keeps the rows that go on, once most have ended",
    "decode fewer": "samples a token of each of those rows",
    "remember": "counts the tokens that a presence penalty lowers",
    "judge": "a teacher scores responses for the reward",
    "score": "a teacher reads what the student is trained on",
    "reference": "the initial student reads the same",
    "first parameters": "draws the parameters that no file has",
    "optimiser": "makes the optimiser's state",
    "head of": "copies a teacher's output layer to the student's devices",
    "old log-probs": "the student reads the same before the first of several updates",
    "zeros": "makes an empty gradient",
    "accumulate": "computes the loss and its gradient, and adds it up",
    "apply": "updates the weights",
    "transcripts": "fetches the numbers of rollouts/",
    "merge": "merges the LoRA into its base",
}


def explain_program(name: str) -> str:
    """Returns in words what the program of this name does."""
    if name.startswith("eval "):
        return f"evaluation: {explain_program(name.removeprefix('eval '))}"
    fitting = [words for words in MEANINGS if f"{name} ".startswith(f"{words} ")]
    return MEANINGS[max(fitting, key=len)]


@dataclasses.dataclass(frozen=True)
class AsyncBytes:
    """Bytes on each device of the next step's asynchronous rollouts."""

    before_update: int = 0  # the decoding weights
    during_update: int = 0  # and the cache


def list_stage_calls(stage: AbstractStage, memory_limit: float | None = None) -> list[ProgramCall]:
    """Lists the programs of one step of a stage in order, with the number of calls of each if every
    response has the maximum length.

    Call this with the student's mesh in use, and lower each call with its own mesh in use.
    memory_limit: bytes of a device, if known.
    """
    calls, async_bytes = [], AsyncBytes()
    if stage.sampled_rows:
        cache_capacity = memory.compute_cache_capacity(stage, memory_limit)
        sampler = sampling_programs.make_stage_sampler(stage, cache_capacity)
        calls += sampling_programs.list_sampling_calls(sampler)
        if stage.s.rollout.asynchronous:
            weights = sampler.weight_bytes
            async_bytes = AsyncBytes(weights, weights + sampler.cache_bytes)
    optimizer = optim.make_optimizer(
        stage.s.optim, stage.s.steps * stage.s.epochs * stage.s.minibatches
    )
    calls += _list_reader_calls(stage, async_bytes)
    calls += _list_init_calls(stage, optimizer)
    calls += _list_update_calls(stage, optimizer, async_bytes)
    if stage.c.eval.every:
        calls += sampling_programs.list_eval_calls(stage)
    return calls


def _list_reader_calls(stage: AbstractStage, async_bytes: AsyncBytes) -> list[ProgramCall]:
    """Lists the programs with which judges, teachers and a reference read micro-batches.

    Teachers and the reference count with the accumulated gradient in memory, and each of several
    teachers with the hidden states of those before it.
    """
    s, loss, calls = stage.s, stage.loss, []
    batch = stage.make_microbatch(stage.mesh)
    hidden_bytes = count_device_bytes(batch.teacher_hidden_BTE)  # of teachers that are not run here
    gradient_bytes = 0 if stage.has_single_microbatch else count_device_bytes(stage.trained_params)
    other_bytes = gradient_bytes + async_bytes.during_update
    for name, teacher in stage.teachers.items():
        reader, suffix = _make_teacher_reader(stage, name), "" if name == "teacher" else f" {name}"
        batch = stage.make_microbatch(reader.mesh)
        inputs = batch.teacher_inputs or batch
        if loss.reward and s.reward.teacher_logprob:
            judge = _make_logp_call(stage, f"judge{suffix}", reader, inputs, 1.0)
            calls.append(_place_beside(stage, judge, async_bytes.before_update))
        if loss.teacher:
            score = _make_score_call(stage, f"score{suffix}", reader, inputs, batch)
            calls.append(_place_beside(stage, score, other_bytes + hidden_bytes))
            hidden_bytes += count_device_bytes(_make_hidden_shape(stage, teacher))
    if loss.reference:
        reader = Reader(stage.student, ("base",))
        if stage.reference:
            reader = Reader(stage.reference, ("reference",))
        inputs = stage.make_microbatch(reader.mesh)
        temperature = stages.get_temperature(s, loss)
        reference = _make_logp_call(stage, "reference", reader, inputs, temperature)
        calls.append(_place_beside(stage, reference, other_bytes))
    return calls


@dataclasses.dataclass(frozen=True)
class Reader:
    """A model that is only read, and the keys of its weights in `memory.count_resident_bytes`."""

    policy: Policy
    resident_arguments: tuple[str, ...]
    lora: Any = None  # the moving average of a LoRA, applied to its base

    @property
    def mesh(self) -> Mesh:
        return policy.get_mesh(self.policy)


def _make_teacher_reader(stage: AbstractStage, name: str) -> Reader:
    teacher, alias = stage.teachers[name], memory.get_alias(stage, name)
    if alias != "average":
        return Reader(teacher, (alias or name,))
    lora = stage.trained_params if stage.student.model.lora else None
    return Reader(teacher, ("average", "base"), lora)


def _make_logp_call(
    stage: AbstractStage, name: str, reader: Reader, inputs: Batch, temperature: float
) -> ProgramCall:
    """Makes the call in which a judge or a reference scores a micro-batch's tokens."""
    rows, T = inputs.tokens_BT.shape
    config, mib = reader.policy.config, stages.get_loss_chunk_mib(stage.c, stage.mesh)
    options = reader.policy.model, mib, temperature
    args = reader.policy.params, reader.lora, local.to_model_inputs(inputs)
    return ProgramCall(
        name,
        functools.partial(local.compute_logp_jit.lower, *options, *args),
        stage.max_microbatches,
        families.count_forward_flops(config, rows * T, (T + 1) / 2, with_head=True),
        reader.resident_arguments,
        mesh=reader.mesh,
        call_scaling="read",
        head_flops=count_head_flops(config, rows * T),
    )


def _make_score_call(
    stage: AbstractStage, name: str, reader: Reader, inputs: Batch, batch: Batch
) -> ProgramCall:
    """Makes the call that computes a teacher's hidden states for a micro-batch from `inputs`."""
    rows, T = inputs.tokens_BT.shape
    args = reader.policy.params, reader.lora, local.to_model_inputs(inputs), batch.teacher_index_BT
    return ProgramCall(
        name,
        functools.partial(local.compute_hidden.lower, reader.policy.model, *args),
        stage.max_microbatches * stage.s.epochs,
        families.count_forward_flops(reader.policy.config, rows * T, (T + 1) / 2, with_head=False),
        reader.resident_arguments,
        mesh=reader.mesh,
        call_scaling="read",
    )


def _place_beside(stage: AbstractStage, call: ProgramCall, other_bytes: int) -> ProgramCall:
    """Sets the call's other bytes, which lie on the student's devices; 0 if it runs elsewhere."""
    return dataclasses.replace(call, other_bytes=other_bytes if call.mesh == stage.mesh else 0)


def _make_hidden_shape(stage: AbstractStage, teacher: Policy) -> Any:
    """Returns the shape [B, T, E] of a teacher's hidden states as the update reads them."""
    T, D = stages.get_row_tokens(stage.s), teacher.config.hidden_size
    sharding = NamedSharding(stage.mesh, mesh_lib.make_hidden_spec(stage.mesh, T))
    dtype = jnp.dtype(teacher.model.dtype)
    return jax.ShapeDtypeStruct((stage.microbatch_rows, T, D), dtype, sharding=sharding)


def _list_init_calls(
    stage: AbstractStage, optimizer: optax.GradientTransformation
) -> list[ProgramCall]:
    """Lists the programs that run once, before a stage's first step."""
    c, student = stage.c, stage.student
    is_first, calls = stage.name == c.stages[0], []
    resident_bytes = memory.count_resident_bytes(stage)
    # Before the first stage no teacher is loaded; before a later one the previous optimiser's state
    # still exists.
    loaded_bytes = sum(resident_bytes.get(name, 0) for name in (*stage.teachers, "reference"))
    other_bytes = -loaded_bytes if is_first else resident_bytes["optimiser"]
    if is_first and (c.student.random_init or student.model.lora):
        init = policy.make_init_fn(student, student.model.lora)
        lower = functools.partial(init.lower, jax.eval_shape(jax.random.key, 0))
        resident = ("parameters", "optimiser", "average")
        calls.append(ProgramCall("first parameters", lower, 0, 0.0, resident, other_bytes))
    init = update_lib.make_optimizer_init(optimizer, stage.trained_params)
    lower = functools.partial(init.lower, stage.trained_params)
    resident = ("parameters", "optimiser")
    calls.append(ProgramCall("optimiser", lower, 0, 0.0, resident, other_bytes))
    for name, teacher in stage.teachers.items():
        teacher_mesh = policy.get_mesh(teacher)
        if teacher_mesh != stage.mesh:  # replicated, so that every process has all of it
            head_VE = transformer.get_output_head(teacher.params)
            lower = functools.partial(jax.jit(mesh_lib.replicate_array).lower, head_VE)
            other_bytes = -count_device_bytes(head_VE)  # an argument
            calls.append(
                ProgramCall(f"head of {name}", lower, 0, 0.0, (), other_bytes, teacher_mesh)
            )
    return calls


def _list_update_calls(
    stage: AbstractStage, optimizer: optax.GradientTransformation, async_bytes: AsyncBytes
) -> list[ProgramCall]:
    """Lists the programs of a step's updates."""
    c, s, student, calls = stage.c, stage.s, stage.student, []
    state = update_lib.make_abstract_state(optimizer, stage.trained_params, c.student.ema_decay > 0)
    programs = setup.make_stage_update(c, s, stage.loss, optimizer, student, stage.mesh, state)
    frozen, base = (student.params, ("base",)) if student.model.lora else (None, ())
    batch, updates = stage.make_microbatch(stage.mesh), s.epochs * s.minibatches
    rows, T = batch.tokens_BT.shape
    config, tokens = student.config, rows * T
    forward_flops = families.count_forward_flops(config, tokens, (T + 1) / 2, with_head=True)
    head_flops = count_head_flops(config, tokens)
    if updates > 1:
        old_logp = ProgramCall(
            "old log-probs",
            functools.partial(
                programs.compute_logp.lower,
                state.params,
                dataclasses.replace(batch, teacher_hidden_BTE=None),
                frozen,
            ),
            stage.max_microbatches,
            forward_flops,
            ("parameters", *base),
            async_bytes.before_update,
            call_scaling="read",
            head_flops=head_flops,
        )
        calls.append(old_logp)
    gradient, other_bytes = None, async_bytes.during_update
    if not stage.has_single_microbatch:
        gradient = state.params
        zeros = functools.partial(programs.init_gradient.lower, state.params)
        calls.append(ProgramCall("zeros", zeros, updates, other_bytes=other_bytes))
    scored = _add_scores(stage, batch)
    heads = scored.teacher.heads_VE if scored.teacher else ()
    args = (gradient, state.params, scored, frozen)
    teacher_flops = sum(2.0 * tokens * V * E for V, E in (head.shape for head in heads))
    # A LoRA's base has no weight gradients: each product is differentiated by its input alone.
    passes = 2 if student.model.lora else 3
    accumulate = ProgramCall(
        "accumulate",
        functools.partial(programs.accumulate.lower, *args),
        stage.max_microbatches * s.epochs,
        passes * forward_flops + teacher_flops,
        ("parameters", *base, *(f"head of {name}" for name in stage.s.teachers)),
        other_bytes - _count_shared_head_bytes(stage),
        call_scaling="train",
        head_flops=passes * head_flops + teacher_flops,
    )
    calls.append(accumulate)
    _, figures, stats = jax.eval_shape(programs.accumulate, *args)
    apply = functools.partial(programs.apply.lower, state, state.params, figures, 1)
    resident = ("parameters", "optimiser", "average")
    calls.append(ProgramCall("apply", apply, updates, 0.0, resident, other_bytes))
    if c.log.transcripts:
        arrays = (
            batch.tokens_BT,
            batch.mask_BT,
            batch.segments_BT,
            batch.finished_BT,
            batch.thinking_BT,
            _split_by_rows(stats, stage.mesh),
        )
        gather = functools.partial(mesh_lib.gather_first_rows.lower, arrays, rows)
        every = c.log.transcripts_every
        calls.append(ProgramCall("transcripts", gather, 1 / every, other_bytes=other_bytes))
    return calls


def _get_scoring_teachers(stage: AbstractStage) -> dict[str, Policy]:
    """Returns the teachers that are run here and whose distributions the loss uses, by name."""
    return stage.teachers if stage.loss.teacher else {}


def _add_scores(stage: AbstractStage, batch: Batch) -> Batch:
    """Returns the micro-batch as the update reads it, with the other models' scores."""
    logp_BT = jax.ShapeDtypeStruct(
        batch.tokens_BT.shape, jnp.float32, sharding=mesh_lib.make_row_sharding(stage.mesh)
    )
    scores: dict[str, Any] = dict.fromkeys(
        ("teacher_inputs", "teacher_index_BT", "teacher_weight_BTN", "teacher_hidden_BTE")
    )
    if stage.loss.reference:
        scores["reference_logp_BT"] = logp_BT
    if stage.s.epochs * stage.s.minibatches > 1:
        scores["old_logp_BT"] = logp_BT
    hidden, heads = {}, {}
    for name, teacher in _get_scoring_teachers(stage).items():
        hidden[name] = _make_hidden_shape(stage, teacher)
        heads[name] = memory.make_abstract_head(teacher, stage.mesh)
    given = [teacher for teacher in stage.external if teacher.hidden_form]
    for teacher, hidden_BTE in zip(given, batch.teacher_hidden_BTE or (), strict=True):
        hidden[teacher.name] = hidden_BTE
        heads[teacher.name] = external.make_abstract_head(teacher, stage.mesh)
    if hidden:
        names = [name for name in stage.s.teachers if name in hidden]
        scores["teacher"] = TeacherOutput(
            hidden_BTE=tuple(hidden[name] for name in names),
            weight_BTN=batch.teacher_weight_BTN,
            heads_VE=tuple(heads[name] for name in names),
        )
    return dataclasses.replace(batch, **scores)


def _count_shared_head_bytes(stage: AbstractStage) -> int:
    """Counts the bytes of head arguments of the update that are also teachers' resident weights."""
    teachers = _get_scoring_teachers(stage).values()
    teachers = [t for t in teachers if policy.get_mesh(t) == stage.mesh]
    return sum(count_device_bytes(memory.make_abstract_head(t, stage.mesh)) for t in teachers)


def _split_by_rows(tree: Any, mesh: Mesh) -> Any:
    sharding = mesh_lib.make_row_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
