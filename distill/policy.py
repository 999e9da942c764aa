"""A policy is parameters on a mesh and the pure function that reads them.

Student and teacher (and, where a loss wants one, a reference) are values of this one class. It is
named by a directory in Hugging Face format, by a hub id, or by a run directory, which stands for
the parameters of its newest checkpoint in the architecture of its student.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from distill import chat, metrics
from distill import mesh as mesh_lib
from distill.batch import Batch
from distill.checkpoint import Checkpoints
from models.errors import UserError
from models.qwen3 import model, moe, quantised, weights
from models.qwen3.config import Config
from models.qwen3.model import Params, Qwen3

DTYPES = ("float32", "bfloat16")  # of activations, and of parameters
PARAM_DTYPES = (*DTYPES, *quantised.LARGEST)  # of the parameters of a model that is only read


@dataclasses.dataclass(frozen=True)
class Policy:
    """A loaded model. `params` is the nested dict that models.qwen3.model describes."""

    path: str
    config: Config
    model: Qwen3
    params: Params
    tokenizer: PreTrainedTokenizerBase | None
    stop_ids: tuple[int, ...]


def is_run(path: str | Path) -> bool:
    """Whether `path` is the directory of a training run."""
    return _student(path) is not None


def _student(path: str | Path) -> str | None:
    """The student that the run directory `path` began with; None if it is no run directory."""
    try:
        fields = json.loads((Path(path) / "config.json").read_text())
        return fields["student"]["path"] if "stages" in fields else None
    except (OSError, ValueError, LookupError, TypeError):
        return None  # whoever reads it as a model directory says what is wrong with it


def resolve(path: str | Path) -> Path:
    """The local directory in Hugging Face format behind a name; a hub id is fetched.

    Of a run it is its student's: architecture and tokenizer, but not the trained parameters.

    Raises:
      UserError: if there is nothing of this name, here or on the hub.
    """
    student = _student(path)
    if student is not None:
        try:
            return resolve(student)
        except UserError as error:
            raise UserError(f"{path}/config.json: student.path: {error}") from None
    # What lies in a folder that is there is meant as a path, though it may look like a hub id.
    if Path(path).exists() or Path(path).parent.is_dir():
        if not Path(path).is_dir():
            raise UserError(f"{path}: no model directory")
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise UserError(f"{path}: no model directory")
    return _fetch(str(path))


@functools.cache
def _fetch(repository: str) -> Path:
    # Weights in safetensors only: a pickle would be code.
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # the hub's client and those under it raise many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repository}: no model directory, and the hub does not give it: {reason}"
        ) from error


def describe(path: str, dtype: str, remat: bool, mesh: Mesh) -> Policy:
    """Everything about the model but its parameters, which are shapes with shardings.

    Raises:
      UserError: if the directory is no Qwen3, or the mesh does not divide it.
    """
    directory = resolve(path)
    config = Config.from_directory(directory)
    mesh_lib.check(config, mesh, f"{path}/config.json")
    tokenizer = chat.load_tokenizer(directory)
    abstract = mesh_lib.parameters(config, mesh)
    qwen3 = Qwen3(config, dtype=jnp.dtype(dtype), remat=remat)
    return Policy(path, config, qwen3, abstract, tokenizer, chat.stop_ids(directory, tokenizer))


def reader(path: str, dtype: str) -> Policy:
    """`describe` for the verbs that only read a model: spread over all devices.

    dtype "" is bfloat16, but float32 on CPU, which computes it faster.
    """
    mesh = mesh_lib.spread(Config.from_directory(resolve(path)))
    return describe(path, dtype or default_dtype(), False, mesh)


def default_dtype() -> str:
    """The faster dtype of activations on this platform."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def mesh_of(policy: Policy) -> Mesh:
    """The mesh that the parameters, or their shapes, lie on."""
    return jax.tree.leaves(policy.params)[0].sharding.mesh


@contextlib.contextmanager
def use(policy: Policy) -> Iterator[None]:
    """Within it, the policy computes on its mesh, and in float32 where that is its dtype.

    TPUs and GPUs else multiply float32 in fewer bits.
    """
    precision = "highest" if policy.model.dtype == jnp.float32 else None
    with mesh_lib.use(mesh_of(policy)), jax.default_matmul_precision(precision):
        yield


def load(policy: Policy, param_dtype: str) -> Policy:
    """Reads the parameters of a described policy, cast to `param_dtype`.

    Where that is a type of 8 bits (models.qwen3.quantised), the layers' kernels are quantised,
    and the other parameters have the dtype that the model computes in.

    Raises:
      UserError: naming the file or tensor that is missing or wrong; for a run without checkpoint.
    """
    kind = param_dtype if param_dtype in quantised.LARGEST else None
    dtype = jnp.dtype(policy.model.dtype if kind else param_dtype)
    shapes = quantised.abstract(policy.params, kind) if kind else policy.params
    shardings = jax.tree.map(lambda p: p.sharding, shapes)
    if is_run(policy.path):
        convert = functools.partial(quantised.tree, kind=kind, dtype=dtype)
        params = jax.jit(convert, out_shardings=shardings)(restore(policy, None)[0].params)
        return dataclasses.replace(policy, params=params)
    with metrics.progress(weights.reads(shapes, shardings), 0, f"load {policy.path}") as bar:
        note = lambda done: bar.update(done, {})  # noqa: E731
        params = weights.load(resolve(policy.path), policy.config, shapes, shardings, dtype, note)
    return dataclasses.replace(policy, params=params)


def check(policy: Policy) -> None:
    """Raises UserError if `load` would find files missing or wrong, without reading a weight."""
    if not is_run(policy.path):
        weights.check(resolve(policy.path), policy.config, policy.params)
    elif newest_step(policy.path) is None:
        raise UserError(f"{policy.path}: a run without a checkpoint yet")


def restore(policy: Policy, step: int | None) -> tuple[Policy, int]:
    """The float32 parameters of a described run after `step` (None: the newest whole checkpoint),
    and that step. Raises UserError if there is no such checkpoint, saying which there are."""
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh_of(policy)))
    with Checkpoints(Path(policy.path) / "checkpoints") as saved:
        found = saved.restore({"params": policy.params, "step": count}, step)
    if found is None:
        raise UserError(f"{policy.path}: a run without a checkpoint yet")
    return dataclasses.replace(policy, params=found[0]["params"]), int(found[0]["step"])


def newest_step(path: str | Path) -> int | None:
    """The step that the run directory `path` now stands for; None of a model directory."""
    if not is_run(path):
        return None
    with Checkpoints(Path(path) / "checkpoints") as saved:
        found = saved.latest()
    return found[0] if found else None


def require_same_vocabulary(student: Policy, teacher: Policy) -> None:
    """Raises UserError if a token id of one is not that token of the other."""
    names = (student.path, teacher.path)
    chat.require_same_tokenizer(student.tokenizer, teacher.tokenizer, names)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"{teacher.path}: vocab_size={teacher.config.vocab_size}, "
            f"but {student.path} has {student.config.vocab_size}"
        )


def randomise(policy: Policy, key: jax.Array) -> Policy:
    """A described policy with random float32 parameters, drawn where they will live."""
    shardings = jax.tree.map(lambda p: p.sharding, policy.params)
    init = jax.jit(functools.partial(model.init, policy.config), out_shardings=shardings)
    return dataclasses.replace(policy, params=init(key))


def save(policy: Policy, directory: Path, dtype: str) -> None:
    """Writes a Hugging Face directory: weights in `dtype`, config, stop ids, tokenizer."""
    weights.save(policy.params, policy.config, directory, jnp.dtype(dtype))
    chat.copy(resolve(policy.path), directory)


def hidden(qwen3: Qwen3, params: Params, batch: Batch) -> jax.Array:
    """Final hidden states [B, T, D] of a batch, in the model's dtype."""
    out_BTD, _ = qwen3.apply(
        {"params": params}, batch.tokens_BT, batch.positions_BT, batch.segments_BT
    )
    return out_BTD


def routed(
    qwen3: Qwen3, params: Params, batch: Batch
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """`hidden`, and (sum, count) pairs of what the routers did (models.qwen3.moe.sums).

    Where the batch says which experts its sampler chose, they are chosen again.
    """
    applied: Any = qwen3.apply(
        {"params": params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
        replay_BTLA=batch.experts_BTLA,
        mutable=[moe.ROUTER],
    )
    (out_BTD, _), noted = applied
    return out_BTD, moe.sums(noted.get(moe.ROUTER, {}))


def chosen(qwen3: Qwen3, params: Params, batch: Batch) -> jax.Array:
    """Which experts a forward pass chooses, [B, T, L, A] int16: what Batch.experts_BTLA holds."""
    applied: Any = qwen3.apply(
        {"params": params},
        batch.tokens_BT,
        batch.positions_BT,
        batch.segments_BT,
        mutable=[moe.CHOSEN],
    )
    return moe.chosen(applied[1][moe.CHOSEN])
