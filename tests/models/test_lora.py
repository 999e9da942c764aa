"""Tests LoRA and rsLoRA against peft: training, saving and loading adapters in both directions."""

import dataclasses
import functools
import json
import math
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import Qwen3ForCausalLM

from configs import base
from distill import export, generate, score
from distill.batch import Batch
from distill.objectives import losses
from distill.policy import exporting, policy
from distill.runtime import mesh as mesh_lib
from distill.training import loop, optim, setup, update
from models import adapter, families, tensor_files, transformer, weights
from models.errors import UserError
from models.layers import quantised
from models.layers.lora import TARGETS, LoRA
from models.qwen3.config import SIZES
from tests.support.loading import counted
from tests.support.paths import ROOT
from tests.support.runs import config, numbers, stop_after, tiny_model
from tests.support.tiny_models import greedy, logprobs, tiny_qwen3
from tests.support.updates import one_update
from tests.support.verbs import call, read, verb_module, write

evaluate = verb_module("evaluate")

pytestmark = [
    # peft calls transformers through an interface that is about to be removed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # It looks up the rank of the experts' gate and up in modules, but they are parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]

T = 17
FLOAT = jnp.dtype("float32")
EXPERTS: dict[str, Any] = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}
# Shapes that the meshes below divide evenly.
EVEN: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
PLAIN = LoRA(3, 6.0, rslora=False, targets=TARGETS)
STABLE = LoRA(5, 3.0, rslora=True, targets=("q_proj", "o_proj", "down_proj"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Returns a directory and its network for an untied, a tied and a sparse model."""
    root = tmp_path_factory.mktemp("bases")
    kinds: dict[str, dict[str, Any]] = {
        "untied": {"num_hidden_layers": 2},
        "tied": {"num_hidden_layers": 2, "tie_word_embeddings": True},
        "sparse": EXPERTS | {"num_hidden_layers": 2},
    }
    return {name: (root / name, tiny_qwen3(root / name, **k)) for name, k in kinds.items()}


def make_policy(path, kind=None, sizes=(1, 1, 1)) -> policy.Policy:
    return policy.make_abstract(
        str(path), "float32", False, mesh_lib.make_mesh(*sizes), lora_config=kind
    )


def tokens_of(config, rows=4, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, T)).astype(np.int32)


def batch_of(config, seed=0, rows=4) -> Batch:
    """Makes rows of unequal lengths, the first three tokens of each being the prompt."""
    lengths = np.resize(np.array([T, 9, 12, 6]), rows)[:, None]
    segments = (np.arange(T)[None] < lengths).astype(np.int32)
    positions = np.tile(np.arange(T, dtype=np.int32), (rows, 1))
    arrays: Any = (tokens_of(config, rows, seed), positions, segments, segments > 0)
    batch = Batch(*arrays)
    return dataclasses.replace(batch, mask_BT=batch.mask_BT & (np.arange(T)[None] >= 3))


@functools.partial(jax.jit, static_argnums=0)
def logits(qwen3, variables, tokens):
    positions = jnp.tile(jnp.arange(tokens.shape[1]), (tokens.shape[0], 1))
    hidden, _ = qwen3.apply(variables, tokens, positions, jnp.ones_like(tokens))
    return jnp.einsum("BTD,VD->BTV", hidden, transformer.get_output_head(variables["params"]))


def transformers_logits(network, tokens):
    with torch.no_grad():
        return network(torch.tensor(tokens)).logits.numpy()


def add_noise(tree, seed=1):
    """Adds noise to the factors, so that b is not zero and all of them have gradients."""
    rng = np.random.default_rng(seed)
    draw = lambda x: (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(draw(np.asarray(x)), x.sharding), tree)


def load_with_lora(path, kind, sizes=(1, 1, 1)) -> tuple[policy.Policy, Any]:
    """Loads a base and initialises a LoRA to train on it."""
    student = policy.load(make_policy(path, kind, sizes), "float32")
    return student, add_noise(policy.load_or_init_lora(student, jax.random.key(3)))


def save_and_load_in_peft(student, trained, path, network):
    """Saves the LoRA as an adapter and loads it into a copy of `network` with peft."""
    assert student.model.lora is not None
    name = str(student.path)
    adapter.save(trained, student.model.lora, student.config, name, path, FLOAT)
    fresh = type(network).from_pretrained(student.path)
    return PeftModel.from_pretrained(fresh, path, is_trainable=True)


@pytest.mark.parametrize(("kind", "name"), [(PLAIN, "untied"), (STABLE, "tied")])
def test_training_equals_peft(bases, kind, name, tmp_path):
    """The same weights, data and three steps of AdamW give the same losses and the same adapter."""
    path, network = bases[name]
    student, trained = load_with_lora(path, kind)
    before = jax.tree.map(np.array, student.params)
    first = dict(weights.iter_tensors(trained, student.config, FLOAT))
    other = save_and_load_in_peft(student, trained, tmp_path, network).float()
    c = base.make_stage("sft")
    c.optim.learning_rate, c.optim.schedule, c.optim.warmup_steps = 1e-2, "constant", 0
    c.optim.eps, c.optim.weight_decay, c.optim.clip_norm = 1e-5, 0.1, 0.5
    optimizer = optim.make_optimizer(c.optim, 3)
    learned = [p for p in other.parameters() if p.requires_grad]
    decay = {"lr": 1e-2, "betas": (c.optim.b1, c.optim.b2), "eps": 1e-5, "weight_decay": 0.1}
    their_optimizer = torch.optim.AdamW(learned, **decay)
    with policy.use(student):
        state = update.init_train_state(optimizer, trained, 0)
        options = update.UpdateOptions(1, 1.0)
        programs = update.make_update(
            student.model, optimizer, losses.OBJECTIVES["sft"], options, state
        )
        for i in range(3):
            batch = batch_of(student.config, i)
            state, measured, _ = one_update(programs, state, batch, student.params, 2)
            # Cross-entropy over trained tokens; padding is masked.
            out = other(
                torch.tensor(batch.tokens_BT), attention_mask=torch.tensor(batch.segments_BT)
            ).logits.log_softmax(-1)
            targets = torch.tensor(batch.tokens_BT[:, 1:]).long()[..., None]
            logp = out[:, :-1].gather(-1, targets)[..., 0]
            loss = -logp[torch.tensor(batch.mask_BT[:, 1:])].mean()
            their_optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 0.5)
            their_optimizer.step()
            assert float(measured["loss"]) == pytest.approx(loss.item(), abs=1e-4)
    other.save_pretrained(tmp_path / "after")
    expected = load_file(tmp_path / "after" / adapter.TENSORS_FILE)
    ours = dict(weights.iter_tensors(state.params, student.config, FLOAT))
    assert ours.keys() == expected.keys()
    assert len(ours) == 2 * 2 * len(kind.targets)
    for tensor, value in expected.items():
        np.testing.assert_allclose(ours[tensor], value, atol=1e-4, rtol=0, err_msg=tensor)
        assert np.abs(first[tensor] - value).max() > 0.01, "the adapter has not moved"
    same = jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, student.params))
    assert all(jax.tree.leaves(same)), "the base has moved"
    # Only the LoRA has moments.
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(state.params))


CASES = [
    ("untied", PLAIN),
    ("tied", STABLE),
    ("sparse", PLAIN),
    ("sparse", STABLE),  # adapts only the experts' down projection, with rsLoRA
    ("sparse", LoRA(2, 5.0, rslora=True, targets=("k_proj", "up_proj"))),
    ("sparse", LoRA(2, 5.0, rslora=True, targets=("v_proj",))),
]


@pytest.mark.parametrize(("name", "kind"), CASES, ids=str)
def test_adapter_round_trip_keeps_the_logits(bases, name, kind, tmp_path):
    """Four routes to the same logits: LoRA beside its base, merged, in peft, and loaded again."""
    path, network = bases[name]
    student, trained = load_with_lora(path, kind)
    tokens = tokens_of(student.config)
    ours = logits(student.model, {"params": student.params, "lora": trained}, tokens)
    plain = logits(student.model, {"params": student.params}, tokens)
    assert np.abs(ours - plain).max() > 0.1
    merged = policy.make_sampler_params_fn(student)(trained)
    actual = logits(student.model, {"params": merged}, tokens)
    np.testing.assert_allclose(actual, ours, atol=1e-5 * np.abs(ours).max(), rtol=0)
    other = save_and_load_in_peft(student, trained, tmp_path / "out", network)
    np.testing.assert_allclose(transformers_logits(other, tokens), ours, atol=1e-4, rtol=0)
    again = policy.load(make_policy(tmp_path / "out"), "float32")
    assert again.model.lora is None and ("head" in again.params) == (name != "tied")
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), again.params, merged)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("untied", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}),
        ("tied", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "mlp.up_proj"]}),
        ("tied", {"r": 2, "use_rslora": True, "target_modules": r".*\.(v|o)_proj"}),
        (
            "sparse",
            {
                "r": 2,
                "lora_alpha": 6,
                "use_rslora": True,
                "target_modules": ["o_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
        ),
        ("sparse", {"r": 3, "target_modules": [], "target_parameters": ["experts.down_proj"]}),
    ],
    ids=str,
)
def test_adapters_written_by_peft_are_read(bases, name, fields, tmp_path, monkeypatch):
    path, network = bases[name]
    fresh = type(network).from_pretrained(path)
    other = get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM", **fields))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path)
    loaded = make_policy(tmp_path)
    policy.check_files(loaded)
    read = []
    monkeypatch.setattr(tensor_files, "safe_open", counted(read))
    loaded = policy.load(loaded, "float32")
    files = [*path.glob("*.safetensors"), tmp_path / adapter.TENSORS_FILE]
    whole = sum(x.nbytes for file in files for x in load_file(file).values())
    # The experts' fused gate and up share a factor, which is read once for each of the two.
    fused = [x for name, x in load_file(files[-1]).items() if "mlp.experts" in name]
    shared = sum(x.nbytes for x in fused if x.shape[1] == loaded.config.hidden_size)
    assert sum(read) == whole + shared
    tokens = tokens_of(loaded.config)
    actual = logits(loaded.model, {"params": loaded.params}, tokens)
    assert np.abs(actual - transformers_logits(network, tokens)).max() > 0.1
    np.testing.assert_allclose(actual, transformers_logits(other, tokens), atol=1e-4, rtol=0)


def test_adapter_with_mixed_layers_warns_about_peft(tmp_path, capsys):
    """peft cannot load an adapter of a model with dense and sparse layers, and the export warns
    about it; loading it here restores everything."""
    layers = {"num_hidden_layers": 2, "mlp_only_layers": [0]}
    tiny_qwen3(tmp_path / "base", **(EXPERTS | layers))
    student, trained = load_with_lora(tmp_path / "base", PLAIN)
    fields = {"path": str(tmp_path / "base"), "lora": dataclasses.asdict(PLAIN)}
    path = write(tmp_path / "config.json", [{"stages": ["sft"], "student": fields}]).parent
    exporting.save_adapter(make_policy(path), trained, tmp_path / "out", "float32")
    assert "peft" in capsys.readouterr().err
    again = policy.load(make_policy(tmp_path / "out"), "float32")
    merged = policy.make_sampler_params_fn(student)(trained)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), again.params, merged)


def test_lora_sizes_of_released_models():
    """Counts the parameters that LoRA adds; 10.1M for 0.6B at rank 16 is PEFT's number."""
    mesh = mesh_lib.make_mesh(1, 2, 2, 2)
    kind = LoRA(16, 32.0, rslora=False, targets=TARGETS)
    for name, count in (("0.6b", 10_092_544), ("8b", 43_646_976), ("235b-a22b", 3_303_505_920)):
        abstract = jax.tree.leaves(mesh_lib.make_abstract_params(SIZES[name], mesh, kind))
        assert sum(x.size for x in abstract) == count
        for x in abstract:
            x.sharding.shard_shape(x.shape)  # raises if a dimension does not divide


def test_initial_factors_leave_the_base_unchanged(bases):
    """a is drawn from U(-1/√in, 1/√in) independently in each layer and b is zero, so the model
    equals its base, as it does without the LoRA collection."""
    student = policy.load(make_policy(bases["untied"][0], PLAIN), "float32")
    drawn = policy.load_or_init_lora(student, jax.random.key(0))
    tokens, alone = tokens_of(student.config), {"params": student.params}
    expected = logits(families.make_model(student.config), alone, tokens)
    for variables in (alone, alone | {"lora": drawn}):
        np.testing.assert_array_equal(logits(student.model, variables, tokens), expected)
    for path, x in jax.tree_util.tree_leaves_with_path(drawn):
        if path[-1].key == "b":
            assert not np.asarray(x).any()
            continue
        bound = x.shape[-2] ** -0.5
        assert 0.9 * bound < np.abs(x).max() <= bound
        assert np.std(x) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert not np.allclose(x[0], x[1])


def test_every_lora_field_has_an_effect(bases):
    """rank and targets change the shapes, alpha and rslora the logits."""
    path, _ = bases["untied"]
    student, trained = load_with_lora(path, PLAIN)
    variables = {"params": student.params, "lora": trained}
    tokens = tokens_of(student.config)
    ours = logits(student.model, variables, tokens)

    def shapes(kind):
        return [
            x.shape for x in jax.tree.leaves(families.get_abstract_params(student.config, kind)[0])
        ]

    for change in ({"rank": 4}, *({"targets": tuple({*TARGETS} - {t})} for t in TARGETS)):
        assert shapes(dataclasses.replace(PLAIN, **change)) != shapes(PLAIN)
    for change, factor in (({"alpha": 12.0}, 2), ({"rslora": True}, math.sqrt(3))):
        other = dataclasses.replace(PLAIN, **change)
        assert other.scale == pytest.approx(PLAIN.scale * factor)
        changed = logits(student.model.clone(lora=other), variables, tokens)
        assert np.abs(changed - ours).max() > 0.1


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="dense"),
        pytest.param(EXPERTS | {"num_experts": 8}, id="sparse", marks=pytest.mark.long),
    ],
)
def test_training_on_a_mesh_equals_one_device(fields, tmp_path):
    """Two steps on eight devices equal those on one; factors and moments have the stated
    shardings."""
    tiny_qwen3(tmp_path, **(EVEN | fields))
    kind = LoRA(3, 6.0, rslora=True, targets=TARGETS)

    def trained_on(sizes):
        student, trained = load_with_lora(tmp_path, kind, sizes)
        optimizer = optim.make_optimizer(base.make_stage("sft").optim, 10)
        with policy.use(student):
            state = update.init_train_state(optimizer, trained, 0)
            mesh = policy.get_mesh(student)
            loss = losses.OBJECTIVES["sft"]
            options = update.UpdateOptions(1, 1.0 * mesh.size)
            programs = update.make_update(student.model, optimizer, loss, options, state)
            for i in range(2):
                batch = batch_of(student.config, i, 8)
                state, measured, _ = one_update(programs, state, batch, student.params)
                jax.block_until_ready(state)  # XLA may deadlock when such programs queue up
        return state, {k: np.asarray(v) for k, v in measured.items()}

    single, expected = trained_on((1, 1, 1))
    state, actual = trained_on((1, 2, 2, 2) if fields else (1, 2, 4))
    for name in ("loss", "grad_norm", "entropy"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), state.params, single.params
    )
    embed = ("fsdp", "context")
    specs = {
        "q": ((embed, None), (None, "tensor")),
        "o": (("tensor", None), (None, embed)),
        "gate": ((embed, None), (None, "tensor")),
        "down": (("tensor", None), (None, embed)),
    }
    moments = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s))
    for tree in (state.params, moments.mu, moments.nu):
        layers = tree["layers"]
        for name, (a, b) in specs.items():
            group = layers["attention" if name in "qo" else "moe" if fields else "mlp"][name]
            lead = (None, "expert") if "moe" in layers and name not in "qo" else (None,)
            factors = group.get("kernel", group)
            for x, spec in ((factors["a"], a), (factors["b"], b)):
                assert (*x.sharding.spec, None, None, None, None)[: x.ndim] == lead + spec, name


def is_adam(x):
    return hasattr(x, "mu")


def test_a_rounded_base_is_merged_in_float32(bases):
    """The sampler's weights are merged in float32 whatever the dtype of the base, and then cast."""
    student, trained = load_with_lora(bases["untied"][0], PLAIN)
    rounded = policy.load(student, "bfloat16")
    actual = policy.make_sampler_params_fn(rounded)(trained)["layers"]["mlp"]["up"]["kernel"]
    factors = jax.tree.map(np.asarray, trained["layers"]["mlp"]["up"]["kernel"])
    kernel = rounded.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and actual.dtype == jnp.float32
    expected = np.asarray(kernel, np.float32) + PLAIN.scale * factors["a"] @ factors["b"]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny_model(root / "student", 0), tiny_model(root / "teacher", 1, hidden_size=48)


def with_lora(models):
    """Configures two stages that train one adapter."""
    c = config(models)
    c.student.param_dtype = "float32"
    c.sft.steps, c.opd.steps = 1, 2
    c.student.lora.rank, c.student.lora.alpha = 2, 8.0
    c.student.lora.targets = ("q_proj", "v_proj", "down_proj")
    c.sft.optim.learning_rate = c.opd.optim.learning_rate = 3e-2
    return c


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    loop.run(with_lora(models), workdir)
    return workdir


def final(workdir):
    return jax.tree.map(np.asarray, policy.restore_trained_params(make_policy(workdir), None)[0])


def test_a_run_saves_only_its_adapter(run, models):
    """A checkpoint has the parameters, moments and files of the LoRA and nothing of the base."""
    about = next((run / "checkpoints" / "3" / "about").glob("*")).read_text()
    leaves = json.loads(about)["leaves"]
    assert all(path.endswith(("/a", "/b")) for path in leaves if leaves[path][0])
    sizes = [math.prod(shape) for shape, _, _ in leaves.values() if shape]
    adapted = sum(x.size for x in jax.tree.leaves(final(run)))
    assert sum(sizes) == 3 * adapted
    files = [f for f in (run / "checkpoints" / "3").rglob("*") if f.is_file()]
    whole = make_policy(models[0]).config.num_parameters
    assert 3 * adapted < whole / 5 and sum(f.stat().st_size for f in files) < 4 * whole


def test_the_sampler_has_the_merged_weights(run):
    rows = numbers(run)
    assert [row["stage"] for row in rows] == ["sft", "opd", "opd"]
    assert all(row["train/sampler_delta"] < 1e-5 for row in rows[1:])
    assert rows[1]["train/loss"] != rows[2]["train/loss"]


def test_resumed_run_has_the_same_bits(run, models, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(SystemExit):
            loop.run(with_lora(models), tmp_path)
    loop.run(with_lora(models), tmp_path)
    assert numbers(tmp_path) == numbers(run)
    same = jax.tree.map(np.array_equal, final(tmp_path), final(run))
    assert all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Returns the run's adapter directory and its merged model."""
    root = tmp_path_factory.mktemp("exports")
    assert call(export, f"--run={run}", f"--out={root / 'adapter'}") == 0
    assert call(export, f"--run={run}", f"--out={root / 'merged'}", "--merge_lora") == 0
    return root / "adapter", root / "merged"


def test_a_run_and_its_exports_score_alike(run, exported, models, tmp_path):
    """The run, its adapter and its merged model have equal scores here, in transformers and in
    peft."""
    ids = list(range(3, 40))
    rows = write(tmp_path / "in.jsonl", [{"tokens": ids}])
    out = tmp_path / "out.jsonl"

    def scores(path) -> list[float]:
        out.unlink(missing_ok=True)
        assert call(score, f"--model={path}", f"--tokens={rows}", f"--out={out}") == 0
        return read(out)[0]["logprobs"][1:]

    network = Qwen3ForCausalLM.from_pretrained(models[0])
    start = logprobs(network, ids)
    beside = PeftModel.from_pretrained(network, exported[0])
    merged = Qwen3ForCausalLM.from_pretrained(exported[1])
    assert merged.config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(exported[1] / "model.safetensors")
    expected: Any = logprobs(merged, ids)
    assert np.abs(np.subtract(expected, start)).max() > 0.01
    for actual in (logprobs(beside, ids), *(scores(path) for path in (run, *exported))):  # pyright: ignore
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    fields = json.loads((exported[0] / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == models[0]
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (2, 8, False)
    assert fields["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    assert fields["task_type"] == "CAUSAL_LM"
    inner = exported[1] / "adapter" / "adapter_model.safetensors"
    assert inner.read_bytes() == (exported[0] / "adapter_model.safetensors").read_bytes()

    out.unlink()
    shared = (f"--model={run}", f"--prompts={rows}", f"--out={out}", "--dtype=float32")
    assert call(generate, *shared, "--temperature=0", "--max_new_tokens=5") == 0
    assert read(out)[0]["samples"][0]["tokens"] == greedy(merged, ids, 5)[:5]


@pytest.mark.parametrize("which", ["run", "adapter"])
def test_a_run_or_adapter_loads_as_an_8_bit_teacher(run, exported, which):
    """Equals the merged model, quantised."""
    path = run if which == "run" else exported[0]
    merged = policy.load(make_policy(exported[1]), "float32").params
    expected = quantised.quantise_params(merged, "int8", FLOAT)
    actual = policy.load(make_policy(path), "int8").params
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1 if ours.dtype == jnp.int8 else 0)


def test_a_lora_run_is_evaluated(run, tmp_path):
    flags = ("--benchmark=arithmetic", "--limit=2", "--max_new_tokens=4", f"--out={tmp_path}")
    assert call(evaluate, f"--model={run}", *flags) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["problems"] == 2


def test_training_continues_from_an_adapter(run, exported, models, tmp_path, monkeypatch):
    """Training starts at its factors and freezes its base. A moved adapter still finds a base that
    it names by a path relative to its old place."""
    monkeypatch.chdir(tmp_path)  # where no base lies beside it, unlike beside this project
    moved = tmp_path / "models" / "adapter"
    shutil.copytree(exported[0], moved)
    shutil.copytree(models[0], tmp_path / "models" / "base")
    fields = json.loads((moved / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = "../base"
    (moved / "adapter_config.json").write_text(json.dumps(fields))
    c = with_lora(models)
    c.student.path = str(moved)
    student = setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1)).student
    first = policy.load_or_init_lora(student, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, first, final(run))
    start = policy.load(make_policy(models[0]), "float32").params
    jax.tree.map(np.testing.assert_array_equal, policy.load(student, "float32").params, start)


@pytest.mark.long
def test_lora_flags_work_from_the_command_line(tmp_path):
    flags = (f"--workdir={tmp_path / 'run'}", "--config.student.lora.rank=4")
    command = [sys.executable, "-m", "distill.train", "--config=configs/quickstart.py:tiny", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kind = policy.read_run_lora(tmp_path / "run")
    assert kind == LoRA(4, 32.0, rslora=False, targets=TARGETS)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def change(**fields):
    def apply(path):
        config = json.loads((path / adapter.CONFIG_FILE).read_text())
        (path / adapter.CONFIG_FILE).write_text(json.dumps(config | fields))

    return apply


def tensors(apply):
    def changed(path):
        arrays = load_file(path / adapter.TENSORS_FILE)
        apply(arrays)
        save_file(arrays, path / adapter.TENSORS_FILE)

    return changed


def cut(path):
    (path / adapter.TENSORS_FILE).write_bytes((path / adapter.TENSORS_FILE).read_bytes()[:-100])


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
EXTRA = {"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}
BAD = {
    "no JSON": (
        lambda p: (p / adapter.CONFIG_FILE).write_text("{"),
        "adapter_config.json: not JSON",
    ),
    "no base": (change(base_model_name_or_path=None), "base_model_name_or_path names no model"),
    "lost base": (
        change(base_model_name_or_path="./gone"),
        "./gone: no model directory; set it to",
    ),
    "other kind": (change(peft_type="IA3"), "peft_type='IA3' is not supported"),
    "DoRA": (change(use_dora=True), "use_dora=True is not supported"),
    "biases": (change(bias="all"), "bias='all' is not supported"),
    "modules": (change(modules_to_save=["lm_head"]), "modules_to_save=['lm_head'] is not"),
    "PiSSA": (change(init_lora_weights="pissa"), "init_lora_weights='pissa' is not supported"),
    "ranks": (
        change(rank_pattern={"q_proj": 3}),
        "has shape [2, 32], adapter_config.json says r=3",
    ),
    "a later field": (change(use_tomorrow=[1]), "use_tomorrow=[1] is not supported"),
    "rank": (change(r=5), "lora_A.weight has shape [2, 48], adapter_config.json says r=5"),
    "no rank": (change(r=None), "r=None, lora_alpha=8: not an integer and a number"),
    "alpha": (change(lora_alpha=-8), "lora.alpha=-8.0: must be above 0"),
    "unknown target": (change(target_modules=["q_proj", "lm_head"]), "target 'lm_head' is not"),
    "absent target": (change(target_modules=["k_proj"]), "target_modules has 'k_proj', but"),
    "missing A": (tensors(lambda x: x.pop(Q0.format("A"))), f"{Q0.format('A')} is missing"),
    "missing B": (tensors(lambda x: x.pop(Q0.format("B"))), f"{Q0.format('B')} is missing"),
    "a head": (tensors(lambda x: x.update(EXTRA)), "lm_head.weight is no factor of a LoRA"),
    "truncated": (cut, "adapter_model.safetensors: not a readable safetensors file"),
    "no tensors": (lambda p: (p / adapter.TENSORS_FILE).unlink(), "safetensors: no such file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_adapters_are_refused(exported, tmp_path, name):
    """The error is one line and comes before any weight is read."""
    apply, words = BAD[name]
    path = tmp_path / "adapter"
    shutil.copytree(exported[0], path)
    apply(path)
    with pytest.raises(UserError) as error:
        policy.check_files(make_policy(path))
    assert words in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_base_is_refused(exported, models, tmp_path, capsys):
    path = tmp_path / "adapter"
    shutil.copytree(exported[0], path)
    change(base_model_name_or_path=models[1])(path)
    rows = write(tmp_path / "in.jsonl", [{"tokens": [1, 2]}])
    out = tmp_path / "out.jsonl"
    assert call(score, f"--model={path}", f"--tokens={rows}", f"--out={out}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "q_proj.lora_A.weight has shape [2, 32], config.json says [2, 48]" in line
    assert not out.exists()


def set_lora(**fields):
    return lambda c, exported, run: c.student.lora.update(fields)


def from_adapter(**fields):
    def apply(c, exported, run):
        c.student.path = str(exported[0])
        c.student.lora.update(fields)

    return apply


BAD_CONFIGS = {
    "rank": (set_lora(rank=-4), "config.student.lora.rank=-4: must be at least 1"),
    "alpha": (set_lora(alpha=0.0), "config.student.lora.alpha=0.0: must be above 0"),
    "targets": (set_lora(targets=("lm_head",)), "config.student.lora.targets=('lm_head',): must"),
    "no targets": (set_lora(targets=()), "config.student.lora.targets=(): must be some of"),
    "random": (
        lambda c, exported, run: setattr(c.student, "random_init", True),
        "config.student.lora.rank: nothing keeps a random base",
    ),
    "a run": (
        lambda c, exported, run: setattr(c.student, "path", str(run)),
        "export it for a base",
    ),
    "other rank": (
        from_adapter(rank=3),
        "an adapter of rank 2, config.student.lora's is 3; it takes rank=2, alpha=8, rslora=False",
    ),
    "other alpha": (from_adapter(alpha=2.0), "an adapter of scale 4, config.student.lora's is 1"),
    "other scale": (
        from_adapter(rslora=True),
        "an adapter of scale 4, config.student.lora's is 5.6",
    ),
    "other targets": (from_adapter(targets=("q_proj",)), "an adapter of targets ['down_proj', 'q_"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_lora_configs_are_refused(exported, run, models, tmp_path, name):
    c = with_lora(models)
    apply, words = BAD_CONFIGS[name]
    apply(c, exported, run)
    with pytest.raises(UserError) as error:
        loop.run(c, tmp_path / "run")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
