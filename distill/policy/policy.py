"""A policy: parameters on a mesh, and the model that applies them.

Student, teacher and reference are all of this class. A policy is named by a directory in Hugging
Face format, a hub id, a run directory (the parameters of its newest checkpoint) or the directory of
a PEFT adapter. An adapter, or a run that trains a LoRA, names its base with the LoRA merged.
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
from distill.policy import hub
from distill.policy.hub import is_run, read_run_lora, resolve_model_dir
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files, xla
from distill.runtime.checkpoint import Checkpoints
from distill.runtime.progress import show_progress
from models import adapter, families, tensor_files, weights
from models.config import Config
from models.errors import UserError
from models.families import make_model
from models.layers import attention, lora, quantised
from models.layers.lora import LoRA
from models.transformer import Params, Transformer

DTYPES = ("float32", "bfloat16")  # of activations, and of parameters
PARAM_DTYPES = (*DTYPES, *quantised.MAX_VALUES)  # of the parameters of a frozen model

Convert = Callable[[tuple, jax.Array], Any]  # (path, parameter) -> its replacement


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with its parameters, the nested dict that models.transformer describes.

    If `model.lora` is set, `params` is the frozen base of the trained LoRA. A policy is "described"
    if `params` holds shapes instead of arrays.
    """

    path: str
    config: Config
    model: Transformer
    params: Params
    tokenizer: PreTrainedTokenizerBase | None
    stop_ids: tuple[int, ...]
    tokenizer_dir: Path = Path()  # where `tokenizer` was read from
    step: int | None = None  # of the run's checkpoint that `params` are

    @property
    def dtype(self) -> str:
        """Name of the dtype that the model computes in."""
        return jnp.dtype(self.model.dtype).name

    def __repr__(self) -> str:
        devices = get_mesh(self).devices
        where = f"{devices.size} × {devices.flat[0].device_kind}"
        size = f"{self.config.num_parameters:,} parameters in {self.dtype}"
        return f"Policy({self.path!r}: {size} on {where})"  # not the arrays, which fill a notebook


def make_abstract(
    path: str, dtype: str, remat: bool, mesh: Mesh, *, tokenizer_path: str = "", **options: Any
) -> Policy:
    """Describes the model that `path` names: reads everything but the parameters.

    Args:
      tokenizer_path: a model whose tokenizer and chat template to use instead of its own. A Base
        student takes those of its teacher, which have `<think>` and end turns with another token;
        the model then stops at the stop ids of both.
      options: lora_config, kernel and packed of `make_abstract_from_config`. With a LoRA the model
        is its frozen base; training continues from the adapter, if `path` names one.

    Raises:
      UserError: if the directory holds no model of a known family, the mesh does not divide it, or
        the tokenizer has other ids than the model's own for the same tokens.
    """
    directory = resolve_model_dir(path)
    tokenizer_dir = hub.resolve_tokenizer_dir(tokenizer_path or path)
    config = families.read_config(directory)
    mesh_lib.check_divisible(config, mesh, f"{path}/config.json")
    tokenizer = chat.load_tokenizer(tokenizer_dir)
    stops = set(chat.load_stop_ids(directory, tokenizer))
    if tokenizer_dir != directory:
        names = (hub.find_base_model(path), str(tokenizer_dir))
        chat.require_vocab_subset(chat.load_tokenizer(directory), tokenizer, names)
        vocabulary = tokenizer.get_vocab() if tokenizer else {}
        for token in (t for t, i in vocabulary.items() if i >= config.vocab_size):
            raise UserError(
                f"{tokenizer_dir}: its token {token!r} has id {vocabulary[token]}, but {directory} "
                f"has {config.vocab_size} embeddings"
            )
        stops |= {i for i in chat.load_stop_ids(tokenizer_dir) if i < config.vocab_size}
    return dataclasses.replace(
        make_abstract_from_config(path, config, dtype, remat, mesh, **options),
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
    """Describes a model by its config alone, without tokenizer and stop ids.

    kernel, packed: see models.layers.attention.choose_kernel.
    """
    xla.log_slow_experts(config, mesh)
    platform = mesh.devices.flat[0].platform
    kernel = attention.choose_kernel(kernel, platform, config.head_dim, jnp.dtype(dtype), packed)
    model = make_model(config, dtype=jnp.dtype(dtype), remat=remat, kernel=kernel, lora=lora_config)
    return Policy(path, config, model, mesh_lib.make_abstract_params(config, mesh), None, ())


def make_abstract_for_inference(path: str, dtype: str, mesh: Mesh | None = None) -> Policy:
    """Describes a frozen model and checks its files; by default on a mesh of all devices.

    With dtype "", or one of 8 bits, it computes in bfloat16; on CPUs in float32, which is faster.
    """
    mesh = mesh or mesh_lib.make_reader_mesh(families.read_config(resolve_model_dir(path)))
    dtype = dtype if dtype in DTYPES else get_default_dtype()
    abstract_policy = make_abstract(path, dtype, False, mesh, packed=False)
    check_files(abstract_policy)
    return abstract_policy


def get_default_dtype() -> str:
    """Returns the faster dtype of activations on this platform."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def get_mesh(policy: Policy) -> Mesh:
    """Returns the mesh of the parameters or their shapes."""
    return jax.tree.leaves(policy.params)[0].sharding.mesh


@contextlib.contextmanager
def use(policy: Policy) -> Iterator[None]:
    """Context in which the policy computes on its mesh.

    A float32 policy multiplies in full float32 there; TPUs and GPUs would otherwise use fewer bits.
    """
    precision = "highest" if policy.model.dtype == jnp.float32 else None
    with mesh_lib.use_mesh(get_mesh(policy)), jax.default_matmul_precision(precision):
        yield


def load(policy: Policy, param_dtype: str = "") -> Policy:
    """Loads the parameters of a described policy, cast to `param_dtype` ("": policy.dtype).

    A policy that trains a LoRA gets its frozen base; otherwise an adapter is merged into its base.
    With an 8-bit `param_dtype` (models.layers.quantised) the layers' kernels are quantised, and the
    other parameters have the dtype that the model computes in.

    Raises:
      UserError: naming a missing or invalid file or tensor, or a run without a checkpoint.
    """
    param_dtype = param_dtype or policy.dtype
    if is_run(policy.path):
        return restore(policy, None, param_dtype)[0]
    lora_config = _read_adapter_lora(policy)
    if lora_config is None or policy.model.lora is not None:
        return dataclasses.replace(policy, params=_load_base_params(policy, param_dtype))
    return _load_merged(policy, _load_adapter_params(policy, lora_config), lora_config, param_dtype)


def make_abstract_params(policy: Policy, param_dtype: str) -> Params:
    """Returns the shapes, dtypes and shardings of the parameters that `load` would read."""
    quant_type, dtype = quantised.split_dtypes(param_dtype, policy.model.dtype)

    def cast_shape(x: Any) -> Any:
        if quantised.is_quantised(x):
            return x
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    shapes = quantised.quantise_shapes(policy.params, quant_type)
    return jax.tree.map(cast_shape, shapes, is_leaf=quantised.is_quantised)


def _load_base_params(policy: Policy, param_dtype: str, convert: Convert | None = None) -> Params:
    """Loads the parameters of the model directory of a described policy."""
    quant_type, dtype = quantised.split_dtypes(param_dtype, policy.model.dtype)
    shapes = quantised.quantise_shapes(policy.params, quant_type)
    shardings, directory = _get_shardings(shapes), resolve_model_dir(policy.path)
    num_reads = weights.count_reads(policy.config, shapes, shardings)
    with show_progress(num_reads, 0, f"load {policy.path}", is_minor=True) as bar:
        return weights.load(
            directory, policy.config, shapes, shardings, dtype, bar.update, convert=convert
        )


def _make_converter(
    policy: Policy,
    param_dtype: str,
    lora_params: Params | None = None,
    lora_config: LoRA | None = None,
) -> Convert:
    """Returns a function that merges the LoRA, if any, into a float32 parameter and casts it.

    It is called on each parameter as it is read, so that no whole model is held in float32.
    """
    quant_type, dtype = quantised.split_dtypes(param_dtype, policy.model.dtype)
    shapes = quantised.quantise_shapes(policy.params, quant_type)

    def merge_and_quantise(x: jax.Array, factors: Params, should_quantise: bool) -> Any:
        if factors and lora_config is not None:
            x = lora.merge_adapter(x, factors, lora_config, jnp.dtype("float32"))
        if quant_type and should_quantise:
            return quantised.quantise_kernel(x, quant_type)
        return x.astype(dtype)

    def convert_param(path: tuple, x: jax.Array) -> Any:
        shape = functools.reduce(lambda tree, key: tree[key.key], path, shapes)
        factors = functools.reduce(lambda tree, key: tree.get(key.key, {}), path, lora_params or {})
        convert = jax.jit(merge_and_quantise, static_argnums=2, out_shardings=_get_shardings(shape))
        return convert(x, factors, quantised.is_quantised(shape))

    return convert_param


def _load_merged(
    policy: Policy, lora_params: Params, lora_config: LoRA, param_dtype: str
) -> Policy:
    convert = _make_converter(policy, param_dtype, lora_params, lora_config)
    return dataclasses.replace(policy, params=_load_base_params(policy, "float32", convert))


def make_sampler_params_fn(policy: Policy) -> Callable[[Params], Params]:
    """Returns the function from trained parameters to those that a sampler reads.

    For a loaded policy that trains a LoRA, it merges the LoRA into the frozen parameters in float32
    and casts the sum to the dtype that the model computes in. Otherwise it is the identity.
    """
    if policy.model.lora is None:
        return lambda trained: trained
    # The base may be in 8 bits; the merged parameters are not.
    return functools.partial(make_lora_merge_fn(policy), policy.params)


def make_lora_merge_fn(policy: Policy) -> Any:
    """Returns the jitted function that merges a LoRA into a frozen base; `policy` need not be
    loaded."""
    merged_shapes = mesh_lib.make_abstract_params(policy.config, get_mesh(policy))
    lora_config = policy.model.lora
    assert lora_config is not None

    def merge_lora(base: Params, lora_params: Params) -> Params:
        return lora.merge_adapter(base, lora_params, lora=lora_config, dtype=policy.model.dtype)

    return jax.jit(merge_lora, out_shardings=_get_shardings(merged_shapes))


def _get_shardings(params: Params) -> Any:
    return jax.tree.map(lambda p: p.sharding, params)


def _read_adapter_lora(policy: Policy) -> LoRA | None:
    """Reads the LoRA of the adapter that the policy's path names; None if it names none."""
    directory = hub.to_local_dir(policy.path)
    found = adapter.is_adapter(directory)
    return adapter.read_lora_config(directory, policy.config) if found else None


def _load_adapter_params(policy: Policy, lora_config: LoRA) -> Params:
    """Loads the LoRA parameters of an adapter directory, in float32."""
    shapes = mesh_lib.make_abstract_params(policy.config, get_mesh(policy), lora_config)
    return adapter.load(
        hub.to_local_dir(policy.path), policy.config, shapes, _get_shardings(shapes)
    )


def check_files(policy: Policy, step: int | None = None) -> None:
    """Raises UserError if files that `load` (or `restore` of a step) needs are missing or invalid.

    Reads no weights. A LoRA to train must have a base, and the shape of the adapter at its path.
    """
    path, expected_lora = policy.path, policy.model.lora
    if is_run(path):
        if expected_lora is not None:
            raise UserError(f"{path}: a run's parameters may change; export it for a base")
        if find_newest_step(path) is None:
            raise UserError(f"{path}: a run without a checkpoint yet")
        with Checkpoints(epath.Path(path) / "checkpoints") as checkpoints:
            checkpoints.check_step(step)
    if (not is_run(path) or read_run_lora(path)) and hub.has_weights(hub.find_base_model(path)):
        directory = resolve_model_dir(path)
        weights.check_weights(directory, policy.config, policy.params)
        if index := tensor_files.find_unread_index(directory):
            run_files.log_line(f"{index}: not read, because {tensor_files.WHOLE_FILE} is beside it")
    adapter_lora = None if is_run(path) else _read_adapter_lora(policy)
    if adapter_lora is not None and hub.has_weights(path):
        shapes = mesh_lib.make_abstract_params(policy.config, get_mesh(policy), adapter_lora)
        adapter.check_adapter(hub.to_local_dir(path), policy.config, shapes)
    if adapter_lora is not None and expected_lora is not None:
        hub.require_same_lora(path, adapter_lora, expected_lora)


def restore(
    policy: Policy, step: int | None, param_dtype: str, average: bool = False
) -> tuple[Policy, int]:
    """Restores a described run's parameters, or their moving average, cast to `param_dtype`.

    Merges a LoRA. Returns the policy and the step; see `restore_trained_params`.
    """
    if lora_config := read_run_lora(policy.path):
        lora_params, step = restore_trained_params(policy, step, average)
        merged = _load_merged(policy, lora_params, lora_config, param_dtype)
        return dataclasses.replace(merged, step=step), step
    convert = None if param_dtype == "float32" else _make_converter(policy, param_dtype)
    params, step = restore_trained_params(policy, step, average, convert)
    return dataclasses.replace(policy, params=params, step=step), step


def restore_trained_params(
    policy: Policy, step: int | None, average: bool = False, convert: Convert | None = None
) -> tuple[Params, int]:
    """Restores the trained parameters of a described run, or their moving average, in float32.

    Args:
      step: step of the checkpoint; None: the newest that verifies.
      convert: applied to each parameter.

    Returns:
      The parameters and their step.

    Raises:
      UserError: if there is no such checkpoint, naming the existing ones, or no moving average.
    """
    entry = "average" if average else "params"
    if average and not hub.has_moving_average(policy.path):
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
    """Returns the newest step of the run directory `path`; None for a model directory."""
    if not is_run(path):
        return None
    with Checkpoints(epath.Path(path) / "checkpoints") as checkpoints:
        latest = checkpoints.read_latest()
    return latest[0] if latest else None


def is_loaded(policy: Policy) -> bool:
    """True if the policy's parameters are arrays, not only shapes."""
    return isinstance(jax.tree.leaves(policy.params)[0], jax.Array)


def init_random_policy(policy: Policy, key: jax.Array) -> Policy:
    """Fills a described policy with random float32 parameters, drawn on its mesh."""
    return dataclasses.replace(policy, params=make_init_fn(policy, None)(key))


def load_or_init_lora(policy: Policy, key: jax.Array) -> Params:
    """Returns the LoRA parameters that training starts from: those of the adapter, or new ones."""
    lora_config = policy.model.lora
    assert lora_config is not None
    if adapter.is_adapter(hub.to_local_dir(policy.path)):
        return _load_adapter_params(policy, lora_config)
    return make_init_fn(policy, lora_config)(key)


def make_init_fn(policy: Policy, lora_config: LoRA | None) -> Any:
    """Returns a jitted function of a key that draws the parameters, or a LoRA, on the mesh."""
    shapes = mesh_lib.make_abstract_params(policy.config, get_mesh(policy), lora_config)
    init = functools.partial(families.init_params, policy.config, lora=lora_config)
    return jax.jit(init, out_shardings=_get_shardings(shapes))
