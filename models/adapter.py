"""Reads and writes LoRA adapters in PEFT's format: adapter_config.json, adapter_model.safetensors.

Written adapters have separate tensors for every projection, also for those of each expert, named as
in transformers 4; peft converts them when it loads them into transformers 5. Both this layout and
the one that peft saves from transformers 5, with all experts of a layer in one tensor, can be read.

A PEFT adapter may give modules ranks and scales of their own and leave layers out. Ours has one
rank and one scale in all layers, so factors are read padded with zeros to the largest rank, b times
the ratio of the scales, and as zeros in a module that is not adapted. That is the same function,
and it stays so in training, because these zeros have no gradient.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models import families, peft_config, weights
from models.config import Config
from models.errors import UserError
from models.layers.lora import MLP_TARGETS, TARGETS, LoRA
from models.peft_config import CONFIG_FILE, REMEDY, Size
from models.tensor_files import open_tensors

TENSORS_FILE = "adapter_model.safetensors"

# A state dict that was not saved by peft may lack the prefix, or have the adapter's name.
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.default)?\.weight")
_EXPERTS = re.compile(r"(.+\.mlp\.experts)(?:\.base_layer)*")


def is_adapter(directory: str | Path) -> bool:
    """Returns True if `directory` contains an adapter."""
    return (Path(directory) / CONFIG_FILE).is_file()


def read_base_name(directory: str | Path) -> str:
    """Returns the name of the base model, as recorded in the adapter's config."""
    name = peft_config.read_fields(directory).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"{Path(directory) / CONFIG_FILE}: base_model_name_or_path names no model")
    return name


def read_lora_config(directory: str | Path, config: Config) -> LoRA:
    """Returns the LoRA that holds the adapter, for a base of `config`; reads no tensors.

    Raises:
      UserError: names the field or tensor that contradicts another or is not supported.
    """
    with open_adapter(Path(directory), config) as (lora, _):
        return lora


def check_adapter(directory: str | Path, config: Config, shapes: Any) -> None:
    """Raises UserError as `load` would, from the files' headers alone; reads no tensors."""
    with open_adapter(Path(directory), config) as (_, tensors):
        weights.check_tensors(Path(directory), tensors, config, shapes)


def load(directory: str | Path, config: Config, shapes: Any, shardings: Any) -> Any:
    """Reads the adapter in `directory` in float32 into `shardings`, as weights.load does."""
    dtype = jnp.dtype("float32")
    with open_adapter(Path(directory), config) as (_, tensors):
        source = contextlib.nullcontext(tensors)
        return weights.load(directory, config, shapes, shardings, dtype, source=source)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A stored tensor, or the rows and columns of it that belong to one projection."""

    tensor: str
    shape: list[int]
    rows: slice | None = None
    columns: slice | None = None
    transposed: bool = False  # these rows and columns are those of the transpose of `shape`


_Pair = dict[str, _Part]  # "lora_A" and "lora_B" of a module


@dataclasses.dataclass(frozen=True)
class _Factor:
    """A factor as the model holds it, with the interface of safetensors' handles."""

    shape: list[int]
    dtype: str
    scale: float
    read: Callable[[], np.ndarray]  # what is stored; the rest of `shape` is zero

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        stored = self.read().astype(np.float32)
        whole = np.zeros(self.shape, np.float32)
        whole[: stored.shape[0], : stored.shape[1]] = stored * self.scale
        return whole[index]


@contextlib.contextmanager
def open_adapter(directory: Path, config: Config) -> Iterator[tuple[LoRA, dict[str, Any]]]:
    """Yields the LoRA that holds an adapter, and tensor name -> handle as open_tensors does.

    Every factor of the LoRA has a handle, under the name that weights.load looks for.

    Raises:
      UserError: names the field or tensor that contradicts another or is not supported.
    """
    path, fields = directory / CONFIG_FILE, peft_config.read_fields(directory)
    peft_config.check_fields(path, fields)
    modules = peft_config.list_modules(config)
    with open_tensors({directory / TENSORS_FILE: []}) as slices:
        pairs = _find_pairs(directory, slices, config, str(fields.get("peft_version")))
        for module in (m for m in pairs if m not in modules):
            name = pairs[module]["lora_A"].tensor
            raise UserError(f"{directory}: tensor {name} is of no projection of the base")
        peft_config.check_names(path, fields, pairs)
        sizes = peft_config.find_sizes(path, fields, config)
        _check_pairs(directory, pairs, sizes)
        lora, scale = _make_lora(path, fields, sizes)
        # Cached: the columns of all experts lie side by side in the same rows.
        rows = functools.lru_cache(maxsize=1)(lambda name, begin, end: slices[name][begin:end])

        def make_factor(module: str, factor: str) -> Any:
            fan_in, fan_out = modules[module]
            if module not in pairs:
                shape = [lora.rank, fan_in] if factor == "lora_A" else [fan_out, lora.rank]
                return _Factor(shape, "F32", 1.0, lambda: np.zeros((0, 0)))
            part = pairs[module][factor]
            handle = slices[part.tensor]
            fan_out, fan_in = part.shape  # of the tensor, so that a wrong one is reported
            shape = [lora.rank, fan_in] if factor == "lora_A" else [fan_out, lora.rank]
            ratio = 1.0 if factor == "lora_A" else sizes[module].scale / scale
            whole = part == _Part(part.tensor, part.shape)
            if whole and shape == part.shape and ratio == 1:
                return handle

            def read_part() -> np.ndarray:
                begin, end, _ = (part.rows or slice(None)).indices(handle.get_shape()[0])
                stored = rows(part.tensor, begin, end)[:, part.columns or slice(None)]
                return stored.T if part.transposed else stored

            return _Factor(shape, handle.get_dtype(), ratio, read_part)

        adapted = (m for m in modules if m.rpartition(".")[2] in lora.targets)
        tensors = {
            f"base_model.model.{module}.{factor}.weight": make_factor(module, factor)
            for module in adapted
            for factor in ("lora_A", "lora_B")
        }
        yield lora, tensors


def _find_pairs(
    directory: Path, slices: dict[str, Any], config: Config, version: str
) -> dict[str, _Pair]:
    """Maps modules to their factors in a file of this version of peft, with experts separated.

    Raises UserError for a tensor that is no factor, and for a factor without its other one.
    """
    stored: dict[str, _Pair] = {}
    for name, handle in slices.items():
        match, shape = _FACTOR.fullmatch(name), list(handle.get_shape())
        if match is None or len(shape) != 2:
            raise UserError(f"{directory}: tensor {name} is no factor of a LoRA; {REMEDY}")
        if match[2] in stored.setdefault(match[1], {}):
            raise UserError(f"{directory}: {match[2]} of {match[1]} is there twice")
        stored[match[1]][match[2]] = _Part(name, shape)
    pairs: dict[str, _Pair] = {}
    for module, pair in stored.items():
        for factor, other in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
            if factor not in pair:
                missing = pair[other].tensor.replace(f".{other}.", f".{factor}.")
                raise UserError(f"{directory}: tensor {missing} is missing")
        experts = _EXPERTS.fullmatch(module)
        split = {module: pair}
        if experts:
            split = _split_experts(directory, experts[1], pair, config, version)
        for twice in sorted(split.keys() & pairs.keys()):
            raise UserError(f"{directory}: the factors of {twice} are there twice")
        pairs |= split
    return pairs


def _split_experts(
    directory: Path, experts: str, pair: _Pair, config: Config, version: str
) -> dict[str, _Pair]:
    """Splits the factors of all experts of a layer into those of each projection.

    peft stores lora_A as [E·R, in], with the expert slowest, and lora_B as [out, R·E], with the
    expert fastest. It adapts gate and up as one: each uses all of a and its own half of b's rows.
    Before version 0.19 it took in for out: there lora_A's transpose is b, and lora_B's is a.
    Raises UserError unless the shapes are those of gate and up, or of the down projection.
    """
    a, b = pair["lora_A"], pair["lora_B"]
    (stacked, fan_in), (fan_out, columns) = a.shape, b.shape
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
    projections = {(D, 2 * F): ("gate_proj", "up_proj"), (F, D): ("down_proj",)}
    minor = re.match(r"0\.(\d+)\.", version)
    old = minor is not None and int(minor[1]) < 19
    if old:
        fan_in, fan_out = fan_out, fan_in
    names = projections.get((fan_in, fan_out), ())
    if not names or not E or columns != stacked or stacked % E:
        raise UserError(
            f"{directory}: {a.tensor} {a.shape} and lora_B {b.shape} fit no projection of {E} "
            f"experts of sizes {D} and {F}"
        )
    R, out = stacked // E, fan_out // len(names)
    pairs = {}
    for e in range(E):
        expert, of_expert = slice(e * R, (e + 1) * R), slice(e, None, E)
        for i, name in enumerate(names):
            own = slice(i * out, (i + 1) * out)
            if old:
                lora_a = _Part(b.tensor, [R, fan_in], None, of_expert, transposed=True)
                lora_b = _Part(a.tensor, [out, R], expert, own, transposed=True)
            else:
                lora_a = _Part(a.tensor, [R, fan_in], expert)
                lora_b = _Part(b.tensor, [out, R], own, of_expert)
            pairs[f"{experts}.{e}.{name}"] = {"lora_A": lora_a, "lora_B": lora_b}
    return pairs


def _check_pairs(directory: Path, pairs: dict[str, _Pair], sizes: dict[str, Size]) -> None:
    """Raises UserError unless the file has factors of the targeted modules, of their ranks."""
    for module, pair in pairs.items():
        a, b = pair["lora_A"], pair["lora_B"]
        if module not in sizes:
            raise UserError(
                f"{directory}: tensor {a.tensor} is of a module that {CONFIG_FILE} does not target"
            )
        for part, rank in ((a, a.shape[0]), (b, b.shape[1])):
            if rank != sizes[module].rank:
                raise UserError(
                    f"{directory}: {part.tensor} has shape {part.shape}, {CONFIG_FILE} says "
                    f"r={sizes[module].rank}"
                )
    for module in (m for m in sizes if m not in pairs):
        raise UserError(f"{directory}: {CONFIG_FILE} targets {module}, {TENSORS_FILE} lacks it")
    if not pairs:
        raise UserError(f"{directory}: {TENSORS_FILE} has no tensors")


def _make_lora(path: Path, fields: dict[str, Any], sizes: dict[str, Size]) -> tuple[LoRA, float]:
    """Returns a LoRA that holds factors of all these sizes, and its scale."""
    adapted = {module.rpartition(".")[2] for module in sizes}
    targets = tuple(t for t in TARGETS if t in adapted)
    rank = max(size.rank for size in sizes.values())
    try:
        if len({*sizes.values()}) == 1:
            alpha = float(next(iter(sizes.values())).alpha)
            lora = LoRA(rank, alpha, bool(fields.get("use_rslora")), targets)
            return lora, lora.scale
        scale = peft_config.compute_scale(fields, fields["r"], fields["lora_alpha"])
        return LoRA(rank, scale * rank, rslora=False, targets=targets), scale
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save(
    adapter: Any, lora: LoRA, config: Config, base_name: str, directory: Path, dtype: jnp.dtype
) -> None:
    """Writes `adapter`, cast to `dtype`, as a PEFT adapter of the model `base_name`.

    peft and vLLM treat the experts' gate and up projections as one of twice the rank and alpha,
    which changes rsLoRA's scale: with experts, the config expresses the same scale without rsLoRA.
    As peft adapts all projections of the experts or none, missing ones are written as zeros.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(config.sparse_layers) and not set(MLP_TARGETS).isdisjoint(lora.targets):
        alpha = lora.scale * lora.rank
        targets = tuple(t for t in TARGETS if t in lora.targets + MLP_TARGETS)
        lora = LoRA(lora.rank, alpha, rslora=False, targets=targets)
        shapes, _ = families.get_abstract_params(config, lora)
        values_by_path = dict(jax.tree_util.tree_leaves_with_path(adapter))
        adapter = jax.tree_util.tree_map_with_path(
            lambda path, x: values_by_path.get(path, np.zeros(x.shape, x.dtype)), shapes
        )
    save_file(
        dict(weights.iter_tensors(adapter, config, dtype)),
        directory / TENSORS_FILE,
        {"format": "pt"},
    )
    (directory / TENSORS_FILE).chmod(0o644)  # safetensors makes it readable by its owner only
    fields = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": lora.rslora,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
