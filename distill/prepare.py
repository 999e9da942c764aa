"""A config made into a plan: everything a user can get wrong is found here, before any weight is
read or file written."""

import dataclasses
import functools

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import (
    context,
    curriculum,
    data,
    examples,
    losses,
    optim,
    packing,
    policy,
    rewards,
    rollout,
    teacher,
)
from distill import mesh as mesh_lib
from distill.policy import Policy
from distill.teacher import Teacher
from models.errors import UserError
from models.qwen3.lora import LoRA

# Share of rows that the student writes, where an objective does not mean all of them.
ON_POLICY = {"sft": 0.0, "distill": 0.0, "gkd": 0.5}
GROUPS = ("keep", "drop", "replace")  # what becomes of groups whose rewards are all equal


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage with all that it needs checked and at hand; `first` is its first global step."""

    name: str
    c: ConfigDict
    first: int
    source: data.Source
    optimizer: optax.GradientTransformation
    loss: losses.Loss
    sampled: int  # rows of a batch that the student writes; the others are read
    packer: packing.Packer | None = None  # where rows hold several examples
    parked: rollout.Parked | None = None  # where a budget of tokens ends its steps
    room: int = 0  # tokens that a context may add to what teachers read; 0: they read the same
    ahead: rollout.Ahead | None = None  # where a step's rows are sampled during the one before

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
        return _taught(self.c, self.loss)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of several teachers what each says counts; () where rows are theirs by source."""
        weights = [float(weight) for weight in self.c.teacher_weights]
        return tuple(weight / sum(weights) for weight in weights)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run: models described but not loaded, stages in order.

    `load` reads the teachers, the reference, and the student where it is the frozen base of a LoRA
    (and then what is that base too).
    """

    student: Policy
    teachers: dict[str, Teacher]  # by the names of their sub-configs
    reference: Policy | None
    stages: tuple[Stage, ...]
    replays: bool = False  # the update sends each token to the experts that the sampler did


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
    chosen = {name: (c[name], *_objective(name, c[name])) for name in c.stages}
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
        teacher.check(c, name, s, _taught(s, loss))
    student = policy.describe(
        m.path,
        m.dtype,
        m.remat,
        mesh,
        trained=_lora(m),
        kernel=c.attention,
        tokenizer_of=m.tokenizer,
    )
    for field, to in (("balance_loss", "balance"), ("replay_routing", "replay")):
        if m[field] and not any(student.config.sparse_layers):
            raise UserError(f"config.student.{field}: {m.path} has no experts to {to}")
    if not c.student.random_init:
        policy.check(student)
    reference, teachers = None, {}
    for s, loss, _ in chosen.values():
        for name in s.teachers if _taught(s, loss) else ():
            teachers[name] = teachers.get(name) or teacher.describe(c, name, student, mesh)
    if any(loss.reference for _, loss, _ in chosen.values()):
        if m.random_init:
            raise UserError("config.student.random_init: nothing keeps a random reference")
        reference = policy.describe(m.path, m.dtype, False, mesh, kernel=c.attention)
    stages, first = [], 0
    for name, (s, loss, sampled) in chosen.items():
        read = [teachers[of].policy for of in s.teachers] if _taught(s, loss) else []
        stages.append(_stage(c, name, first, loss, sampled, student, read, mesh))
        first += s.steps
    return Plan(student, teachers, reference, tuple(stages), m.replay_routing)


def load(c: ConfigDict, plan: Plan) -> Plan:
    """Reads all that the run only reads: teachers, reference, and the base of a LoRA."""
    student, reference = plan.student, plan.reference
    if student.model.lora:
        student = policy.load(student, c.student.param_dtype)
    loaded = {name: teacher.load(t, student) for name, t in plan.teachers.items()}
    if reference:
        reference = teacher.begun(reference, student, c.student.param_dtype)
    return dataclasses.replace(plan, student=student, teachers=loaded, reference=reference)


def _objective(name: str, s: ConfigDict) -> tuple[losses.Loss, int]:
    """What a stage minimises, and how many rows of its batch the student writes."""
    if s.objective not in losses.TABLE:
        known = ", ".join(losses.TABLE)
        raise UserError(f"config.{name}.objective: {s.objective!r} is none of {known}")
    changes = {field: value for field, value in s.loss.items() if value is not None}
    try:
        loss = dataclasses.replace(losses.TABLE[s.objective], **changes)
    except UserError as error:
        raise UserError(f"config.{name}.loss.{error}") from None
    share = ON_POLICY.get(s.objective, 1.0) if s.on_policy is None else s.on_policy
    if not 0 <= share <= 1:
        raise UserError(f"config.{name}.on_policy={share}: must be from 0 to 1")
    sampled = round(share * s.batch_size)
    if loss.on_policy and sampled < s.batch_size:
        raise UserError(
            f"config.{name}.on_policy={share}: this loss needs the sampler's log-probabilities of "
            "every token, and read responses have none"
        )
    if loss.served == "token":
        raise UserError(f"config.{name}.loss.served=token: is of a teacher elsewhere")
    if loss.served == "top" and sampled:
        raise UserError(
            f"config.{name}.loss.served=top: stored log-probabilities are of read responses, "
            f"but on_policy={share}"
        )
    if loss.reward:
        _check_reward(name, s, loss)
    return loss, sampled


def _check_reward(name: str, s: ConfigDict, loss: losses.Loss) -> None:
    r = s.reward
    if s.samples < 2:
        raise UserError(
            f"config.{name}.samples={s.samples}: an advantage compares responses to one prompt, so "
            "it takes at least 2"
        )
    if r.grader not in rewards.GRADERS:
        known = ", ".join(rewards.GRADERS)
        raise UserError(f"config.{name}.reward.grader: {r.grader!r} is none of {known}")
    if r.constant_groups not in GROUPS:
        raise UserError(
            f"config.{name}.reward.constant_groups: {r.constant_groups!r} is none of "
            f"{', '.join(GROUPS)}"
        )
    if not any((*terms_of(s).values(), r.judge)):
        raise UserError(f"config.{name}.reward: all weights are 0")
    if r.length and not 0 < r.margin <= s.max_response_tokens:
        raise UserError(
            f"config.{name}.reward.margin={r.margin}: the length penalty falls over so many tokens "
            "before the limit, at least 1"
        )
    if r.rounds < 1:
        raise UserError(f"config.{name}.reward.rounds={r.rounds}: must be at least 1")
    if s.rollout.budget:
        raise UserError(
            f"config.{name}.rollout.budget: the responses to one prompt must end together"
        )


def terms_of(s: ConfigDict) -> dict[str, float]:
    """The weights of the reward's terms."""
    r = s.reward
    return {
        "correct": r.correct,
        "format": r.format,
        "length": r.length,
        "repetition": r.repetition,
    }


def _taught(s: ConfigDict, loss: losses.Loss) -> bool:
    """Whether a stage needs the teacher's model."""
    hands_over = loss.teacher > 0 and loss.served != "top"
    return bool(hands_over or (loss.reward and s.reward.judge))


def _stage(
    c: ConfigDict,
    name: str,
    first: int,
    loss: losses.Loss,
    sampled: int,
    student: Policy,
    teachers: list[Policy],
    mesh: Mesh,
) -> Stage:
    s = c[name]
    told = context.describe(s.context, f"config.{name}.context")
    room = s.context.max_tokens if told else 0
    _check_stage(name, s, sampled, student, teachers, room, mesh)
    fits = functools.partial(
        data.require,
        limit=s.max_prompt_tokens,
        field=f"config.{name}.max_prompt_tokens",
        vocab_size=student.config.vocab_size,
    )

    def require(example: data.Example) -> None:
        fits(example)
        allowed = s.max_prompt_tokens + room
        if len(example.told or ()) > allowed:
            raise UserError(
                f"{example.where}: prompt and context of {len(example.told or ())} tokens, config."
                f"{name}.max_prompt_tokens and context.max_tokens allow {allowed} together"
            )
        data.require_ids(example.told or [], student.config.vocab_size, example.where)
        if loss.served == "top":
            examples.require_top(example, loss.served_k)
        if loss.reward and s.reward.correct and not example.answer:
            raise UserError(f"{example.where}: no answer to compare a response with")
        compared = loss.reward and s.reward.correct
        if compared and not rewards.gradable(s.reward.grader, example.answer):
            raise UserError(
                f"{example.where}: answer {example.answer[:60]!r} is none that the grader "
                f"{s.reward.grader} can compare with"
            )

    if loss.reward and student.tokenizer is None:
        raise UserError(f"{student.path}: no tokenizer, so responses cannot be graded")
    source = data.load(s.data, student.tokenizer, c.seed, sampled < s.batch_size, require, told)
    order = curriculum.over(s.data, source.size, source.example, s.steps, c.seed)
    source = dataclasses.replace(source, order=order)
    packer = None
    if s.pack_tokens:
        packer = packing.Packer(source, c.seed, s.batch_size, s.pack_tokens, s.max_response_tokens)
    parked = rollout.Parked() if s.rollout.budget else None
    if s.rollout.ahead:
        _check_ahead(name, s, loss, sampled)
    ahead = rollout.Ahead() if s.rollout.ahead else None
    optimizer = optim.make(s.optim, s.steps * s.epochs * s.minibatches)
    return Stage(name, s, first, source, optimizer, loss, sampled, packer, parked, room, ahead)


def _check_ahead(name: str, s: ConfigDict, loss: losses.Loss, sampled: int) -> None:
    """Rows sampled ahead come from weights one update old: the loss must know what to do then."""
    flag = f"config.{name}.rollout.ahead"
    if not sampled:
        raise UserError(f"{flag}: {s.objective} samples nothing")
    if loss.on_policy and loss.ratio == "none":
        raise UserError(f"{flag}: loss.ratio=none takes every sample for fresh; use token")
    if loss.teacher and loss.estimator == "sampled" and loss.k1_of == "sampler":
        raise UserError(f"{flag}: loss.k1_of=sampler lags behind on such samples; use student")
    if loss.on_policy and s.minibatches * s.epochs > 1 and not loss.truncate:
        raise UserError(
            f"{flag}: with several updates a step the ratio begins at the first of them; "
            "loss.truncate weighs what came before"
        )


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
    name: str,
    s: ConfigDict,
    sampled: int,
    student: Policy,
    teachers: list[Policy],
    context_room: int,
    mesh: Mesh,
) -> None:
    counts = ("steps", "batch_size", "samples", "accumulate", "minibatches", "epochs")
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
    for reader, more in [(student, 0), *((reader, context_room) for reader in teachers)]:
        limit, what = reader.config.context_length, " + context.max_tokens" if more else ""
        if total + more > limit:
            raise UserError(
                f"config.{name}: max_prompt_tokens + max_response_tokens{what} = {total + more} "
                f"exceeds the model's {limit} positions ({reader.path})"
            )
    if s.pack_tokens and context_room:
        raise UserError(
            f"config.{name}.pack_tokens: a context makes the teachers' rows longer, so they are "
            "not packed; set 0"
        )
    if s.pack_tokens and sampled:
        raise UserError(f"config.{name}.pack_tokens: {s.objective} samples, and packs nothing")
    if s.pack_tokens and len(teachers) > 1 and not s.teacher_weights:
        raise UserError(
            f"config.{name}.pack_tokens: a row would hold examples of several teachers; set 0, or "
            "teacher_weights"
        )
    if s.pack_tokens and s.data.curriculum:
        raise UserError(f"config.{name}.data.curriculum: packed rows are of no one step")
    if s.pack_tokens < 0 or 0 < s.pack_tokens < total:
        raise UserError(
            f"config.{name}.pack_tokens={s.pack_tokens}: a row must hold max_prompt_tokens + "
            f"max_response_tokens = {total}"
        )
    rows = s.accumulate * s.minibatches * mesh_lib.row_shards(mesh)
    if s.batch_size % rows:
        raise UserError(
            f"config.{name}.batch_size={s.batch_size} does not divide by accumulate times "
            f"minibatches times the devices ({rows})"
        )
    if sampled % s.samples:
        raise UserError(
            f"config.{name}.batch_size={s.batch_size}: the {sampled} rows that are sampled do not "
            f"divide by samples ({s.samples})"
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
        param_dtype=r.param_dtype,
        gathered=r.gathered,
    )
