"""The table of model families, and functions that dispatch on a config's family."""

import functools
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.config import Config, read_architecture
from models.errors import UserError
from models.family import Family
from models.layers.lora import LORA, LoRA
from models.qwen3 import family as qwen3
from models.transformer import Params, Transformer

FAMILIES: dict[str, Family] = {"qwen3": qwen3.FAMILY}


def get_family(config: Config) -> Family:
    """Returns the family that `config` belongs to."""
    return next(f for f in FAMILIES.values() if f.config_type is type(config))


def parse_config(fields: dict[str, Any], source: str) -> Config:
    """Makes a config from config.json's fields.

    Args:
      fields: the parsed JSON object.
      source: the file they come from, for messages.

    Raises:
      UserError: for an architecture of no known family, a missing field, or a variant that the
        model does not implement.
    """
    architecture = read_architecture(fields)
    for family in FAMILIES.values():
        if architecture in family.architectures:
            return family.config_type.from_hf(fields, source)
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise UserError(f"{source}: architecture {architecture!r} is none of {known}")


def read_config(directory: str | Path) -> Config:
    """Reads DIRECTORY/config.json. Raises UserError if missing, malformed, or as `parse_config`."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        inside = [
            *Path(directory).glob("*/config.json"),
            *Path(directory).glob("*/adapter_config.json"),
        ]
        names = ", ".join(sorted({str(file.parent) for file in inside}))
        hint = f"; name one within: {names}" if names else ""
        raise UserError(f"{directory}: no model directory (it has no config.json){hint}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not a JSON object")
    return parse_config(fields, str(path))


def find_released(name: str) -> Config | None:
    """Returns the config of a hub repository that a family lists, else None.

    A Base model gets the config of its post-trained sibling.
    """
    released = {k.lower(): c for family in FAMILIES.values() for k, c in family.released.items()}
    return released.get(name.removesuffix("-Base").lower())


def make_model(config: Config, **options: Any) -> Transformer:
    """Makes the model of `config`; `options` are Transformer's other fields."""
    return Transformer(config, get_family(config).block, **options)


def count_forward_flops(
    config: Config, tokens: float, context_length: float, with_head: bool
) -> float:
    """Counts the operations of a forward pass over `tokens`, each attending to `context_length`
    others."""
    return get_family(config).count_forward_flops(config, tokens, context_length, with_head)


def count_cache_token_bytes(config: Config, tensor: int, dtype: jnp.dtype) -> int:
    """Counts the bytes of a token's keys and values on each of `tensor` devices sharing heads."""
    return get_family(config).count_cache_token_bytes(config, tensor, dtype)


def get_abstract_params(config: Config, lora: LoRA | None = None) -> tuple[Params, Params]:
    """Returns (shapes, axes) of all parameters, or of `lora`'s factors; allocates nothing.

    Shapes are ShapeDtypeStructs; axes are PartitionSpecs of logical axis names.
    """
    boxed = _eval_abstract_params(config, lora)
    is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
    shapes = jax.tree.map(lambda box: box.value, boxed, is_leaf=is_box)
    return shapes, nn.get_partition_spec(boxed)


@functools.cache  # called several times per start for the same model, on different meshes
def _eval_abstract_params(config: Config, lora: LoRA | None) -> Params:
    return jax.eval_shape(lambda: _init_boxed_params(config, lora, jax.random.key(0)))


def init_params(config: Config, key: jax.Array, lora: LoRA | None = None) -> Params:
    """Initialises float32 parameters: kernels N(0, 1/fan_in), embeddings N(0, 1/D), norms one.

    With `lora`, only its factors (models.layers.lora.make_factors).
    """
    return nn.unbox(_init_boxed_params(config, lora, key))


def _init_boxed_params(config: Config, lora: LoRA | None, key: jax.Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = make_model(config, lora=lora).init(key, tokens, tokens, tokens)
    return variables["params" if lora is None else LORA]
