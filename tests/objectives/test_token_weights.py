"""Tests the weights of tokens in a loss against whole logits and loops, and their metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.objectives import losses, token_weights
from distill.objectives.losses import Loss
from tests.support.heads import token_stats

B, T, V, D, E = 3, 9, 11, 5, 4
# Two sequences in the first row; padding last. The second response of row 0 has two turns.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 0, 0], [1] * 9])
MASK = np.array([[0, 1, 1, 1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 0, 0], [0, 1] + [0] * 7], bool)
SETTINGS = [
    {"position_half_life": 1.5},
    {"entropy_weight": 0.9},
    {"entropy_weight": -0.7, "entropy_from": "teacher"},
    {"position_half_life": 3.0, "entropy_weight": 0.5, "entropy_from": "teacher"},
]


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"hidden": (B, T, D), "head": (V, D), "teacher": (B, T, E), "teacher_head": (V, E)}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {**found, "targets": rng.integers(0, V, (B, T)).astype(np.int32)}


def find_weights(loss: Loss, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Returns the weight of each token [B, T] by its definition, from probabilities [B, T, V]."""
    weights = np.zeros((B, T))
    for b in range(B):
        seen: dict[int, int] = {}
        for t in range(T):
            if MASK[b, t]:
                i = seen.setdefault(SEGMENTS[b, t], 0)
                seen[SEGMENTS[b, t]] += 1
                x = (q if loss.entropy_from == "teacher" else p)[b, t]
                weights[b, t] = np.exp(-loss.entropy_weight * (x * np.log(x)).sum())
                if loss.position_half_life:
                    weights[b, t] *= 0.5 ** (i / loss.position_half_life)
    return weights


def compute_loss(loss: Loss, parameters: dict, chunk: int = 0):
    """Returns the loss by the streamed head, divided by the weights, and the weights [B, T]."""
    x = {name: jnp.asarray(value) for name, value in arrays().items()}
    known = {"mask_BT": jnp.asarray(MASK), "segments_BT": jnp.asarray(SEGMENTS)}
    weight, _ = token_weights.compute_token_weights(loss, known["mask_BT"], known["segments_BT"], T)
    student = parameters["hidden"], parameters["head"], x["targets"]
    options = {
        "loss_chunk_mib": chunk * 4 * V / 2**20 if chunk else 1,
        "divergence": loss.teacher_divergence,
        "teacher_hidden_BTE": x["teacher"],
        "teacher_head_VE": x["teacher_head"],
    }
    if chunk:
        stats = token_stats(
            *student,
            **options,
            known=known,
            weight_BT=weight,
            loss=lambda stats, known: losses.compute_token_losses(loss, stats, **known),
        )
        total = stats["total"]
    else:
        stats = losses.compute_token_losses(loss, token_stats(*student, **options), **known)
        total = jnp.sum(weight * stats["loss"])
    weight, count = token_weights.complete_token_weights(weight, stats)
    return total / jax.lax.stop_gradient(count), weight


@pytest.mark.parametrize("chunk", [0, B * 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_weights_equal_their_definition_on_whole_logits(settings, chunk):
    """The loss is the weighted mean of the tokens' reverse KL, and the gradient does not pass
    through the weights: value, gradient and weights equal those of whole logits, where the weights
    are constants. In chunks the head computes the gradient in its forward pass."""
    loss, x = Loss(teacher=1, **settings), arrays()
    parameters = {"hidden": jnp.asarray(x["hidden"]), "head": jnp.asarray(x["head"])}
    logq = jax.nn.log_softmax(jnp.asarray(x["teacher"] @ x["teacher_head"].T))

    def get_logp(parameters):
        return jax.nn.log_softmax(parameters["hidden"] @ parameters["head"].T)

    wanted_weights = find_weights(loss, np.exp(get_logp(parameters)), np.exp(np.asarray(logq)))

    def compute_dense(parameters):
        logp = get_logp(parameters)
        kl = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)
        return jnp.sum(jnp.asarray(wanted_weights / wanted_weights.sum()) * kl)

    value, gradient = jax.value_and_grad(compute_dense)(parameters)
    (mine, weights), my_gradient = jax.value_and_grad(
        lambda p: compute_loss(loss, p, chunk), has_aux=True
    )(parameters)
    np.testing.assert_allclose(weights, wanted_weights, rtol=1e-5)
    np.testing.assert_allclose(mine, value, rtol=1e-5)
    for name in parameters:
        np.testing.assert_allclose(my_gradient[name], gradient[name], rtol=1e-4, atol=1e-6)


def test_equal_weights_give_the_loss_without_weights():
    """A half-life far beyond the longest response changes nothing."""
    loss, x = Loss(teacher=1), arrays()
    parameters = {"hidden": jnp.asarray(x["hidden"]), "head": jnp.asarray(x["head"])}

    def run(**settings):
        changed = dataclasses.replace(loss, **settings)
        return jax.value_and_grad(lambda p: compute_loss(changed, p)[0])(parameters)

    value, gradient = run()
    same, same_gradient = run(position_half_life=1e9)
    np.testing.assert_allclose(same, value, rtol=1e-6)
    for name in parameters:
        np.testing.assert_allclose(same_gradient[name], gradient[name], rtol=1e-5, atol=1e-8)
