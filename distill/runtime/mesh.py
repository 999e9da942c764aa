"""The device mesh, and the table of mesh axes that split each logical array axis."""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from models import families, transformer
from models.config import Config
from models.errors import UserError
from models.families import get_family
from models.layers.lora import LoRA

# Context follows fsdp: decoding merges the two into one axis (`to_decode_mesh`).
AXES = ("data", "fsdp", "context", "expert", "tensor")
ROW_AXES = ("data", "fsdp", "expert")  # split the batch
VOCABULARY_AXES = ("fsdp", "expert", "context", "tensor")
TOKEN_AXES = ("context", "tensor")  # split the tokens of hidden states

# Logical axis -> mesh axes. Weights are split twice: by fsdp along the model dimension and by
# tensor along heads or feed-forward. Experts are also split by expert, an axis that acts like data
# for all other weights. The embedding and the head are split along the vocabulary by all axes but
# data, so that the streamed loss holds 1/(fsdp·expert·context·tensor) of each chunk's logits on a
# device. Context acts like fsdp for weights; it splits a row's tokens everywhere except in
# attention, where it splits heads and every device has all tokens (arXiv 2309.14509).
SHARDING_RULES = (
    ("batch", ROW_AXES),
    ("embed", ("fsdp", "context")),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("expert", "expert"),
    ("vocab", VOCABULARY_AXES),
    ("act_heads", ("tensor", "context")),
    ("act_tokens", TOKEN_AXES),
    ("act_context", "context"),
    ("layers", None),
)

_GATHERED_AXES = ("embed", "vocab")
# The same for decoding, where every row shard holds all weights except experts: decoding reads all
# weights for each token and would otherwise fetch them each time.
GATHERED_RULES = (
    ("embed", None),
    ("vocab", "tensor"),
    *(r for r in SHARDING_RULES if r[0] not in _GATHERED_AXES),
)


def make_mesh(
    data: int,
    fsdp: int,
    tensor: int,
    expert: int = 1,
    context: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Makes a mesh of as many of the first devices as the product of the sizes.

    One size may be -1: the remaining devices. `devices` replaces jax.devices().

    Raises:
      UserError: if there are too few devices, or the sizes do not divide their number.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, context, expert, tensor]
    known = int(np.prod([s for s in sizes if s != -1]))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"config.mesh: sizes {dict(zip(AXES, sizes, strict=True))} are invalid")
    if -1 in sizes:
        if len(devices) % known:
            raise UserError(f"config.mesh: {len(devices)} devices do not divide by {known}")
        sizes[sizes.index(-1)] = len(devices) // known
    total = int(np.prod(sizes))
    if total > len(devices):
        raise UserError(f"config.mesh: needs {total} devices, there are {len(devices)}")
    shaped = np.array(devices[:total]).reshape(sizes)
    if devices[0].platform == "tpu" and total == len(devices) and _is_box(devices):
        shaped = _order_by_torus(sizes, devices)
    return Mesh(shaped, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_meshes(c: ConfigDict, devices: Sequence[Any] | None = None) -> tuple[Mesh, Mesh]:
    """Makes the student's mesh and the teachers' mesh; they may be the same.

    With `config.teacher_mesh.devices` the teachers get that many of the last devices of every
    process, so that batches and scores are moved within a host.

    Raises:
      UserError: as `make_mesh`, or if a process has no device left for one of the two.
    """
    sizes = c.teacher_mesh.to_dict()
    count = sizes.pop("devices")
    if not count:
        mesh = make_mesh(**c.mesh, devices=devices)
        return mesh, mesh
    devices_by_process: dict[int, list[Any]] = {}
    for device in jax.devices() if devices is None else devices:
        devices_by_process.setdefault(device.process_index, []).append(device)
    least = min(map(len, devices_by_process.values()))
    if not 0 < count < least:
        raise UserError(
            f"config.teacher_mesh.devices={count}: of the {least} devices of a process at least "
            "one must be the student's, and one the teachers'"
        )
    mesh = make_mesh(
        **c.mesh, devices=[device for own in devices_by_process.values() for device in own[:-count]]
    )
    teacher_devices = [device for own in devices_by_process.values() for device in own[-count:]]
    try:
        return mesh, make_mesh(**sizes, devices=teacher_devices)
    except UserError as error:
        raise UserError(str(error).replace("config.mesh", "config.teacher_mesh", 1)) from None


def _is_box(devices: Sequence[Any]) -> bool:
    """Returns True if TPU devices fill a box of their torus, one per coordinate of a slice; for v4
    the compiler lists both cores of a chip."""
    at = np.array([device.coords for device in devices])
    spans = int(np.prod(at.max(axis=0) - at.min(axis=0) + 1))
    places = {(getattr(device, "slice_index", 0), *device.coords) for device in devices}
    return spans == len({place[1:] for place in places}) and len(places) == len(at)


def _order_by_torus(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Orders TPU devices so that, where possible, each mesh axis is an axis of the torus.

    Gradients are then reduce-scattered along its ring; over a mesh axis of two torus dimensions XLA
    all-reduces them on every device. Only rows are split between slices, whose network is slow.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})  # set if several
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *others = sizes
    if data % slices:
        raise UserError(
            f"config.mesh.data={data}: must be a multiple of the {slices} slices, between which "
            "only rows are split"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *others),
        (slices, *(1 for _ in others)),
        devices,
        allow_split_physical_axes=True,
    )


def make_reader_mesh(*configs: Config) -> Mesh:
    """Makes a mesh of all devices that divides these models, for verbs that only read them.

    Tensor and then expert come first, since they move activations rather than weights at each
    decoding step; then fsdp, which stores every weight only once; the remaining devices split rows.
    """
    left = jax.device_count()

    def list_sizes(*names: str) -> list[int]:
        """Returns the sizes, in all models, of the dimensions that these logical axes split."""
        tables = [get_family(config).get_sharded_sizes(config) for config in configs]
        return [size for table in tables for name in names for size in table[name].values()]

    vocabulary = math.gcd(*list_sizes("vocab"))
    tensor = math.gcd(left, vocabulary, *list_sizes("heads", "mlp"))
    left, vocabulary = left // tensor, vocabulary // tensor
    expert = math.gcd(left, vocabulary, *list_sizes("expert")) if list_sizes("expert") else 1
    left, vocabulary = left // expert, vocabulary // expert
    fsdp = math.gcd(left, vocabulary, *list_sizes("embed"))
    return make_mesh(left // fsdp, fsdp, tensor, expert)


def to_decode_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh for decoding: the same devices, with rows split along context too, since
    there are no tokens to split."""
    data, fsdp, context, *others = mesh.devices.shape
    shaped = mesh.devices.reshape(data, fsdp * context, 1, *others)
    return mesh if context == 1 else Mesh(shaped, AXES, axis_types=mesh.axis_types)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Context in which the logical axis names of models/ map to axes of `mesh`."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(SHARDING_RULES):
        yield


def check_divisible(config: Config, mesh: Mesh, source: str) -> None:
    """Raises UserError if the model has a dimension that the mesh splits but does not divide."""
    rules: dict[str, Any] = dict(SHARDING_RULES)
    for logical, sizes in get_family(config).get_sharded_sizes(config).items():
        axes = [rules[logical]] if isinstance(rules[logical], str) else rules[logical]
        parts = _count_axis_shards(mesh, axes)
        for name, size in sizes.items():
            if size % parts:
                raise UserError(
                    f"{source}: {name}={size} does not divide by mesh axis {'*'.join(axes)}={parts}"
                )


def make_abstract_params(
    config: Config, mesh: Mesh, lora: LoRA | None = None, rules: tuple = SHARDING_RULES
) -> transformer.Params:
    """Returns a model's parameters, or those of `lora`, as float32 ShapeDtypeStructs with their
    shardings on `mesh`."""
    shapes, axes = families.get_abstract_params(config, lora)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        nn.logical_to_mesh_sharding(axes, mesh, rules),
    )


def make_row_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def list_local_rows(mesh: Mesh, count: int, devices: Iterable[Any] | None = None) -> list[int]:
    """Returns, in order, the rows of a batch of `count` on these devices; by default on those of
    this process."""
    index_of_device = make_row_sharding(mesh).devices_indices_map((count,))
    own = set(jax.local_devices() if devices is None else devices)
    parts = [part for device, (part,) in index_of_device.items() if device in own]
    return sorted({row for part in parts for row in range(*part.indices(count))})


def from_local_rows(tree: Any, mesh: Mesh, count: int, spec: PartitionSpec | None = None) -> Any:
    """Makes arrays of `count` rows, split by rows over `mesh` or by `spec`, from host arrays of
    this process's rows (`list_local_rows`)."""
    mine = {row: at for at, row in enumerate(list_local_rows(mesh, count))}
    sharding = NamedSharding(mesh, spec) if spec else make_row_sharding(mesh)

    def make_global_array(x: np.ndarray) -> jax.Array:
        def get_shard(index: Any) -> np.ndarray:
            first, end, _ = index[0].indices(count)
            return x[(slice(mine[first], mine[first] + end - first), *index[1:])]

        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, get_shard)

    return jax.tree.map(make_global_array, tree)


def move_rows(tree: Any, mesh: Mesh) -> Any:
    """Moves arrays whose first axis is the batch to another mesh.

    They are split by rows there, and hidden states [B, T, D] by `make_hidden_spec`. With several
    processes, each moves its own rows through its host's memory; see `check_colocated`.
    """

    def move_array(x: jax.Array) -> jax.Array:
        spec = make_hidden_spec(mesh, x.shape[1]) if x.ndim == 3 else PartitionSpec(ROW_AXES)
        if x.is_fully_addressable:
            return jax.device_put(x, NamedSharding(mesh, spec))
        assert isinstance(x.sharding, NamedSharding)
        own = list_local_rows(x.sharding.mesh, x.shape[0])  # pyright: ignore[reportArgumentType]
        mine = {row: at for at, row in enumerate(own)}
        local_rows = np.empty((len(own), *x.shape[1:]), x.dtype)
        for shard in x.addressable_shards:
            first, end, _ = shard.index[0].indices(x.shape[0])
            into = (slice(mine[first], mine[first] + end - first), *shard.index[1:])
            local_rows[into] = np.asarray(shard.data)
        return from_local_rows(local_rows, mesh, x.shape[0], spec)

    return jax.tree.map(move_array, tree)


def check_colocated(first: Mesh, second: Mesh, count: int) -> None:
    """Raises UserError if `move_rows` cannot move a batch of `count` rows between two meshes.

    Each process must hold the same rows on both, with all their tokens. Equal meshes always pass.
    """
    if first == second:
        return
    devices_by_process: dict[int, list[Any]] = {}
    for device in (*first.devices.flat, *second.devices.flat):
        devices_by_process.setdefault(device.process_index, []).append(device)
    same = all(
        list_local_rows(first, count, own) == list_local_rows(second, count, own)
        for own in devices_by_process.values()
    )
    whole = all(
        len({device.process_index for device in line}) == 1
        for mesh in (first, second)
        for line in mesh.devices.swapaxes(2, 3).reshape(
            -1, _count_axis_shards(mesh, TOKEN_AXES)
        )  # expert before
    )
    if not same or not whole:
        raise UserError(
            "config.teacher_mesh: a process would have other rows there than on config.mesh; the "
            "axes that split rows must go over the hosts alike, context and tensor stay within one"
        )


def wait_on_cpu(tree: Any) -> Any:
    """Returns `tree`; on several CPU devices, waits until it is ready.

    XLA deadlocks there, and then aborts, if programs with collectives queue up on few cores.
    """
    leaf = next((x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)), None)
    if leaf is not None and len(leaf.sharding.device_set) > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


def to_global_array(x: Any, sharding: NamedSharding) -> jax.Array:
    """Puts a host array, the same in every process, on the devices of all processes.

    jax.device_put would compare it between processes each time.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    host_array = np.asarray(x)
    return jax.make_array_from_callback(host_array.shape, sharding, lambda index: host_array[index])


@functools.partial(jax.jit, static_argnums=1)
def gather_first_rows(tree: Any, count: int) -> Any:
    """Within `use_mesh`: returns the first rows of arrays split by rows, replicated everywhere."""
    return jax.tree.map(lambda x: replicate_array(x[:count]), tree)


def is_on_gpu(mesh: Mesh) -> bool:
    """Returns True if its devices are GPUs; they need not exist."""
    return mesh.devices.flat[0].platform in ("gpu", "cuda")


def count_row_shards(mesh: Mesh) -> int:
    """Returns the number of parts that the batch is split into."""
    return _count_axis_shards(mesh, ROW_AXES)


def count_token_shards(mesh: Mesh | AbstractMesh, T: int) -> int:
    """Returns the number of parts that hidden states of T tokens are split into along a row."""
    parts = _count_axis_shards(mesh, TOKEN_AXES)
    return 1 if T % parts else parts


def count_shards(B: int, T: int) -> tuple[int, int]:
    """Within `use_mesh`: returns how many parts hidden states [B, T, D] are split into, by rows and
    by tokens; B parts by rows if the row shards do not divide B."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        return 1, 1
    parts = _count_axis_shards(mesh, ROW_AXES)
    return B if B % parts else parts, count_token_shards(mesh, T)


def _count_axis_shards(mesh: Mesh | AbstractMesh, axes: Iterable[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def make_replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(x: jax.Array) -> jax.Array:
    """Within `use_mesh`: splits an array by rows, its first axis."""
    return _constrain_sharding(x, PartitionSpec(ROW_AXES))


def replicate_array(x: jax.Array) -> jax.Array:
    """Within `use_mesh`: replicates an array, so that every process can read it."""
    return _constrain_sharding(x, PartitionSpec())


def make_hidden_spec(mesh: Mesh | AbstractMesh, T: int) -> PartitionSpec:
    """Returns the spec of hidden states [B, T, D]: split by rows, and by tokens if T divides."""
    return PartitionSpec(ROW_AXES, TOKEN_AXES if count_token_shards(mesh, T) > 1 else None)


def split_hidden(x_BTD: jax.Array) -> jax.Array:
    """Within `use_mesh`: splits hidden states by `make_hidden_spec`."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        _constrain_sharding(x_BTD, make_hidden_spec(mesh, x_BTD.shape[1]))
        if mesh.axis_names
        else x_BTD
    )


def split_vocabulary(logits_BCV: jax.Array) -> jax.Array:
    """Within `use_mesh`: splits logits over the vocabulary, like the head; rows over data only."""
    return _constrain_sharding(logits_BCV, PartitionSpec("data", None, VOCABULARY_AXES))


def _constrain_sharding(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    if not jax.sharding.get_abstract_mesh().axis_names:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
