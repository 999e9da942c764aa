"""The bytes that carry teachers' outputs: over HTTP, and in the files of stored scores.

They are a safetensors file, which needs no code to be run and which other programs can read. Its
tensors are `lengths`, int32 [R], the number of tokens of each of R responses, and the fields of
`ResponseOutput`, each with the tokens of all responses one after another. Its metadata are texts.
An output head is such a file too, with the one tensor `head_VE`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save

from distill.teachers.outputs import FIELD_DTYPES, InvalidOutput, ResponseOutput, check_output

LENGTHS, HEAD = "lengths", "head_VE"
DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "I32": np.int32}


def encode_outputs(
    outputs: Sequence[ResponseOutput],
    metadata: Mapping[str, str],
    tables: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    """Encodes outputs that all have the same fields, dtypes and widths.

    tables: further tensors, for a reader that knows them.
    """
    names = list(outputs[0].get_fields())
    assert all(list(x.get_fields()) == names for x in outputs)
    tensors = {name: np.concatenate([x.get_fields()[name] for x in outputs]) for name in names}
    assert all(tensors[name].dtype == outputs[0].get_fields()[name].dtype for name in names)
    tensors[LENGTHS] = np.array([x.num_tokens for x in outputs], np.int32)
    return save(tensors | dict(tables or {}), dict(metadata))


def decode_outputs(
    data: bytes, vocab_size: int, *, hidden_size: int = 0, top_k: int = 0
) -> tuple[list[ResponseOutput], dict[str, str]]:
    """Returns the outputs of `encode_outputs`, in order, and its metadata.

    Args:
      vocab_size, hidden_size, top_k: as for `outputs.check_output`, which checks each output.

    Raises:
      InvalidOutput: if the bytes are cut short or damaged, or an output cannot be right.
    """
    tensors, metadata = decode_tensors(data)
    lengths = tensors.pop(LENGTHS, None)
    if lengths is None or lengths.ndim != 1 or lengths.dtype != np.int32 or (lengths < 0).any():
        raise InvalidOutput(f"no {LENGTHS} of responses among its tensors {sorted(tensors)}")
    whole = make_output(tensors)
    if whole.num_tokens != lengths.sum(dtype=np.int64):
        raise InvalidOutput(
            f"has {whole.num_tokens} tokens, {LENGTHS} say {lengths.sum(dtype=np.int64)}"
        )
    ends = np.cumsum(lengths, dtype=np.int64)
    outputs = [
        make_output({name: x[end - length : end] for name, x in tensors.items()})
        for end, length in zip(ends, lengths, strict=True)
    ]
    for number, output in enumerate(outputs):
        try:
            check_output(
                output, int(lengths[number]), vocab_size, hidden_size=hidden_size, top_k=top_k
            )
        except InvalidOutput as error:
            raise InvalidOutput(f"output {number} {error}") from None
    return outputs, metadata


def make_output(tensors: Mapping[str, np.ndarray]) -> ResponseOutput:
    """Makes an output of its fields by name. Raises InvalidOutput for others."""
    unknown = sorted(tensors.keys() - FIELD_DTYPES.keys())
    if unknown:
        raise InvalidOutput(f"has the unknown tensor {unknown[0]!r}")
    return ResponseOutput(**tensors)


def decode_tensors(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and metadata of a safetensors file; bfloat16 is ml_dtypes'.

    Raises:
      InvalidOutput: if it is none, is cut short, or has another dtype than outputs have.
    """
    try:
        parts = safetensors.deserialize(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise InvalidOutput(f"not safetensors, or cut short ({error})") from None
    tensors = {}
    for name, part in parts:
        if part["dtype"] not in DTYPES:
            raise InvalidOutput(f"{name} is {part['dtype']}, not one of {', '.join(DTYPES)}")
        values = np.frombuffer(part["data"], DTYPES[part["dtype"]])
        tensors[name] = values.reshape(part["shape"])
    return tensors, header.get("__metadata__", {})


def hash_head(head_VE: np.ndarray) -> str:
    """Returns the SHA-256 of a head's bytes, 64 hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(head_VE).reshape(-1).view(np.uint8).data).hexdigest()


def encode_head(head_VE: np.ndarray) -> bytes:
    return save({HEAD: np.ascontiguousarray(head_VE)})


def decode_head(data: bytes, vocab_size: int, hidden_size: int, head_hash: str) -> np.ndarray:
    """Returns the head [V, E] of `encode_head`.

    Raises:
      InvalidOutput: if the bytes are cut short, or the head has another shape or hash.
    """
    tensors, _ = decode_tensors(data)
    if tensors.keys() != {HEAD}:
        raise InvalidOutput(f"not a head: its tensors are {sorted(tensors)}")
    head_VE = tensors[HEAD]
    if head_VE.shape != (vocab_size, hidden_size):
        expected = [vocab_size, hidden_size]
        raise InvalidOutput(f"{HEAD} has the shape {list(head_VE.shape)}, not {expected}")
    if hash_head(head_VE) != head_hash:
        raise InvalidOutput(f"{HEAD} is another head, or was altered (its hash differs)")
    return head_VE
