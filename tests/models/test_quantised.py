"""Tests 8-bit kernels: their numbers, cost and shardings, and a run with a quantised teacher."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import quickstart
from distill import rollout, score
from distill.batch import Batch
from distill.data import collate, dataset
from distill.policy import forward, policy
from distill.rollout import decode_weights
from distill.runtime import mesh as mesh_lib
from distill.training import loop, microbatches, setup
from models import transformer, weights
from models.errors import UserError
from models.layers import quantised
from models.layers.quantised import Quantised
from tests.support.paths import ROOT
from tests.support.tiny_models import tiny_qwen3
from tests.support.verbs import call, read, write

KINDS = tuple(quantised.MAX_VALUES)
T = 24
EVEN: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
}
EVEN |= {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
MODELS = {
    "dense": EVEN,
    "sparse": EVEN | EXPERTS | {"norm_topk_prob": True},
    "mixed": EVEN | EXPERTS | {"mlp_only_layers": [1], "norm_topk_prob": True},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Maps a model's name to its directory."""
    root = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        tiny_qwen3(root / name, **fields)
    return root


def loaded(directory, kind, sizes=(1, 1, 1, 1)):
    described = policy.make_abstract(str(directory), "float32", False, mesh_lib.make_mesh(*sizes))
    with policy.use(described):
        return policy.load(described, kind)


def batch_of(vocabulary, rows=8):
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, T)).astype(np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (rows, 1))
    ones = np.ones_like(tokens)
    tokens, positions, ones, mask = map(jnp.asarray, (tokens, positions, ones, ones > 0))
    return Batch(tokens, positions, ones, mask)


@functools.partial(jax.jit, static_argnums=0)
def log_probs(qwen3, params, batch):
    logits_BTV = (
        forward.compute_hidden(qwen3, params, batch) @ transformer.get_output_head(params).T
    )
    return jax.nn.log_softmax(logits_BTV)


def kl(reference, other):
    return np.asarray(jnp.sum(jnp.exp(reference) * (reference - other), axis=-1))


def leaves(params):
    return jax.tree.leaves(params, is_leaf=quantised.is_quantised)


# The numbers.


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_values_and_scales_match_the_definition(kind):
    kernel = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    kernel[1, :, 2] = 0
    kernel[2, 4, 3] = 1e-30
    quantised_kernel = quantised.quantise_kernel(jnp.asarray(kernel), kind)
    assert quantised_kernel.values.dtype == kind and quantised_kernel.scale.dtype == jnp.float32
    assert quantised_kernel.shape == (3, 7, 5) and quantised_kernel.scale.shape == (3, 1, 5)
    for place in np.ndindex(3, 5):
        column = kernel[place[0], :, place[1]]
        largest = max(abs(x) for x in column)
        scale = np.float32(largest / quantised.MAX_VALUES[kind]) if largest else np.float32(1)
        assert quantised_kernel.scale[place[0], 0, place[1]] == pytest.approx(scale, rel=1e-6)
        exact = column / np.asarray(quantised_kernel.scale)[place[0], 0, place[1]]
        nearest = np.rint(exact) if kind == "int8" else exact.astype(ml_dtypes.float8_e4m3fn)
        ours = np.asarray(quantised_kernel.values[place[0], :, place[1]]).astype(np.float32)
        np.testing.assert_array_equal(ours, nearest.astype(np.float32))
        assert np.abs(ours).max() == (quantised.MAX_VALUES[kind] if largest else 0)


def test_products_equal_those_of_the_dequantised_kernel():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 6, 16)).astype(np.float32)
    kernel = quantised.quantise_kernel(jnp.asarray(rng.normal(size=(16, 9)), jnp.float32), "int8")
    np.testing.assert_allclose(
        quantised.dot(jnp.asarray(x), kernel), x @ np.asarray(kernel.astype(jnp.float32)), atol=1e-5
    )
    half = quantised.dot(jnp.asarray(x, jnp.bfloat16), kernel)
    assert half.dtype == jnp.bfloat16
    rows, sizes = x.reshape(12, 16), np.array([3, 0, 7, 1])  # one row belongs to no expert
    experts = quantised.quantise_kernel(
        jnp.asarray(rng.normal(size=(4, 16, 9)), jnp.float32), "int8"
    )
    actual = quantised.ragged_dot(jnp.asarray(rows), experts, jnp.asarray(sizes))
    wide = np.asarray(experts.astype(jnp.float32))
    of_row = np.repeat(np.arange(4), sizes)
    expected = np.stack([row @ wide[e] for row, e in zip(rows[:11], of_row, strict=True)])
    np.testing.assert_allclose(actual[:11], expected, atol=1e-5)


# The cost, on the trained teacher and text of its task.

# Rounding to s = max|w|/127 leaves noise of s/√12, about 0.8% of a channel whose largest weight is
# 3.5 standard deviations; a handful of such layers in series make 2% of the logits, whose spread
# under the distribution is about 1: KL = ½ Var δ = 2e-4 nats. e4m3 has three bits of mantissa, and
# noise of 2.6%: ten times that. Each is allowed twice its noise, that is four times the KL.
BOUND = {"int8": 8e-4, "float8_e4m3fn": 8e-3}


@pytest.fixture(scope="module")
def taught():
    """Returns (teacher, batch of worked problems, mask of its tokens, its log-probabilities)."""
    teacher = loaded(ROOT / "assets" / "teacher", "float32")
    c = quickstart.get_config().opd.data
    examples = dataset.get_step_examples(
        dataset.load_source(c, teacher.tokenizer, 0, with_responses=True), 0, 32, 0
    )
    batch = collate.collate_padded(examples, 60, 52)
    where = np.asarray(batch.segments_BT) > 0
    return teacher, batch, where, log_probs(teacher.model, teacher.params, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_quantisation_costs_little_divergence_and_saves_memory(taught, kind):
    teacher, batch, where, reference = taught
    small = loaded(ROOT / "assets" / "teacher", kind)
    divergence = kl(reference, log_probs(small.model, small.params, batch))[where]
    assert 0 < divergence.mean() < BOUND[kind]
    assert divergence.max() < 100 * BOUND[kind]

    def per_tensor(path, x):
        if not quantised._is_kernel(path):
            return x
        flat = quantised.quantise_kernel(x.reshape(len(x), -1, 1), kind)
        return flat.astype(jnp.float32).reshape(x.shape)

    coarse = jax.tree_util.tree_map_with_path(per_tensor, teacher.params)
    assert divergence.mean() < kl(reference, log_probs(teacher.model, coarse, batch))[where].mean()
    for x, fine, flat in zip(*map(leaves, (teacher.params, small.params, coarse)), strict=True):
        if isinstance(fine, Quantised):
            error = [jnp.mean((x - other.astype(jnp.float32)) ** 2) for other in (fine, flat)]
            assert error[0] < error[1]
            # Bytes on the device: one per number and four per channel.
            assert fine.values.nbytes == x.size and fine.scale.nbytes == 4 * x.size // x.shape[-2]
        else:
            assert np.array_equal(x, fine)
    kernels = sum(x.values.size for x in leaves(small.params) if isinstance(x, Quantised))
    assert kernels > 0.8 * teacher.config.num_parameters
    sizes = [sum(x.nbytes for x in jax.tree.leaves(p.params)) for p in (teacher, small)]
    assert sizes[1] < 0.35 * sizes[0]


def test_int8_is_closer_than_fp8(taught):
    """In a channel without outliers, 255 even steps are finer than three bits of mantissa."""
    teacher, batch, where, reference = taught
    costs = {}
    for kind in KINDS:
        params = quantised.quantise_params(teacher.params, kind, jnp.dtype("float32"))
        costs[kind] = kl(reference, log_probs(teacher.model, params, batch))[where].mean()
    assert costs["int8"] < costs["float8_e4m3fn"]


# Shardings.


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dense", "int8"), ("dense", "float8_e4m3fn"), ("sparse", "int8"), ("mixed", "float8_e4m3fn")],
)
def test_quantised_loading_is_bitwise_the_same_on_a_mesh(directories, name, kind):
    """Loading layer by layer gives the bits of quantising the whole float model, also a second time
    and on a mesh."""
    directory = directories / name
    plain = loaded(directory, "float32")
    alone = loaded(directory, kind)
    convert = jax.jit(quantised.quantise_params, static_argnums=(1, 2))
    expected = convert(plain.params, kind, jnp.dtype("float32"))
    sparse = any(plain.config.sparse_layers)
    sizes = (1, 2, 2, 2) if sparse else (1, 2, 4, 1)
    spread = loaded(directory, kind, sizes)
    for other in (expected, spread.params):
        assert jax.tree.structure(other) == jax.tree.structure(alone.params)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, other, alone.params)))
    batch = batch_of(plain.config.vocab_size)
    reference = log_probs(alone.model, alone.params, batch)
    with policy.use(spread):
        shared = jax.device_put(batch, mesh_lib.make_row_sharding(mesh_lib.make_mesh(*sizes)))
        actual = np.asarray(log_probs(spread.model, spread.params, shared))
    np.testing.assert_allclose(actual, reference, atol=1e-5 * np.abs(reference).max(), rtol=0)
    assert np.abs(actual - log_probs(plain.model, plain.params, batch)).max() > 1e-4


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_scales_are_sharded_like_output_channels(directories, name):
    """Values have the sharding of the floats; a scale has that of its output channels."""
    spread, floats = (
        loaded(directories / name, kind, (1, 2, 2, 2)) for kind in ("int8", "float32")
    )
    at_path = dict(jax.tree_util.tree_leaves_with_path(floats.params))
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        spread.params, is_leaf=quantised.is_quantised
    ):
        if not isinstance(leaf, Quantised):
            assert path[-1].key in ("embed", "head", "router", "scale")
            assert leaf.dtype == jnp.float32 and leaf.sharding == at_path[path].sharding
            continue
        count += 1
        assert (leaf.values.dtype, leaf.scale.dtype) == (jnp.int8, jnp.float32)
        assert leaf.values.sharding == at_path[path].sharding
        values, scale = (x.addressable_shards[0].data.shape for x in (leaf.values, leaf.scale))
        assert scale == (*values[:-2], 1, values[-1])
        assert leaf.values.size == np.prod(values) * (8 if "moe" in str(path) else 4)
    assert count == 7


def test_loading_holds_one_layer_in_floats(tmp_path):
    """While loading, at most one layer's kernel and the embedding are floats, and a scoring pass
    has no copy of a stack of kernels in another dtype."""
    fields: Any = EVEN | {"hidden_size": 64, "intermediate_size": 96}
    tiny_qwen3(tmp_path, **fields)
    described = policy.make_abstract(str(tmp_path), "float32", False, mesh_lib.make_mesh(1, 1, 1))
    before = {id(x) for x in jax.live_arrays()}
    largest = 0

    def note(done):
        nonlocal largest
        fresh = [x for x in jax.live_arrays() if id(x) not in before]
        sizes = [x.size for x in fresh if x.dtype == jnp.float32 and x.ndim > 1]
        largest = max([largest, *sizes])

    shapes = quantised.quantise_shapes(described.params, "int8")
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    dtype = jnp.dtype("float32")
    params = weights.load(tmp_path, described.config, shapes, shardings, dtype, note)
    assert largest == 128 * 64  # the embedding; the largest kernel of a layer has 64 * 96
    text = log_probs.lower(described.model, params, batch_of(128)).compile().as_text()
    assert text is not None
    assert "s8[4,64,96]" in text and "f32[4,64,96]" not in text and "bf16[4,64,96]" not in text


# In runs.


def tiny_run(param_dtype):
    c = quickstart.get_config("tiny")
    c.student.path, c.teacher.path = (
        str(ROOT / "assets" / name) for name in ("student", "teacher")
    )
    c.teacher.param_dtype = param_dtype
    c.mesh.fsdp = 1
    c.opd.steps = 1
    c.opd.max_response_tokens = 16
    return c


def test_a_run_trains_with_an_int8_teacher(tmp_path, monkeypatch):
    """The divergence at the first step is within rounding of the float teacher's, and the run
    trains."""
    rows = {}
    for kind in ("float32", "int8"):
        loop.run(tiny_run(kind), tmp_path / kind)
        lines = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
        rows[kind] = [json.loads(line) for line in lines]
    first = [rows[kind][0]["train/reverse_kl"] for kind in ("float32", "int8")]
    assert first[0] != first[1] == pytest.approx(first[0], rel=0.02)
    assert all(np.isfinite(row["train/loss"]) for row in rows["int8"])
    # A run is a teacher too, and its checkpoint is never in memory in float32 as a whole.
    whole = loaded(tmp_path / "int8", "float32")
    largest = watch_floats(monkeypatch)
    again = loaded(tmp_path / "int8", "int8")
    assert sum(isinstance(x, Quantised) for x in leaves(again.params)) == 7
    expected = jax.jit(quantised.quantise_params, static_argnums=(1, 2))(
        whole.params, "int8", jnp.float32
    )
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.params, expected)))
    kernels = [
        x.size
        for x, y in zip(*map(leaves, (whole.params, again.params)), strict=True)
        if y is not x and isinstance(y, Quantised)
    ]
    assert 0 < largest() <= max(kernels) < sum(kernels) / 3


def watch_floats(monkeypatch):
    """Returns a function that gives the largest number of kernel values that were float32 at once,
    checked whenever a kernel is converted."""
    before, largest, convert = {id(x) for x in jax.live_arrays()}, [0], quantised.quantise_kernel

    def watched(*args):
        fresh = [x for x in jax.live_arrays() if id(x) not in before and x.dtype == jnp.float32]
        largest[0] = max(largest[0], sum(x.size for x in fresh if x.ndim > 2 and x.shape[-2] > 1))
        return convert(*args)

    monkeypatch.setattr(quantised, "quantise_kernel", watched)
    return lambda: largest[0]


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_an_8_bit_base_serves_sampler_and_reference(tmp_path):
    """The sampler merges the LoRA with the base that the update uses, and the reference is that
    base without the LoRA; for a fully trained student the reference is an 8-bit copy."""
    rows = {}
    for name, rank, kind in (("lora", 2, "int8"), ("whole", 0, "float8_e4m3fn")):
        c = tiny_run("float32")
        c.student.param_dtype, c.student.lora.rank = kind, rank
        c.opd.loss.reference = 0.1
        loop.run(c, tmp_path / name)
        (rows[name],) = rows_of(tmp_path / name)
        assert rows[name]["train/sampler_delta"] < 1e-4
    assert abs(rows["lora"]["train/reference_kl"]) < 1e-9
    assert 1e-5 < rows["whole"]["train/reference_kl"] < 0.05


@pytest.mark.parametrize("kind", ["", "bfloat16", "int8"])
def test_8_bit_sampling_weights_change_the_importance_ratio(tmp_path, kind):
    """The sampler's policy differs slightly from the trainer's, and importance ratios show it."""
    c = tiny_run("float32")
    c.opd.objective, c.opd.rollout.param_dtype = "opd_sampled", kind
    loop.run(c, tmp_path)
    (row,) = rows_of(tmp_path)
    delta, ratio = row["train/sampler_delta"], row["train/ratio_max"] - 1
    if kind:
        assert 1e-4 < delta < 0.1 and ratio > 1e-4
    else:
        assert delta < 1e-5 and ratio < 1e-4


def test_8_bit_sampler_equals_the_8_bit_model(directories):
    """Sampling weights quantised on a mesh equal loaded ones: log-probabilities are those of one
    forward pass on one device, and experts keep their shardings."""
    spread = loaded(directories / "sparse", "float32", (1, 2, 2, 2))
    rng = np.random.default_rng(0)
    rows = [rollout.Sequence(rng.integers(0, 128, n).tolist(), (0, n), 8) for n in (3, 9, 5, 12)]
    options = rollout.RolloutOptions(
        4, param_dtype="int8", stacked=True, cache_backend="plain", page_size=4
    )
    with policy.use(spread):
        qwen3, params = decode_weights.prepare_weights(
            spread.model,
            spread.params,
            policy.get_mesh(spread),
            stacked=True,
            gather_weights=True,
            param_dtype="int8",
        )
        done = list(
            rollout.sample(
                rollout.SamplingModel(spread.model, spread.params, ()),
                rows,
                sampling=rollout.Sampling(),
                options=options,
            )
        )
    gate = params["params"]["layers"]["moe"]["gate"]
    assert gate.values.dtype == jnp.int8 and qwen3.scan
    assert tuple(gate.values.sharding.spec) == (None, "expert", None, "tensor")
    alone = loaded(directories / "sparse", "int8")
    batch = microbatches.make_unpacked_batch(done, 4, 20)
    actual = np.asarray(log_probs(alone.model, alone.params, batch))[:, :-1]
    expected = np.take_along_axis(actual, np.asarray(batch.tokens_BT)[:, 1:, None], -1)[..., 0]
    for row, logp, mask in zip(done, expected, np.asarray(batch.mask_BT), strict=True):
        np.testing.assert_allclose(row.logprobs, logp[mask[1:]], atol=1e-4)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(
        UserError, match=r"config.teacher.param_dtype='int4': must be one of 'float32', 'bf"
    ):
        setup.setup_run(tiny_run("int4"), mesh_lib.make_mesh(1, 1, 1))
    c = tiny_run("int8")
    with pytest.raises(
        UserError, match=r"config.opd.rollout.param_dtype='int4': must be one of '', 'float32',"
    ):
        c.opd.rollout.param_dtype = "int4"
        setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))
    c.teacher.dtype = "int8"
    with pytest.raises(
        UserError, match=r"config.teacher.dtype='int8': must be one of 'float32', 'bfloat16'"
    ):
        setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))


def test_score_verb_computes_in_8_bits(taught, tmp_path):
    """Runs the verb with the dtype flag and compares its scores with those of the quantised
    model."""
    _, batch, where, reference = taught
    ids = np.asarray(batch.tokens_BT)[0][where[0]].tolist()
    rows, out = write(tmp_path / "in.jsonl", [{"tokens": ids}]), tmp_path / "out.jsonl"
    path = ROOT / "assets" / "teacher"
    flags = (f"--model={path}", f"--tokens={rows}", f"--out={out}", "--dtype=int8")
    assert call(score, *flags) == 0
    small = loaded(path, "int8")
    positions = np.flatnonzero(where[0])[:-1]
    exact, rounded = (
        np.asarray(x)[0, positions][np.arange(len(positions)), ids[1:]]
        for x in (reference, log_probs(small.model, small.params, batch))
    )
    actual = np.array(read(out)[0]["logprobs"][1:])
    np.testing.assert_allclose(actual, rounded, atol=1e-4)
    assert 1e-3 < np.abs(actual - exact).max() < 0.2
