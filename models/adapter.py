"""A LoRA as PEFT stores it: a directory of adapter_config.json and adapter_model.safetensors.

What is written here has tensors of its own for every projection, an expert's too, by the names of
transformers 4; peft converts them as it loads them into transformers 5. What is read are these,
and all experts of a layer in one tensor, as peft itself saves them from transformers 5.
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

# Fields of PEFT's LoraConfig that do not change what a trained adapter computes, or are read here.
_IGNORED_FIELDS = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules"),
    *("inference_mode", "layers_pattern", "lora_alpha", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "r", "runtime_config", "target_modules"),
    *("target_parameters", "task_type", "use_rslora"),
)
_SUPPORTED_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base too
_FUSED_PROJECTIONS = (
    "gate_up_proj",
    "down_proj",
)  # all experts' projections as transformers 5 names them


def is_adapter(directory: str | Path) -> bool:
    """Whether DIRECTORY is an adapter's."""
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
    """The name of the model that the adapter in DIRECTORY was made for, as its config has it."""
    name = _read_config_fields(directory).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise UserError(f"{Path(directory) / CONFIG_FILE}: base_model_name_or_path names no model")
    return name


def read_lora_config(directory: str | Path, config: Config) -> LoRA:
    """Which LoRA the adapter in DIRECTORY is, to a base of `config`; reads no tensor.

    Raises:
      UserError: naming the field or tensor that contradicts another, or that is not supported.
    """
    path, fields = Path(directory) / CONFIG_FILE, _read_config_fields(directory)
    plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _SUPPORTED_INITS}
    for name, value in ({"peft_type": None} | fields).items():
        known = value in plain[name] if name in plain else not value or name in _IGNORED_FIELDS
        if not known:
            raise UserError(f"{path}: {name}={value!r} is not supported")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r={rank!r}, lora_alpha={alpha!r}: not an integer and a number")
    with open_tensors(Path(directory), config) as slices:
        shapes = {name: list(part.get_shape()) for name, part in slices.items()}
    for name, shape in shapes.items():
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UserError(f"{directory}: tensor {name} is no factor of a LoRA")
        found = shape[:1] if ".lora_A." in name else shape[1:]
        if found != [rank]:
            raise UserError(f"{directory}: {name} has shape {shape}, {CONFIG_FILE} says r={rank}")
    # The tensors say what is adapted: the config may do so by a pattern.
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
    """Tensor name -> handle as weights.opened gives it, every projection by itself."""
    with weights.open_tensors({directory / TENSORS_FILE: []}) as slices:
        # Once for all experts whose columns lie side by side in these rows.
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
    """Some rows and columns of a stored matrix, in the form of safetensors' handles."""

    shape: list[int]
    rows: slice
    columns: slice
    read: Callable[[int, int], np.ndarray]  # of all columns, rows [begin, end)
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
    """What a factor of all experts holds of each, made by part_of(shape, rows, columns).

    peft has lora_A as [E·R, in], the expert slowest, and lora_B as [out, R·E], the expert fastest.
    Of gate and up, which it adapts as one, each has all of a and its own half of b's rows. Raises
    ValueError for shapes that are neither theirs nor those of the down projection.
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
    """Raises UserError as `load` would, from the files' headers alone; reads no tensor."""
    with open_tensors(Path(directory), config) as slices:
        weights.check_tensors(Path(directory), slices, config, shapes)


def load(directory: str | Path, config: Config, shapes: Any, shardings: Any) -> Any:
    """Reads the adapter in DIRECTORY, float32, straight into `shardings`; as weights.load does."""
    source = open_tensors(Path(directory), config)
    return weights.load(directory, config, shapes, shardings, jnp.dtype("float32"), source=source)


def save(
    adapter: Any, lora: LoRA, config: Config, base_name: str, directory: Path, dtype: jnp.dtype
) -> None:
    """Writes `adapter`, cast to `dtype`, as PEFT's adapter to the model that `base` names.

    peft and vLLM take the experts' gate and up projections for one of twice the rank and alpha,
    whose scale rsLoRA would get wrong: with experts the config has the same scale without it. And
    as peft adapts all projections of the experts or none, missing ones are there with zeros.
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
    (directory / TENSORS_FILE).chmod(0o644)  # safetensors leaves it to its owner alone
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
