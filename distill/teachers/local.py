"""Frozen models read what was written: teachers and judges, one or several, and a reference.

A teacher may read more than the student does: the same response behind another prompt
(Batch.told). What it makes of a token is then laid where the token lies in the student's row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.batch import Batch
from distill.objectives import fused_head, losses
from distill.policy import compatibility, forward, policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from models import transformer
from models.errors import UserError
from models.transformer import Params, Transformer

INITIAL, EMA = "initial", "ema"  # paths that mean the student's own past


@dataclasses.dataclass(frozen=True)
class Teacher:
    """One sub-config `base.teacher()`. The parameters of a moving average are in the train state;
    `policy` then has at most the frozen base of a LoRA."""

    c: ConfigDict
    policy: Policy

    @property
    def is_ema(self) -> bool:
        return self.c.path == EMA


def check_teachers(c: ConfigDict, name: str, s: ConfigDict, needs_teacher: bool) -> None:
    """Raises UserError if stage `name`, which asks a teacher or does not, names those that it
    cannot have."""
    at, weights = f"config.{name}.teachers", tuple(s.teacher_weights)
    if not needs_teacher:
        if weights:
            raise UserError(f"config.{name}.teacher_weights: {s.objective} asks no teacher")
        if s.context.text or s.context.column:
            raise UserError(f"config.{name}.context: {s.objective} asks no teacher to read it")
        return
    if not s.teachers:
        raise UserError(f"{at}: {s.objective} needs a teacher")
    for teacher_name in s.teachers:
        teacher_config: Any = (
            c[teacher_name] if isinstance(teacher_name, str) and teacher_name in c else None
        )
        if not isinstance(teacher_config, ConfigDict) or not {"path", "step"} <= set(
            teacher_config
        ):
            raise UserError(f"{at}: {teacher_name!r} is no teacher of this config")
        if tuple(s.teachers).count(teacher_name) > 1:
            raise UserError(f"{at}: {teacher_name!r} is named twice")
    if not s.teachers[1:] and not weights:
        return
    if weights:
        if len(weights) != len(s.teachers):
            raise UserError(
                f"config.{name}.teacher_weights={weights}: {len(weights)} for the "
                f"{len(s.teachers)} of teachers={tuple(s.teachers)}"
            )
        if not all(type(w) in (int, float) and 0 < w < math.inf for w in weights):
            raise UserError(f"config.{name}.teacher_weights={weights}: must be above 0 and finite")
    elif len(s.data.mixture) != len(s.teachers):
        raise UserError(
            f"{at}={tuple(s.teachers)}: without teacher_weights each teaches the rows of one source"
            f" of config.{name}.data.mixture, which names {len(s.data.mixture)}"
        )


def describe_teacher(
    c: ConfigDict, name: str, student: Policy, mesh: Mesh, packed: bool
) -> Teacher:
    """The teacher `config.NAME` without its parameters, on `mesh`; a moving average lies where the
    student does. packed: whether a row it reads may hold several sequences.

    Raises:
      UserError: naming the key at fault, or a file that `load` would not find.
    """
    t, m, at = c[name], c.student, f"config.{name}"
    for field, allowed in (("dtype", policy.DTYPES), ("param_dtype", policy.PARAM_DTYPES)):
        if t[field] not in allowed:
            raise UserError(f"{at}.{field}: {t[field]!r} is none of {', '.join(allowed)}")
    if not t.path:
        raise UserError(f"{at}.path: name a model directory")
    if t.path == EMA and not m.ema_decay:
        raise UserError(f"{at}.path=ema: no moving average is kept, config.student.ema_decay is 0")
    if t.path == INITIAL and m.random_init:
        raise UserError(f"{at}.path=initial: nothing keeps random weights (student.random_init)")
    if t.step and not policy.is_run(t.path):
        raise UserError(f"{at}.step={t.step}: {t.path} is no run, and has no checkpoints")
    if t.path in (INITIAL, EMA):
        trained = student.model.lora if t.path == EMA else None
        own = policy.make_abstract(
            m.path,
            t.dtype,
            False,
            policy.get_mesh(student) if t.path == EMA else mesh,
            lora_config=trained,
            kernel=c.attention,
            packed=packed,
            tokenizer_path=m.tokenizer,
        )
        return Teacher(t, own)
    described = policy.make_abstract(
        t.path, t.dtype, False, mesh, kernel=c.attention, packed=packed
    )
    compatibility.require_same_vocabulary(student, described)
    policy.check_files(described, t.step or None)
    return Teacher(t, described)


def load_teacher(teacher: Teacher, student: Policy) -> Teacher:
    """Reads a described teacher's parameters. `student` is loaded where it trains a LoRA."""
    t, described = teacher.c, teacher.policy
    if t.path == EMA:
        lora = student.model.lora is not None
        loaded = dataclasses.replace(described, params=student.params) if lora else described
    elif t.path == INITIAL:
        loaded = load_initial_student(described, student, t.param_dtype)
    elif t.step:
        with policy.use(described):
            loaded, _ = policy.restore(described, t.step, t.param_dtype)
    else:
        with policy.use(described):
            loaded = policy.load(described, t.param_dtype)
    return Teacher(t, loaded)


def load_initial_student(described: Policy, student: Policy, param_dtype: str) -> Policy:
    """The student as it was before step 0. `described` is its path without a LoRA to train."""
    if is_base(student):
        return student
    with policy.use(described):
        return policy.load(described, param_dtype)


def is_base(student: Policy) -> bool:
    """Whether what a LoRA is trained beside is the student before step 0, at no further memory: it
    is, unless the LoRA began with an adapter."""
    return student.model.lora is not None and not policy.is_adapter(student.path)


def get_teacher_heads(teachers: Sequence[Teacher]) -> tuple[jax.Array | None, ...]:
    """The output head [V, E] of each, a copy where a teacher has devices of its own; None of a
    moving average that has a head of its own."""
    return tuple(
        None if t.is_ema and t.policy.model.lora is None else _get_head(t.policy) for t in teachers
    )


def _get_head(reader: Policy) -> jax.Array:
    head_VE, mesh = transformer.get_output_head(reader.params), jax.sharding.get_mesh()
    if mesh.empty or policy.get_mesh(reader) == mesh:
        return head_VE
    if not head_VE.is_fully_addressable:
        with policy.use(reader):
            head_VE = jax.jit(mesh_lib.replicate_array)(head_VE)
    like: Any = transformer.get_output_head(mesh_lib.make_abstract_params(reader.config, mesh))
    return mesh_lib.to_global_array(head_VE, like.sharding)


def _run_on_reader_mesh(
    reader: Policy, function: Callable[..., jax.Array], *args: Any
) -> jax.Array:
    """What a function of arrays that are split by rows finds, with the reader's parameters, where
    those lie, brought to where we are."""
    current_mesh = jax.sharding.get_mesh()
    if current_mesh.empty or current_mesh == (reader_mesh := policy.get_mesh(reader)):
        return mesh_lib.wait_on_cpu(function(*args))
    with policy.use(reader):
        result = mesh_lib.wait_on_cpu(function(*mesh_lib.move_rows(args, reader_mesh)))
    return mesh_lib.move_rows(result, current_mesh)


def _get_parameters(teacher: Teacher, average: Params | None) -> tuple[Params, Params | None]:
    """(parameters, LoRA beside them)"""
    if not teacher.is_ema:
        return teacher.policy.params, None
    assert average is not None
    own, lora = teacher.policy, teacher.policy.model.lora is not None
    return (own.params, average) if lora else (average, None)


def score(teachers: Sequence[Teacher], batch: Batch, average: Params | None = None) -> Batch:
    """Fills teacher_hidden_BTD: of each teacher [B, T, its D] in its dtype; what they read that the
    student does not is left out of what comes back.

    Not logits: the loss streams the teachers' heads over these, so the exact distribution over the
    whole vocabulary is at hand at the price of D numbers a token. No gradient. `average`: the
    moving average of what the student trains, for teachers that are it.
    """
    inputs, index_BT = to_model_inputs(batch.teacher_inputs or batch), batch.teacher_index_BT
    teacher_hidden = tuple(
        _run_on_reader_mesh(
            t.policy,
            functools.partial(compute_hidden, t.policy.model, *_get_parameters(t, average)),
            inputs,
            index_BT,
        )
        for t in teachers
    )
    return dataclasses.replace(
        batch, teacher_hidden_BTD=teacher_hidden, teacher_inputs=None, teacher_index_BT=None
    )


def to_model_inputs(batch: Batch) -> Batch:
    """What a model reads of a batch."""
    return Batch(batch.tokens_BT, batch.positions_BT, batch.segments_BT, batch.mask_BT)


@functools.partial(jax.jit, static_argnums=0)
def compute_hidden(
    model: Transformer,
    params: Params,
    lora: Params | None,
    inputs: Batch,
    index_BT: jax.Array | None,
) -> jax.Array:
    """Final hidden states [B, T, D] of what is read, or of the places `at_BT` in it, which lie
    split by rows and tokens."""
    hidden_BTD = forward.compute_hidden(model, params, inputs, lora)
    if index_BT is not None:
        hidden_BTD = jnp.take_along_axis(hidden_BTD, index_BT[..., None], axis=1)
    return mesh_lib.split_hidden(hidden_BTD)


def compute_logp(
    reader: Policy, batch: Batch, loss_chunk_mib: float, temperature: float = 1.0
) -> jax.Array:
    """[B, T] float32: the log-probability that a model gives each token of the mask; else 0."""
    read = functools.partial(
        compute_logp_jit, reader.model, loss_chunk_mib, temperature, reader.params, None
    )
    return _run_on_reader_mesh(reader, read, to_model_inputs(batch))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compute_logp_jit(
    model: Transformer,
    loss_chunk_mib: float,
    temperature: float,
    params: Params,
    lora: Params | None,
    batch: Batch,
) -> jax.Array:
    """See `logp`."""
    stats = fused_head.compute_token_stats(
        forward.compute_hidden(model, params, batch, lora),
        transformer.get_output_head(params),
        losses.shift(batch.tokens_BT),
        loss_chunk_mib=loss_chunk_mib,
        temperature=temperature,
        split=mesh_lib.split_vocabulary,
        mask_BT=losses.shift(batch.mask_BT),
        shards=mesh_lib.count_shards(*batch.tokens_BT.shape),
    )
    return losses.unshift(stats["logp"])


def judge_responses(
    teachers: Sequence[Teacher], batch: Batch, loss_chunk_mib: float, average: Params | None = None
) -> np.ndarray:
    """[B, T] float32: the log-probability that the teachers give each token of each response; the
    same whole array in every process."""
    inputs = to_model_inputs(batch.teacher_inputs or batch)
    teacher_logps = [
        _run_on_reader_mesh(
            t.policy,
            functools.partial(
                compute_logp_jit, t.policy.model, loss_chunk_mib, 1.0, *_get_parameters(t, average)
            ),
            inputs,
        )
        for t in teachers
    ]
    return np.asarray(_mix_logps(teacher_logps, batch))


@jax.jit
def _mix_logps(logp_BT: list[jax.Array], batch: Batch) -> jax.Array:
    if batch.teacher_index_BT is not None:
        logp_BT = [jnp.take_along_axis(x, batch.teacher_index_BT, axis=1) for x in logp_BT]
    mixed_BT = logp_BT[0]
    if batch.teacher_weight_BTN is not None:
        log_weight_NBT = jnp.moveaxis(jnp.log(batch.teacher_weight_BTN), 2, 0)
        mixed_BT = jax.nn.logsumexp(jnp.stack(logp_BT) + log_weight_NBT, axis=0)
    return mesh_lib.replicate_array(mixed_BT)
