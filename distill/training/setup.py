"""A config made into a plan: everything a user can get wrong is found here, before any weight is
read or file written."""

import dataclasses
import functools
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import rollout
from distill.data import curriculum, dataset, examples, packing, teacher_context
from distill.objectives import losses
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.teachers import local
from distill.teachers.local import Teacher
from distill.training import optim, stages, update
from models.errors import UserError

REFERENCE = "a reference"  # its name in what is held, which no teacher can have


@dataclasses.dataclass(frozen=True)
class StageSetup:
    """One stage with all that it needs checked and at hand; `first` is its first global step."""

    name: str
    c: ConfigDict
    first_step: int
    source: dataset.Source
    optimizer: optax.GradientTransformation
    loss: losses.Loss
    sampled_rows: int  # rows of a batch that the student writes; the others are read
    packer: packing.Packer | None = None  # where rows hold several examples
    partial_rollouts: rollout.PartialRollouts | None = (
        None  # where a budget of tokens ends its steps
    )
    context_tokens: int = (
        0  # tokens that a context may add to what teachers read; 0: they read the same
    )
    async_rollouts: rollout.AsyncRollouts | None = (
        None  # where a step's rows are sampled during the one before
    )
    microbatch_rows: int = 0  # of a micro-batch

    @property
    def end_step(self) -> int:
        return self.first_step + self.c.steps

    @property
    def updates_per_step(self) -> int:
        """Updates of the optimiser in one step."""
        return self.c.epochs * self.c.minibatches

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's model is needed."""
        return stages.needs_teacher(self.c, self.loss)


@dataclasses.dataclass(frozen=True)
class RunSetup:
    """A checked run: models described but not loaded, stages in order.

    `base` reads the student where it is the frozen base of a LoRA, `load` what one stage reads: its
    teachers and its reference.
    """

    student: Policy
    teachers: dict[str, Teacher]  # by the names of their sub-configs
    reference: Policy | None
    stages: tuple[StageSetup, ...]
    replay_routing: bool = False  # the update sends each token to the experts that the sampler did


def setup_run(c: ConfigDict, mesh: Mesh, teacher_mesh: Mesh | None = None) -> RunSetup:
    """Checks everything a user can get wrong, before any weight is read or file written.

    apart: the mesh of models that are only read, where it is another than the student's.

    Raises:
      UserError: naming the flag, file or row at fault.
    """
    teacher_mesh = teacher_mesh or mesh
    if c.seed < 0:
        raise UserError(f"config.seed={c.seed}: must be 0 or more")
    if not c.stages:
        raise UserError("config.stages: names no stage")
    for name in c.stages:
        if name not in c or not isinstance(c[name], ConfigDict) or "objective" not in c[name]:
            raise UserError(f"config.stages: {name!r} is no stage of this config")
    objectives = {name: (c[name], *stages.resolve_objective(name, c[name])) for name in c.stages}
    if not c.student.path:
        raise UserError("config.student.path: name a model directory")
    m = c.student
    for field, allowed in (("dtype", policy.DTYPES), ("param_dtype", policy.PARAM_DTYPES)):
        if m[field] not in allowed:
            known = ", ".join(allowed)
            raise UserError(f"config.student.{field}: {m[field]!r} is none of {known}")
    if not 0 <= m.ema_decay < 1:
        raise UserError(
            f"config.student.ema_decay={m.ema_decay}: must be at least 0 (off) and below 1"
        )
    for name, (s, loss, _) in objectives.items():
        local.check_teachers(c, name, s, stages.needs_teacher(s, loss))
    student = policy.make_abstract(
        m.path,
        m.dtype,
        m.remat,
        mesh,
        lora_config=stages.make_lora(m),
        kernel=c.attention,
        packed=stages.has_packed_rows(c),
        tokenizer_path=m.tokenizer,
    )
    for field, to in (("router_aux_loss_coef", "balance"), ("replay_routing", "replay")):
        if m[field] and not any(student.config.sparse_layers):
            raise UserError(f"config.student.{field}: {m.path} has no experts to {to}")
    if not c.student.random_init:
        policy.check_files(student)
    reference, teachers = None, {}
    for s, loss, _ in objectives.values():
        for name in s.teachers if stages.needs_teacher(s, loss) else ():
            teachers[name] = teachers.get(name) or local.describe_teacher(
                c, name, student, teacher_mesh, stages.has_packed_rows(c)
            )
    if any(loss.reference for _, loss, _ in objectives.values()):
        if m.random_init:
            raise UserError("config.student.random_init: nothing keeps a random reference")
        reference = policy.make_abstract(
            m.path,
            m.dtype,
            False,
            teacher_mesh,
            kernel=c.attention,
            packed=stages.has_packed_rows(c),
        )
    stage_setups, first_step = [], 0
    for name, (s, loss, sampled_rows) in objectives.items():
        teacher_policies = (
            [teachers[of].policy for of in s.teachers] if stages.needs_teacher(s, loss) else []
        )
        stage_setups.append(
            _setup_stage(
                c,
                name,
                first_step,
                loss,
                sampled_rows,
                student,
                teacher_policies,
                mesh,
                teacher_mesh,
            )
        )
        first_step += s.steps
    return RunSetup(student, teachers, reference, tuple(stage_setups), m.replay_routing)


def load_lora_base(c: ConfigDict, run_setup: RunSetup) -> RunSetup:
    """Reads the base of a LoRA, which all stages share."""
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
    """Reads what a stage only reads: its teachers and its reference.

    plan: with what `base` read. held: what was read for earlier stages, by name; what this one does
      not need is let go of before anything is read, and what is read is added.
    """
    loaded_models = {} if loaded_models is None else loaded_models
    names = set(stage.c.teachers) if stage.needs_teacher else set()
    needed = names | ({REFERENCE} if stage.loss.reference else set())
    for name in loaded_models.keys() - needed:
        del loaded_models[name]
    for name in sorted(needed - loaded_models.keys()):  # of several processes all in one order
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
    loss: losses.Loss,
    sampled_rows: int,
    student: Policy,
    teachers: list[Policy],
    mesh: Mesh,
    teacher_mesh: Mesh,
) -> StageSetup:
    s = c[name]
    context = teacher_context.load_context(s.context, f"config.{name}.context")
    context_tokens = s.context.max_tokens if context else 0
    stages.check_stage(
        name, s, loss, sampled_rows, student, teachers, context_tokens, mesh, teacher_mesh
    )
    check_prompt = functools.partial(
        dataset.require_valid_example,
        limit=s.max_prompt_tokens,
        field=f"config.{name}.max_prompt_tokens",
        vocab_size=student.config.vocab_size,
    )

    def check_example(example: dataset.Example) -> None:
        check_prompt(example)
        allowed = s.max_prompt_tokens + context_tokens
        if len(example.teacher_prompt or ()) > allowed:
            raise UserError(
                f"{example.where}: prompt and context of {len(example.teacher_prompt or ())} "
                "tokens, config."
                f"{name}.max_prompt_tokens and context.max_tokens allow {allowed} together"
            )
        dataset.require_ids(example.teacher_prompt or [], student.config.vocab_size, example.where)
        if loss.teacher_output == "top":
            examples.require_top(example, loss.teacher_topk)
        if loss.reward and s.reward.correct and not example.answer:
            raise UserError(f"{example.where}: no answer to compare a response with")
        is_graded = loss.reward and s.reward.correct
        if is_graded and not graders.is_gradable(s.reward.grader, example.answer):
            raise UserError(
                f"{example.where}: answer {example.answer[:60]!r} is none that the grader "
                f"{s.reward.grader} can compare with"
            )

    if loss.reward and student.tokenizer is None:
        raise UserError(f"{student.path}: no tokenizer, so responses cannot be graded")
    if loss.k > student.config.vocab_size:
        raise UserError(
            f"config.{name}.loss.k={loss.k}: the vocabulary has {student.config.vocab_size} tokens"
        )
    try:
        source = dataset.load_source(
            s.data, student.tokenizer, c.seed, sampled_rows < s.batch_size, check_example, context
        )
        order = curriculum.make_stage_order(
            s.data, source.size, source.read_example, s.steps, c.seed
        )
    except UserError as error:  # of which stage, the reader of data does not know
        raise UserError(str(error).replace("config.data.", f"config.{name}.data.")) from None
    source = dataclasses.replace(source, order=order)
    packer = None
    if s.pack_tokens and not sampled_rows:
        packer = packing.Packer(source, c.seed, s.batch_size, s.pack_tokens, s.max_response_tokens)
    partial_rollouts = rollout.PartialRollouts() if s.rollout.token_budget else None
    if s.rollout.asynchronous:
        stages.check_async_rollouts(name, s, loss, sampled_rows)
    async_rollouts = rollout.AsyncRollouts() if s.rollout.asynchronous else None
    try:
        optimizer = optim.make_optimizer(s.optim, s.steps * s.epochs * s.minibatches)
    except UserError as error:
        raise UserError(f"config.{name}.optim.{error}") from None
    microbatch_rows = stages.compute_microbatch_rows(s, sampled_rows, mesh, teacher_mesh)
    return StageSetup(
        name,
        s,
        first_step,
        source,
        optimizer,
        loss,
        sampled_rows,
        packer,
        partial_rollouts,
        context_tokens,
        async_rollouts,
        microbatch_rows,
    )


def make_stage_update(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    optimizer: optax.GradientTransformation,
    student: Policy,
    mesh: Mesh,
    state: update.TrainState,
) -> update.UpdatePrograms:
    """The update of a stage, for a state like this one, which may be shapes alone."""
    options = update.UpdateOptions(
        s.max_response_tokens,
        stages.compute_logits_mib(c, mesh),
        router_aux_loss_coef=c.student.router_aux_loss_coef,
        overlap_k=c.log.overlap_top_k if loss.teacher else 0,
        ema_decay=c.student.ema_decay,
        temperature=stages.get_temperature(s, loss),
    )
    return update.make_update(student.model, optimizer, loss, options, state)
