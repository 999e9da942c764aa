"""The device mesh, and the one table that says which axis of it splits which axis of an array."""

import contextlib
import math
from collections.abc import Iterator

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.errors import UserError
from models.qwen3 import model
from models.qwen3.config import Config

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Weights are split twice, by fsdp along the model dimension and by
# tensor along heads or feed-forward; the embedding and the head along the vocabulary by both, so
# that the streamed loss holds 1/(fsdp·tensor) of each chunk's logits on a device.
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", ("fsdp", "tensor")),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("layers", None),
)


def make(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of the first data·fsdp·tensor devices; one size may be -1 for all that are left.

    Raises:
      UserError: if there are too few devices, or they cannot be divided so.
    """
    sizes = [data, fsdp, tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"config.mesh: sizes {dict(zip(AXES, sizes, strict=True))} are no mesh")
    if -1 in sizes:
        if jax.device_count() % known:
            raise UserError(f"config.mesh: {jax.device_count()} devices do not divide by {known}")
        sizes[sizes.index(-1)] = jax.device_count() // known
    total = int(np.prod(sizes))
    if total > jax.device_count():
        raise UserError(f"config.mesh: needs {total} devices, there are {jax.device_count()}")
    devices = np.array(jax.devices()[:total]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spread(*configs: Config) -> Mesh:
    """All devices, for verbs that only read these models: whatever their shapes, it divides them.

    Tensor first, which moves activations and not weights at each decoding step; then fsdp, which
    at least holds every weight once; what divides neither shares out the rows.
    """
    data, tensor, fsdp = jax.device_count(), 0, 0
    for c in configs:
        tensor = math.gcd(
            tensor,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.intermediate_size,
            c.vocab_size,
        )
    tensor = math.gcd(tensor, data)
    for c in configs:
        fsdp = math.gcd(fsdp, c.hidden_size, c.vocab_size // tensor)
    fsdp = math.gcd(fsdp, data // tensor)
    return make(data // (tensor * fsdp), fsdp, tensor)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Within it, logical axis names in models/qwen3 mean axes of `mesh`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def check(config: Config, mesh: Mesh, source: str) -> None:
    """Raises UserError if the mesh does not divide a dimension of the model that it splits."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    splits = (
        ("num_attention_heads", config.num_attention_heads, "tensor", tensor),
        ("num_key_value_heads", config.num_key_value_heads, "tensor", tensor),
        ("intermediate_size", config.intermediate_size, "tensor", tensor),
        ("hidden_size", config.hidden_size, "fsdp", fsdp),
        ("vocab_size", config.vocab_size, "fsdp*tensor", fsdp * tensor),
    )
    for name, size, axis, parts in splits:
        if size % parts:
            raise UserError(f"{source}: {name}={size} does not divide by mesh axis {axis}={parts}")


def parameters(config: Config, mesh: Mesh) -> model.Params:
    """The parameters of a model as ShapeDtypeStructs (float32) with their shardings on `mesh`."""
    shapes, axes = model.abstract(config)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        nn.logical_to_mesh_sharding(axes, mesh, RULES),
    )


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_vocabulary(logits_BCV: jax.Array) -> jax.Array:
    """Within `use`: logits split over the vocabulary, as the head is; rows only over data."""
    axes = jax.sharding.get_abstract_mesh().axis_names
    if not axes:
        return logits_BCV
    return jax.lax.with_sharding_constraint(
        logits_BCV, PartitionSpec("data", None, ("fsdp", "tensor"))
    )
