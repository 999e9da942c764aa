"""Reads and writes LoRA adapters in PEFT's format: adapter_config.json, adapter_model.safetensors.

Written adapters have separate tensors for every projection, also for those of each expert, named as
in transformers 4; peft converts them when it loads them into transformers 5. Both this layout and
the one that peft saves from transformers 5, with all experts of a layer in one tensor, can be read.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models import families, weights
from models.config import Config
from models.errors import UserError
from models.layers.lora import MLP_TARGETS, TARGETS, LoRA

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Fields of PEFT's LoraConfig that do not affect what a trained adapter computes, or are read below.
_IGNORED_FIELDS = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules"),
    *("inference_mode", "layers_pattern", "lora_alpha", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "r", "runtime_config", "target_modules"),
    *("target_parameters", "task_type", "use_rslora"),
)
_SUPPORTED_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others also change the base
# The projections of all experts, as transformers 5 names them.
_FUSED_PROJECTIONS = ("gate_up_proj", "down_proj")


def is_adapter(directory: str | Path) -> bool:
    """Returns True if `directory` contains an adapter."""
    return (Path(directory) / CONFIG_FILE).is_file()


def _read_config_fields(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / CONFIG_FILE
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object")
    return fields


def read_base_name(directory: str | Path) -> str:
    """Returns the name of the base model, as recorded in the adapter's config."""
    name = _read_config_fields(directory).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"{Path(directory) / CONFIG_FILE}: base_model_name_or_path names no model")
    return name


def read_lora_config(directory: str | Path, config: Config) -> LoRA:
    """Returns the LoRA that the adapter describes, for a base of `config`; reads no tensors.

    Raises:
      UserError: names the field or tensor that contradicts another or is not supported.
    """
    path, fields = Path(directory) / CONFIG_FILE, _read_config_fields(directory)
    plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _SUPPORTED_INITS}
    for name, value in ({"peft_type": None} | fields).items():
        supported = value in plain[name] if name in plain else not value or name in _IGNORED_FIELDS
        if not supported:
            raise UserError(f"{path}: {name}={value!r} is not supported")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r={rank!r}, lora_alpha={alpha!r}: not an integer and a number")
    with open_tensors(Path(directory), config) as slices:
        shapes = {name: list(part.get_shape()) for name, part in slices.items()}
    for name, shape in shapes.items():
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UserError(f"{directory}: tensor {name} is no factor of a LoRA")
        stored_rank = shape[:1] if ".lora_A." in name else shape[1:]
        if stored_rank != [rank]:
            raise UserError(f"{directory}: {name} has shape {shape}, {CONFIG_FILE} says r={rank}")
    # The tensors determine the targets, because the config may give them as a pattern.
    adapted = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in shapes}
    listed = fields.get("target_modules") or []
    named = set() if isinstance(listed, str) else {str(name).rpartition(".")[2] for name in listed}
    experts = {str(name).rpartition(".")[2] for name in fields.get("target_parameters") or []}
    for name in sorted((adapted | named) - {*TARGETS} | experts - {*_FUSED_PROJECTIONS}):
        raise UserError(f"{path}: target {name!r} is not supported, only {', '.join(TARGETS)}")
    for name in sorted(named - adapted):
        raise UserError(f"{path}: target_modules has {name!r}, but {TENSORS_FILE} no tensor of it")
    try:
        return LoRA(
            rank,
            float(alpha),
            bool(fields.get("use_rslora")),
            tuple(t for t in TARGETS if t in adapted),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@contextlib.contextmanager
def open_tensors(directory: Path, config: Config) -> Iterator[dict[str, Any]]:
    """Yields tensor name -> handle, as weights.open_tensors does, with experts separated."""
    with weights.open_tensors({directory / TENSORS_FILE: []}) as slices:
        # Cached: the columns of all experts lie side by side in the same rows.
        rows = functools.lru_cache(maxsize=1)(lambda name, begin, end: slices[name][begin:end])
        handles: dict[str, Any] = {}
        for name in slices:
            layer, _, end = name.partition(".mlp.experts.")
            if end.removeprefix("base_layer.").startswith("lora_"):
                stem, factor, _ = name.rsplit(".", 2)
                pair = [f"{stem}.{f}.weight" for f in ("lora_A", "lora_B")]
                for missing in (n for n in pair if n not in slices):
                    raise UserError(f"{directory}: tensor {missing} is missing")
                shapes = [tuple(slices[n].get_shape()) for n in pair]
                part = functools.partial(
                    _TensorPart, read=functools.partial(rows, name), dtype=slices[name].get_dtype()
                )
                try:
                    handles |= _split_experts(f"{layer}.mlp.experts", factor, shapes, part, config)
                except ValueError:
                    raise UserError(
                        f"{directory}: {stem} has factors of shapes {shapes}, which fit no "
                        f"projection of {config.num_experts} experts"
                    ) from None
            else:
                handles[name] = slices[name]
        yield handles


@dataclasses.dataclass(frozen=True)
class _TensorPart:
    """Some rows and columns of a stored matrix, with the interface of safetensors' handles."""

    shape: list[int]
    rows: slice
    columns: slice
    read: Callable[[int, int], np.ndarray]  # reads rows [begin, end), all columns
    dtype: str

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.read(self.rows.start, self.rows.stop)[:, self.columns][index]


def _split_experts(
    stem: str,
    factor: str,
    shapes: list[tuple[int, ...]],
    make_part: Callable[..., _TensorPart],
    config: Config,
) -> dict[str, _TensorPart]:
    """Splits a factor of all experts into parts, each made by make_part(shape, rows, columns).

    peft stores lora_A as [E·R, in], with the expert slowest, and lora_B as [out, R·E], with the
    expert fastest. It adapts gate and up as one: each uses all of a and its own half of b's rows.
    Raises ValueError unless the shapes are those of gate and up, or of the down projection.
    """
    (stacked, fan_in), (fan_out, columns) = shapes
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
    projections = {(D, 2 * F): ("gate_proj", "up_proj"), (F, D): ("down_proj",)}
    names = projections.get((fan_in, fan_out), ())
    if not names or not E or columns != stacked or stacked % E:
        raise ValueError(shapes)
    R, out = stacked // E, fan_out // len(names)
    parts = {}
    for e in range(E):
        for i, name in enumerate(names):
            if factor == "lora_A":
                part = make_part([R, fan_in], slice(e * R, (e + 1) * R), slice(None))
            else:
                part = make_part([out, R], slice(i * out, (i + 1) * out), slice(e, None, E))
            parts[f"{stem}.{e}.{name}.{factor}.weight"] = part
    return parts


def check_adapter(directory: str | Path, config: Config, shapes: Any) -> None:
    """Raises UserError as `load` would, from the files' headers alone; reads no tensors."""
    with open_tensors(Path(directory), config) as slices:
        weights.check_tensors(Path(directory), slices, config, shapes)


def load(directory: str | Path, config: Config, shapes: Any, shardings: Any) -> Any:
    """Reads the adapter in `directory` in float32 into `shardings`, as weights.load does."""
    source = open_tensors(Path(directory), config)
    return weights.load(directory, config, shapes, shardings, jnp.dtype("float32"), source=source)


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
