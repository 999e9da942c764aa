"""Describes a stage by shapes, and the calls of its programs."""

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
from distill.teachers.external import ExternalTeacher
from distill.training import microbatches
from models.config import Config

# Jitted functions that a run calls and `plan` omits, with the arrays they read or return: small
# compared with those of every listed program.
UNPLANNED_PROGRAMS = {
    # scalars of a step
    "_fold_row_keys": "two numbers per sequence",
    "_mix_logps": "a number per token from each of several judges",
    "merge_metrics": "sums of two micro-batches",
    "average_metrics": "metrics of several updates",
    # one array at a time, while weights are loaded, copied or compared
    "merge_and_quantise": "a parameter, merged and cast while it is read",
    "quantise_kernel": "a parameter",
    "write_layer": "a parameter",
    "write_piece": "a parameter",
    "is_equal": "a parameter and a teacher's",
    "copy": "a parameter of the moving average, before step 0",
    "copy_with_checksum": "an array of a checkpoint",
    "compute_checksum": "an array of a checkpoint; a number",
    "compute_checksums": "the parameters, before an evaluation; a number each",
    "_are_finite": "the state, before it is saved; a truth value for each array",
}


@dataclasses.dataclass(frozen=True)
class AbstractStage:
    """A stage's config and the shapes of its models, which determine its programs and its memory.

    The policies' `params` may be shapes, in the dtypes in which `train` loads them.
    """

    c: ConfigDict  # the run's
    name: str  # the stage's
    loss: losses.Loss
    sampled_rows: int  # rows of a batch that the student samples
    microbatch_rows: int
    student: Policy  # the frozen base if a LoRA is trained
    trained_params: Any  # float32
    teachers: dict[str, Policy]  # those that are run here, keyed by sub-config
    reference: Policy | None  # None also if it is the base of a LoRA
    external: tuple[ExternalTeacher, ...] = ()  # teachers that are not run here

    @property
    def s(self) -> ConfigDict:
        """The stage's own config."""
        return self.c[self.name]

    @property
    def mesh(self) -> Mesh:
        """The student's mesh."""
        return policy.get_mesh(self.student)

    @property
    def readers(self) -> list[Policy]:
        """The models that are only read."""
        return [*self.teachers.values(), *([self.reference] if self.reference else [])]

    @property
    def max_microbatches(self) -> int:
        """Micro-batches of a step if every response has the maximum length."""
        s = self.s
        return s.minibatches * -(-s.batch_size // (s.minibatches * self.microbatch_rows))

    @property
    def has_single_microbatch(self) -> bool:
        """True if every update has one micro-batch, so that no accumulated gradient is kept."""
        return not self.sampled_rows and self.s.accumulate == 1

    @property
    def layout(self) -> collate.BatchLayout:
        """The layout of the stage's micro-batches."""
        routing = self.student.config.routing_shape if self.c.student.replay_routing else None
        return microbatches.make_stage_layout(
            self.s, self.loss, self.sampled_rows, routing, self.external
        )

    def make_microbatch(self, mesh: Mesh) -> Batch:
        """Returns the shapes of a micro-batch on a mesh, before any model has scored it."""
        return microbatches.make_abstract_microbatch(self.layout, self.microbatch_rows, mesh)


@dataclasses.dataclass(frozen=True)
class ProgramCall:
    """A program, the number of its calls per step, and the work of each call.

    FLOPs are those of the formula, over all devices: recomputation and padding do not count.
    """

    name: str
    lower: Callable[[], Any]  # to be called with the mesh it runs on in use
    calls_per_step: float  # or iterations of its open loop; 0: once per stage or on some steps only
    flops: float = 0.0  # per call or per iteration
    resident_arguments: tuple[str, ...] = ()  # keys of `memory.count_resident_bytes`
    other_bytes: int = 0  # on each device, beside the program and the resident arrays
    mesh: Mesh | None = None  # that it runs on; None: the student's
    kernel_bytes_read: int = 0  # per call, by kernels whose reads the compiled text does not show
    # Scaling of `calls_per_step` for shorter responses (distill.planning.forecast): "read" and
    # "train" follow the micro-batches, the name of a sampling program follows the decoding, and
    # "fixed" does not change.
    call_scaling: str = "fixed"
    turns_per_call: int = 1  # iterations of its open loop, which share the traffic outside of it
    head_flops: float = 0.0  # the part of `flops` in output heads, which skip untrained tokens


def count_device_bytes(tree: Any) -> int:
    """Counts the bytes on one device of a tree of arrays or shapes with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def cast_shapes(tree: Any, dtype: Any) -> Any:
    """Returns the same shapes and shardings in another dtype."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), tree
    )


def infer_output_shapes(function: Any, *args: Any) -> Any:
    """Returns the shapes of a jitted function's results, with the shardings that XLA chooses."""
    lowered = function.lower(*args)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info,
        lowered.compile().output_shardings,
    )


def count_head_flops(config: Config, tokens: int) -> float:
    """Counts the FLOPs of the output head's forward pass over `tokens` tokens."""
    return 2.0 * tokens * config.hidden_size * config.vocab_size
