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
from distill.policy.hub import (
    has_moving_average,
    is_run,
    read_run_lora,
    resolve_model_dir,
    resolve_tokenizer_dir,
    to_local_dir,
)
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files
from distill.runtime.checkpoint import Checkpoints
from models import adapter, families, weights
from models.config import Config
from models.errors import UserError
from models.families import make_model
from models.layers import attention, lora, quantised
from models.layers.lora import LoRA
from models.transformer import Params, Transformer

DTYPES = ("float32", "bfloat16")  # of activations, and of parameters
PARAM_DTYPES = (*DTYPES, *quantised.MAX_VALUES)  # of the parameters of a model that is only read

Convert = Callable[[tuple, jax.Array], Any]  # (path, parameter) -> what stands in its place


@dataclasses.dataclass(frozen=True)
class Policy:
    """A loaded model. `params` is the nested dict that models.transformer describes.

    Where `model.lora` is set, they are the frozen base of what is trained beside them.
    """

    path: str
    config: Config
    model: Transformer
    params: Params
    tokenizer: PreTrainedTokenizerBase | None
    stop_ids: tuple[int, ...]
    tokenizer_dir: Path = Path()  # where `tokenizer` was read


def make_abstract(
    path: str,
    dtype: str,
    remat: bool,
    mesh: Mesh,
    *,
    lora_config: LoRA | None = None,
    kernel: str = "auto",
    packed: bool = True,
    tokenizer_path: str = "",
) -> Policy:
    """Everything about the model but its parameters, which are shapes with shardings.

    With `trained` it is the frozen base of a LoRA to train, which goes on from the adapter that
    `path` may name. `kernel` and `packed` are what models.layers.attention.choose takes.

    `tokenizer_of` names the model whose tokenizer and chat template it takes in place of its own:
    a Base student those of its teacher, which have `<think>` and end turns by another token. The
    model then stops at the stop ids of both.

    Raises:
      UserError: if the directory is no Qwen3, the mesh does not divide it, or the tokenizer has
        other ids for the tokens of the model's own.
    """
    directory, tokenizer_dir = (
        resolve_model_dir(path),
        resolve_tokenizer_dir(tokenizer_path or path),
    )
    config = families.read_config(directory)
    mesh_lib.check_divisible(config, mesh, f"{path}/config.json")
    tokenizer = chat.load_tokenizer(tokenizer_dir)
    stops = set(chat.load_stop_ids(directory, tokenizer))
    if tokenizer_dir != directory:
        chat.require_vocab_subset(
            chat.load_tokenizer(directory), tokenizer, (path, str(tokenizer_dir))
        )
        stops |= {i for i in chat.load_stop_ids(tokenizer_dir) if i < config.vocab_size}
    abstract_policy = make_abstract_from_config(
        path, config, dtype, remat, mesh, lora_config=lora_config, kernel=kernel, packed=packed
    )
    return dataclasses.replace(
        abstract_policy,
        tokenizer=tokenizer,
        stop_ids=tuple(sorted(stops)),
        tokenizer_dir=tokenizer_dir,
    )


def make_abstract_from_config(
    path: str,
    config: Config,
    dtype: str,
    remat: bool,
    mesh: Mesh,
    *,
    lora_config: LoRA | None = None,
    kernel: str = "auto",
    packed: bool = True,
) -> Policy:
    """`describe` for a model of which only the config is at hand: no tokenizer, no stop ids."""
    platform = mesh.devices.flat[0].platform
    kernel = attention.choose_kernel(kernel, platform, config.head_dim, jnp.dtype(dtype), packed)
    model = make_model(config, dtype=jnp.dtype(dtype), remat=remat, kernel=kernel, lora=lora_config)
    return Policy(path, config, model, mesh_lib.make_abstract_params(config, mesh), None, ())


def make_abstract_for_inference(path: str, dtype: str, mesh: Mesh | None = None) -> Policy:
    """`describe` and `check` for the verbs that only read a model: spread over all devices.

    dtype "" is bfloat16, but float32 on CPU, which computes it faster.
    """
    mesh = mesh or mesh_lib.make_reader_mesh(families.read_config(resolve_model_dir(path)))
    abstract_policy = make_abstract(path, dtype or get_default_dtype(), False, mesh, packed=False)
    check_files(abstract_policy)
    return abstract_policy


def get_default_dtype() -> str:
    """The faster dtype of activations on this platform."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def get_mesh(policy: Policy) -> Mesh:
    """The mesh that the parameters, or their shapes, lie on."""
    return jax.tree.leaves(policy.params)[0].sharding.mesh


@contextlib.contextmanager
def use(policy: Policy) -> Iterator[None]:
    """Within it, the policy computes on its mesh, and in float32 where that is its dtype.

    TPUs and GPUs else multiply float32 in fewer bits.
    """
    precision = "highest" if policy.model.dtype == jnp.float32 else None
    with mesh_lib.use_mesh(get_mesh(policy)), jax.default_matmul_precision(precision):
        yield


def load(policy: Policy, param_dtype: str) -> Policy:
    """Reads the parameters of a described policy, cast to `param_dtype`.

    They are what its path stands for; of a policy that trains a LoRA, the frozen base. Where
    `param_dtype` is a type of 8 bits (models.layers.quantised), the layers' kernels are quantised,
    and the other parameters have the dtype that the model computes in.

    Raises:
      UserError: naming the file or tensor that is missing or wrong; for a run without checkpoint.
    """
    if is_run(policy.path):
        return restore(policy, None, param_dtype)[0]
    lora_config = _read_adapter_lora(policy)
    if lora_config is None or policy.model.lora is not None:
        return dataclasses.replace(policy, params=_load_base_params(policy, param_dtype))
    return _load_merged(policy, _load_adapter_params(policy, lora_config), lora_config, param_dtype)


def make_abstract_params(policy: Policy, param_dtype: str) -> Params:
    """Shapes of what `load` would read, with dtypes and shardings."""
    quant_type, dtype = quantised.split_dtypes(param_dtype, policy.model.dtype)
    shapes = quantised.quantise_shapes(policy.params, quant_type) if quant_type else policy.params

    def cast_shape(x: Any) -> Any:
        if quantised.is_quantised(x):
            return x
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree.map(cast_shape, shapes, is_leaf=quantised.is_quantised)


def _load_base_params(policy: Policy, param_dtype: str, convert: Convert | None = None) -> Params:
    """The parameters of the model directory that a described policy comes from."""
    quant_type, dtype = quantised.split_dtypes(param_dtype, policy.model.dtype)
    shapes = quantised.quantise_shapes(policy.params, quant_type) if quant_type else policy.params
    shardings = _get_shardings(shapes)
    with run_files.show_progress(
        weights.count_reads(policy.config, shapes, shardings), 0, f"load {policy.path}"
    ) as bar:
        report_progress = lambda done: bar.update(done, {})  # noqa: E731
        return weights.load(
            resolve_model_dir(policy.path),
            policy.config,
            shapes,
            shardings,
            dtype,
            report_progress,
            convert=convert,
        )


def _make_converter(
    policy: Policy,
    param_dtype: str,
    lora_params: Params | None = None,
    lora_config: LoRA | None = None,
) -> Convert:
    """What becomes of each float32 parameter of a described policy as it is read: its LoRA merged,
    if there is one, and all of it in `param_dtype`. So the model is never whole in float32."""
    quant_type, dtype = quantised.split_dtypes(param_dtype, policy.model.dtype)

    def convert_param(path: tuple, x: jax.Array) -> Any:
        def nest_leaf(leaf: Any) -> Params:
            return functools.reduce(lambda tree, key: {key.key: tree}, reversed(path), leaf)

        def merge_and_quantise(tree: Params, lora_params: Params | None) -> Params:
            if lora_params is not None and lora_config is not None:
                tree = lora.merge_adapter(tree, lora_params, lora_config, jnp.dtype("float32"))
            return quantised.quantise_params(tree, quant_type, dtype)

        shape = functools.reduce(lambda tree, key: tree[key.key], path, policy.params)
        shapes = (
            quantised.quantise_shapes(nest_leaf(shape), quant_type)
            if quant_type
            else nest_leaf(shape)
        )
        converted = jax.jit(merge_and_quantise, out_shardings=_get_shardings(shapes))(
            nest_leaf(x), lora_params
        )
        return functools.reduce(lambda tree, key: tree[key.key], path, converted)

    return convert_param


def _load_merged(
    policy: Policy, lora_params: Params, lora_config: LoRA, param_dtype: str
) -> Policy:
    convert = _make_converter(policy, param_dtype, lora_params, lora_config)
    return dataclasses.replace(policy, params=_load_base_params(policy, "float32", convert))


def make_sampler_params_fn(policy: Policy) -> Callable[[Params], Params]:
    """The function from what is trained to what a sampler reads, which knows nothing of LoRA.

    `policy` is loaded where it trains a LoRA: its frozen parameters are merged with it in float32,
    and then cast to the dtype that the model computes in.
    """
    if policy.model.lora is None:
        return lambda trained: trained
    # The base may be in 8 bits, what is merged is not.
    return functools.partial(make_lora_merge_fn(policy), policy.params)


def make_lora_merge_fn(policy: Policy) -> Any:
    """The jitted function of a frozen base and a LoRA that `sampled` merges by; of a policy that
    may be described alone."""
    merged_shapes, lora_config = (
        mesh_lib.make_abstract_params(policy.config, get_mesh(policy)),
        policy.model.lora,
    )
    assert lora_config is not None

    def merge_lora(base: Params, lora_params: Params) -> Params:
        return lora.merge_adapter(base, lora_params, lora=lora_config, dtype=policy.model.dtype)

    return jax.jit(merge_lora, out_shardings=_get_shardings(merged_shapes))


def _get_shardings(params: Params) -> Any:
    return jax.tree.map(lambda p: p.sharding, params)


def is_adapter(path: str) -> bool:
    """Whether `path` names a PEFT adapter."""
    return not is_run(path) and adapter.is_adapter(to_local_dir(path))


def _read_adapter_lora(policy: Policy) -> LoRA | None:
    """The LoRA of the adapter directory that the policy's path names; None of another path."""
    directory = to_local_dir(policy.path)
    return (
        adapter.read_lora_config(directory, policy.config)
        if adapter.is_adapter(directory)
        else None
    )


def _load_adapter_params(policy: Policy, lora_config: LoRA) -> Params:
    """The LoRA of an adapter directory, float32."""
    shapes = mesh_lib.make_abstract_params(policy.config, get_mesh(policy), lora_config)
    return adapter.load(to_local_dir(policy.path), policy.config, shapes, _get_shardings(shapes))


def check_files(policy: Policy, step: int | None = None) -> None:
    """Raises UserError if `load` (or `restore` of a step) would find files missing or wrong,
    without reading a weight; for a policy that trains a LoRA also if its path cannot be the base,
    or holds another LoRA."""
    path, expected_lora = policy.path, policy.model.lora
    if is_run(path):
        if expected_lora is not None:
            raise UserError(f"{path}: a run, whose parameters may change; export it for a base")
        if find_newest_step(path) is None:
            raise UserError(f"{path}: a run without a checkpoint yet")
        with Checkpoints(epath.Path(path) / "checkpoints") as checkpoints:
            checkpoints.check_step(step)
    if not is_run(path) or read_run_lora(path):
        weights.check_weights(resolve_model_dir(path), policy.config, policy.params)
    adapter_lora = None if is_run(path) else _read_adapter_lora(policy)
    if adapter_lora is not None:
        shapes = mesh_lib.make_abstract_params(policy.config, get_mesh(policy), adapter_lora)
        adapter.check_adapter(to_local_dir(path), policy.config, shapes)
        if expected_lora is not None:
            _require_same_lora(path, adapter_lora, expected_lora)


def _require_same_lora(path: str, actual: LoRA, expected: LoRA) -> None:
    for name, theirs, ours in (
        ("rank", actual.rank, expected.rank),
        ("scale", f"{actual.scale:g}", f"{expected.scale:g}"),
        ("targets", sorted(actual.targets), sorted(set(expected.targets))),
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
    lora_config = read_run_lora(policy.path)
    if lora_config is not None:
        lora_params, step = restore_trained_params(policy, step, average)
        return _load_merged(policy, lora_params, lora_config, param_dtype), step
    convert = None if param_dtype == "float32" else _make_converter(policy, param_dtype)
    params, step = restore_trained_params(policy, step, average, convert)
    return dataclasses.replace(policy, params=params), step


def restore_trained_params(
    policy: Policy, step: int | None, average: bool = False, convert: Convert | None = None
) -> tuple[Params, int]:
    """What a described run has trained after `step` (None: the newest whole checkpoint), float32
    unless each parameter is converted, and that step; or its moving average. Raises UserError if
    there is no such checkpoint, saying which there are, or if the run kept no average."""
    entry = "average" if average else "params"
    if average and not has_moving_average(policy.path):
        raise UserError(
            f"{policy.path}: a run that kept no moving average (config.student.ema_decay)"
        )
    mesh = get_mesh(policy)
    shapes = mesh_lib.make_abstract_params(policy.config, mesh, read_run_lora(policy.path))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.make_replicated_sharding(mesh))

    def convert_restored(path: tuple, x: jax.Array) -> Any:
        return convert(path[1:], x) if convert and path[0].key == entry else x

    with Checkpoints(epath.Path(policy.path) / "checkpoints") as checkpoints:
        restored = checkpoints.restore(
            {entry: shapes, "step": count}, step, convert_restored if convert else None
        )
    if restored is None:
        raise UserError(f"{policy.path}: a run without a checkpoint yet")
    return restored[0][entry], int(restored[0]["step"])


def find_newest_step(path: str | Path) -> int | None:
    """The step that the run directory `path` now stands for; None of a model directory."""
    if not is_run(path):
        return None
    with Checkpoints(epath.Path(path) / "checkpoints") as checkpoints:
        latest = checkpoints.read_latest()
    return latest[0] if latest else None


def require_same_vocabulary(student: Policy, teacher: Policy) -> None:
    """Raises UserError if a token id of one is not that token of the other."""
    names = (student.path, teacher.path)
    try:
        chat.require_same_tokenizer(student.tokenizer, teacher.tokenizer, names)
    except UserError as error:
        try:
            chat.require_vocab_subset(student.tokenizer, teacher.tokenizer, names)
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


def find_extra_stop_ids(student: Policy, teacher: Policy) -> list[int]:
    """Stop ids of a teacher where the student would write on."""
    return sorted(set(teacher.stop_ids) - set(student.stop_ids))


def init_random_policy(policy: Policy, key: jax.Array) -> Policy:
    """A described policy with random float32 parameters, drawn where they will live."""
    return dataclasses.replace(policy, params=_init_params(policy, key, None))


def load_or_init_lora(policy: Policy, key: jax.Array) -> Params:
    """The LoRA that a policy which trains one begins with: its adapter's, or a new one."""
    lora_config = policy.model.lora
    assert lora_config is not None
    if adapter.is_adapter(to_local_dir(policy.path)):
        return _load_adapter_params(policy, lora_config)
    return _init_params(policy, key, lora_config)


def _init_params(policy: Policy, key: jax.Array, lora_config: LoRA | None) -> Params:
    return make_init_fn(policy, lora_config)(key)


def make_init_fn(policy: Policy, lora_config: LoRA | None) -> Any:
    """The jitted function of a key that draws parameters, or a LoRA, where they will live."""
    shapes = mesh_lib.make_abstract_params(policy.config, get_mesh(policy), lora_config)
    init = functools.partial(families.init_params, policy.config, lora=lora_config)
    return jax.jit(init, out_shardings=_get_shardings(shapes))
