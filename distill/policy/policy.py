"""A policy is parameters on a mesh and the pure function that reads them.

Student and teacher (and, where a loss wants one, a reference) are values of this one class. It is
named by a directory in Hugging Face format, by a hub id, by a run directory, which stands for the
parameters of its newest checkpoint in the architecture of its student, or by the directory of a
PEFT adapter. An adapter, be it a directory's or a LoRA run's, stands for its base with it merged.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from distill.data import chat
from distill.policy.hub import is_run, keeps_average, local, lora_of, resolve, tokenizer_directory
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files
from distill.runtime.checkpoint import Checkpoints
from models.errors import UserError
from models.qwen3 import adapter, attention, lora, model, quantised, weights
from models.qwen3.config import Config
from models.qwen3.lora import LoRA
from models.qwen3.model import Params, Qwen3

DTYPES = ("float32", "bfloat16")  # of activations, and of parameters
PARAM_DTYPES = (*DTYPES, *quantised.LARGEST)  # of the parameters of a model that is only read

Convert = Callable[[tuple, jax.Array], Any]  # (path, parameter) -> what stands in its place


@dataclasses.dataclass(frozen=True)
class Policy:
    """A loaded model. `params` is the nested dict that models.qwen3.model describes.

    Where `model.lora` is set, they are the frozen base of what is trained beside them.
    """

    path: str
    config: Config
    model: Qwen3
    params: Params
    tokenizer: PreTrainedTokenizerBase | None
    stop_ids: tuple[int, ...]
    tokenizer_dir: Path = Path()  # where `tokenizer` was read


def describe(
    path: str,
    dtype: str,
    remat: bool,
    mesh: Mesh,
    *,
    trained: LoRA | None = None,
    kernel: str = "auto",
    packed: bool = True,
    tokenizer_of: str = "",
) -> Policy:
    """Everything about the model but its parameters, which are shapes with shardings.

    With `trained` it is the frozen base of a LoRA to train, which goes on from the adapter that
    `path` may name. `kernel` and `packed` are what models.qwen3.attention.choose takes.

    `tokenizer_of` names the model whose tokenizer and chat template it takes in place of its own:
    a Base student those of its teacher, which have `<think>` and end turns by another token. The
    model then stops at the stop ids of both.

    Raises:
      UserError: if the directory is no Qwen3, the mesh does not divide it, or the tokenizer has
        other ids for the tokens of the model's own.
    """
    directory, tokenizer_dir = resolve(path), tokenizer_directory(tokenizer_of or path)
    config = Config.from_directory(directory)
    mesh_lib.check(config, mesh, f"{path}/config.json")
    tokenizer = chat.load_tokenizer(tokenizer_dir)
    stops = set(chat.stop_ids(directory, tokenizer))
    if tokenizer_dir != directory:
        chat.require_extended(chat.load_tokenizer(directory), tokenizer, (path, str(tokenizer_dir)))
        stops |= {i for i in chat.stop_ids(tokenizer_dir) if i < config.vocab_size}
    found = shaped(path, config, dtype, remat, mesh, trained=trained, kernel=kernel, packed=packed)
    return dataclasses.replace(
        found, tokenizer=tokenizer, stop_ids=tuple(sorted(stops)), tokenizer_dir=tokenizer_dir
    )


def shaped(
    path: str,
    config: Config,
    dtype: str,
    remat: bool,
    mesh: Mesh,
    *,
    trained: LoRA | None = None,
    kernel: str = "auto",
    packed: bool = True,
) -> Policy:
    """`describe` for a model of which only the config is at hand: no tokenizer, no stop ids."""
    platform = mesh.devices.flat[0].platform
    kernel = attention.choose(kernel, platform, config.head_dim, jnp.dtype(dtype), packed)
    qwen3 = Qwen3(config, dtype=jnp.dtype(dtype), remat=remat, kernel=kernel, lora=trained)
    return Policy(path, config, qwen3, mesh_lib.parameters(config, mesh), None, ())


def reader(path: str, dtype: str, mesh: Mesh | None = None) -> Policy:
    """`describe` and `check` for the verbs that only read a model: spread over all devices.

    dtype "" is bfloat16, but float32 on CPU, which computes it faster.
    """
    mesh = mesh or mesh_lib.spread(Config.from_directory(resolve(path)))
    described = describe(path, dtype or default_dtype(), False, mesh, packed=False)
    check(described)
    return described


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

    They are what its path stands for; of a policy that trains a LoRA, the frozen base. Where
    `param_dtype` is a type of 8 bits (models.qwen3.quantised), the layers' kernels are quantised,
    and the other parameters have the dtype that the model computes in.

    Raises:
      UserError: naming the file or tensor that is missing or wrong; for a run without checkpoint.
    """
    if is_run(policy.path):
        return restore(policy, None, param_dtype)[0]
    kind = _adapted(policy)
    if kind is None or policy.model.lora is not None:
        return dataclasses.replace(policy, params=_base(policy, param_dtype))
    return _merged(policy, _stored(policy, kind), kind, param_dtype)


def loaded(policy: Policy, param_dtype: str) -> Params:
    """Shapes of what `load` would read, with dtypes and shardings."""
    kind, dtype = quantised.split(param_dtype, policy.model.dtype)
    shapes = quantised.abstract(policy.params, kind) if kind else policy.params

    def cast(x: Any) -> Any:
        if quantised.is_quantised(x):
            return x
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree.map(cast, shapes, is_leaf=quantised.is_quantised)


def _base(policy: Policy, param_dtype: str, convert: Convert | None = None) -> Params:
    """The parameters of the model directory that a described policy comes from."""
    kind, dtype = quantised.split(param_dtype, policy.model.dtype)
    shapes = quantised.abstract(policy.params, kind) if kind else policy.params
    shardings = _shardings(shapes)
    with run_files.progress(weights.reads(shapes, shardings), 0, f"load {policy.path}") as bar:
        note = lambda done: bar.update(done, {})  # noqa: E731
        return weights.load(
            resolve(policy.path), policy.config, shapes, shardings, dtype, note, convert=convert
        )


def _converter(
    policy: Policy, param_dtype: str, trained: Params | None = None, kind: LoRA | None = None
) -> Convert:
    """What becomes of each float32 parameter of a described policy as it is read: its LoRA merged,
    if there is one, and all of it in `param_dtype`. So the model is never whole in float32."""
    to, dtype = quantised.split(param_dtype, policy.model.dtype)

    def convert(path: tuple, x: jax.Array) -> Any:
        def place(leaf: Any) -> Params:
            return functools.reduce(lambda tree, key: {key.key: tree}, reversed(path), leaf)

        def one(tree: Params, trained: Params | None) -> Params:
            if trained is not None and kind is not None:
                tree = lora.merge(tree, trained, kind, jnp.dtype("float32"))
            return quantised.tree(tree, to, dtype)

        like = functools.reduce(lambda tree, key: tree[key.key], path, policy.params)
        shapes = quantised.abstract(place(like), to) if to else place(like)
        made = jax.jit(one, out_shardings=_shardings(shapes))(place(x), trained)
        return functools.reduce(lambda tree, key: tree[key.key], path, made)

    return convert


def _merged(policy: Policy, trained: Params, kind: LoRA, param_dtype: str) -> Policy:
    convert = _converter(policy, param_dtype, trained, kind)
    return dataclasses.replace(policy, params=_base(policy, "float32", convert))


def sampled(policy: Policy) -> Callable[[Params], Params]:
    """The function from what is trained to what a sampler reads, which knows nothing of LoRA.

    `policy` is loaded where it trains a LoRA: its frozen parameters are merged with it in float32,
    and then cast to the dtype that the model computes in.
    """
    if policy.model.lora is None:
        return lambda trained: trained
    # The base may be in 8 bits, what is merged is not.
    return functools.partial(merging(policy), policy.params)


def merging(policy: Policy) -> Any:
    """The jitted function of a frozen base and a LoRA that `sampled` merges by; of a policy that
    may be described alone."""
    plain, kind = mesh_lib.parameters(policy.config, mesh_of(policy)), policy.model.lora
    assert kind is not None

    def merged(base: Params, trained: Params) -> Params:
        return lora.merge(base, trained, lora=kind, dtype=policy.model.dtype)

    return jax.jit(merged, out_shardings=_shardings(plain))


def _shardings(params: Params) -> Any:
    return jax.tree.map(lambda p: p.sharding, params)


def is_adapter(path: str) -> bool:
    """Whether `path` names a PEFT adapter."""
    return not is_run(path) and adapter.is_adapter(local(path))


def _adapted(policy: Policy) -> LoRA | None:
    """The LoRA of the adapter directory that the policy's path names; None of another path."""
    directory = local(policy.path)
    return adapter.describe(directory, policy.config) if adapter.is_adapter(directory) else None


def _stored(policy: Policy, kind: LoRA) -> Params:
    """The LoRA of an adapter directory, float32."""
    shapes = mesh_lib.parameters(policy.config, mesh_of(policy), kind)
    return adapter.load(local(policy.path), policy.config, shapes, _shardings(shapes))


def check(policy: Policy, step: int | None = None) -> None:
    """Raises UserError if `load` (or `restore` of a step) would find files missing or wrong,
    without reading a weight; for a policy that trains a LoRA also if its path cannot be the base,
    or holds another LoRA."""
    path, wanted = policy.path, policy.model.lora
    if is_run(path):
        if wanted is not None:
            raise UserError(f"{path}: a run, whose parameters may change; export it for a base")
        if newest_step(path) is None:
            raise UserError(f"{path}: a run without a checkpoint yet")
        with Checkpoints(epath.Path(path) / "checkpoints") as saved:
            saved.require(step)
    if not is_run(path) or lora_of(path):
        weights.check(resolve(path), policy.config, policy.params)
    kind = None if is_run(path) else _adapted(policy)
    if kind is not None:
        shapes = mesh_lib.parameters(policy.config, mesh_of(policy), kind)
        adapter.check(local(path), policy.config, shapes)
        if wanted is not None:
            _require_same(path, kind, wanted)


def _require_same(path: str, found: LoRA, wanted: LoRA) -> None:
    for name, theirs, ours in (
        ("rank", found.rank, wanted.rank),
        ("scale", f"{found.scale:g}", f"{wanted.scale:g}"),
        ("targets", sorted(found.targets), sorted(set(wanted.targets))),
    ):
        if theirs != ours:
            raise UserError(
                f"{path}: an adapter of {name} {theirs}, config.student.lora's is {ours}"
            )


def restore(
    policy: Policy, step: int | None, param_dtype: str, average: bool = False
) -> tuple[Policy, int]:
    """The parameters of a described run after `step` (None: the newest whole checkpoint), or their
    moving average, cast to `param_dtype`, and that step; a LoRA is merged. Raises UserError as
    `restore_trained` does."""
    kind = lora_of(policy.path)
    if kind is not None:
        trained, step = restore_trained(policy, step, average)
        return _merged(policy, trained, kind, param_dtype), step
    convert = None if param_dtype == "float32" else _converter(policy, param_dtype)
    params, step = restore_trained(policy, step, average, convert)
    return dataclasses.replace(policy, params=params), step


def restore_trained(
    policy: Policy, step: int | None, average: bool = False, convert: Convert | None = None
) -> tuple[Params, int]:
    """What a described run has trained after `step` (None: the newest whole checkpoint), float32
    unless each parameter is converted, and that step; or its moving average. Raises UserError if
    there is no such checkpoint, saying which there are, or if the run kept no average."""
    part = "average" if average else "params"
    if average and not keeps_average(policy.path):
        raise UserError(f"{policy.path}: a run that kept no moving average (config.student.ema)")
    mesh = mesh_of(policy)
    shapes = mesh_lib.parameters(policy.config, mesh, lora_of(policy.path))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh))

    def inner(path: tuple, x: jax.Array) -> Any:
        return convert(path[1:], x) if convert and path[0].key == part else x

    with Checkpoints(epath.Path(policy.path) / "checkpoints") as saved:
        found = saved.restore({part: shapes, "step": count}, step, inner if convert else None)
    if found is None:
        raise UserError(f"{policy.path}: a run without a checkpoint yet")
    return found[0][part], int(found[0]["step"])


def newest_step(path: str | Path) -> int | None:
    """The step that the run directory `path` now stands for; None of a model directory."""
    if not is_run(path):
        return None
    with Checkpoints(epath.Path(path) / "checkpoints") as saved:
        found = saved.latest()
    return found[0] if found else None


def require_same_vocabulary(student: Policy, teacher: Policy) -> None:
    """Raises UserError if a token id of one is not that token of the other."""
    names = (student.path, teacher.path)
    try:
        chat.require_same_tokenizer(student.tokenizer, teacher.tokenizer, names)
    except UserError as error:
        try:
            chat.require_extended(student.tokenizer, teacher.tokenizer, names)
        except UserError:
            raise error from None
        remedy = f"--config.student.tokenizer={teacher.path} gives it the teacher's"
        raise UserError(f"{error}; {remedy}") from None
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"{teacher.path}: vocab_size={teacher.config.vocab_size}, "
            f"but {student.path} has {student.config.vocab_size}"
        )


def is_loaded(policy: Policy) -> bool:
    """Whether its parameters are arrays, not shapes alone."""
    return isinstance(jax.tree.leaves(policy.params)[0], jax.Array)


def further_stops(student: Policy, teacher: Policy) -> list[int]:
    """Stop ids of a teacher where the student would write on."""
    return sorted(set(teacher.stop_ids) - set(student.stop_ids))


def randomise(policy: Policy, key: jax.Array) -> Policy:
    """A described policy with random float32 parameters, drawn where they will live."""
    return dataclasses.replace(policy, params=_drawn(policy, key, None))


def first(policy: Policy, key: jax.Array) -> Params:
    """The LoRA that a policy which trains one begins with: its adapter's, or a new one."""
    kind = policy.model.lora
    assert kind is not None
    if adapter.is_adapter(local(policy.path)):
        return _stored(policy, kind)
    return _drawn(policy, key, kind)


def _drawn(policy: Policy, key: jax.Array, kind: LoRA | None) -> Params:
    return drawing(policy, kind)(key)


def drawing(policy: Policy, kind: LoRA | None) -> Any:
    """The jitted function of a key that draws parameters, or a LoRA, where they will live."""
    shapes = mesh_lib.parameters(policy.config, mesh_of(policy), kind)
    init = functools.partial(model.init, policy.config, lora=kind)
    return jax.jit(init, out_shardings=_shardings(shapes))
