"""Frozen models that read responses: teachers, judges and the reference.

A teacher may read the same response after another prompt than the student's
(Batch.teacher_inputs). Its output for a token is then moved to the token's column in the student's
row.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.batch import Batch, TeacherOutput
from distill.policy import compatibility, forward, hub, policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import external
from distill.teachers.external import ExternalTeacher
from models import checks, transformer
from models.checks import Range
from models.errors import UserError, name_key
from models.transformer import Params, Transformer

INITIAL, EMA = "initial", "ema"  # paths that stand for the student's own past


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher, described by a sub-config from `configs.base.make_teacher`."""

    c: ConfigDict
    # Without parameters if these are the train state's moving average. With a LoRA, the average is
    # of the LoRA alone, and these are the frozen base.
    policy: Policy
    head_VE: Any = None  # output head on the student's mesh: see place_heads

    @property
    def is_ema(self) -> bool:
        return self.c.path == EMA

    @property
    def is_moving_average(self) -> bool:
        """True if all parameters, including the head, are in the train state's moving average."""
        return self.is_ema and self.policy.model.lora is None


def check_teachers(c: ConfigDict, name: str, s: ConfigDict, needs_teacher: bool) -> None:
    """Raises UserError if the teachers of stage `name` do not fit its objective."""
    key, weights = f"config.{name}.teachers", tuple(s.teacher_weights)
    if not needs_teacher:
        if weights:
            raise UserError(f"config.{name}.teacher_weights: {s.objective} has no teacher")
        if s.context.text or s.context.column:
            raise UserError(f"config.{name}.context: {s.objective} has no teacher to read it")
        return
    if not s.teachers:
        raise UserError(f"{key}: {s.objective} needs a teacher")
    for teacher_name in s.teachers:
        section: Any = c.get(teacher_name) if isinstance(teacher_name, str) else None
        if not isinstance(section, ConfigDict) or not {"path", "step"} <= set(section):
            raise UserError(f"{key}: {teacher_name!r} is not a teacher of this config")
        if tuple(s.teachers).count(teacher_name) > 1:
            raise UserError(f"{key}: {teacher_name!r} is named twice")
    if weights:
        if len(weights) != len(s.teachers):
            raise UserError(
                f"config.{name}.teacher_weights={weights}: {len(weights)} for the "
                f"{len(s.teachers)} of teachers={tuple(s.teachers)}"
            )
        if not all(weight in Range(above=True) for weight in weights):
            raise UserError(f"config.{name}.teacher_weights={weights}: must be above 0 and finite")
    elif len(s.teachers) > 1 and len(s.data.mixture) != len(s.teachers):
        raise UserError(
            f"{key}={tuple(s.teachers)}: without teacher_weights each teaches the rows of one "
            f"source of config.{name}.data.mixture, which names {len(s.data.mixture)}"
        )


def describe_teacher(
    c: ConfigDict, name: str, student: Policy, mesh: Mesh, packed: bool
) -> Teacher:
    """Returns the teacher `config.NAME` without its parameters.

    Args:
      mesh: the teacher's mesh; not used for a moving average, which is on the student's.
      packed: rows may hold several sequences.

    Raises:
      UserError: naming the invalid key, or a file that `load_teacher` would miss.
    """
    t, m, key = c[name], c.student, f"config.{name}"
    external.refuse_server_keys(t, key)
    checks.check_fields(
        t, {"dtype": policy.DTYPES, "param_dtype": policy.PARAM_DTYPES}, prefix=f"{key}."
    )
    if not t.path:
        raise UserError(f"{key}.path: name a model directory")
    if t.path == EMA and not m.ema_decay:
        raise UserError(f"{key}.path=ema: no moving average is kept, config.student.ema_decay is 0")
    if t.path == INITIAL and m.random_init:
        raise UserError(f"{key}.path=initial: random weights are not kept (student.random_init)")
    if t.step and not policy.is_run(t.path):
        raise UserError(f"{key}.step={t.step}: {t.path} is no run, so it has no checkpoints")
    if t.path in (INITIAL, EMA):
        described = policy.make_abstract(
            m.path,
            t.dtype,
            False,
            policy.get_mesh(student) if t.path == EMA else mesh,
            lora_config=student.model.lora if t.path == EMA else None,
            kernel=c.attention,
            packed=packed,
            tokenizer_path=m.tokenizer,
        )
        return Teacher(t, described)
    with name_key(f"{key}.path", t.path):
        described = policy.make_abstract(
            t.path, t.dtype, False, mesh, kernel=c.attention, packed=packed
        )
        compatibility.require_same_vocabulary(student, described)
        policy.check_files(described, t.step or None)
    return Teacher(t, described)


def load_teacher(teacher: Teacher, student: Policy) -> Teacher:
    """Loads a described teacher's parameters. A student that trains a LoRA must be loaded."""
    t, described = teacher.c, teacher.policy
    if t.path == EMA:
        has_lora = student.model.lora is not None
        loaded = dataclasses.replace(described, params=student.params) if has_lora else described
    elif t.path == INITIAL:
        loaded = load_initial_student(described, student, t.param_dtype)
    else:
        with policy.use(described):
            if t.step:
                loaded, _ = policy.restore(described, t.step, t.param_dtype)
            else:
                loaded = policy.load(described, t.param_dtype)
    return Teacher(t, loaded)


def load_initial_student(described: Policy, student: Policy, param_dtype: str) -> Policy:
    """Returns the student before step 0. `described`: the model of its path, without a LoRA."""
    if is_base(student):
        return student
    with policy.use(described):
        return policy.load(described, param_dtype)


def is_base(student: Policy) -> bool:
    """Returns True if the student's frozen base is also the student before step 0.

    This holds with a LoRA, unless training started from an adapter; no second copy is then needed.
    """
    return student.model.lora is not None and not hub.is_adapter(student.path)


def place_heads(
    teachers: Sequence[Teacher | ExternalTeacher],
) -> tuple[Teacher | ExternalTeacher, ...]:
    """Returns the teachers with output heads on the current mesh, as `score` needs them.

    If a teacher is on other devices, or not run here, its head is copied.
    """

    def place_head(t: Teacher | ExternalTeacher) -> Teacher | ExternalTeacher:
        if isinstance(t, ExternalTeacher):
            return external.place_head(t)
        if t.is_moving_average:
            return t
        return dataclasses.replace(t, head_VE=_copy_head(t.policy))

    return tuple(map(place_head, teachers))


def _copy_head(reader: Policy) -> jax.Array:
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
    """Runs `function` of arrays split by rows on the reader's mesh, and moves the result back."""
    current_mesh = jax.sharding.get_mesh()
    if current_mesh.empty or current_mesh == (reader_mesh := policy.get_mesh(reader)):
        return mesh_lib.wait_on_cpu(function(*args))
    with policy.use(reader):
        result = mesh_lib.wait_on_cpu(function(*mesh_lib.move_rows(args, reader_mesh)))
    return mesh_lib.move_rows(result, current_mesh)


def _get_params(teacher: Teacher, average: Params | None) -> tuple[Params, Params | None]:
    """Returns (parameters, LoRA beside them)."""
    if not teacher.is_ema:
        return teacher.policy.params, None
    assert average is not None
    return (average, None) if teacher.is_moving_average else (teacher.policy.params, average)


def score(
    teachers: Sequence[Teacher | ExternalTeacher], batch: Batch, average: Params | None = None
) -> Batch:
    """Returns the batch with `teacher` set, and without the fields that only teachers read.

    `teacher` stays None without teachers, and with those that give no hidden states.

    Args:
      teachers: the result of `place_heads`.
      average: moving average of the trained parameters, for teachers with `is_ema`.
    """
    inputs, index_BT = to_model_inputs(batch.teacher_inputs or batch), batch.teacher_index_BT
    given_BTE = iter(batch.teacher_hidden_BTE or ())
    readers = [t for t in teachers if isinstance(t, Teacher) or t.output == "hidden"]

    def compute_teacher_hidden(t: Teacher | ExternalTeacher) -> jax.Array:
        if isinstance(t, ExternalTeacher):
            return next(given_BTE)
        function = functools.partial(compute_hidden, t.policy.model, *_get_params(t, average))
        return _run_on_reader_mesh(t.policy, function, inputs, index_BT)

    def get_head(t: Teacher | ExternalTeacher) -> jax.Array:
        if isinstance(t, Teacher) and t.is_moving_average:
            return transformer.get_output_head(average)  # pyright: ignore[reportArgumentType]
        return t.head_VE

    output = TeacherOutput(
        hidden_BTE=tuple(map(compute_teacher_hidden, readers)),
        weight_BTN=batch.teacher_weight_BTN,
        heads_VE=tuple(map(get_head, readers)),
    )
    return dataclasses.replace(
        batch,
        teacher=output if readers else None,
        teacher_weight_BTN=None,
        teacher_hidden_BTE=None,
        teacher_inputs=None,
        teacher_index_BT=None,
    )


def to_model_inputs(batch: Batch) -> Batch:
    """Returns a batch of the fields that a model reads."""
    return Batch(batch.tokens_BT, batch.positions_BT, batch.segments_BT, batch.mask_BT)


@functools.partial(jax.jit, static_argnums=0)
def compute_hidden(
    model: Transformer,
    params: Params,
    lora: Params | None,
    inputs: Batch,
    index_BT: jax.Array | None,
) -> jax.Array:
    """Computes final hidden states [B, T, D], split by rows and tokens.

    With `index_BT`, takes them at those columns.
    """
    hidden_BTD = forward.compute_hidden(model, params, inputs, lora)
    if index_BT is not None:
        hidden_BTD = jnp.take_along_axis(hidden_BTD, index_BT[..., None], axis=1)
    return mesh_lib.split_hidden(hidden_BTD)


def compute_logp(
    reader: Policy, batch: Batch, loss_chunk_mib: float, temperature: float = 1.0
) -> jax.Array:
    """Computes log-probabilities [B, T], float32, of the batch's trained tokens; 0 elsewhere."""
    return _compute_logp(
        reader, (reader.params, None), to_model_inputs(batch), loss_chunk_mib, temperature
    )


def _compute_logp(
    reader: Policy,
    params: tuple[Params, Params | None],
    inputs: Batch,
    loss_chunk_mib: float,
    temperature: float,
) -> jax.Array:
    function = functools.partial(
        compute_logp_jit, reader.model, loss_chunk_mib, temperature, *params
    )
    return _run_on_reader_mesh(reader, function, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def compute_logp_jit(
    model: Transformer,
    loss_chunk_mib: float,
    temperature: float,
    params: Params,
    lora: Params | None,
    batch: Batch,
) -> jax.Array:
    """Computes log-probabilities [B, T], float32, of the batch's trained tokens; 0 elsewhere."""
    hidden_BTD = forward.compute_hidden(model, params, batch, lora)
    return forward.compute_logp(hidden_BTD, params, batch, loss_chunk_mib, temperature)


def judge_responses(
    teachers: Sequence[Teacher], batch: Batch, loss_chunk_mib: float, average: Params | None = None
) -> np.ndarray:
    """Computes log-probabilities [B, T], float32, of response tokens under the teachers' mixture.

    Every process gets the whole array.
    """
    inputs = to_model_inputs(batch.teacher_inputs or batch)
    teacher_logps = [
        _compute_logp(t.policy, _get_params(t, average), inputs, loss_chunk_mib, 1.0)
        for t in teachers
    ]
    return np.asarray(_mix_logps(teacher_logps, batch))


@jax.jit
def _mix_logps(teacher_logps_BT: list[jax.Array], batch: Batch) -> jax.Array:
    if batch.teacher_index_BT is not None:
        teacher_logps_BT = [
            jnp.take_along_axis(x, batch.teacher_index_BT, axis=1) for x in teacher_logps_BT
        ]
    mixed_BT = teacher_logps_BT[0]
    if batch.teacher_weight_BTN is not None:
        log_weight_NBT = jnp.moveaxis(jnp.log(batch.teacher_weight_BTN), 2, 0)
        mixed_BT = jax.nn.logsumexp(jnp.stack(teacher_logps_BT) + log_weight_NBT, axis=0)
    return mesh_lib.replicate_array(mixed_BT)
