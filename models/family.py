"""The spec of a model family: everything that the rest of the project needs to know about it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from models.config import Config

# Path in the parameters -> (name in the checkpoint, stored transposed: torch keeps [out, in]).
# Each {} in a name is a leading axis of the stacked parameter: the layer, then the expert.
TensorNames = Mapping[tuple[str, ...], tuple[str, bool]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of decoder-only transformers.

    architectures: values of `architectures` or `model_type` in config.json that it accepts.
    config_type: its Config class, with a classmethod from_hf(fields, source).
    block: a Linen module with the signature of models.qwen3.model.Block, stacked by
      models.transformer.
    tensor_names: the names of its weights in Hugging Face checkpoints.
    count_forward_flops: (config, tokens, context_length, with_head) -> operations of one forward
      pass over `tokens`, each attending to `context_length` others.
    count_cache_token_bytes: (config, tensor, dtype) -> bytes that one token's keys and values take
      on each of the `tensor` devices that share the heads.
    get_sharded_sizes: config -> logical axis -> the fields that it splits, with their sizes.
    released: configs of released models by hub repository name, for planning without a model
      directory.
    """

    architectures: tuple[str, ...]
    config_type: Any
    block: type[nn.Module]
    tensor_names: TensorNames
    count_forward_flops: Callable[[Any, float, float, bool], float]
    count_cache_token_bytes: Callable[..., int]
    get_sharded_sizes: Callable[[Any], dict[str, dict[str, int]]]
    released: Mapping[str, Config]
