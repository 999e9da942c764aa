"""Tests rotary embeddings beyond the pretraining length: YaRN and linear scaling against
transformers."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from distill import rollout
from distill.evaluation import scoring
from distill.policy import policy
from distill.runtime import mesh as mesh_lib
from models import families, transformer, weights
from models.config import RopeScaling
from models.errors import UserError
from models.layers import rope
from models.qwen3.config import SIZES, Config
from tests.support.tiny_models import tiny_qwen3

QWEN3 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
TINY = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.1,
}
VARIANTS = {
    "as Qwen3 says": QWEN3,
    "old spelling": {**QWEN3, "type": "yarn", "rope_type": None},
    "its own betas": {**QWEN3, "beta_fast": 16.0, "beta_slow": 2.0},
    "its own attention factor": {**QWEN3, "attention_factor": 1.25},
    "two mscales": {**QWEN3, "mscale": 0.7, "mscale_all_dim": 1.3},
    "one mscale": {**QWEN3, "mscale": 0.7},
    "not truncated": {**QWEN3, "truncate": False},
    "no original": {"rope_type": "yarn", "factor": 2.0},
    "factor one": {**QWEN3, "factor": 1.0},
    "narrow ramp": {**QWEN3, "original_max_position_embeddings": 8},
    "linear": {"rope_type": "linear", "factor": 3.0},
}


def fields_of(scaling, size="0.6b", **changed):
    scaling = {k: v for k, v in scaling.items() if v is not None}
    return SIZES[size].to_hf() | {"rope_parameters": None, "rope_scaling": scaling} | changed


@pytest.mark.parametrize("name", VARIANTS)
def test_frequencies_are_those_of_transformers(name):
    fields = fields_of(VARIANTS[name])
    config = Config.from_hf(fields)
    assert config.rope_scaling is not None
    theirs = Qwen3Config(**fields | {"rope_scaling": dict(fields["rope_scaling"])})
    kind = config.rope_scaling.rope_type
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    ours = rope.compute_frequencies(config)
    np.testing.assert_allclose(ours[0], inverse.double().numpy(), rtol=2e-6)
    assert ours[1] == pytest.approx(factor, rel=1e-12)
    # It survives a round trip through config.json in both spellings.
    stored = json.loads(json.dumps(config.to_hf()))
    assert Config.from_hf(stored) == config
    assert Config.from_hf(stored | {"rope_scaling": None}) == config
    assert Config.from_hf(stored | {"rope_parameters": None}) == config
    again = Qwen3Config(**stored)
    inverse_again, factor_again = ROPE_INIT_FUNCTIONS[kind](again, torch.device("cpu"))
    assert torch.equal(inverse_again, inverse) and factor_again == factor
    assert again.to_dict()["rope_parameters"]["rope_theta"] == config.rope_theta


OTHER = {
    "rope_type": "linear",
    "factor": 8.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 16.0,
    "beta_slow": 4.0,
    "attention_factor": 1.5,
    "mscale": 0.5,
    "mscale_all_dim": 2.0,
    "truncate": False,
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(RopeScaling)])
def test_every_scaling_field_has_an_effect(field):
    """Another value changes the frequencies or the attention factor."""
    other = {"attention_factor": 1.1, "mscale": 1.1, "mscale_all_dim": 0.9}
    scaling = RopeScaling("yarn", 4.0, 32768)
    if field.startswith("mscale"):  # these two count as a pair
        scaling = dataclasses.replace(scaling, mscale=1.1, mscale_all_dim=0.9)
    elif field in other:
        scaling = dataclasses.replace(scaling, attention_factor=other[field])
    changed = dataclasses.replace(scaling, **{field: OTHER[field]})
    before, after = (
        rope.compute_frequencies(dataclasses.replace(SIZES["8b"], rope_scaling=s))
        for s in (scaling, changed)
    )
    assert not np.allclose(before[0], after[0], rtol=1e-3) or before[1] != after[1]


@pytest.mark.parametrize("scaling", [None, RopeScaling("yarn", 4.0, 32768)], ids=["plain", "yarn"])
def test_angles_at_far_positions_are_accurate(scaling):
    """Checks the bound that `compute_rotary` states: a frequency and its product are each rounded
    once."""
    config = dataclasses.replace(SIZES["8b"], rope_scaling=scaling)
    rng = np.random.default_rng(0)
    positions = np.concatenate(
        [np.arange(64), [32768, 131_071, 131_072], rng.integers(0, 2**17, 500)]
    )
    cos, sin = (
        np.asarray(x)[0, :, 0] for x in rope.compute_rotary(jnp.asarray(positions)[None], config)
    )
    exact, factor = rope.compute_frequencies(config)
    angles = positions[:, None] * exact[None]
    bound = factor * (angles * 2.0**-23 + 2e-7)
    for ours, reference in ((cos, np.cos(angles)), (sin, np.sin(angles))):
        error = np.abs(ours - factor * reference)
        assert (error <= bound).all()
        assert error.max() < 0.016 * factor


@pytest.fixture(scope="module")
def stretched(tmp_path_factory):
    """Returns (directory, transformers' model) with 16 pretraining positions stretched to 64."""
    directory = tmp_path_factory.mktemp("yarn")
    fields: Any = {"head_dim": 16, "vocab_size": 128, "max_position_embeddings": 20}
    return directory, tiny_qwen3(directory, rope_parameters=dict(TINY), **fields)


def test_logits_and_decoding_beyond_the_original_positions(stretched):
    """64 tokens in one pass, then 40 tokens decoded after 24 with a cache."""
    directory, network = stretched
    config = families.read_config(directory)
    mesh = mesh_lib.make_mesh(1, 1, 1)
    abstract = mesh_lib.make_abstract_params(config, mesh)
    shardings = jax.tree.map(lambda p: p.sharding, abstract)
    params = weights.load(directory, config, abstract, shardings, jnp.dtype("float32"))
    tokens = np.random.default_rng(0).integers(0, 128, (2, 64)).astype(np.int32)
    positions = np.tile(np.arange(64, dtype=np.int32), (2, 1))
    with torch.no_grad():
        expected = network(torch.tensor(tokens)).logits.numpy()

    def logits(config):
        forward = jax.jit(families.make_model(config).apply)
        hidden, _ = forward({"params": params}, tokens, positions, np.ones_like(tokens))
        return np.asarray(hidden @ transformer.get_output_head(params).T)

    np.testing.assert_allclose(logits(config), expected, atol=1e-4, rtol=0)
    plain = logits(dataclasses.replace(config, rope_scaling=None))
    assert np.abs(plain - expected).max() > 1

    prompts = tokens[:, :24]
    with mesh_lib.use_mesh(mesh):
        rows = rollout.sample(
            rollout.SamplingModel(families.make_model(config), params, (-1,)),
            [rollout.Sequence(prompt, (0, 0), 40) for prompt in prompts.tolist()],
            sampling=rollout.Sampling(temperature=0),
            options=rollout.RolloutOptions(slots=2),
        )
        written = np.array([row.prompt + row.tokens for row in rows])
    out = torch.tensor(prompts).long()
    for _ in range(40):
        with torch.no_grad():
            best = network(out).logits[:, -1].argmax(-1, keepdim=True)
        out = torch.cat([out, best], dim=1)
    np.testing.assert_array_equal(written, out.numpy())


def test_an_export_keeps_the_scaling(stretched, tmp_path):
    directory, network = stretched
    subject = policy.make_abstract_for_inference(str(directory), "float32")
    with policy.use(subject):
        subject = policy.load(subject, "float32")
    weights.save(subject.params, subject.config, tmp_path, jnp.dtype("float32"))
    again = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, network(tokens).logits)


def test_the_position_limit_comes_from_the_scaling(stretched):
    """max_position_embeddings is often left unchanged when YaRN is turned on."""
    subject = policy.make_abstract_for_inference(str(stretched[0]), "float32")
    assert [*scoring.read_token_ids(subject, [("here", {"tokens": [1] * 64})])] == [[1] * 64]
    with pytest.raises(UserError, match="here: 65 tokens exceed the model's 64 positions"):
        scoring.read_token_ids(subject, [("here", {"tokens": [1] * 65})])
    reach = {
        name: Config.from_hf(fields_of(VARIANTS[name])).context_length
        for name in ("as Qwen3 says", "factor one", "linear")
    }
    assert reach == {"as Qwen3 says": 131_072, "factor one": 40_960, "linear": 122_880}
    assert SIZES["8b"].context_length == 40_960
