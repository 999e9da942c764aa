"""Compares values and gradients with TRL's own losses on the same tensors.

TRL computes them inside trainers; here its functions run on a bare object with the fields that they
read. If we differ from TRL by choice, the test says how and why.
"""

import dataclasses
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # TRL warns that this interface may change

from distill.objectives import losses, token_weights
from distill.objectives.divergences import Divergence
from distill.objectives.losses import OBJECTIVES, Loss
from distill.rewards import terms
from tests.support.heads import token_stats

torch: Any = pytest.importorskip("torch")
pytest.importorskip("trl")

B, T, V = 4, 6, 11
LIMIT = 8  # most tokens of a response
LENGTHS = (6, 3, 1, 5)


@pytest.fixture(scope="module")
def gkd():
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer


@pytest.fixture(scope="module")
def iw_opd():
    from trl.experimental.iw_opd import IWOPDTrainer

    return IWOPDTrainer


@pytest.fixture(scope="module")
def grpo():
    from trl import GRPOTrainer

    return GRPOTrainer


def numbers(seed=0):
    """Returns log-probabilities (new, old, sampler, reference), advantages and a mask."""
    rng = np.random.default_rng(seed)
    logp = np.log(rng.uniform(0.05, 0.95, (B, T))).astype(np.float32)
    old = np.minimum(logp + 0.4 * rng.normal(size=(B, T)), -0.01).astype(np.float32)
    return {
        "logp": logp,
        "old": old,
        "sampler": np.minimum(old + 0.5 * rng.normal(size=(B, T)), -0.01).astype(np.float32),
        "reference": np.minimum(logp + rng.normal(size=(B, T)), -0.01).astype(np.float32),
        "advantage": rng.normal(size=B).astype(np.float32),
        "mask": np.arange(T)[None] < np.array(LENGTHS)[:, None],
    }


def theirs(grpo, x, **fields):
    """Returns the loss and its gradient in logp from GRPOTrainer._compute_loss."""
    logp = torch.tensor(x["logp"], requires_grad=True)
    trainer = SimpleNamespace(
        **{"aux_loss_enabled": False, "top_entropy_quantile": 1.0, "epsilon_low": 0.2},
        **{"off_policy_mask_threshold": None, "_entropy_bonus_enabled": False},
        **{"use_adaptive_entropy": False, "vllm_importance_sampling_correction": True},
        **{"current_gradient_accumulation_steps": 1, "max_completion_length": LIMIT},
    )
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    trainer.accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer.args = SimpleNamespace(delta=None, use_bias_correction_kl=True, steps_per_generation=1)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros(B, T), None)
    defaults = {"importance_sampling_level": "token", "beta": 0.0, "epsilon_high": 0.2}
    vars(trainer).update({**defaults, "use_vllm": False, **fields})
    mask = torch.tensor(x["mask"]).float()
    inputs = {
        "prompt_ids": torch.zeros(B, 2, dtype=torch.long),
        "prompt_mask": torch.ones(B, 2),
        "completion_ids": torch.zeros(B, T, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor(x["advantage"]),
        "old_per_token_logps": torch.tensor(x["old"]),
        "ref_per_token_logps": torch.tensor(x["reference"]),
        "num_items_in_batch": mask.sum(),
    }
    gap = torch.exp(torch.tensor(x["old"] - x["sampler"]))
    inputs["importance_sampling_ratio"] = torch.clamp(gap, max=1.5)  # mode token_truncate
    loss = grpo._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logp.grad.numpy(), trainer._metrics["train"]


def ours(loss, x):
    mask, segments = jnp.asarray(x["mask"]), jnp.asarray(x["mask"], jnp.int32)
    statistics = {}

    def total(logp):
        per_token = losses.compute_token_losses(
            loss,
            {"logp": logp},
            mask,
            segments,
            sampler_logp_BT=jnp.asarray(x["sampler"]),
            old_logp_BT=jnp.asarray(x["old"]),
            reference_logp_BT=jnp.asarray(x["reference"]),
            advantages_BT=jnp.broadcast_to(jnp.asarray(x["advantage"])[:, None], (B, T)),
        )
        statistics.update(per_token)
        weight, count = token_weights.compute_token_weights(loss, mask, segments, LIMIT)
        return (weight * per_token["loss"]).sum() / count

    value, grad = jax.value_and_grad(total)(jnp.asarray(x["logp"]))
    return float(value), np.asarray(grad), statistics


SAME = {
    "grpo": (OBJECTIVES["grpo"], {"loss_type": "grpo"}),
    "dr_grpo": (OBJECTIVES["dr_grpo"], {"loss_type": "dr_grpo"}),
    "dapo": (OBJECTIVES["dapo"], {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": (
        OBJECTIVES["gspo"],
        {
            **{"loss_type": "grpo", "importance_sampling_level": "sequence"},
            **{"epsilon_low": 3e-4, "epsilon_high": 4e-4},
        },
    ),
    "gspo wide": (
        dataclasses.replace(OBJECTIVES["gspo"], clip_low=0.05, clip_high=0.05),
        {
            **{"loss_type": "grpo", "importance_sampling_level": "sequence"},
            **{"epsilon_low": 0.05, "epsilon_high": 0.05},
        },
    ),
    # TRL bounds the ratio itself, and has no lower bound: 1 - clip_low = 0, 1 + 4 = 5
    "cispo": (OBJECTIVES["cispo"], {"loss_type": "cispo", "epsilon_high": 5.0}),
    "cispo tight": (
        Loss(reward=1, clip="cispo", clip_low=1, clip_high=0.1),
        {"loss_type": "cispo", "epsilon_high": 1.1},
    ),
    # the reference's KL with the differentiated ratio, TRL's default today
    "grpo with reference": (
        Loss(reward=1, reference=0.3, clip="ppo", aggregation="sequence"),
        {"loss_type": "grpo", "beta": 0.3},
    ),
    "dapo, sampler mismatch": (
        Loss(reward=1, clip="ppo", clip_high=0.28, tis_clip=1.5),
        {"loss_type": "dapo", "epsilon_high": 0.28, "use_vllm": True},
    ),
    "cispo, sampler mismatch, reference": (
        Loss(reward=1, reference=0.1, clip="cispo", clip_low=1, clip_high=4, tis_clip=1.5),
        {"loss_type": "cispo", "epsilon_high": 5.0, "use_vllm": True, "beta": 0.1},
    ),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("seed", [0, 1])
def test_policy_gradients_equal_trls(grpo, name, seed):
    loss, fields = SAME[name]
    x = numbers(seed)
    value, grad, metrics = theirs(grpo, x, **fields)
    mine, my_grad, figures = ours(loss, x)
    np.testing.assert_allclose(mine, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(my_grad, grad, rtol=1e-5, atol=1e-6)
    if loss.clip == "ppo":  # the bounds do stop some tokens
        share = float(figures["clipped"].sum() / sum(LENGTHS))
        if loss.ratio == "token":
            np.testing.assert_allclose(share, metrics["clip_ratio/region_mean"][0], rtol=1e-5)
        assert share > 0
    if loss.reference:
        mean = float(figures["reference_kl"].sum() / sum(LENGTHS))
        np.testing.assert_allclose(mean, metrics["kl"][0], rtol=1e-4)


def test_sequences_without_trained_tokens_do_not_count(grpo):
    """Differs by choice: TRL divides by all rows, so rows that are masked out (truncated, or blank
    ones that fill up devices) shrink its gradient; we divide by the number of trained rows."""
    x = numbers()
    x["mask"] = x["mask"] & (np.arange(B) != 2)[:, None]
    for name in ("grpo", "dr_grpo"):
        value, grad, _ = theirs(grpo, x, **SAME[name][1])
        mine, my_grad, _ = ours(SAME[name][0], x)
        np.testing.assert_allclose(mine, value * B / (B - 1), rtol=1e-5)
        np.testing.assert_allclose(my_grad, grad * B / (B - 1), rtol=1e-5, atol=1e-7)


def test_reference_kl_is_weighted_by_the_token_ratio(grpo):
    """Differs by choice: with a sequence ratio TRL also weighs the reference's KL by it, which its
    documentation calls biased; we weigh it by the token's own ratio, which is unbiased."""
    x = numbers()
    fields = {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.3}
    loss = Loss(reward=1, reference=0.3, ratio="sequence", clip="ppo", aggregation="sequence")
    value, _, _ = theirs(grpo, x, **fields)
    assert abs(ours(loss, x)[0] - value) > 1e-3
    x["old"] = x["logp"]  # fresh samples: the same
    np.testing.assert_allclose(ours(loss, x)[0], theirs(grpo, x, **fields)[0], rtol=1e-5)


# Divergences


def logits(seed=0):
    rng = np.random.default_rng(seed)
    return tuple((2 * rng.normal(size=(2, 5, V))).astype(np.float32) for _ in range(2))


def check_divergence(d, function, scale=1.0, **options):
    student, teacher = logits()
    x = torch.tensor(student, requires_grad=True)
    options |= {"temperature": d.temperature, "reduction": "none"}
    value = scale * function(x, torch.tensor(teacher), **options).sum(-1)
    value.sum().backward()
    eye, targets = jnp.eye(V), jnp.zeros((2, 5), jnp.int32)

    def total(y):
        stats = token_stats(
            y, eye, targets, jnp.asarray(teacher), eye, loss_chunk_mib=1, divergence=d
        )
        return stats["divergence"].sum(), stats["divergence"]

    (_, mine), grad = jax.value_and_grad(total, has_aux=True)(jnp.asarray(student))
    np.testing.assert_allclose(mine, value.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jsd_equals_trls(gkd, beta, temperature):
    """Differs by choice: TRL leaves out the factor τ², so its gradient fades as τ grows."""
    d = Divergence("jsd", beta=float(beta), temperature=temperature)
    check_divergence(d, gkd.generalized_jsd_loss, temperature**2, beta=beta)


@pytest.mark.parametrize("beta, of", [(0, "teacher"), (0.5, "union"), (1, "student")])
def test_topk_with_tail_equals_trls(iw_opd, beta, of):
    """TRL ties the choice of tokens to β; here any of the three goes with any divergence."""
    d = Divergence("jsd", beta=float(beta), k=3, topk_from=of)
    check_divergence(d, iw_opd.generalized_jsd_loss, beta=beta, top_k=3, add_tail=True)


def test_overlong_reward_equals_trls():
    """Counts tokens, not characters."""
    from trl.rewards import get_soft_overlong_punishment

    lengths = [1, 79, 80, 81, 90, 99, 100, 101, 500]
    reference = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    mine = [
        terms.overlong_reward(
            terms.Response("", [0] * n, n <= 100, "correct", False, limit=100, margin=20)
        )
        for n in lengths
    ]
    np.testing.assert_allclose(mine, reference([[0] * n for n in lengths]), atol=1e-6)
