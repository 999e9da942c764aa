"""A program that a run calls, lowered from shapes alone, and what is known of its models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill.policy.policy import Policy
from models.qwen3.config import Config

# Names of jitted functions that a run calls too, and `plan` leaves out: what they read and give is
# small beside every program that is listed.
SMALL = {
    # of a step's sequences or updates: a few numbers each
    "_row_keys": "two numbers a sequence",
    "_mixed": "a number a token, of several judges",
    "merge": "figures of two micro-batches",
    "mean": "figures of several updates",
    # one array at a time, when weights are read, copied or compared
    "one": "a parameter, merged and cast as it is read",
    "quantise": "a parameter",
    "put_at": "a parameter",
    "equal": "a parameter, beside a teacher's",
    "copy": "a parameter of the moving average, before step 0",
    "_copied": "an array of a checkpoint",
    "checksum": "a number of each array of a checkpoint",
    "checksums": "a number of each parameter, before an evaluation",
}


@dataclasses.dataclass(frozen=True)
class Models:
    """Described models, whose `params` have the dtypes that `train` would load them in."""

    student: Policy  # its base, where it trains a LoRA
    trained: Any  # shapes of what is trained: float32
    teachers: dict[str, Policy]  # by the names of their sub-configs
    reference: Policy | None


@dataclasses.dataclass(frozen=True)
class Call:
    """A program, how often a step calls it, and what it does that was asked for.

    lower: what compiles it. turns: calls a step, or turns of its open loop; 0: once in a stage, or
    only where something asks for it. useful: operations of the formula that one call computes, over
    all devices: no recomputation, no padding of a mask; `head` of it by output heads, which skip
    what is not trained. holds: of what the run keeps on the devices, the names that are among its
    arguments. beside: bytes that lie on each device beside it and what the run keeps. mesh: where
    it runs, if not where the student is; `lower` is to be called within its use. reads: bytes of
    memory that a kernel reads in a call, of which the compiled text says nothing. kind: by what it
    is called more or less often at other lengths (distill.planning.forecast). segment: turns of its
    open loop in one call, which share what lies outside.
    """

    name: str
    lower: Callable[[], Any]
    turns: float
    useful: float
    holds: tuple[str, ...]
    beside: int = 0
    mesh: Mesh | None = None
    reads: int = 0
    kind: str = "fixed"
    segment: int = 1
    head: float = 0.0


def bytes_of(tree: Any) -> int:
    """Bytes that a tree of ShapeDtypeStructs with shardings takes on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def cast(tree: Any, dtype: Any) -> Any:
    """The same shapes and shardings in another dtype."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), tree
    )


def operations(config: Config, tokens: float, context: float, head: bool) -> float:
    """Operations of one forward pass over `tokens`, each of which attends to `context` others."""
    D, H = config.hidden_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    per_layer = 2 * D * H * (2 * N + 2 * K) + 4 * N * H * context
    total = per_layer * config.num_hidden_layers
    for sparse in config.sparse_layers:
        width = config.intermediate_size
        if sparse:
            width = config.moe_intermediate_size * config.num_experts_per_tok
            total += 2 * D * config.num_experts
        total += 6 * D * width
    return tokens * (total + (2 * D * config.vocab_size if head else 0))


def like(function: Any, *args: Any) -> Any:
    """What a jitted function of static arguments returns, as shapes with its own shardings."""
    lowered = function.lower(*args)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        lowered.compile().output_shardings,
    )
