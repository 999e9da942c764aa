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
from safetensors import SafetensorError
from safetensors.numpy import save_file

from models.config import Config
from models.errors import UserError
from models.families import get_family
from models.family import TensorNames
from models.layers import quantised
from models.layers.quantised import is_quantised
from models.tensor_files import INDEX_FILE, WHOLE_FILE, list_files, open_tensors

_FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that weights may be stored in

FACTOR_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight"}

Box = tuple[tuple[int, int], ...]  # part of an array: [begin, end) on each axis

SHARD_BYTES = 5 * 10**9  # Hugging Face's usual size of a file
COMPARED_ROWS = 8192  # read at a time of two matrices that must be equal
PIECE_BYTES = 2**22  # small layers are moved to the devices in pieces of this size


def check_tensors(directory: Path, slices: dict[str, Any], config: Config, shapes: Any) -> None:
    """Raises UserError for tensors that are missing, extra, misshapen or not floats; reads none."""
    expected, names = {}, get_family(config).tensor_names
    for name in [n for n in slices if n.endswith("rotary_emb.inv_freq")]:
        del slices[name]  # old checkpoints have these constants
    for path, leaf in _list_leaves(shapes):
        name, transposed = lookup_tensor(path, names)
        stacked = name.count("{}")
        shape = leaf.shape[stacked:]
        for place in np.ndindex(leaf.shape[:stacked]):
            expected[name.format(*place)] = list(shape[::-1] if transposed else shape)
    if config.tie_word_embeddings:  # some tied checkpoints store the head as well, or instead
        embed, head = _name_ends(config)
        if head in slices:
            slices[embed] = slices.get(embed) or slices[head]
            del slices[head]
    for name, shape in expected.items():
        if name not in slices:
            bare = name.removeprefix("model.")
            remedy = f"; {bare} is there: load it with AutoModelForCausalLM and save_pretrained"
            raise UserError(
                f"{directory}: tensor {name} is missing{remedy if bare in slices else ''}"
            )
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


def _require_tied_head(directory: Path, slices: dict[str, Any], config: Config) -> None:
    """Raises UserError if a tied model stores a head that is not its embedding.

    transformers 5 would then use both, and other readers the embedding alone.
    """
    embed, head = (slices.get(name) for name in _name_ends(config))
    if not config.tie_word_embeddings or embed is None or head is None:
        return
    shape = list(embed.get_shape())
    starts = range(0, shape[0], COMPARED_ROWS) if list(head.get_shape()) == shape else ()
    spans = [slice(start, min(start + COMPARED_ROWS, shape[0])) for start in starts]
    if not spans or not all(np.array_equal(embed[rows], head[rows]) for rows in spans):
        names = " differs from ".join(_name_ends(config)[::-1])
        raise UserError(
            f"{directory}: config.json says tie_word_embeddings, but {names}; set it to false to "
            "use both, or remove the head"
        )


def _name_ends(config: Config) -> tuple[str, str]:
    """Returns the names of the embedding and the head."""
    names = get_family(config).tensor_names
    return names["embed",][0], names["head",][0]


def check_weights(directory: str | Path, config: Config, shapes: Any) -> None:
    """Raises UserError as `load` would, from the files' headers alone; reads no tensor.

    Only `load` compares the head of a tied model with its embedding.
    """
    with open_tensors(list_files(Path(directory))) as slices:
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
    with source or open_tensors(list_files(directory)) as slices:
        _require_tied_head(directory, slices, config)
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
        (directory / "shard-1.tmp").rename(directory / WHOLE_FILE)
        return
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        (directory / f"shard-{i}.tmp").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
