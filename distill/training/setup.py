"""Checks a run: finds all mistakes of the user before any weight is read or file written."""

import dataclasses
import functools
import itertools
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.data import curriculum, dataset, examples, teacher_context
from distill.objectives import losses
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rewards import sandbox
from distill.teachers import external, local
from distill.teachers.external import ExternalTeacher
from distill.teachers.local import Teacher
from distill.training import graded_rows, optim, stages, update
from models import checks, families
from models.checks import Range
from models.errors import PromptTooLong, UserError, name_key, suggest

# What a config has besides stages and teachers, which are named freely. configs/base.py has their
# keys; a test compares the two.
SETTINGS = ("seed", "stages", "unsafe_code", "attention", "deterministic", "loss_chunk_mib")
SETTINGS += ("compilation_cache",)
PARTS = ("student", "mesh", "teacher_mesh", "checkpoint", "log", "alerts", "eval")
REFERENCE = "a reference"  # its name among loaded models; no teacher can have it


@dataclasses.dataclass(frozen=True)
class StageSetup:
    """A checked stage."""

    name: str
    c: ConfigDict
    first_step: int  # counted over all stages
    source: dataset.Source
    optimizer: optax.GradientTransformation
    loss: losses.Loss
    sampled_rows: int  # rows of a batch that the student samples; the others are traces
    microbatch_rows: int = 0
    context_tokens: int = 0  # most tokens that a context adds to teachers' prompts; 0: none
    token_budget: int = 0  # tokens sampled per step; 0: all sequences end in their step
    asynchronous: bool = False  # a step's sequences are sampled during the previous step
    teacher_names: tuple[str, ...] = ()  # of the teachers that it reads, in order
    external: tuple[ExternalTeacher, ...] = ()  # those of them that are not run here

    @property
    def end_step(self) -> int:
        return self.first_step + self.c.steps

    @property
    def updates_per_step(self) -> int:
        """The number of optimiser updates in a step."""
        return self.c.epochs * self.c.minibatches

    @property
    def local_teachers(self) -> tuple[str, ...]:
        """The names of the teachers whose models the stage runs."""
        outside = {teacher.name for teacher in self.external}
        return tuple(name for name in self.teacher_names if name not in outside)


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """A checked run: its models, described but not loaded, and its stages in order.

    `load_lora_base` loads the frozen base of a LoRA student, `load_stage_models` the teachers and
    the reference of one stage.
    """

    student: Policy
    teachers: dict[str, Teacher]  # those that are run here, by the name of their sub-config
    reference: Policy | None
    stages: tuple[StageSetup, ...]
    replay_routing: bool = False  # the update routes tokens to the sampler's experts

    def close(self) -> None:
        """Closes the connections to teachers that are not run here."""
        for stage in self.stages:
            for teacher in stage.external:
                teacher.scorer.close()


def setup_run(
    c: ConfigDict, mesh: Mesh, teacher_mesh: Mesh | None = None, steps_done: int = 0
) -> RunSetup:
    """Checks a config, before any weight is read or file written.

    Args:
      teacher_mesh: the mesh of frozen models; None: the student's.
      steps_done: of a run that is resumed. Data and teachers of stages that ended by then are not
        opened, since they may be gone; the setup of such a stage has no examples.

    Raises:
      UserError: naming the invalid flag, file or row.
    """
    teacher_mesh = teacher_mesh or mesh
    if c.unsafe_code:
        sandbox.allow_unsafe_code()
    for message in explain_unknown_entries(c).values():
        raise UserError(message)
    checks.check_fields(c, {"seed": checks.SEEDS}, "config.")
    rules = {"every": Range(1), "keep": Range(1)}
    rules |= {"every_minutes": Range(off="never"), "keep_every": Range(off="none")}
    checks.check_fields(c.checkpoint, rules, "config.checkpoint.")
    if not c.stages:
        raise UserError("config.stages: must name at least one stage")
    for name in c.stages:
        if name not in c or not isinstance(c[name], ConfigDict) or "objective" not in c[name]:
            raise UserError(f"config.stages: {name!r} is not a stage of this config")
    objectives = {name: stages.resolve_objective(name, c[name]) for name in c.stages}
    for name in c.stages:  # before a model is looked for, which may be fetched from the hub
        stages.check_counts(name, c[name])
    m = c.student
    _check_student(m)
    teacher_names = {name: stages.check_teachers(c, name, *objectives[name]) for name in c.stages}
    packed = stages.has_packed_rows(c)
    with name_key("config.student.path", m.path):
        student = policy.make_abstract(
            m.path,
            m.dtype,
            m.remat,
            mesh,
            lora_config=stages.make_lora(m),
            kernel=c.attention,
            packed=packed,
            tokenizer_path=m.tokenizer,
        )
    for field, verb in (("router_aux_loss_coef", "balance"), ("replay_routing", "replay")):
        if m[field] and not any(student.config.sparse_layers):
            raise UserError(f"config.student.{field}: {m.path} has no experts to {verb}")
    if not m.random_init:
        with name_key("config.student.path", m.path):
            policy.check_files(student)
    end_steps = itertools.accumulate(c[name].steps for name in c.stages)
    remaining = [
        name
        for name, end in zip(c.stages, end_steps, strict=True)
        if end > steps_done or not steps_done  # then no count of steps has been checked
    ]
    names = [teacher for name in remaining for teacher in teacher_names[name]]
    outside = external.list_external(c, names)
    teachers = {
        name: local.describe_teacher(c, name, student, teacher_mesh, packed)
        for name in dict.fromkeys(names)
        if name not in outside
    }
    reference = None
    if any(objectives[name][0].reference for name in remaining):
        if m.random_init:
            raise UserError("config.student.random_init: nothing keeps a random reference")
        reference = policy.make_abstract(
            m.path, m.dtype, False, teacher_mesh, kernel=c.attention, packed=packed
        )
    stage_setups, first_step = [], 0
    for name in c.stages:
        own_teachers = {teacher: teachers.get(teacher) for teacher in teacher_names[name]}
        stage = _setup_stage(
            c, name, first_step, student, own_teachers, mesh, teacher_mesh, name not in remaining
        )
        stage_setups.append(stage)
        first_step = stage.end_step
    return RunSetup(student, teachers, reference, tuple(stage_setups), m.replay_routing)


def explain_unknown_entries(c: ConfigDict) -> dict[str, str]:
    """Returns a message for each entry of a config that nothing reads, by its name. Entries can be
    added, unlike the keys of a part, so that recipes can have further stages and teachers."""
    messages = {}
    for name, entry in c.items():
        keys = set(entry) if isinstance(entry, ConfigDict) else set()
        if name in (*SETTINGS, *PARTS) or "objective" in keys or {"path", "step"} <= keys:
            continue
        known = [key for key in c if key in (*SETTINGS, *PARTS) or isinstance(c[key], ConfigDict)]
        hint = suggest(name, [key for key in known if key != name])
        messages[name] = f"config.{name}: is neither a setting nor a stage or a teacher{hint}"
    return messages


def _check_student(m: ConfigDict) -> None:
    if not m.path:
        raise UserError("config.student.path: name a model directory")
    rules = {
        "dtype": policy.DTYPES,
        "param_dtype": policy.PARAM_DTYPES,
        "ema_decay": Range(0, 1, below=True, off="off"),
    }
    checks.check_fields(m, rules, "config.student.")


def load_lora_base(c: ConfigDict, run_setup: RunSetup) -> RunSetup:
    """Loads the base of a LoRA student, which all stages share."""
    if not run_setup.student.model.lora:
        return run_setup
    student = policy.load(run_setup.student, c.student.param_dtype)
    return dataclasses.replace(run_setup, student=student)


def load_stage_models(
    c: ConfigDict,
    run_setup: RunSetup,
    stage: StageSetup,
    loaded_models: dict[str, Policy | Teacher] | None = None,
) -> RunSetup:
    """Loads the teachers and the reference of a stage.

    Args:
      run_setup: the result of `load_lora_base`.
      loaded_models: models of earlier stages by name. Models that this stage does not need are
        removed before others are loaded and added.
    """
    loaded_models = {} if loaded_models is None else loaded_models
    names = set(stage.local_teachers)
    needed = names | ({REFERENCE} if stage.loss.reference else set())
    for name in loaded_models.keys() - needed:
        del loaded_models[name]
    for name in sorted(needed - loaded_models.keys()):  # all processes load in the same order
        if name == REFERENCE:
            assert run_setup.reference is not None
            loaded_models[name] = local.load_initial_student(
                run_setup.reference, run_setup.student, c.student.param_dtype
            )
        else:
            loaded_models[name] = local.load_teacher(run_setup.teachers[name], run_setup.student)
    teachers: Any = {**run_setup.teachers, **{name: loaded_models[name] for name in names}}
    reference: Any = loaded_models.get(REFERENCE, run_setup.reference)
    return dataclasses.replace(run_setup, teachers=teachers, reference=reference)


def _setup_stage(
    c: ConfigDict,
    name: str,
    first_step: int,
    student: Policy,
    teachers: dict[str, Teacher | None],
    mesh: Mesh,
    teacher_mesh: Mesh,
    is_done: bool,
) -> StageSetup:
    """Checks a stage, and the first `data.check_rows` rows of its data unless it is done.

    teachers: by name, in the order in which the stage names them; None: one that is not run here.
    """
    s = c[name]
    loss, sampled_rows = stages.resolve_objective(name, s)
    if is_done:
        optimizer = make_stage_optimizer(name, s)
        no_examples = dataset.Source(0, _refuse_to_read)
        return StageSetup(name, s, first_step, no_examples, optimizer, loss, sampled_rows)
    context = teacher_context.load_context(s.context, f"config.{name}.context")
    context_tokens = s.context.max_tokens if context else 0
    stages.check_sampling(name, s, loss, sampled_rows, student, mesh)
    outside = external.open_teachers(c, s, loss, tuple(teachers), student)
    readers = [*(t.policy for t in teachers.values() if t), *outside]
    stages.check_positions(name, s, student, readers, context_tokens)
    stages.check_packing(name, s, sampled_rows, context_tokens if any(teachers.values()) else 0)
    stages.check_splits(name, s, sampled_rows, mesh, teacher_mesh)
    vocab_size = student.config.vocab_size
    if loss.reward and student.tokenizer is None:
        raise UserError(f"{student.path}: no tokenizer, so responses cannot be graded")
    adapt_row = {"adapt_row": graded_rows.make_row_adapter(name, s)} if loss.reward else {}
    if loss.k > vocab_size:
        raise UserError(f"config.{name}.loss.k={loss.k}: the vocabulary has {vocab_size} tokens")
    check_example = functools.partial(
        _check_example,
        name,
        s,
        loss,
        s.max_prompt_tokens + context_tokens,
        vocab_size,
        has_stored_top=loss.teacher_output == "top" and not outside,
        outside=outside,
    )
    with stages.name_stage(name):
        source = dataset.load_source(
            s.data,
            student.tokenizer,
            c.seed,
            sampled_rows < s.batch_size,
            check_example,
            context,
            **adapt_row,
        )
        order = curriculum.make_stage_order(
            s.data, source.size, source.read_example, s.steps, c.seed
        )
    if s.rollout.asynchronous:
        stages.check_async_rollouts(name, s, loss, sampled_rows)
    optimizer = make_stage_optimizer(name, s)
    return StageSetup(
        name,
        s,
        first_step,
        dataclasses.replace(source, order=order),
        optimizer,
        loss,
        sampled_rows,
        stages.compute_microbatch_rows(s, sampled_rows, mesh, teacher_mesh),
        context_tokens,
        s.rollout.token_budget,
        s.rollout.asynchronous,
        tuple(teachers),
        outside,
    )


def make_stage_optimizer(name: str, s: ConfigDict) -> optax.GradientTransformation:
    """Makes the optimiser of a stage. Raises UserError naming the key that is out of range."""
    try:
        return optim.make_optimizer(s.optim, s.steps * s.epochs * s.minibatches)
    except UserError as error:
        raise UserError(f"config.{name}.optim.{error}") from None


def _refuse_to_read(index: int) -> dataset.Example:
    raise AssertionError("a stage that is done reads no examples")


def _check_example(
    name: str,
    s: ConfigDict,
    loss: losses.Loss,
    max_teacher_prompt: int,
    vocab_size: int,
    example: dataset.Example,
    *,
    has_stored_top: bool = False,
    outside: tuple[ExternalTeacher, ...] = (),
) -> None:
    """Raises UserError naming an example that stage `name` cannot use.

    Args:
      has_stored_top: rows hold the teacher's likeliest tokens.
      outside: the teachers that are not run here.
    """
    field = f"config.{name}.max_prompt_tokens"
    dataset.require_valid_example(example, s.max_prompt_tokens, field, vocab_size)
    teacher_prompt = example.teacher_prompt or []
    if len(teacher_prompt) > max_teacher_prompt:
        raise PromptTooLong(
            f"{example.where}: prompt and context of {len(teacher_prompt)} tokens, {field} and "
            f"config.{name}.context.max_tokens allow {max_teacher_prompt} together",
            len(teacher_prompt),
        )
    dataset.require_ids(teacher_prompt, vocab_size, example.where)
    if has_stored_top:
        examples.require_top(example, loss.teacher_topk)
    if example.response:
        if loss.is_on_policy:
            examples.require_logprobs(example)
        for teacher in outside:
            teacher.require_example(example)
    if loss.reward:
        graded_rows.require_gradable(s, example)


def describe_models(run_setup: RunSetup) -> dict[str, dict[str, float]]:
    """Returns the size of the student and of each teacher, and the operations of a forward pass of
    one token through its weights, by names of sub-configs. From these a report adds up the cost."""
    policies = {"student": run_setup.student}
    policies |= {name: teacher.policy for name, teacher in run_setup.teachers.items()}
    return {
        name: {
            "parameters": policy.config.num_parameters,
            "flops_per_token": families.count_forward_flops(policy.config, 1, 0, with_head=True),
        }
        for name, policy in policies.items()
    }


def make_stage_update(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    optimizer: optax.GradientTransformation,
    student: Policy,
    mesh: Mesh,
    state: update.TrainState,
) -> update.UpdatePrograms:
    """Makes the update of a stage for states like `state`, which may be shapes alone."""
    options = update.UpdateOptions(
        s.max_response_tokens,
        stages.get_loss_chunk_mib(c, mesh),
        router_aux_loss_coef=c.student.router_aux_loss_coef,
        overlap_k=c.log.overlap_top_k if loss.teacher else 0,
        ema_decay=c.student.ema_decay,
        temperature=stages.get_temperature(s, loss),
    )
    return update.make_update(student.model, optimizer, loss, options, state)
