"""Runs a second model family, a Llama defined here, through the whole project."""

import dataclasses
import json
import shutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill import rollout
from distill.planning import fit
from distill.policy import exporting, policy
from distill.runtime import mesh as mesh_lib
from distill.training import loop
from models import families, weights
from models.errors import UserError
from models.family import Family
from models.layers import attention, pages
from models.layers.dense import MLP, Linear, RMSNorm
from models.layers.lora import LoRA
from models.layers.rope import apply_rotary
from models.qwen3 import config as qwen3_config
from models.qwen3 import family as qwen3
from models.transformer import get_output_head
from tests.support.paths import ROOT
from tests.support.runs import config, numbers
from tests.support.tiny_models import greedy

FIELDS = {
    "vocab_size": 132,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

# The family: Qwen3's config, attention and block without the query and key norms.


@dataclasses.dataclass(frozen=True)
class Config(qwen3_config.Config):
    """A dense Qwen3 without query and key norms, which makes it a Llama."""

    @classmethod
    def from_hf(cls, fields: dict, source: str = "config.json") -> "Config":
        dense = fields | {"architectures": ["Qwen3ForCausalLM"]}
        return cls(**vars(qwen3_config.Config.from_hf(dense, source)))

    def to_hf(self) -> dict:
        return super().to_hf() | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}

    @property
    def num_parameters(self) -> int:
        return super().num_parameters - 2 * self.head_dim * self.num_hidden_layers


class Attention(nn.Module):
    config: Config
    kernel: str
    lora: LoRA | None

    @nn.compact
    def __call__(self, x_BTD, rope, segments_BT, cache, layer):
        c, (B, T, D) = self.config, x_BTD.shape

        def project_heads(name: str, count: int) -> jax.Array:
            linear = Linear(count * c.head_dim, ("embed", "heads"), self.lora, name=name)
            return linear(x_BTD).reshape(B, T, count, c.head_dim)

        q = apply_rotary(project_heads("q", c.num_attention_heads), rope)
        k = apply_rotary(project_heads("k", c.num_key_value_heads), rope)
        v = project_heads("v", c.num_key_value_heads)
        if cache is None:
            out = attention.TABLE[self.kernel](q, k, v, segments_BT)
        else:
            out, cache = cache.write_and_attend(layer, q, k, v)
        return Linear(D, ("heads", "embed"), self.lora, name="o")(out.reshape(B, T, -1)), cache


class Block(nn.Module):
    config: Any
    sparse: bool = False
    kernel: str = "xla"
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, carry, layer, rope, segments_BT, replay_BTA=None):
        x_BTD, cache = carry
        epsilon = self.config.rms_norm_eps
        attend = Attention(self.config, self.kernel, self.lora, name="attention")
        normed = RMSNorm(epsilon, name="attention_norm")(x_BTD)
        out, cache = attend(normed, rope, segments_BT, cache, layer)
        x_BTD = x_BTD + out
        normed = RMSNorm(epsilon, name="mlp_norm")(x_BTD)
        return (x_BTD + MLP(self.config, self.lora, name="mlp")(normed), cache), None


LLAMA = Family(
    architectures=("LlamaForCausalLM", "llama"),
    config_type=Config,
    block=Block,
    tensor_names={
        path: row
        for path, row in qwen3.TENSOR_NAMES.items()
        if not {"q_norm", "k_norm", "moe"} & {*path}
    },
    count_forward_flops=qwen3.count_forward_flops,
    count_cache_token_bytes=pages.count_token_bytes,
    get_sharded_sizes=qwen3.get_sharded_sizes,
    released={"meta-llama/Tiny": Config.from_hf(FIELDS | {"rope_theta": 1e4})},
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "llama", LLAMA)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a random Llama with transformers; returns its directory and the network."""
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**FIELDS, initializer_range=0.2)).float().eval()
    network.save_pretrained(directory)
    return directory, network


def load(directory, *sizes):
    c, mesh = families.read_config(directory), mesh_lib.make_mesh(*sizes)
    mesh_lib.check_divisible(c, mesh, str(directory))
    shapes = mesh_lib.make_abstract_params(c, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return c, mesh, weights.load(directory, c, shapes, shardings, jnp.dtype("float32"))


def test_an_architecture_of_no_family_is_refused(monkeypatch, written):
    monkeypatch.delitem(families.FAMILIES, "llama")
    with pytest.raises(UserError, match="'LlamaForCausalLM' is none of Qwen3ForCausalLM, qwen3"):
        families.read_config(written[0])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 1)], ids=str)
def test_logits_equal_those_of_transformers(written, sizes):
    directory, network = written
    c, mesh, params = load(directory, *sizes)
    assert type(c) is Config and c.num_parameters == sum(p.numel() for p in network.parameters())
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, c.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)

    @jax.jit
    def compute_logits(params):
        variables, ones = {"params": params}, jnp.ones_like(tokens)
        hidden, _ = families.make_model(c).apply(variables, tokens, positions, ones)
        return hidden @ get_output_head(params).T

    with mesh_lib.use_mesh(mesh), torch.no_grad():
        ours, theirs = compute_logits(params), network(torch.tensor(np.asarray(tokens))).logits
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


def test_saved_weights_equal_the_loaded_ones(written, tmp_path):
    directory, network = written
    c, _, params = load(directory, 1, 1, 1)
    weights.save(params, c, tmp_path, jnp.dtype("float32"))
    assert families.read_config(tmp_path) == c
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path)
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(("backend", "stacked"), [("slabs", False), ("plain", True)])
def test_greedy_sampling_equals_that_of_transformers(written, backend, stacked):
    directory, network = written
    c, mesh, params = load(directory, 1, 1, 1)
    prompts = [[5, 9, 77], [3, 14]]
    with mesh_lib.use_mesh(mesh):
        rows = rollout.sample(
            rollout.SamplingModel(families.make_model(c), params, ()),
            [rollout.Sequence(prompt, (0, 0), 8) for prompt in prompts],
            sampling=rollout.Sampling(temperature=0),
            options=rollout.RolloutOptions(stacked=stacked, cache_backend=backend),
        )
        assert [row.tokens for row in rows] == [greedy(network, prompt, 8) for prompt in prompts]


def test_trained_run_exports_to_transformers(tmp_path):
    """Trains two stages with sampling, exports the run and loads the export in transformers."""
    models = []
    for seed, name in enumerate(("student", "teacher")):
        directory = tmp_path / name
        weightless = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(ROOT / "assets" / "student", directory, ignore=weightless)
        fields = json.loads((directory / "config.json").read_text())
        fields |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        fields |= {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
        (directory / "config.json").write_text(json.dumps(fields))
        mesh = mesh_lib.make_mesh(1, 1, 1)
        described = policy.make_abstract(str(directory), "float32", False, mesh)
        random = policy.init_random_policy(described, jax.random.key(seed))
        weights.save(random.params, random.config, directory, jnp.dtype("float32"))
        models.append(str(directory))
    c = config(models)
    c.sft.steps = c.opd.steps = 2
    loop.run(c, tmp_path / "run")
    assert [row["step"] for row in numbers(tmp_path / "run")] == [0, 1, 2, 3]
    assert all(row["train/grad_norm"] > 0 for row in numbers(tmp_path / "run"))
    exporting.export_run(tmp_path / "run", tmp_path / "out")
    exported: Any = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    before: Any = LlamaForCausalLM.from_pretrained(models[0])
    name = "model.layers.1.self_attn.q_proj.weight"
    trained = policy.restore(
        policy.make_abstract_for_inference(str(tmp_path / "run"), "float32"), None, "float32"
    )[0]
    ours = np.asarray(trained.params["layers"]["attention"]["q"]["kernel"][1]).T
    np.testing.assert_array_equal(exported.state_dict()[name].numpy(), ours)
    assert not np.array_equal(before.state_dict()[name].numpy(), ours)


def test_planning_needs_only_the_family():
    """Counts operations and cache bytes of a released size, and refuses a mesh that does not divide
    it."""
    mesh = mesh_lib.make_mesh(1, 1, 1)
    c = fit.describe_policy("meta-llama/Tiny", "float32", False, mesh, "student").config
    assert type(c) is Config
    D, F, L, N, K, H, V = 48, 52, 3, 6, 3, 10, 132
    matrices = L * (D * H * (2 * N + 2 * K) + 3 * D * F) + D * V
    flops = families.count_forward_flops(c, 7, 5, True)
    assert flops == 7 * (2 * matrices + L * 4 * N * H * 5)
    assert families.count_cache_token_bytes(c, 1, jnp.dtype("bfloat16")) == L * 2 * K * H * 2
    with pytest.raises(UserError, match="num_key_value_heads=3 does not divide by mesh axis"):
        mesh_lib.check_divisible(c, mesh_lib.make_mesh(1, 1, 2), "here")
