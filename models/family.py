"""A model family: what the rest of the project asks about one, as a spec of functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from models.config import Config

# Path in the parameters -> (name in the checkpoint, stored transposed: torch keeps [out, in]).
# Each {} of a name is a leading axis of the stacked parameter: the layer, then the expert.
TensorNames = Mapping[tuple[str, ...], tuple[str, bool]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A decoder-only transformer by its config, its block and its names.

    architectures: the names of `architectures` or `model_type` in config.json that it reads.
    config_type: its Config class, with a classmethod from_hf(fields, source).
    block: a Linen module called as models.qwen3.model.Block is; models.transformer stacks it.
    tensor_names: the names of its weights in Hugging Face's checkpoints.
    count_forward_flops: (config, tokens, context_length, with_head) -> operations of one forward
      pass over `tokens`, each of which attends to `context_length` others.
    count_cache_token_bytes: (config, tensor, dtype) -> bytes that one token's keys and values take
      on each of the `tensor` devices that share the heads.
    get_sharded_sizes: config -> logical axis -> the fields that it splits, with their sizes.
    released: the configs of released models, for planning without a model directory, by the names
      of their repositories on the hub.
    """

    architectures: tuple[str, ...]
    config_type: Any
    block: type[nn.Module]
    tensor_names: TensorNames
    count_forward_flops: Callable[[Any, float, float, bool], float]
    count_cache_token_bytes: Callable[..., int]
    get_sharded_sizes: Callable[[Any], dict[str, dict[str, int]]]
    released: Mapping[str, Config]
