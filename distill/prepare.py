"""A config made into a plan: everything a user can get wrong is found here, before any weight is
read or file written."""

import dataclasses
import functools

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill import data, losses, optim, packing, policy, rewards, rollout, update
from distill import mesh as mesh_lib
from distill.policy import Policy
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

    @property
    def end(self) -> int:
        return self.first + self.c.steps

    @property
    def updates(self) -> int:
        """Updates of the optimiser in one step."""
        return self.c.epochs * self.c.minibatches

    @property
    def taught(self) -> bool:
        """Whether the teacher's model is needed."""
        return taught(self.c, self.loss)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked run: models described but not loaded, stages in order.

    `run` loads the teacher, the reference, and the student where it is the frozen base of a LoRA
    (and then the reference).
    """

    student: Policy
    teacher: Policy | None
    reference: Policy | None
    stages: tuple[Stage, ...]


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
    chosen = {name: (c[name], *objective(name, c[name])) for name in c.stages}
    if not c.student.path:
        raise UserError("config.student.path: name a model directory")
    if any(taught(s, loss) for s, loss, _ in chosen.values()) and not c.teacher.path:
        raise UserError("config.teacher.path: name a model directory")
    for field, dtype, allowed in (
        ("student.dtype", c.student.dtype, policy.DTYPES),
        ("student.param_dtype", c.student.param_dtype, policy.DTYPES),
        ("teacher.dtype", c.teacher.dtype, policy.DTYPES),
        ("teacher.param_dtype", c.teacher.param_dtype, policy.PARAM_DTYPES),
    ):
        if dtype not in allowed:
            raise UserError(f"config.{field}: {dtype!r} is none of {', '.join(allowed)}")
    m = c.student
    student = policy.describe(
        m.path,
        m.dtype,
        m.remat,
        mesh,
        trained=lora(m),
        kernel=c.attention,
        tokenizer_of=m.tokenizer,
    )
    if c.student.balance_loss and not any(student.config.sparse_layers):
        raise UserError(f"config.student.balance_loss: {c.student.path} has no experts to balance")
    if not c.student.random_init:
        policy.check(student)
    teacher = reference = None
    if any(taught(s, loss) for s, loss, _ in chosen.values()):
        teacher = policy.describe(c.teacher.path, c.teacher.dtype, False, mesh, kernel=c.attention)
        policy.require_same_vocabulary(student, teacher)
        policy.check(teacher)
    if any(loss.reference for _, loss, _ in chosen.values()):
        if m.random_init:
            raise UserError("config.student.random_init: nothing keeps a random reference")
        reference = policy.describe(m.path, m.dtype, False, mesh, kernel=c.attention)
    stages, first = [], 0
    for name, (s, loss, sampled) in chosen.items():
        stages.append(_stage(c, name, first, loss, sampled, student, teacher, mesh))
        first += s.steps
    return Plan(student, teacher, reference, tuple(stages))


def objective(name: str, s: ConfigDict) -> tuple[losses.Loss, int]:
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


def taught(s: ConfigDict, loss: losses.Loss) -> bool:
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
    teacher: Policy | None,
    mesh: Mesh,
) -> Stage:
    s = c[name]
    _check_stage(name, s, sampled, student, teacher if taught(s, loss) else None, mesh)
    fits = functools.partial(
        data.require,
        limit=s.max_prompt_tokens,
        field=f"config.{name}.max_prompt_tokens",
        vocab_size=student.config.vocab_size,
    )

    def require(example: data.Example) -> None:
        fits(example)
        if loss.reward and s.reward.correct and not example.answer:
            raise UserError(f"{example.where}: no answer to compare a response with")

    if loss.reward and student.tokenizer is None:
        raise UserError(f"{student.path}: no tokenizer, so responses cannot be graded")
    source = data.load(s.data, student.tokenizer, c.seed, sampled < s.batch_size, require)
    packer = None
    if s.pack_tokens:
        packer = packing.Packer(source, c.seed, s.batch_size, s.pack_tokens, s.max_response_tokens)
    parked = rollout.Parked() if s.rollout.budget else None
    optimizer = optim.make(s.optim, s.steps * s.epochs * s.minibatches)
    return Stage(name, s, first, source, optimizer, loss, sampled, packer, parked)


def lora(s: ConfigDict) -> LoRA | None:
    if not s.lora.rank:
        return None
    if s.random_init:
        raise UserError("config.student.lora.rank: nothing keeps a random base; train all of it")
    try:
        return LoRA(s.lora.rank, s.lora.alpha, s.lora.rslora, tuple(s.lora.targets))
    except UserError as error:
        raise UserError(f"config.student.{error}") from None


def _check_stage(
    name: str, s: ConfigDict, sampled: int, student: Policy, teacher: Policy | None, mesh: Mesh
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
    for reader in (student, teacher) if teacher else (student,):
        limit = reader.config.context_length
        if total > limit:
            raise UserError(
                f"config.{name}: max_prompt_tokens + max_response_tokens = {total} exceeds the "
                f"model's {limit} positions ({reader.path})"
            )
    if s.pack_tokens and sampled:
        raise UserError(f"config.{name}.pack_tokens: {s.objective} samples, and packs nothing")
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
        gathered=r.gathered,
    )


def updater(
    c: ConfigDict,
    s: ConfigDict,
    loss: losses.Loss,
    optimizer: optax.GradientTransformation,
    student: Policy,
    mesh: Mesh,
    state: update.TrainState,
) -> update.Step:
    """The update of a stage, for a state like this one, which may be shapes alone."""
    return update.make(
        student.model,
        optimizer,
        loss,
        s.max_response_tokens,
        s.accumulate,
        c.logits_mib * mesh.size,
        state,
        balance=c.student.balance_loss,
        overlap=c.log.overlap if loss.teacher else 0,
        minibatches=s.minibatches,
        epochs=s.epochs,
    )
