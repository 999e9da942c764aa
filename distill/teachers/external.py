"""Teachers whose models are not run here: on a server, or done in advance and stored.

Each gives one of three outputs for a response (Loss.teacher_output): final hidden states, which the
loss streams through the teacher's head like those of a local teacher; its likeliest tokens; or the
log-probability of each token. `data.collate` puts them at the student's columns.
"""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from distill.data.examples import Example
from distill.objectives.loss import Loss
from distill.policy.policy import Policy
from distill.runtime import addresses
from distill.runtime import mesh as mesh_lib
from distill.teachers import remote, stored, stored_files
from distill.teachers.outputs import ResponseOutput, Scorer, ScorerInfo
from models.errors import UserError, name_key

# Keys of a teacher's sub-config that only servers need, with the values that ask for nothing.
SERVER_KEYS = {"kind": "ours", "model": "", "api_key_env": "", "timeout_seconds": 0}
SERVER_KEYS |= {"max_in_flight": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class ExternalTeacher:
    """A teacher that is not run here, as a stage uses it."""

    name: str  # of its sub-config
    path: str
    output: str  # a key of outputs.OUTPUT_FIELDS
    scorer: Scorer
    source_id: int | None = None  # teaches the rows of one source of a mixture; None: all rows
    head_VE: Any = None  # output head on the student's mesh, of "hidden": see place_head

    @property
    def info(self) -> ScorerInfo:
        return self.scorer.info

    @property
    def hidden_form(self) -> tuple[int, Any] | None:
        """(E, dtype) of its hidden states; None if it does not give them."""
        if self.output != "hidden":
            return None
        return self.info.hidden_size, jnp.dtype(self.info.hidden_dtype)

    def require_example(self, example: Example) -> None:
        """Raises UserError naming an example that the teacher teaches and whose score is not there,
        if all that it can give is known."""
        if self.source_id in (None, example.source_id) and isinstance(
            self.scorer, stored.StoredScorer
        ):
            prompt = example.teacher_prompt or example.prompt
            self.scorer.require_response(prompt, example.response, example.where)

    def submit(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        source_id: int,
        where: str,
        limit: int,
    ) -> concurrent.futures.Future[ResponseOutput] | None:
        """Asks for the output of the first `limit` tokens of a response; None if the teacher does
        not teach the rows of its source."""
        if self.source_id not in (None, source_id):
            return None
        return self.scorer.submit(prompt, response, where, limit)


def is_external(t: Any) -> bool:
    """Returns True if a teacher's sub-config names servers or stored scores."""
    if not isinstance(t, ConfigDict) or not isinstance(t.get("path"), str) or not t.path:
        return False
    return addresses.is_url(t.path) or stored_files.is_stored(t.path)


def list_external(c: ConfigDict, names: Sequence[Any]) -> list[str]:
    """Returns those of the named teachers that are not run here."""
    return [name for name in names if isinstance(name, str) and is_external(c.get(name))]


def open_teachers(
    c: ConfigDict,
    s: ConfigDict,
    loss: Loss,
    names: Sequence[str],
    student: Policy,
    asks_probe: bool = True,
) -> tuple[ExternalTeacher, ...]:
    """Opens those of a stage's teachers that are not run here, in order, and checks them; for
    `asks_probe` see open_scorer.

    Raises:
      UserError: naming the key at fault, if one cannot be reached, is not the one it should be, or
        does not give what the loss reads.
    """
    outside, opened = list_external(c, names), []
    for source_id, name in enumerate(names):
        if name in outside:
            t, key = c[name], f"config.{name}"
            scorer = open_scorer(t, key, loss, student, asks_probe)
            check_scorer(scorer.info, t, key, loss.teacher_output, student)
            by_source = len(names) > 1 and not s.teacher_weights
            own_source = source_id if by_source else None
            opened.append(ExternalTeacher(name, t.path, loss.teacher_output, scorer, own_source))
    return tuple(opened)


def open_scorer(t: ConfigDict, key: str, loss: Loss, student: Policy, asks_probe: bool) -> Scorer:
    """Opens what a teacher's sub-config `key` names.

    asks_probe: asks servers for a probe, which takes time.
    """
    if t.step:
        raise UserError(f"{key}.step={t.step}: is read for a run that is a teacher here only")
    top_k = loss.teacher_topk if loss.teacher_output == "top" else 0
    if not addresses.is_url(t.path):
        refuse_server_keys(t, key)
        with name_key(f"{key}.path", t.path):
            stored.check_tokenizer(t.path, student)
            return stored.StoredScorer(t.path, loss.teacher_output, top_k)
    scorer = remote.RemoteScorer(t, key, loss.teacher_output, top_k, student.config.vocab_size)
    if asks_probe:
        scorer.check(student)
    return scorer


def check_scorer(info: ScorerInfo, t: ConfigDict, key: str, output: str, student: Policy) -> None:
    """Raises UserError if a teacher's outputs are not those that a loss reads."""
    if output not in info.outputs:
        raise UserError(
            f"{key}.path={t.path}: gives {' or '.join(info.outputs)}, but the stage's "
            f"loss.teacher_output is {output}"
        )
    if info.vocab_size != student.config.vocab_size:
        raise UserError(
            f"{key}.path={t.path}: vocab_size={info.vocab_size}, but {student.path} has "
            f"{student.config.vocab_size}"
        )


def describe_info(info: ScorerInfo) -> str:
    """Describes a teacher that is not run here in one line."""
    text = f"{info.model}, {' or '.join(info.outputs)}"
    if info.hidden_size:
        text += f" of {info.hidden_size} numbers in {info.hidden_dtype}"
    return f"{text}, model hash {info.model_hash}" if info.model_hash else text


def identify(info: ScorerInfo) -> dict[str, str]:
    """Returns what must stay the same for a run to go on with a teacher: the hash of its files and
    its dtypes or, of a server that does not tell these, the name of its model."""
    if not info.model_hash:
        return {"model": info.model}
    dtypes = " of ".join(filter(None, (info.hidden_dtype, info.param_dtype)))
    return {"model": f"{info.model_hash} in {dtypes}"}


def refuse_server_keys(t: ConfigDict, key: str) -> None:
    """Raises UserError if a teacher that is no server has settings of one."""
    for field, unset in SERVER_KEYS.items():
        if t[field] != unset:
            raise UserError(f"{key}.{field}={t[field]!r}: is read for a path of http(s)://… only")


def make_abstract_head(teacher: ExternalTeacher, mesh: Mesh) -> Any:
    """Returns the shape [V, E], dtype and sharding of a teacher's head as `place_head` puts it."""
    assert teacher.hidden_form
    E, dtype = teacher.hidden_form
    shape = (teacher.info.vocab_size, E)
    # As models/transformer.py splits an embedding, by its vocabulary.
    sharding = NamedSharding(mesh, PartitionSpec(mesh_lib.VOCABULARY_AXES, None))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def place_head(teacher: ExternalTeacher) -> ExternalTeacher:
    """Returns the teacher with its head on the current mesh, if it gives hidden states.

    The head is cast to their dtype, in which the loss computes its products anyway.
    """
    if teacher.output != "hidden":
        return teacher
    head_VE, form = teacher.scorer.head_VE, make_abstract_head(teacher, jax.sharding.get_mesh())
    if head_VE is None or head_VE.shape != form.shape:
        shape = None if head_VE is None else list(head_VE.shape)
        raise UserError(
            f"config.{teacher.name}.path={teacher.path}: its output head has the shape {shape}, "
            f"not {list(form.shape)}"
        )
    placed = mesh_lib.to_global_array(np.asarray(head_VE, form.dtype), form.sharding)
    return dataclasses.replace(teacher, head_VE=placed)
