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
class Stage:
    """One stage with all that it needs checked and at hand; `first` is its first global step."""

    name: str
    c: ConfigDict
    first: int
    source: dataset.Source
    optimizer: optax.GradientTransformation
    loss: losses.Loss
    sampled: int  # rows of a batch that the student writes; the others are read
    packer: packing.Packer | None = None  # where rows hold several examples
    parked: rollout.PartialRollouts | None = None  # where a budget of tokens ends its steps
    room: int = 0  # tokens that a context may add to what teachers read; 0: they read the same
    ahead: rollout.AsyncRollouts | None = (
        None  # where a step's rows are sampled during the one before
    )
    rows: int = 0  # of a micro-batch

    @property
    def end(self) -> int:
        return self.first + self.c.steps

    @property
    def updates(self) -> int:
        """Updates of the optimiser in one step."""
        return self.c.epochs * self.c.minibatches

    @property
    def taught(self) -> bool:
        """Whether a teacher's model is needed."""
        return stages.taught(self.c, self.loss)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of several teachers what each says counts; () where rows are theirs by source."""
        weights = [float(weight) for weight in self.c.teacher_weights]
        return tuple(weight / sum(weights) for weight in weights)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run: models described but not loaded, stages in order.

    `base` reads the student where it is the frozen base of a LoRA, `load` what one stage reads: its
    teachers and its reference.
    """

    student: Policy
    teachers: dict[str, Teacher]  # by the names of their sub-configs
    reference: Policy | None
    stages: tuple[Stage, ...]
    replays: bool = False  # the update sends each token to the experts that the sampler did


def prepare(c: ConfigDict, mesh: Mesh, apart: Mesh | None = None) -> Plan:
    """Checks everything a user can get wrong, before any weight is read or file written.

    apart: the mesh of models that are only read, where it is another than the student's.

    Raises:
      UserError: naming the flag, file or row at fault.
    """
    apart = apart or mesh
    if c.seed < 0:
        raise UserError(f"config.seed={c.seed}: must be 0 or more")
    if not c.stages:
        raise UserError("config.stages: names no stage")
    for name in c.stages:
        if name not in c or not isinstance(c[name], ConfigDict) or "objective" not in c[name]:
            raise UserError(f"config.stages: {name!r} is no stage of this config")
    chosen = {name: (c[name], *stages.objective(name, c[name])) for name in c.stages}
    if not c.student.path:
        raise UserError("config.student.path: name a model directory")
    m = c.student
    for field, allowed in (("dtype", policy.DTYPES), ("param_dtype", policy.PARAM_DTYPES)):
        if m[field] not in allowed:
            known = ", ".join(allowed)
            raise UserError(f"config.student.{field}: {m[field]!r} is none of {known}")
    if not 0 <= m.ema < 1:
        raise UserError(f"config.student.ema={m.ema}: must be at least 0 (off) and below 1")
    for name, (s, loss, _) in chosen.items():
        local.check(c, name, s, stages.taught(s, loss))
    student = policy.describe(
        m.path,
        m.dtype,
        m.remat,
        mesh,
        trained=stages.lora(m),
        kernel=c.attention,
        packed=stages.packs(c),
        tokenizer_of=m.tokenizer,
    )
    for field, to in (("balance_loss", "balance"), ("replay_routing", "replay")):
        if m[field] and not any(student.config.sparse_layers):
            raise UserError(f"config.student.{field}: {m.path} has no experts to {to}")
    if not c.student.random_init:
        policy.check(student)
    reference, teachers = None, {}
    for s, loss, _ in chosen.values():
        for name in s.teachers if stages.taught(s, loss) else ():
            teachers[name] = teachers.get(name) or local.describe(
                c, name, student, apart, stages.packs(c)
            )
    if any(loss.reference for _, loss, _ in chosen.values()):
        if m.random_init:
            raise UserError("config.student.random_init: nothing keeps a random reference")
        reference = policy.describe(
            m.path, m.dtype, False, apart, kernel=c.attention, packed=stages.packs(c)
        )
    listed, first = [], 0
    for name, (s, loss, sampled) in chosen.items():
        read = [teachers[of].policy for of in s.teachers] if stages.taught(s, loss) else []
        listed.append(_stage(c, name, first, loss, sampled, student, read, mesh, apart))
        first += s.steps
    return Plan(student, teachers, reference, tuple(listed), m.replay_routing)


def base(c: ConfigDict, plan: Plan) -> Plan:
    """Reads the base of a LoRA, which all stages share."""
    if not plan.student.model.lora:
        return plan
    student = policy.load(plan.student, c.student.param_dtype)
    return dataclasses.replace(plan, student=student)


def load(
    c: ConfigDict, plan: Plan, stage: Stage, held: dict[str, Policy | Teacher] | None = None
) -> Plan:
    """Reads what a stage only reads: its teachers and its reference.

    plan: with what `base` read. held: what was read for earlier stages, by name; what this one does
      not need is let go of before anything is read, and what is read is added.
    """
    held = {} if held is None else held
    names = set(stage.c.teachers) if stage.taught else set()
    needed = names | ({REFERENCE} if stage.loss.reference else set())
    for name in held.keys() - needed:
        del held[name]
    for name in sorted(needed - held.keys()):  # of several processes all in one order
        if name == REFERENCE:
            assert plan.reference is not None
            held[name] = local.begun(plan.reference, plan.student, c.student.param_dtype)
        else:
            held[name] = local.load(plan.teachers[name], plan.student)
    teachers: Any = {**plan.teachers, **{name: held[name] for name in names}}
    reference: Any = held.get(REFERENCE, plan.reference)
    return dataclasses.replace(plan, teachers=teachers, reference=reference)


def _stage(
    c: ConfigDict,
    name: str,
    first: int,
    loss: losses.Loss,
    sampled: int,
    student: Policy,
    teachers: list[Policy],
    mesh: Mesh,
    apart: Mesh,
) -> Stage:
    s = c[name]
    told = teacher_context.describe(s.context, f"config.{name}.context")
    room = s.context.max_tokens if told else 0
    stages.check(name, s, loss, sampled, student, teachers, room, mesh, apart)
    fits = functools.partial(
        dataset.require,
        limit=s.max_prompt_tokens,
        field=f"config.{name}.max_prompt_tokens",
        vocab_size=student.config.vocab_size,
    )

    def require(example: dataset.Example) -> None:
        fits(example)
        allowed = s.max_prompt_tokens + room
        if len(example.told or ()) > allowed:
            raise UserError(
                f"{example.where}: prompt and context of {len(example.told or ())} tokens, config."
                f"{name}.max_prompt_tokens and context.max_tokens allow {allowed} together"
            )
        dataset.require_ids(example.told or [], student.config.vocab_size, example.where)
        if loss.served == "top":
            examples.require_top(example, loss.served_k)
        if loss.reward and s.reward.correct and not example.answer:
            raise UserError(f"{example.where}: no answer to compare a response with")
        compared = loss.reward and s.reward.correct
        if compared and not graders.gradable(s.reward.grader, example.answer):
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
        source = dataset.load(
            s.data, student.tokenizer, c.seed, sampled < s.batch_size, require, told
        )
        order = curriculum.over(s.data, source.size, source.example, s.steps, c.seed)
    except UserError as error:  # of which stage, the reader of data does not know
        raise UserError(str(error).replace("config.data.", f"config.{name}.data.")) from None
    source = dataclasses.replace(source, order=order)
    packer = None
    if s.pack_tokens and not sampled:
        packer = packing.Packer(source, c.seed, s.batch_size, s.pack_tokens, s.max_response_tokens)
    parked = rollout.PartialRollouts() if s.rollout.budget else None
    if s.rollout.ahead:
        stages.check_ahead(name, s, loss, sampled)
    ahead = rollout.AsyncRollouts() if s.rollout.ahead else None
    try:
        optimizer = optim.make(s.optim, s.steps * s.epochs * s.minibatches)
    except UserError as error:
        raise UserError(f"config.{name}.optim.{error}") from None
    rows = stages.microbatch_rows(s, sampled, mesh, apart)
    return Stage(
        name, s, first, source, optimizer, loss, sampled, packer, parked, room, ahead, rows
    )


def updater(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    optimizer: optax.GradientTransformation,
    student: Policy,
    mesh: Mesh,
    state: update.TrainState,
) -> update.Update:
    """The update of a stage, for a state like this one, which may be shapes alone."""
    return update.make(
        student.model,
        optimizer,
        loss,
        s.max_response_tokens,
        stages.logits_mib(c, mesh),
        state,
        balance=c.student.balance_loss,
        overlap=c.log.overlap if loss.teacher else 0,
        ema=c.student.ema,
        temperature=stages.read_at(s, loss),
    )
