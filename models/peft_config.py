"""Reads PEFT's adapter_config.json: which modules an adapter adapts, with which rank and scale.

Modules are the projections that our LoRA can adapt, under their names in transformers 4, where each
expert has its own. peft's rules are followed field by field (peft 0.21: check_target_module_exists
in peft/tuners/tuners_utils.py, get_pattern_key in peft/utils/other.py), so that what an adapter
must contain is known before its tensors are read.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import regex

from models import families, weights
from models.config import Config
from models.errors import UserError
from models.layers.lora import TARGETS

CONFIG_FILE = "adapter_config.json"
REMEDY = "merge it in peft (merge_and_unload), save it and name the merged model"

# Fields of PEFT's LoraConfig that do not affect what a trained adapter computes, or are read below.
_IGNORED_FIELDS = (
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
    *("lora_alpha", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r"),
    *("rank_pattern", "runtime_config", "target_modules", "target_parameters", "task_type"),
    "use_rslora",
)
_SUPPORTED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base
    "revision": (None, "main"),  # of the base on the hub
}
# A projection of an expert -> the parameter of all experts that holds it in transformers 5.
_EXPERTS_PARAMETERS = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
_WRONG = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, RecursionError)
_PATTERN_SECONDS = 1.0  # for one module: patterns that backtrack can take for ever
_TARGET_NAMES = {*TARGETS, *_EXPERTS_PARAMETERS.values()}


@dataclasses.dataclass(frozen=True)
class Size:
    """The rank and alpha of a module's factors, and the scale that follows from them."""

    rank: int
    alpha: float
    scale: float


def read_fields(directory: str | Path) -> dict[str, Any]:
    """Returns the fields of DIRECTORY/adapter_config.json, not yet checked."""
    path = Path(directory) / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object")
    return fields


def check_fields(path: Path, fields: dict[str, Any]) -> None:
    """Raises UserError for a field or a listed target that is not supported."""
    for name, value in ({"peft_type": None} | fields).items():
        known = _SUPPORTED_VALUES.get(name)
        if not (value in known if known else not value or name in _IGNORED_FIELDS):
            raise UserError(f"{path}: {name}={value!r} is not supported; {REMEDY}")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r={rank!r}, lora_alpha={alpha!r}: not an integer and a number")
    for field in ("target_modules", "target_parameters"):
        for name in _list_names(fields, field):
            if name.removesuffix(".weight").rpartition(".")[2] not in _TARGET_NAMES:
                known = ", ".join(TARGETS)
                raise UserError(f"{path}: target {name!r} is not supported, only {known}; {REMEDY}")


@functools.cache
def list_modules(config: Config) -> dict[str, tuple[int, int]]:
    """Maps every module of the base to its sizes (in, out)."""
    modules, names = {}, families.get_family(config).tensor_names
    params, _ = families.get_abstract_params(config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        module = weights.lookup_tensor(path, names)[0].removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            for place in np.ndindex(leaf.shape[: module.count("{}")]):
                modules[module.format(*place)] = leaf.shape[-2:]
    return modules


def find_sizes(path: Path, fields: dict[str, Any], config: Config) -> dict[str, Size]:
    """Maps every module that the fields target to its size.

    Raises:
      UserError: for a field of another type or value than peft writes.
    """
    sizes = {}
    try:
        for module in list_modules(config):
            parameter = _name_parameter(module)
            if _is_target(fields, module):
                sizes[module] = _find_size(fields, module)
            elif _matches(list(fields.get("target_parameters") or []), parameter):
                sizes[module] = _find_size(fields, parameter)
    except (regex.error, TimeoutError, *_WRONG) as error:
        raise UserError(f"{path}: a field of the wrong type or value ({error})") from None
    return sizes


def check_names(path: Path, fields: dict[str, Any], adapted: Iterable[str]) -> None:
    """Raises UserError for a listed target that none of the adapted modules has."""
    modules = list(adapted)
    parameters = [_name_parameter(module) for module in modules]
    for field, names in (("target_modules", modules), ("target_parameters", parameters)):
        for target in _list_names(fields, field):
            if not any(_matches([target], name) for name in names):
                raise UserError(f"{path}: {field} has {target!r}, but the adapter no tensor of it")


def _list_names(fields: dict[str, Any], field: str) -> list[str]:
    """Returns a field's names, sorted; none if it is a pattern."""
    value = fields.get(field)
    return sorted(map(str, value)) if isinstance(value, list) else []


def _name_parameter(module: str) -> str:
    """Returns the name in transformers 5 of the parameter that holds a module's weights."""
    experts, found, end = module.partition(".mlp.experts.")
    parameter = _EXPERTS_PARAMETERS.get(end.rpartition(".")[2])
    return f"{experts}{found}{parameter}" if found else f"{module}.weight"


def _matches(targets: str | list[str], module: str) -> bool:
    """Returns True if a pattern or a list of names or their ends applies to a module."""
    if isinstance(targets, str):
        return bool(regex.fullmatch(targets, module, timeout=_PATTERN_SECONDS))
    return any(module == name or module.endswith(f".{name}") for name in targets)


def _is_target(fields: dict[str, Any], module: str) -> bool:
    """Returns True if target_modules and the fields that restrict it select a module."""
    targets, layers = fields.get("target_modules") or [], fields.get("layers_to_transform")
    if _matches(fields.get("exclude_modules") or [], module):
        return False
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return targets == "all-linear" or _matches(targets, module)
    patterns = fields.get("layers_pattern") or r"[^.]+"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        at = rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\."
        if match := regex.match(at, module, timeout=_PATTERN_SECONDS):
            chosen = layers if isinstance(layers, list) else [layers]
            return int(match["layer"]) in chosen and _matches(targets, module)
    return False


def _find_size(fields: dict[str, Any], name: str) -> Size:
    def find_value(patterns: str, default: str) -> Any:
        values = (fields.get(patterns) or {}).items()
        for key, value in values:
            if regex.match(rf"(.*\.)?({key})$", name, timeout=_PATTERN_SECONDS):
                return value
        return fields[default]

    rank, alpha = find_value("rank_pattern", "r"), find_value("alpha_pattern", "lora_alpha")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank {rank!r} of {name}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha {alpha!r} of {name}")
    return Size(rank, alpha, compute_scale(fields, rank, alpha))


def compute_scale(fields: dict[str, Any], rank: int, alpha: float) -> float:
    """Returns the scale of factors of this rank and alpha."""
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
