"""Loads and saves weights, driven by the family's table of Hugging Face names.

Of every tensor, loading reads the part held by this process's devices, once, and distributes it to
them: files are row-major, so reading one device's columns costs as much as reading all of them. The
host holds one layer's tensor at a time (several layers' if they are small), and there is never a
second copy of the model.
"""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import DictKey
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import Config
from models.errors import UserError
from models.families import get_family
from models.family import TensorNames
from models.layers import quantised
from models.layers.quantised import is_quantised

_FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that weights may be stored in

FACTOR_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight"}

Box = tuple[tuple[int, int], ...]  # part of an array: [begin, end) on each axis

SHARD_BYTES = 5 * 10**9  # Hugging Face's usual size of a file
PIECE_BYTES = 2**22  # small layers are moved to the devices in pieces of this size


def _list_files(directory: Path) -> dict[Path, list[str]]:
    """Returns a model's files and, if there is an index, the tensors that it places in each."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return {directory / "model.safetensors": []}
    files: dict[Path, list[str]] = {}
    try:
        for name, file in sorted(json.loads(index.read_text())["weight_map"].items()):
            files.setdefault(directory / file, []).append(name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not an index of safetensors files ({error!r})") from None
    return files


@contextlib.contextmanager
def open_tensors(files: dict[Path, list[str]]) -> Iterator[dict[str, Any]]:
    """Yields tensor name -> handle with .get_shape(), .get_dtype() and slicing.

    `files` maps each file to the tensors that it must contain; others in it are included. Raises
    UserError for a missing or unreadable file or tensor.
    """
    with contextlib.ExitStack() as stack:
        slices = {}
        for file, placed in files.items():
            if not file.is_file():
                raise UserError(f"{file}: no such file")
            try:
                handle = stack.enter_context(safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: not a readable safetensors file ({error})") from None
            file_slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            absent = [name for name in placed if name not in file_slices]
            if absent:
                raise UserError(
                    f"{file}: tensor {absent[0]} is missing, which the index says it has"
                )
            slices |= file_slices
        yield slices


def check_tensors(directory: Path, slices: dict[str, Any], config: Config, shapes: Any) -> None:
    """Raises UserError for tensors that are missing, extra, misshapen or not floats; reads none."""
    expected, names = {}, get_family(config).tensor_names
    for path, leaf in _list_leaves(shapes):
        name, transposed = lookup_tensor(path, names)
        stacked = name.count("{}")
        shape = leaf.shape[stacked:]
        for place in np.ndindex(leaf.shape[:stacked]):
            expected[name.format(*place)] = list(shape[::-1] if transposed else shape)
    if config.tie_word_embeddings:  # some tied checkpoints store the head anyway
        slices.pop("lm_head.weight", None)
    for name, shape in expected.items():
        if name not in slices:
            raise UserError(f"{directory}: tensor {name} is missing")
        stored_shape = list(slices[name].get_shape())
        if stored_shape != shape:
            raise UserError(
                f"{directory}: {name} has shape {stored_shape}, config.json says {shape}"
            )
        if (stored_dtype := slices[name].get_dtype()) not in _FLOATS:
            raise UserError(
                f"{directory}: {name} is of {stored_dtype}, none of {', '.join(_FLOATS)}"
            )
    extra = sorted(set(slices) - set(expected))
    if extra:
        raise UserError(f"{directory}: tensor {extra[0]} is no part of this model")


def check_weights(directory: str | Path, config: Config, shapes: Any) -> None:
    """Raises UserError as `load` would, from the files' headers alone; reads no tensor."""
    with open_tensors(_list_files(Path(directory))) as slices:
        check_tensors(Path(directory), slices, config, shapes)


def lookup_tensor(path: tuple, names: TensorNames) -> tuple[str, bool]:
    """Returns the row of `names` for a path in the parameters, as jax.tree_util gives it.

    For a path in a single layer's subtree, "layers_3", the returned name includes the layer's
    number. LoRA's factors a and b of a kernel have PEFT's names and are stored transposed.
    """
    first, *rest = (key.key for key in path)
    if rest and rest[-1] in FACTOR_NAMES:
        stem = lookup_tensor(path[:-1], names)[0].removesuffix("weight")
        return f"base_model.model.{stem}{FACTOR_NAMES[rest[-1]]}", True
    if not first.startswith("layers_"):
        return names[first, *rest]
    name, transposed = names["layers", *rest]
    return name.replace("{}", first.removeprefix("layers_"), 1), transposed


def _group_devices_by_box(sharding: Any, shape: tuple[int, ...]) -> dict[Box, list[Any]]:
    """Maps each part of an array that this process holds to the devices that hold it."""
    parts: dict[Box, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        spans = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        parts.setdefault(tuple(spans), []).append(device)
    return parts


def _merge_boxes(boxes: Iterable[Box]) -> list[Box]:
    """Joins adjacent boxes; they must not overlap."""
    joined = list(boxes)
    for axis in reversed(range(len(joined[0]) if joined else 0)):
        lines: dict[Box, list[tuple[int, int]]] = {}
        for box in sorted(joined):
            spans = lines.setdefault((*box[:axis], *box[axis + 1 :]), [])
            if spans and spans[-1][1] == box[axis][0]:
                spans[-1] = (spans[-1][0], box[axis][1])
            else:
                spans.append(box[axis])
        joined = [(*k[:axis], s, *k[axis:]) for k, spans in lines.items() for s in spans]
    return joined


def _is_within(part: Box, box: Box) -> bool:
    return all(b[0] <= p[0] and p[1] <= b[1] for p, b in zip(part, box, strict=True))


def _count_elements(box: Box) -> int:
    return math.prod(end - begin for begin, end in box)


def _choose_layers_per_piece(
    path: tuple, shape: tuple[int, ...], sharding: Any, dtype: jnp.dtype
) -> int:
    """Returns how much of a parameter's first axis to read at a time: all of it, or of stacked
    layers as many as fit in PIECE_BYTES."""
    if path[0].key != "layers":
        return shape[0]
    bytes_per_layer = (
        sum(map(_count_elements, _group_devices_by_box(sharding, shape)))
        // shape[0]
        * dtype.itemsize
    )
    counts = (n for n in range(shape[0], 1, -1) if shape[0] % n == 0)
    return next((n for n in counts if n * bytes_per_layer <= PIECE_BYTES), 1)


@functools.cache  # so that parameters of one shape share a compilation
def _make_piece_writer(sharding: Any) -> Callable[..., jax.Array]:
    def write_piece(target: jax.Array, piece: jax.Array, first: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(target, piece, first, 0)

    return jax.jit(write_piece, donate_argnums=0, out_shardings=sharding)


def count_reads(config: Config, shapes: Any, shardings: Any) -> int:
    """Returns the number of tensor slices that `load` reads in this process."""
    count, names = 0, get_family(config).tensor_names
    for (path, leaf), sharding in zip(_list_leaves(shapes), _list_leaves(shardings), strict=True):
        stacked = lookup_tensor(path, names)[0].count("{}")
        sharding = sharding[1].values if is_quantised(leaf) else sharding[1]
        count += sum(
            _count_elements(box[:stacked])
            for box in _merge_boxes(_group_devices_by_box(sharding, leaf.shape))
        )
    return count


def _list_leaves(tree: Any) -> list[tuple[tuple, Any]]:
    """Returns (path, leaf) pairs; a quantised kernel is one leaf."""
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantised)


def _read_box(
    directory: Path,
    slices: dict[str, Any],
    names: TensorNames,
    path: tuple,
    box: Box,
    dtype: jnp.dtype,
    on_read: Callable[[], None],
) -> np.ndarray:
    """Reads a box of a parameter, with one slice of each tensor in it.

    Several tensors are stacked in `dtype`; a single one keeps its stored dtype. Raises UserError
    naming a tensor that cannot be read.
    """
    name, transposed = lookup_tensor(path, names)
    stacked = name.count("{}")
    index = tuple(slice(*span) for span in box[stacked:])
    index = index[::-1] if transposed else index
    places = list(itertools.product(*(range(*span) for span in box[:stacked])))
    shape = [end - begin for begin, end in box]
    out = None
    for i, place in enumerate(places):
        tensor = name.format(*place)
        try:
            tensor_part = slices[tensor][index]
        except SafetensorError as error:
            raise UserError(f"{directory}: {tensor} cannot be read ({error})") from None
        on_read()
        tensor_part = tensor_part.T if transposed else tensor_part
        if len(places) == 1:
            return tensor_part.reshape(shape)
        out = np.empty((len(places), *tensor_part.shape), dtype) if out is None else out
        out[i] = tensor_part
    assert out is not None
    return out.reshape(shape)


def load(
    directory: str | Path,
    config: Config,
    shapes: Any,
    shardings: Any,
    dtype: jnp.dtype,
    on_progress: Callable[[int], None] = lambda done: None,
    source: contextlib.AbstractContextManager[dict[str, Any]] | None = None,
    convert: Callable[[tuple, jax.Array], Any] | None = None,
) -> Any:
    """Reads the parameters in `directory` directly into `shardings`, cast to `dtype`.

    Args:
      directory: a model directory.
      config: the model's config.
      shapes: tree of ShapeDtypeStructs (families.get_abstract_params). A kernel for which it has a
        Quantised (quantised.quantise_shapes) is quantised on the devices as it is read, layer by
        layer: at most one layer of it exists in `dtype`.
      shardings: tree of jax shardings of the same structure.
      dtype: of the parameters that are not quantised.
      on_progress: called after each read with the number of reads so far, out of `count_reads`.
      source: result of `open_tensors` to read from instead of the files in `directory`.
      convert: (path, parameter) -> its replacement, made before the next parameter is read.

    Raises:
      UserError: names the file or tensor that is missing, extra, misshapen or unreadable.
    """
    directory, names = Path(directory), get_family(config).tensor_names
    done = itertools.count(1)
    count = lambda: on_progress(next(done))  # noqa: E731
    with source or open_tensors(_list_files(directory)) as slices:
        check_tensors(directory, slices, config, shapes)

        def read_array(
            path: tuple, shape: tuple[int, ...], sharding: Any, first: int = 0
        ) -> jax.Array:
            """Reads shape[0] layers of a stacked parameter, starting with layer `first`."""
            parts, arrays = _group_devices_by_box(sharding, shape), []
            for box in _merge_boxes(parts):
                begin, end = box[0]
                stored_box = ((first + begin, first + end), *box[1:])
                host_box = _read_box(directory, slices, names, path, stored_box, dtype, count)
                for part in (part for part in parts if _is_within(part, box)):
                    at = (slice(p - b, q - b) for (p, q), (b, _) in zip(part, box, strict=True))
                    host = np.ascontiguousarray(host_box[tuple(at)], dtype)
                    # Wait, so that the host's copy can be freed.
                    arrays += jax.block_until_ready([jax.device_put(host, d) for d in parts[part]])
            return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

        def read_param(path: tuple, shape: tuple[int, ...], sharding: Any) -> jax.Array:
            count = _choose_layers_per_piece(path, shape, sharding, dtype)
            if count == shape[0]:
                return read_array(path, shape, sharding)
            param = jnp.zeros(shape, dtype, device=sharding)
            for first in range(0, shape[0], count):
                piece = read_array(path, (count, *shape[1:]), sharding, first)
                param = jax.block_until_ready(_make_piece_writer(sharding)(param, piece, first))
            return param

        def load_leaf(path: tuple, leaf: Any, sharding: Any) -> Any:
            if not is_quantised(leaf):
                param = read_param(path, leaf.shape, sharding)
                return convert(path, param) if convert else param
            if path[0].key != "layers":
                return quantised.quantise_onto(read_param(path, leaf.shape, sharding.values), leaf)
            layer_sharding = NamedSharding(sharding.values.mesh, P(*sharding.values.spec[1:]))
            layers = ((DictKey(f"layers_{i}"), *path[1:]) for i in range(leaf.shape[0]))
            return quantised.quantise_stack(
                (read_array(at, leaf.shape[1:], layer_sharding) for at in layers), leaf
            )

        return jax.tree_util.tree_map_with_path(load_leaf, shapes, shardings, is_leaf=is_quantised)


def iter_tensors(params: Any, config: Config, dtype: jnp.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) of all stored tensors of `params`, on the host, layer by layer."""
    names = get_family(config).tensor_names
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, transposed = lookup_tensor(path, names)
        stacked = name.count("{}")
        for first in np.ndindex(leaf.shape[: min(stacked, 1)]):  # one layer at a time on the host
            host = np.asarray(leaf[first]).astype(dtype)
            for second in np.ndindex(host.shape[: stacked - len(first)]):
                tensor = host[second].T if transposed else host[second]
                yield name.format(*first, *second), np.ascontiguousarray(tensor)


def save(params: Any, config: Config, directory: Path, dtype: jnp.dtype) -> None:
    """Writes config.json and (sharded) safetensors of `params`, cast to `dtype`, to `directory`.

    transformers and vLLM can load the result once a tokenizer is added.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fields = config.to_hf() | {"dtype": jnp.dtype(dtype).name, "torch_dtype": jnp.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    shards: list[list[str]] = []
    batch: dict[str, np.ndarray] = {}
    total = 0

    def flush_shard() -> None:
        shards.append(list(batch))
        file = directory / f"shard-{len(shards)}.tmp"
        save_file(batch, file, metadata={"format": "pt"})
        file.chmod(0o644)  # safetensors makes it readable by its owner only
        batch.clear()

    for name, tensor in iter_tensors(params, config, dtype):
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > SHARD_BYTES:
            flush_shard()
        batch[name] = tensor
        total += tensor.nbytes
    flush_shard()
    if len(shards) == 1:
        (directory / "shard-1.tmp").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        (directory / f"shard-{i}.tmp").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
