"""Tests losses over arrays: which tokens are trained, how sums add up, and refused settings."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill.objectives import advantages, losses, token_weights
from distill.objectives.divergences import Divergence
from distill.objectives.losses import OBJECTIVES, Loss
from models.errors import UserError
from tests.support.heads import token_stats

V, D, E, LIMIT = 9, 6, 5, 12
EOS = 0  # the same token pads, as in Qwen3
PROMPTS = (3, 1, 4, 2, 2)  # lengths of five sequences: prompt, and response including EOS
RESPONSES = (5, 7, 1, 2, 4)
N, LONGEST = len(PROMPTS), 8

# Every objective of the table, plus every estimator and aggregation.
FORMS = {
    **OBJECTIVES,
    "topk": Loss(teacher=1, divergence="jsd", estimator="topk", k=3, topk_from="union"),
    "stored": Loss(
        **{"teacher": 1, "divergence": "forward", "estimator": "topk", "k": 3},
        **{"teacher_output": "top", "teacher_topk": 4},
    ),
    "k2": Loss(teacher=1, estimator="k2", aggregation="sequence"),
    "k3": Loss(teacher=1, estimator="k3", divergence="forward"),
    "discount": Loss(teacher=1, discount=0.9, aggregation="constant"),
    "sampled, all": Loss(
        **{"teacher": 0.7, "reward": 0.5, "estimator": "sampled", "baseline": True},
        **{"discount": 0.5, "clip": "ppo", "ratio": "sequence", "tis_clip": 1.2},
    ),
    "all terms": Loss(sft=0.1, teacher=0.2, reward=0.3, reference=0.4, clip="cispo"),
    "weights": Loss(teacher=1, position_half_life=2.0, entropy_weight=0.8),
    "weights, discount": Loss(
        **{"teacher": 1, "discount": 0.9, "entropy_weight": -0.5, "entropy_from": "teacher"}
    ),
}


@functools.cache
def sequences():
    """Arrays for five sequences, [N, LONGEST, ...], and the parameters: their hidden states and a
    head. EOS ends each response and appears nowhere else."""
    rng = np.random.default_rng(0)
    f32 = np.float32
    tokens = rng.integers(1, V, (N, LONGEST)).astype(np.int32)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        tokens[i, prompt + response - 1] = EOS
    parameters = {
        "hidden": rng.normal(size=(N, LONGEST, D)).astype(f32),
        "head": rng.normal(size=(V, D)).astype(f32),
    }
    teacher = rng.normal(size=(N, LONGEST, E)).astype(f32), rng.normal(size=(V, E)).astype(f32)
    hidden, head = map(jnp.asarray, parameters.values())
    stats = token_stats(hidden, head, losses.shift(jnp.asarray(tokens)), loss_chunk_mib=1)
    fresh = np.array(losses.unshift(stats["logp"]))
    return parameters, {
        "tokens": tokens,
        "teacher": teacher[0],
        "teacher_head": teacher[1],
        "fresh": fresh,
        "old": fresh + 0.05 * rng.normal(size=fresh.shape).astype(f32),
        "sampler": fresh + 0.3 * rng.normal(size=fresh.shape).astype(f32),
        "reference": fresh + 0.3 * rng.normal(size=fresh.shape).astype(f32),
        "advantage": np.array([1.0, -0.7, 0.4, -1.2, 0.6], f32),
    }


# A layout lists, for every row, (sequence, first column). All have one shape, so that they compile
# once; rows without a sequence fill up the devices.
Layout = list[list[tuple[int, int]]]
WIDTH, WIDEST = 14, max(PROMPTS)
LAYOUTS: dict[str, Layout] = {
    "right padded": [[(i, 0)] for i in range(N)],
    "left padded": [[(i, WIDEST - PROMPTS[i])] for i in range(N)],  # like prompts for sampling
    "packed": [[(0, 0), (2, 8)], [], [(3, 0), (1, 4)], [(4, 2)], []],
}


def sums(loss, parameters, layout, fresh=False, chunk=0):
    """Returns (Σ weight·loss, count) of sequences placed in rows; padding holds garbage. With a
    chunk of that many columns, the head computes the loss's gradient in the forward pass."""
    rows, width = layout, WIDTH
    _, known = sequences()
    rng = np.random.default_rng(1)
    at = np.zeros((2, len(rows), width), np.int32)  # sequence and position of each column
    segments = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), bool)
    for r, row in enumerate(rows):
        for number, (i, first) in enumerate(row):
            length = PROMPTS[i] + RESPONSES[i]
            columns = slice(first, first + length)
            at[0, r, columns], at[1, r, columns] = i, np.arange(length)
            segments[r, columns] = number + 1
            mask[r, first + PROMPTS[i] : first + length] = True
    real = jnp.asarray(segments > 0)

    def place(x, garbage):
        shape = (*real.shape, *x.shape[2:])
        filled = real.reshape(*real.shape, *[1] * (x.ndim - 2))
        return jnp.where(filled, x[at[0], at[1]], jnp.broadcast_to(garbage, shape).astype(x.dtype))

    noise = 3 * rng.normal(size=(*real.shape, D))
    hidden = place(parameters["hidden"], noise)
    teacher = place(jnp.asarray(known["teacher"]), noise[..., :E])
    tokens = place(jnp.asarray(known["tokens"]), EOS)
    options: Any = {
        "loss_chunk_mib": 1,
        "divergence": loss.teacher_divergence,
        "baseline": loss.baseline,
    }
    if loss.teacher_output == "top":
        logq, ids = jax.lax.top_k(jax.nn.log_softmax(teacher @ known["teacher_head"].T), 4)
        options["teacher_top_BTK"] = ids, logq
    else:
        options |= {"teacher_hidden_BTE": teacher, "teacher_head_VE": known["teacher_head"]}

    def of_tokens(name):
        known_as = "fresh" if fresh and name != "reference" else name
        return losses.shift(place(jnp.asarray(known[known_as]), 40.0))

    mask, segments = losses.shift(jnp.asarray(mask)), losses.shift(jnp.asarray(segments))
    reward = np.broadcast_to(known["advantage"][:, None], (N, LONGEST))
    known_BT = {
        **{"mask_BT": mask, "segments_BT": segments},
        **{f"{name}_logp_BT": of_tokens(name) for name in ("sampler", "old", "reference")},
        "advantages_BT": losses.shift(place(jnp.asarray(reward), np.nan)),
    }
    weight, count = token_weights.compute_token_weights(loss, mask, segments, LIMIT)
    student = hidden, parameters["head"], losses.shift(tokens)
    if chunk:
        options |= {
            "known": known_BT,
            "weight_BT": weight,
            "loss_chunk_mib": chunk * 4 * N * V / 2**20,
        }
        options["loss"] = lambda stats, known: losses.compute_token_losses(loss, stats, **known)
        per_token = token_stats(*student, **options)
        total = per_token["total"]
    else:
        stats = token_stats(*student, **options)
        per_token = losses.compute_token_losses(loss, stats, **known_BT)
        total = (weight * per_token["loss"]).sum()
    if loss.weighs_tokens:
        count = token_weights.complete_token_weights(weight, per_token)[1]
    return total, count


def run(loss, layout, fresh=False, chunk=0):
    """Returns the loss and gradient; the sum is divided once."""
    parameters = jax.tree.map(jnp.asarray, sequences()[0])
    (total, count), grads = jax.value_and_grad(
        lambda p: sums(loss, p, layout, fresh, chunk), has_aux=True
    )(parameters)
    return total / count, jax.tree.map(lambda g: g / count, grads), total, count


@functools.cache
def reference_run(name):
    return run(FORMS[name], LAYOUTS["right padded"])


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["left padded", "packed"])
@pytest.mark.parametrize("name", FORMS)
def test_loss_does_not_depend_on_the_row_layout(name, layout):
    """Packed and padded rows agree, on either side and whatever the padding holds; rows that fill
    up the devices do not count. Only response tokens are trained in any layout."""
    actual = run(FORMS[name], LAYOUTS[layout])
    same(actual[:2], reference_run(name)[:2])
    assert not np.asarray(actual[1]["hidden"])[~predicts()].any()


@pytest.mark.parametrize("name", [name for name, loss in FORMS.items() if loss.is_per_token])
def test_forward_pass_gradients_equal_recomputed_ones(name):
    """With three chunks of five columns, one of them padding, the loss and gradient equal those of
    a head that recomputes its logits in the backward pass."""
    same(run(FORMS[name], LAYOUTS["packed"], chunk=5)[:2], reference_run(name)[:2])


def test_losses_that_need_other_tokens_are_marked():
    others = {name for name, loss in FORMS.items() if not loss.is_per_token}
    assert others == {"gspo", "discount", "sampled, all", "weights, discount"}


@pytest.mark.parametrize("name", FORMS)
def test_micro_batches_of_uneven_counts_add_up(name):
    """Splits 17 trained tokens into 13 and 6 and divides the sums once; a mean of means would be
    another number."""
    rows = LAYOUTS["right padded"]
    parts = [run(FORMS[name], part) for part in ([*rows[:3], [], []], [[], [], [], *rows[3:]])]
    count = sum(p[3] for p in parts)
    total = sum(p[2] for p in parts) / count
    sums = [jax.tree.map(lambda g, n=n: g * n, grads) for _, grads, _, n in parts]
    grads = jax.tree.map(lambda a, b: (a + b) / count, *sums)
    same((total, grads), reference_run(name)[:2])
    assert abs(sum(float(p[0]) for p in parts) / 2 - float(total)) > 1e-4


@functools.cache
def predicts():
    """bool [N, LONGEST]: positions whose next token is in the response, EOS included."""
    positions, prompts = np.arange(LONGEST)[None], np.array(PROMPTS)[:, None]
    return (positions >= prompts - 1) & (positions < prompts - 1 + np.array(RESPONSES)[:, None])


@pytest.mark.parametrize("name", FORMS)
def test_exactly_response_tokens_and_eos_are_trained(name):
    """A hidden state has a gradient exactly where the next token is in the response, even with pad
    = eos; prompt tokens and tokens after EOS have none. Samples are fresh, because a clip could
    stop some gradients."""
    gradient = run(FORMS[name], LAYOUTS["right padded"], fresh=True)[1]["hidden"]
    size = np.abs(np.asarray(gradient)).max(-1)
    assert (size[predicts()] > 1e-6).all()
    assert not size[~predicts()].any()


def test_a_truncated_response_trains_no_eos():
    """The mask follows lengths, so a truncated response trains its tokens, the last one included,
    but no EOS that was never sampled."""
    tokens = jnp.asarray([[5, 6, 7, 8, EOS, EOS]])
    mask = jnp.asarray(
        [[False, False, True, True, False, False]]
    )  # truncated after 8; padded with EOS
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, D)), jnp.float32)
    head = jnp.asarray(sequences()[0]["head"])

    def total(hidden):
        stats = token_stats(hidden, head, losses.shift(tokens), loss_chunk_mib=1)
        shifted = losses.shift(mask)
        per_token = losses.compute_token_losses(
            OBJECTIVES["sft"], stats, shifted, shifted.astype(jnp.int32)
        )
        return per_token["loss"].sum()

    trained = np.abs(np.asarray(jax.grad(total)(hidden))).max(-1)[0] > 0
    np.testing.assert_array_equal(trained, [False, True, True, False, False, False])


def test_targets_are_shifted_by_one():
    x = jnp.array([[5, 6, 7]])
    np.testing.assert_array_equal(losses.shift(x), [[6, 7, 0]])
    np.testing.assert_array_equal(losses.unshift(losses.shift(x)), [[0, 6, 7]])


def simple(loss, logp, **known):
    """Returns the summed loss over [1, T] tokens of one sequence, and its gradient in log p."""
    stats = {k: jnp.asarray([v]) for k, v in known.pop("stats", {}).items()}
    known = {k: jnp.asarray([v]) for k, v in known.items()}
    mask = jnp.ones((1, len(logp)), jnp.int32)

    def total(x):
        return losses.compute_token_losses(loss, {"logp": x, **stats}, mask, mask, **known)[
            "loss"
        ].sum()

    value, grad = jax.value_and_grad(total)(jnp.asarray([logp]))
    return float(value), np.asarray(grad)[0]


@pytest.mark.parametrize("discount", [0.0, 0.9])
def test_sampled_opd_equals_the_tinker_cookbook(discount):
    """tinker-cookbook: advantage -c (log p_sampler - log q), detached, or its discounted future
    sum; loss -Σ exp(log p - log p_sampler)·advantage."""
    rng = np.random.default_rng(2)
    logp, sampler, teacher = (-rng.uniform(0.1, 3, 7).astype(np.float32) for _ in range(3))
    advantage = -0.7 * (sampler - teacher).astype(np.float64)
    for t in reversed(range(6)):
        advantage[t] += discount * advantage[t + 1]
    ratio = np.exp(logp - sampler)
    loss = Loss(teacher=0.7, estimator="sampled", k1_from="sampler", discount=discount)
    value, grad = simple(loss, logp, stats={"teacher_logp": teacher}, sampler_logp_BT=sampler)
    np.testing.assert_allclose(value, -(ratio * advantage).sum(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(grad, -ratio * advantage, rtol=1e-6, atol=1e-6)


def test_loss_has_no_gradient_in_teacher_and_advantages():
    """The gradient in q, μ, the reference and the advantages is zero."""
    rng = np.random.default_rng(3)
    mask = jnp.ones((2, 4), jnp.int32)
    names = ("teacher_logp", "baseline", "reverse_kl", "sampler", "old", "reference", "advantages")
    inputs = {n: jnp.asarray(-rng.uniform(0.1, 2, (2, 4))) for n in names}
    logp = jnp.asarray(-rng.uniform(0.1, 2, (2, 4)))
    loss = dataclasses.replace(FORMS["sampled, all"], reference=0.5)

    def total(x):
        stats = {"logp": logp, **{n: x[n] for n in ("teacher_logp", "baseline", "reverse_kl")}}
        arguments: Any = {f"{n}_logp_BT": x[n] for n in ("sampler", "old", "reference")}
        arguments["advantages_BT"] = x["advantages"]
        return losses.compute_token_losses(loss, stats, mask, mask, **arguments)["loss"].sum()

    assert all(not g.any() for g in jax.grad(total)(inputs).values())


def test_aggregations_weigh_lengths_as_documented():
    """By token, a response weighs as much as it is long; by sequence, each weighs 1, so tokens of
    long ones weigh less; by constant, a token weighs the same everywhere and the divisor does not
    depend on lengths."""
    mask = jnp.asarray([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    weights = {
        a: token_weights.compute_token_weights(Loss(sft=1, aggregation=a), mask, mask, 8)
        for a in ("token", "sequence", "constant")
    }
    rows = {a: (np.asarray(w).sum(1) / float(n)).tolist() for a, (w, n) in weights.items()}
    assert rows["token"] == pytest.approx([0.8, 0.2, 0])
    assert rows["sequence"] == pytest.approx([0.5, 0.5, 0])
    assert rows["constant"] == pytest.approx([0.25, 0.0625, 0])
    assert [float(n) for _, n in weights.values()] == [5, 2, 2]


def test_ratio_and_clipped_fraction_are_reported():
    """These statistics warn of a collapse: the ratio, and which tokens the clip stops."""
    logp = np.log([0.5, 0.5, 0.5, 0.5]).astype(np.float32)
    before = np.log([0.25, 0.9, 0.5, 0.1]).astype(np.float32)
    mask = jnp.ones((1, 4), jnp.int32)

    def get_statistics(loss, advantage):
        arguments: Any = {
            "sampler_logp_BT": jnp.asarray([before]),
            "advantages_BT": jnp.full((1, 4), advantage),
        }
        return losses.compute_token_losses(
            loss, {"logp": jnp.asarray([logp])}, mask, mask, **arguments
        )

    up = get_statistics(OBJECTIVES["grpo"], 1.0)
    np.testing.assert_allclose(up["ratio"][0], [2, 0.5 / 0.9, 1, 5], rtol=1e-6)
    np.testing.assert_array_equal(up["clipped"][0], [1, 0, 0, 1])
    np.testing.assert_array_equal(
        get_statistics(OBJECTIVES["grpo"], -1.0)["clipped"][0], [0, 1, 0, 0]
    )
    tight = dataclasses.replace(OBJECTIVES["cispo"], clip_low=0.2, clip_high=0.2)
    np.testing.assert_array_equal(get_statistics(tight, 1.0)["clipped"][0], [1, 1, 0, 1])
    assert set(up) == {"loss", "advantage", "ratio", "clipped"}


def test_sampler_mismatch_weight_is_capped():
    """The weight p_old/p_sampler is capped and detached, and only scales the policy gradient."""
    old, sampler = np.log([[0.5, 0.5], [0.1, 0.4]]).astype(np.float32)
    known = {"old_logp_BT": old, "sampler_logp_BT": sampler}
    advantage = np.ones(2, np.float32)
    loss = Loss(reward=1, tis_clip=2.0)
    value, grad = simple(loss, old, advantages_BT=advantage, **known)
    np.testing.assert_allclose(grad, [-2, -1.25], rtol=1e-6)  # 5 is capped at 2; 1.25 stays
    np.testing.assert_allclose(value, -3.25, rtol=1e-6)
    both = simple(dataclasses.replace(loss, sft=1.0), old, advantages_BT=advantage, **known)
    np.testing.assert_allclose(both[1] - grad, [-1, -1], rtol=1e-6)


def test_sft_and_opd_losses_equal_their_definitions():
    """The table's first rows are -log p and the head's reverse KL."""
    assert OBJECTIVES["sft"].teacher_divergence is None and not OBJECTIVES["sft"].is_on_policy
    assert OBJECTIVES["opd"].teacher_divergence == Divergence("reverse")
    assert not OBJECTIVES["opd"].has_policy_gradient
    for loss in OBJECTIVES.values():
        assert hash(loss) == hash(dataclasses.replace(loss))  # static under jit
        assert loss.is_on_policy or not loss.has_policy_gradient


TOP = {"teacher": 1, "estimator": "topk", "k": 4, "teacher_output": "top", "teacher_topk": 8}
REFUSED = {
    "nothing is learned": {},
    "one of": {"teacher": 1, "divergence": "kl"},
    "sft=-1: must be at least 0": {"sft": -1},
    "beta=1.5": {"teacher": 1, "beta": 1.5},
    "read by divergence=jsd only": {"teacher": 1, "beta": 0.3},
    "read by teacher_output=top only": {"teacher": 1, "teacher_topk": 8},
    "skew=1.0: must be at least 0 (off) and below 1": {"teacher": 1, "skew": 1.0},
    "has no skew": {"teacher": 1, "skew": 0.1, "divergence": "jsd"},
    "temperature=0.0": {"teacher": 1, "temperature": 0.0},
    "set k to at least 1": {"teacher": 1, "estimator": "topk"},
    "read by estimator=topk only": {"teacher": 1, "k": 5},
    "gradient of the plain reverse KL": {"teacher": 1, "estimator": "k2", "divergence": "jsd"},
    "gradient of the plain forward KL": {"teacher": 1, "estimator": "k3"},
    "at temperature 1": {"teacher": 1, "estimator": "sampled", "temperature": 2.0},
    "teacher_output=top needs topk": {"teacher": 1, "teacher_output": "top", "teacher_topk": 8},
    "above teacher_topk=8": {**TOP, "k": 9},
    "teacher_output=top needs teacher": {**TOP, "topk_from": "union"},
    "teacher_output=top needs 1": {**TOP, "temperature": 2.0},
    "one number a token": {"teacher": 1, "teacher_output": "token"},
    "baseline: read by": {"teacher": 1, "baseline": True},
    "needs a teacher's hidden states": {
        **{"teacher": 1, "estimator": "sampled", "baseline": True, "teacher_output": "token"}
    },
    "baseline: is a mean": {"reward": 1, "estimator": "sampled", "baseline": True},
    "discount=1.5: must be at least 0 (off) and at most 1": {"teacher": 1, "discount": 1.5},
    "but teacher=0": {"reward": 1, "discount": 0.5},
    "discount: estimator=k2 has no advantage to add to": {
        "teacher": 1,
        "estimator": "k2",
        "discount": 0.5,
    },
    "clip_low=1.5: must be at least 0 and at most 1": {
        **{"reward": 1, "clip": "ppo", "clip_low": 1.5}
    },
    "clip_high=-0.1: must be at least 0": {"reward": 1, "clip": "ppo", "clip_high": -0.1},
    "ratio=none is always 1": {"reward": 1, "clip": "ppo", "ratio": "none"},
    "use sampled, or clip=cispo": {"teacher": 1, "estimator": "k2", "clip": "ppo"},
    "tis_clip=-1.0: must be at least 0 (off)": {"reward": 1, "tis_clip": -1.0},
    "needs a policy gradient": {"teacher": 1, "tis_clip": 2.0},
    "position_half_life=-1.0: must be at least 0 (off)": {"sft": 1, "position_half_life": -1.0},
    "entropy_weight=1.5: must be at least -1 and at most 1": {"sft": 1, "entropy_weight": 1.5},
    "entropy_from='both': must be one of": {"sft": 1, "entropy_weight": 1, "entropy_from": "both"},
    "aggregation=sequence: position_half_life and entropy_weight divide by": {
        **{"sft": 1, "position_half_life": 8.0, "aggregation": "sequence"}
    },
    "entropy_from=teacher: read by entropy_weight only": {"teacher": 1, "entropy_from": "teacher"},
    "entropy_from=teacher: the entropy is over": {
        **{"sft": 1, "entropy_weight": 0.5, "entropy_from": "teacher"}
    },
    "entropy_from=teacher: the entropy is over the whole vocabulary": {
        **{**TOP, "entropy_weight": 0.5, "entropy_from": "teacher"}
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_contradictory_loss_settings_are_refused(reason):
    """The error gives the reason and comes before any weight is loaded."""
    with pytest.raises(UserError) as error:
        Loss(**{"teacher": 0, **REFUSED[reason]})
    assert reason in str(error.value) and "\n" not in str(error.value)


# distill/objectives/advantages.py


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_discounted_future_sums_stay_within_sequences(discount):
    """Compares with sums written out for two sequences in a row and padding."""
    rng = np.random.default_rng(4)
    segments = np.array([[0, 1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    x = rng.normal(size=segments.shape).astype(np.float32) * (segments > 0)
    wanted = np.zeros_like(x)
    for b, t in np.ndindex(*x.shape):
        for i in range(t + 1, x.shape[1]):
            wanted[b, t] += discount ** (i - t) * x[b, i] * (segments[b, i] == segments[b, t])
    wanted *= segments > 0
    mine = advantages.sum_discounted_future(jnp.asarray(x), jnp.asarray(segments), discount)
    np.testing.assert_allclose(mine * (segments > 0), wanted, atol=1e-6)


def test_group_advantages_follow_each_papers_formula():
    """A group of equal rewards is marked and has exactly 0."""
    rng = np.random.default_rng(5)
    rewards = rng.normal(size=(4, 5)).astype(np.float32)
    rewards[1], rewards[2] = 0.1, [1, 0, 0, 0, 0]
    for group in advantages.ADVANTAGE_NORMS:
        actual, constant = advantages.compute_group_advantages(jnp.asarray(rewards), group)
        np.testing.assert_array_equal(constant, [False, True, False, False])
        assert not actual[1].any()
        for p, g in np.ndindex(*rewards.shape):
            r, others = rewards[p], np.delete(rewards[p], g)
            wanted = {
                "std": (r[g] - r.mean()) / (r.std(ddof=1) + 1e-4),
                "mean": r[g] - r.mean(),
                "leave_one_out": r[g] - others.mean(),
            }
            np.testing.assert_allclose(actual[p, g], wanted[group], atol=1e-5)


def test_position_sums_count_trained_tokens_of_a_sequence():
    """Offsets count trained tokens within the sequence, whatever precedes it in the row."""
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 1, 1, 1]])
    mask = jnp.asarray([[0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 1, 1]], bool)
    positions = np.asarray(advantages.compute_response_positions(mask, segments))
    assert positions[0][np.asarray(mask[0])].tolist() == [0, 1, 0, 1]
    assert positions[1][np.asarray(mask[1])].tolist() == [0, 1, 2, 3]
    x = jnp.asarray([[9, 1, 2, 9, 3, 4, 9], [9, 9, 5, 6, 9, 7, 8]], jnp.float32)
    position_sums = advantages.sum_by_position(x, mask, segments, (0, 1, 3))
    assert {k: (float(a), float(n)) for k, (a, n) in position_sums.items()} == {
        **{"0": (1 + 3 + 5, 3), "1": (2 + 4 + 6 + 7, 4), "3": (8, 1)}
    }


def test_judge_reward_is_the_mean_log_likelihood():
    """Each token of a response has the response's mean log-likelihood."""
    logq = jnp.asarray([[-9.0, -1, -3, -2, -4]])
    mask, segments = jnp.asarray([[0, 1, 1, 0, 1]]), jnp.asarray([[1, 1, 1, 2, 2]])
    mean = advantages.mean_over_sequence(logq, mask, segments)
    np.testing.assert_allclose(mean, [[-2, -2, -2, -4, -4]])
