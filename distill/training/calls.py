"""A program that a run calls, lowered from shapes alone, and what is known of its models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distill.policy.policy import Policy

# Names of jitted functions that a run calls too, and `plan` leaves out: what they read and give is
# small beside every program that is listed.
UNPLANNED_PROGRAMS = {
    # of a step's sequences or updates: a few numbers each
    "_fold_row_keys": "two numbers a sequence",
    "_mix_logps": "a number a token, of several judges",
    "merge_metrics": "metrics of two micro-batches",
    "average_metrics": "figures of several updates",
    # one array at a time, when weights are read, copied or compared
    "merge_and_quantise": "a parameter, merged and cast as it is read",
    "quantise_kernel": "a parameter",
    "write_layer": "a parameter",
    "write_piece": "a parameter",
    "is_equal": "a parameter, beside a teacher's",
    "copy": "a parameter of the moving average, before step 0",
    "_copy_with_checksum": "an array of a checkpoint",
    "compute_checksum": "a number of each array of a checkpoint",
    "compute_checksums": "a number of each parameter, before an evaluation",
}


@dataclasses.dataclass(frozen=True)
class StageModels:
    """Described models, whose `params` have the dtypes that `train` would load them in."""

    student: Policy  # its base, where it trains a LoRA
    trained_params: Any  # shapes of what is trained: float32
    teachers: dict[str, Policy]  # by the names of their sub-configs
    reference: Policy | None


@dataclasses.dataclass(frozen=True)
class ProgramCall:
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
    calls_per_step: float
    flops: float
    resident_arguments: tuple[str, ...]
    other_bytes: int = 0
    mesh: Mesh | None = None
    kernel_bytes_read: int = 0
    call_scaling: str = "fixed"
    turns_per_call: int = 1
    head_flops: float = 0.0


def count_device_bytes(tree: Any) -> int:
    """Bytes that a tree of ShapeDtypeStructs with shardings takes on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def cast_shapes(tree: Any, dtype: Any) -> Any:
    """The same shapes and shardings in another dtype."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), tree
    )


def infer_output_shapes(function: Any, *args: Any) -> Any:
    """What a jitted function of static arguments returns, as shapes with its own shardings."""
    lowered = function.lower(*args)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        lowered.compile().output_shardings,
    )
