"""The files of stored scores: what `score --output` writes and a teacher's path may name.

    scores.json               what was scored, by which model, and the shards
    head.safetensors          for hidden states: the model's output head, `head_VE`
    tokenizer/                the model's, to compare with a student's
    shard-00000.safetensors   outputs of responses, in the form of `wire`, with two more tensors:
                              keys, int32 [R, 4], a hash of each prompt and response; and checksums,
                              int32 [R, fields], the CRC-32 of each response's bytes in each field

A shard's index is all of it but the fields themselves: its header, lengths, keys and checksums.
scores.json has the index's SHA-256, and the index has checksums of the rest. So a reader knows
every byte to be as written without reading a whole shard for one response.
"""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
from etils import epath

from distill.runtime import addresses, paths, run_files
from distill.teachers import wire
from distill.teachers.outputs import FIELD_DTYPES, InvalidOutput, ResponseOutput
from models.errors import SourceFailure, UserError

FORMAT = 1
MANIFEST, HEAD_FILE, TOKENIZER_DIR = "scores.json", "head.safetensors", "tokenizer"
KEYS, CHECKSUMS = "keys", "checksums"
KEY_BYTES = 16
REMEDY = "the same call of score writes it again"
THREADS = 16  # that read files: a request to a bucket takes tens of milliseconds
_INDEX_TENSORS = (wire.LENGTHS, KEYS, CHECKSUMS)
_MAX_HEADER = 2**20  # of a shard, whose few tensors need less than a thousand bytes


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was scored, and how. A job that goes on must have the same; paths may differ."""

    model: str
    model_hash: str  # identity.hash_parts of its files
    tokenizer_hash: str  # and of its tokenizer's; "": it has none
    step: int  # of a run's checkpoint; -1: no run
    rows: str
    rows_hash: str  # of the keys of all responses, in order
    output: str  # a key of outputs.OUTPUT_FIELDS; log-probabilities are always there
    top_k: int
    dtype: str  # of activations, and so of hidden states
    param_dtype: str
    vocab_size: int
    hidden_size: int
    responses: int  # to score, each distinct one once
    tokens: int  # of those responses


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of outputs."""

    file: str
    bytes: int
    responses: int
    tokens: int
    index_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of scores.json."""

    settings: Settings
    head_hash: str  # wire.hash_head; "": no head is stored
    shards: tuple[Shard, ...] = ()

    @property
    def is_complete(self) -> bool:
        return sum(shard.responses for shard in self.shards) == self.settings.responses


@dataclasses.dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the responses of a shard are in its file."""

    file: str
    keys: list[bytes]
    lengths_R: np.ndarray  # int32: tokens
    starts_R: np.ndarray  # int64: tokens before
    checksums: dict[str, np.ndarray]  # of each field, uint32 [R]
    fields: dict[str, tuple[int, np.dtype, int]]  # place in the file, dtype, numbers of a token

    def read_output(
        self, directory: epath.Path, number: int, names: Iterable[str]
    ) -> ResponseOutput:
        """Reads the fields `names` of a response.

        Raises:
          SourceFailure: if they were altered, so that a run stops at a checkpoint.
        """
        path = directory / self.file
        n, start = int(self.lengths_R[number]), int(self.starts_R[number])
        arrays = {}
        with path.open("rb") as file:
            for name in names:
                place, dtype, width = self.fields[name]
                data = _read_at(file, place + start * width * dtype.itemsize, n * width, dtype)
                is_whole = len(data) == n * width * dtype.itemsize
                if not is_whole or zlib.crc32(data) != self.checksums[name][number]:
                    raise SourceFailure(
                        f"{path}: {name} of its response {number} was altered since it was "
                        f"written, or cut short; delete it, and {REMEDY}"
                    )
                shape = (n,) if name == "logp" else (n, width)
                arrays[name] = np.frombuffer(data, dtype).reshape(shape)
        return ResponseOutput(**arrays)


def _read_at(file: BinaryIO, place: int, count: int, dtype: np.dtype) -> bytes:
    file.seek(place)
    return file.read(count * dtype.itemsize)


def is_stored(path: str) -> bool:
    """Returns True if `path` names a directory of stored scores."""
    if not path or addresses.is_url(path):
        return False
    return (epath.Path(path) / MANIFEST).is_file()


def hash_response(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """Returns the key of a response after a prompt, KEY_BYTES long."""
    ids = np.array([len(prompt), *prompt, *response], "<i4")
    return hashlib.sha256(ids.tobytes()).digest()[:KEY_BYTES]


def count_bytes_per_token(settings: Settings) -> int:
    """Returns the bytes of a token in the shards. A response has 24 to 32 more, of its index."""
    logp = 4
    if settings.output == "top":
        return logp + 8 * settings.top_k
    if settings.output == "hidden":
        return logp + np.dtype(FIELD_DTYPES["hidden"][settings.dtype == "float32"]).itemsize * (
            settings.hidden_size
        )
    return logp


def name_shard(number: int) -> str:
    return f"shard-{number:05}.safetensors"


def write_shard(
    directory: epath.Path, number: int, keys: Sequence[bytes], outputs: Sequence[ResponseOutput]
) -> Shard:
    """Writes a shard, atomically."""
    names = list(outputs[0].get_fields())
    checksums = [[zlib.crc32(x.get_fields()[name].tobytes()) for name in names] for x in outputs]
    tables = {
        KEYS: np.frombuffer(b"".join(keys), "<i4").reshape(len(keys), -1),
        CHECKSUMS: np.array(checksums, np.uint32).view(np.int32),
    }
    data = wire.encode_outputs(outputs, {"fields": " ".join(names)}, tables)
    header, begin = _parse_header(data, len(data))
    digest = hashlib.sha256(data[:begin])
    for name in _INDEX_TENSORS:
        first, last = header[name]["data_offsets"]
        digest.update(data[begin + first : begin + last])
    file = name_shard(number)
    paths.write_bytes(directory / file, data)
    tokens = sum(x.num_tokens for x in outputs)
    return Shard(file, len(data), len(outputs), tokens, digest.hexdigest())


def _parse_header(start: bytes, size: int) -> tuple[dict[str, Any], int]:
    """Returns a safetensors file's header, and where it ends. Raises ValueError if it has none."""
    end = 8 + int.from_bytes(start[:8], "little")
    if not 8 < end <= min(size, 8 + _MAX_HEADER):
        raise ValueError("no header of a shard")
    return json.loads(start[8:end]), end


def read_index(directory: epath.Path, shard: Shard) -> ShardIndex:
    """Reads a shard's index.

    Raises:
      UserError: if the file is missing, cut short or altered.
    """
    path = directory / shard.file
    if not path.is_file():
        raise UserError(f"{path}: no such file, which {MANIFEST} names; {REMEDY}")
    size = path.stat().length
    if size != shard.bytes:
        raise UserError(f"{path}: has {size:,} bytes, {shard.bytes:,} were written; {REMEDY}")
    try:
        with path.open("rb") as file:
            index, digest = parse_index(file, size, shard.file)
    except InvalidOutput:
        index, digest = None, ""
    if index is None or digest != shard.index_sha256 or len(index.keys) != shard.responses:
        raise UserError(f"{path}: its index was altered since it was written; {REMEDY}")
    return index


def parse_index(file: BinaryIO, size: int, name: str) -> tuple[ShardIndex, str]:
    """Returns the index of a shard of `size` bytes, and the index's SHA-256.

    Raises:
      InvalidOutput: if it is none.
    """
    try:
        start = file.read(8)
        start += file.read(min(int.from_bytes(start, "little"), _MAX_HEADER))
        header, begin = _parse_header(start, size)
        metadata, spans = header.pop("__metadata__"), {}
        for tensor, about in header.items():
            dtype, shape = np.dtype(wire.DTYPES[about["dtype"]]), tuple(about["shape"])
            first, last = about["data_offsets"]
            if not all(type(x) is int and x >= 0 for x in (first, last, *shape)):
                raise ValueError(f"{tensor} is at {first}:{last}")
            if last > size - begin or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{tensor} is not within the file")
            spans[tensor] = begin + first, dtype, shape
        digest, tables = hashlib.sha256(start), {}
        for tensor in _INDEX_TENSORS:
            place, dtype, shape = spans[tensor]
            data = _read_at(file, place, math.prod(shape), dtype)
            digest.update(data)
            tables[tensor] = np.frombuffer(data, dtype).reshape(shape)
        index = _make_index(name, tables, spans, metadata["fields"].split())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidOutput(f"no index of a shard ({error!r})") from None
    return index, digest.hexdigest()


def _make_index(
    file: str, tables: dict[str, np.ndarray], spans: dict[str, tuple], names: list[str]
) -> ShardIndex:
    """Makes an index of its tensors, and of (place, dtype, shape) of all. Raises ValueError if they
    contradict each other."""
    lengths, checksums = tables[wire.LENGTHS], tables[CHECKSUMS]
    R, ends = len(lengths), np.cumsum(lengths, dtype=np.int64)
    is_sound = (
        set(names) <= FIELD_DTYPES.keys()
        and all(table.dtype == np.int32 for table in tables.values())
        and lengths.ndim == 1
        and bool((lengths >= 0).all())
        and tables[KEYS].shape == (R, KEY_BYTES // 4)
        and checksums.shape == (R, len(names))
        and all(spans[name][2][0] == ends[-1] for name in names)
        and all(len(spans[name][2]) == (1 if name == "logp" else 2) for name in names)
    )
    if not is_sound:
        raise ValueError("its tensors contradict each other")
    keys = tables[KEYS].tobytes()
    fields = {name: (*spans[name][:2], math.prod(spans[name][2][1:])) for name in names}
    return ShardIndex(
        file,
        [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)],
        lengths,
        ends - lengths,
        dict(zip(names, checksums.view(np.uint32).T, strict=True)),
        fields,
    )


def write_manifest(directory: epath.Path, manifest: Manifest) -> None:
    shards = [dataclasses.asdict(shard) for shard in manifest.shards]
    settings = dataclasses.asdict(manifest.settings)
    head = {"head_hash": manifest.head_hash}
    content = {"format": FORMAT, **settings, **head, "is_complete": manifest.is_complete}
    run_files.write_json(directory / MANIFEST, {**content, "shards": shards})


def read_manifest(directory: epath.PathLike) -> Manifest:
    """Reads scores.json of a directory, complete or not.

    Raises:
      UserError: if it is missing, damaged or of another version.
    """
    path = epath.Path(directory) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise UserError(
                f"{path}: has the format {content['format']!r}, this version reads {FORMAT}"
            )
        shards = tuple(_parse(Shard, shard) for shard in content["shards"])
        manifest = Manifest(_parse(Settings, content), str(content["head_hash"]), shards)
        _check_manifest(manifest)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a list of stored scores ({error!r})") from None
    return manifest


T = TypeVar("T")


def _parse(cls: type[T], content: Any) -> T:
    """Makes a dataclass of texts and counts. Raises ValueError for a value of another type."""
    values = {}
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        value = values[field.name] = content[field.name]
        if type(value) is not field.type or (field.type is int and value < -1):
            raise ValueError(f"{field.name} is {value!r}")
    return cls(**values)


def _check_manifest(manifest: Manifest) -> None:
    """Raises ValueError for what `write_manifest` would not write."""
    settings = manifest.settings
    if settings.output not in ("token", "top", "hidden") or not settings.vocab_size > 0:
        raise ValueError(f"output={settings.output}, vocab_size={settings.vocab_size}")
    for number, shard in enumerate(manifest.shards):
        if shard.file != name_shard(number):
            raise ValueError(f"shard {number} is {shard.file!r}")
    if sum(shard.responses for shard in manifest.shards) > settings.responses:
        raise ValueError("shards have more responses than were to be scored")


def write_head(directory: epath.Path, head_VE: np.ndarray) -> None:
    paths.write_bytes(directory / HEAD_FILE, wire.encode_head(head_VE))


def read_head(directory: epath.Path, manifest: Manifest) -> np.ndarray:
    """Reads the head. Raises UserError if it is missing, cut short or altered."""
    path, settings = directory / HEAD_FILE, manifest.settings
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        sizes = settings.vocab_size, settings.hidden_size
        return wire.decode_head(data, *sizes, manifest.head_hash)
    except InvalidOutput as error:
        raise UserError(f"{path}: {error}") from None
