"""A stage as shapes, and the programs that a run of it calls."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from distill.batch import Batch
from distill.data import collate
from distill.objectives import losses
from distill.policy import policy
from distill.policy.policy import Policy
from distill.training import microbatches
from models.config import Config

# Jitted functions that a run calls too and `plan` leaves out, and what they read and return: small
# beside every program that is listed.
UNPLANNED_PROGRAMS = {
    # figures of a step
    "_fold_row_keys": "two numbers a sequence",
    "_mix_logps": "a number a token from each of several judges",
    "merge_metrics": "sums of two micro-batches",
    "average_metrics": "metrics of several updates",
    # one array at a time, while weights are read, copied or compared
    "merge_and_quantise": "a parameter, merged and cast as it is read",
    "quantise_kernel": "a parameter",
    "write_layer": "a parameter",
    "write_piece": "a parameter",
    "is_equal": "a parameter and a teacher's",
    "copy": "a parameter of the moving average, before step 0",
    "_copy_with_checksum": "an array of a checkpoint",
    "compute_checksum": "an array of a checkpoint; a number",
    "compute_checksums": "the parameters, before an evaluation; a number each",
}


@dataclasses.dataclass(frozen=True)
class AbstractStage:
    """A stage of a config and the shapes of its models: what its programs and its memory depend on.

    The policies' `params` may be shapes; they have the dtypes that `train` loads them in.
    """

    c: ConfigDict  # of the run
    name: str  # of the stage
    loss: losses.Loss
    sampled_rows: int  # rows of a batch that the student writes
    microbatch_rows: int
    student: Policy  # the frozen base, where a LoRA is trained
    trained_params: Any  # float32
    teachers: dict[str, Policy]  # by the names of their sub-configs
    reference: Policy | None  # None also where it is the base of a LoRA

    @property
    def s(self) -> ConfigDict:
        """The stage's own config."""
        return self.c[self.name]

    @property
    def mesh(self) -> Mesh:
        """The student's."""
        return policy.get_mesh(self.student)

    @property
    def readers(self) -> list[Policy]:
        """The models that are only read."""
        return [*self.teachers.values(), *([self.reference] if self.reference else [])]

    @property
    def max_microbatches(self) -> int:
        """Micro-batches of a step if every response is as long as it may be."""
        s = self.s
        return s.minibatches * -(-s.batch_size // (s.minibatches * self.microbatch_rows))

    @property
    def has_single_microbatch(self) -> bool:
        """True if every update has one micro-batch: no sum of gradients lies beside its own."""
        return not self.sampled_rows and self.s.accumulate == 1

    @property
    def layout(self) -> collate.BatchLayout:
        """The layout of its micro-batches."""
        routing = self.student.config.routing_shape if self.c.student.replay_routing else None
        return microbatches.make_stage_layout(self.s, self.loss, self.sampled_rows, routing)

    def make_microbatch(self, mesh: Mesh) -> Batch:
        """Shapes of a micro-batch as it is laid out on a mesh, before any model has scored it."""
        return microbatches.make_abstract_microbatch(self.layout, self.microbatch_rows, mesh)


@dataclasses.dataclass(frozen=True)
class ProgramCall:
    """A program, how often a step calls it, and the work that a call does.

    FLOPs are those of the formula, over all devices: neither recomputation nor padding counts.
    """

    name: str
    lower: Callable[[], Any]  # to be called within the use of the mesh that it runs on
    calls_per_step: float  # or turns of its open loop; 0: once a stage, or only on some steps
    flops: float = 0.0  # of one call, or of one turn
    resident_arguments: tuple[str, ...] = ()  # its arguments among `memory.count_resident_bytes`
    other_bytes: int = 0  # on each device, beside the program and what is resident
    mesh: Mesh | None = None  # where it runs; None: the student's
    kernel_bytes_read: int = 0  # by a kernel in one call, which the compiled text does not show
    # What the number of calls follows if responses are shorter (distill.planning.forecast): "read"
    # and "train" the micro-batches, the name of a sampling program the decoding, "fixed" nothing.
    call_scaling: str = "fixed"
    turns_per_call: int = 1  # turns of its open loop, which share what lies outside of it
    head_flops: float = 0.0  # of `flops`, those of output heads, which skip untrained tokens


def count_device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of arrays, or of shapes, with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def cast_shapes(tree: Any, dtype: Any) -> Any:
    """Returns the same shapes and shardings with another dtype."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), tree
    )


def infer_output_shapes(function: Any, *args: Any) -> Any:
    """Returns the shapes that a jitted function returns, with the shardings that XLA gives them."""
    lowered = function.lower(*args)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        lowered.compile().output_shardings,
    )


def count_head_flops(config: Config, tokens: int) -> float:
    """FLOPs of the output head over `tokens` tokens, forward."""
    return 2.0 * tokens * config.hidden_size * config.vocab_size
