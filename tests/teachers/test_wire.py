"""Outputs of teachers that are not run here, and the bytes that carry them."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from distill.teachers import outputs, wire
from distill.teachers.outputs import InvalidOutput, ResponseOutput

V, E, K = 11, 4, 3


def make_output(n: int, seed: int = 0, dtype=ml_dtypes.bfloat16) -> ResponseOutput:
    """Makes the output of a random distribution over V tokens."""
    rng = np.random.default_rng(seed)
    logits_nV = rng.normal(size=(n, V))
    logp_nV = logits_nV - np.log(np.exp(logits_nV).sum(1, keepdims=True))
    ids_nK = np.argsort(-logp_nV, axis=1)[:, :K].astype(np.int32)
    return ResponseOutput(
        logp=logp_nV[:, 0].astype(np.float32),
        top_ids=ids_nK,
        top_logp=np.take_along_axis(logp_nV, ids_nK, 1).astype(np.float32),
        hidden=rng.normal(size=(n, E)).astype(dtype),
    )


def change(output: ResponseOutput, name: str, place: tuple, value: float) -> ResponseOutput:
    array = getattr(output, name).copy()
    array[place] = value
    return dataclasses.replace(output, **{name: array})


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("names", [("logp",), ("top_ids", "top_logp"), ("logp", "hidden")])
def test_outputs_survive_the_wire_bit_for_bit(names, dtype):
    sent = [
        ResponseOutput(**{name: getattr(make_output(n, n, dtype), name) for name in names})
        for n in (5, 1, 8)
    ]
    data = wire.encode_outputs(sent, {"model": "x", "step": "3"})
    received, metadata = wire.decode_outputs(data, V)
    assert metadata == {"model": "x", "step": "3"}
    assert [x.num_tokens for x in received] == [5, 1, 8]
    for a, b in zip(sent, received, strict=True):
        assert a.get_fields().keys() == b.get_fields().keys() == set(names)
        for name, array in a.get_fields().items():
            assert b.get_fields()[name].dtype == array.dtype
            assert b.get_fields()[name].tobytes() == array.tobytes()


def test_bytes_cut_anywhere_are_refused():
    data = wire.encode_outputs([make_output(3), make_output(2, 1)], {"model": "x"})
    for size in range(len(data)):
        with pytest.raises(InvalidOutput, match="cut short"):
            wire.decode_outputs(data[:size], V)
    with pytest.raises(InvalidOutput, match="cut short"):
        wire.decode_outputs(data + b"\0", V)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"logp": np.zeros(3, np.float32)}, "no lengths"),
        ({"logp": np.zeros(3, np.float32), "lengths": np.array([4], np.int32)}, "lengths say 4"),
        ({"logp": np.zeros(3, np.float32), "lengths": np.array([4, -1], np.int32)}, "no lengths"),
        ({"logp": np.zeros(3, np.float64), "lengths": np.array([3], np.int32)}, "logp is F64"),
        ({"logp": np.zeros(3, np.int32), "lengths": np.array([3], np.int32)}, "logp is int32"),
        ({"lengths": np.array([3], np.int32)}, "has none of"),
        (
            {"x": np.zeros(3, np.float32), "lengths": np.array([3], np.int32)},
            "unknown tensor 'x'",
        ),
        (
            {"top_ids": np.zeros((3, 1), np.int32), "lengths": np.array([3], np.int32)},
            "without the other",
        ),
    ],
)
def test_other_tensors_are_refused(tensors, message):
    with pytest.raises(InvalidOutput, match=message):
        wire.decode_outputs(save(tensors), V)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("logp", (2,), np.nan, "logp is not finite at token 2"),
        ("logp", (1,), 0.1, "logp is above 0 at token 1"),
        ("top_logp", (0, 1), -np.inf, "top_logp is not finite at token 0"),
        ("top_logp", (3, 2), -0.001, "does not begin with the likeliest at token 3"),
        ("top_logp", (3, slice(None)), -0.5, "sum above 1 at token 3"),
        ("top_ids", (1, 0), V, f"outside the vocabulary of {V} at token 1"),
        ("top_ids", (1, 0), -1, f"outside the vocabulary of {V} at token 1"),
        ("top_ids", (2, slice(None)), 5, "an id twice at token 2"),
        ("hidden", (4, 1), np.inf, "hidden is not finite at token 4"),
    ],
)
def test_values_that_cannot_be_right_are_named(name, place, value, message):
    good = make_output(5)
    outputs.check_output(good, 5, V, hidden_size=E, top_k=K)
    bad = change(good, name, place, value)
    with pytest.raises(InvalidOutput, match=message):
        outputs.check_output(bad, 5, V)
    with pytest.raises(InvalidOutput, match=f"output 1 .*{message}"):
        wire.decode_outputs(wire.encode_outputs([make_output(5, 1), bad], {}), V)


def test_other_sizes_are_refused():
    output = make_output(5)
    for arguments, message in (
        ((4, V), "is of 5 tokens, the response has 4"),
        ((5, V, E + 1), r"hidden has the shape \[5, 4\], not \[5, 5\]"),
        ((5, V, E, K + 1), "has the 3 likeliest tokens, not 4"),
    ):
        n, vocab_size, *sizes = arguments
        options = dict(zip(("hidden_size", "top_k"), sizes, strict=False))
        with pytest.raises(InvalidOutput, match=message):
            outputs.check_output(output, n, vocab_size, **options)
    without = dataclasses.replace(output, hidden=None, top_ids=None, top_logp=None)
    with pytest.raises(InvalidOutput, match="hidden has the shape None"):
        outputs.check_output(without, 5, V, hidden_size=E)
    with pytest.raises(InvalidOutput, match="no top_ids"):
        outputs.check_output(without, 5, V, top_k=1)
    with pytest.raises(InvalidOutput, match="different numbers of tokens"):
        dataclasses.replace(output, logp=np.zeros(4, np.float32))
