"""Draws of one token: kept sets against brute force, frequencies against probabilities."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from distill.rollout import sampling as sampling_lib
from distill.rollout.sampling import Sampling
from distill.runtime import mesh as mesh_lib
from models.errors import UserError

CASES = [
    Sampling(),
    Sampling(0.7),
    Sampling(1.6, top_k=20),
    Sampling(0.6, top_k=20, top_p=0.95),
    Sampling(top_p=0.9),
    Sampling(top_p=0.3, min_p=0.02),
    Sampling(1.2, min_p=0.1),
    Sampling(top_k=1),
    Sampling(top_p=1e-6),
    Sampling(top_p=0.99),
    Sampling(0.7, top_k=300, top_p=0.8, min_p=0.001),
]

FEW = [CASES[0], CASES[3], CASES[5], CASES[-1]]  # for tests that compile more
draw = jax.jit(sampling_lib.draw_tokens, static_argnums=2)
truncate = jax.jit(sampling_lib.truncate_logits, static_argnums=1)


def find_kept(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Returns the kept tokens [V] by definition, in float64; ties with a kept token are kept."""
    z = logits.astype(np.float32) / np.float32(s.temperature)
    keep = np.ones(len(z), bool)
    if s.top_k:
        keep = z >= np.sort(z)[-s.top_k]
    p = np.exp(z.astype(np.float64) - z.max()) * keep
    p /= p.sum()
    if s.top_p < 1:
        order = np.argsort(-p, kind="stable")
        ahead = np.cumsum(p[order]) - p[order]
        least = p[order][ahead < s.top_p].min()
        keep &= p >= least
    return keep & (p >= s.min_p * p.max())


def probabilities(logits: np.ndarray, s: Sampling) -> np.ndarray:
    z = logits.astype(np.float64) / s.temperature
    p = np.exp(z - z.max()) * find_kept(logits, s)
    return p / p.sum()


def rows(vocabulary: int, ties: bool) -> np.ndarray:
    """Returns logits from nearly flat to nearly a point, so that nuclei are small and large."""
    rng = np.random.default_rng(vocabulary)
    logits = rng.normal(size=(12, vocabulary)) * np.geomspace(0.05, 8, 12)[:, None]
    return (np.round(logits * 2) / 2 if ties else logits).astype(np.float32)


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_kept_tokens_match_the_definition(sampling: Sampling) -> None:
    for vocabulary in (512, 6000):  # the second is searched by blocks of 16
        for ties in (False, True):
            logits = rows(vocabulary, ties)
            ours = np.asarray(truncate(logits, sampling)) > -np.inf
            for row, mask in zip(logits, ours, strict=True):
                np.testing.assert_array_equal(mask, find_kept(row, sampling))


def test_truncation_matches_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = rows(512, ties=False)
    for s in CASES:
        reference: Any = torch.tensor(logits) / s.temperature
        warpers = [theirs.TopKLogitsWarper(s.top_k)] if s.top_k else []
        warpers += [theirs.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
        warpers += [theirs.MinPLogitsWarper(s.min_p)] if s.min_p else []
        no_ids: Any = None
        for warper in warpers:
            reference = warper(no_ids, reference)
        ours = truncate(logits, s)
        np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-6)


def test_top_k_of_a_real_vocabulary_matches_a_sort() -> None:
    x = np.random.default_rng(0).normal(size=(3, 151_936)).astype(np.float32)
    x[1] = np.round(x[1])  # thousands of ties for the first place
    for k in (1, 20, 128, 600):
        values, places = sampling_lib.find_top_k(jnp.asarray(x), k)
        np.testing.assert_array_equal(values, -np.sort(-x, axis=-1)[:, :k])
        np.testing.assert_array_equal(np.take_along_axis(x, np.asarray(places), 1), values)
        assert all(len(set(row)) == k for row in np.asarray(places).tolist())


@pytest.mark.parametrize("sampling", FEW, ids=str)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    """Chi-square test of 20,000 draws (fixed keys), and their recorded log-probabilities."""
    count, logits = 20_000, rows(384, ties=False)[6]
    keys = jax.random.split(jax.random.key(7), count)
    same = jnp.broadcast_to(logits[None], (count, 384))
    tokens, logp = draw(same, keys, sampling)
    expected = probabilities(logits, sampling)
    seen = np.bincount(np.asarray(tokens), minlength=384)
    assert not seen[expected == 0].any()
    np.testing.assert_allclose(np.exp(np.asarray(logp)), expected[np.asarray(tokens)], rtol=2e-5)
    often = expected * count >= 10
    counts, wanted = seen[often].tolist(), (expected[often] * count).tolist()
    if not often.all():  # rare tokens as one bin
        counts, wanted = [*counts, seen[~often].sum()], [*wanted, expected[~often].sum() * count]
    if wanted[-1] == 0:
        counts, wanted = counts[:-1], wanted[:-1]
    if len(counts) > 1:
        assert stats.chisquare(counts, wanted).pvalue > 1e-3


def test_draws_are_the_same_in_any_batch_and_on_any_mesh() -> None:
    """Alone, beside rows with large nuclei, and split over eight devices."""
    logits = rows(384, ties=False)
    keys = jax.random.split(jax.random.key(1), len(logits))
    mesh = mesh_lib.make_mesh(1, 2, 4)
    for sampling in FEW:
        tokens, logp = draw(logits, keys, sampling)
        reverse, reverse_logp = draw(logits[::-1], keys[::-1], sampling)
        np.testing.assert_array_equal(reverse[::-1], tokens)
        np.testing.assert_array_equal(reverse_logp[::-1], logp)
        for i in (0, 6, 11):
            alone, alone_logp = draw(logits[i : i + 1], keys[i : i + 1], sampling)
            assert alone[0] == tokens[i]
            assert float(alone_logp[0]) == pytest.approx(float(logp[i]), abs=1e-6)
        put = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        split, split_logp = draw(jax.device_put(logits, put), keys, sampling)
        np.testing.assert_array_equal(split, tokens)
        np.testing.assert_allclose(split_logp, logp, atol=1e-6)


def test_presence_penalty_counts_each_token_once() -> None:
    logits = jnp.asarray(rows(384, ties=False)[7:8])
    likely = int(jnp.argmax(logits[0]))
    seen = jnp.zeros((1, 384), bool).at[0, [likely, 3]].set(True)
    penalised = logits.at[0, [likely, 3]].add(-1.5)
    key = jax.random.split(jax.random.key(0), 1)
    for plain in (Sampling(0.7, top_k=20, top_p=0.8), Sampling()):
        token, logp = draw(logits, key, replace(plain, presence_penalty=1.5), seen)
        expected = draw(penalised, key, plain)
        assert (token[0], logp[0]) == (expected[0][0], expected[1][0])
    token, logp = draw(logits, key, Sampling(0, presence_penalty=1e4), seen)
    assert token[0] == jnp.argmax(logits.at[0, [likely, 3]].set(-jnp.inf)[0])
    assert logp[0] == pytest.approx(float(jax.nn.log_softmax(logits[0])[token[0]]), abs=1e-6)


def test_greedy_takes_the_first_of_tied_tokens() -> None:
    logits = rows(384, ties=True)
    keys = jax.random.split(jax.random.key(0), len(logits))
    tokens, logp = draw(jnp.asarray(logits), keys, Sampling(0))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logits).max(-1), atol=1e-6)


@pytest.mark.parametrize("sampling", [Sampling(0), *FEW], ids=str)
def test_nan_row_is_marked_and_changes_no_other(sampling: Sampling) -> None:
    logits = rows(384, ties=False)
    keys = jax.random.split(jax.random.key(0), len(logits))
    tokens, logp = draw(jnp.asarray(logits), keys, sampling)
    logits[2, 17], logits[4], logits[5, 0], logits[9] = np.nan, -np.inf, np.inf, np.nan
    broken, broken_logp = draw(jnp.asarray(logits), keys, sampling)
    bad = np.isin(np.arange(12), (2, 4, 5, 9))
    np.testing.assert_array_equal(broken, np.where(bad, -1, tokens))
    np.testing.assert_array_equal(broken_logp, np.where(bad, np.nan, logp))


def test_model_log_probabilities_match_log_softmax() -> None:
    logits = jnp.asarray(rows(384, ties=False))
    expected = np.asarray(jax.nn.log_softmax(logits))
    ids, logp = sampling_lib.find_model_top(logits, 5)
    np.testing.assert_array_equal(ids, np.argsort(-expected, axis=-1, kind="stable")[:, :5])
    np.testing.assert_allclose(logp, np.take_along_axis(expected, np.asarray(ids), 1), atol=1e-5)
    np.testing.assert_allclose(
        sampling_lib.compute_model_logp(logits, ids[:, 3]), np.asarray(logp)[:, 3], atol=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: must be 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": math.nan}, "min_p=nan"),
        ({"presence_penalty": math.inf}, "presence_penalty=inf"),
    ],
)
def test_out_of_bounds_field_is_refused_by_name(fields: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Sampling(**fields)  # pyright: ignore[reportArgumentType]


def test_top_k_above_the_vocabulary_is_refused() -> None:
    Sampling(top_k=384).check_vocab_size(384)
    with pytest.raises(UserError, match=r"^top_k=385: the vocabulary has 384 tokens$"):
        sampling_lib.truncate_logits(jnp.zeros((1, 384)), Sampling(top_k=385))


def test_rows_with_their_own_sampling_draw_as_all_with_one() -> None:
    """Also where top_k or the nucleus is larger than the tokens that are searched first."""
    cases = [*FEW, Sampling(top_p=0.99), Sampling(0.0), Sampling(presence_penalty=-1.5)]
    by_row = jax.jit(
        lambda logits, keys, rows, seen: sampling_lib.draw_tokens(
            logits, keys, sampling_lib.RowSampling(*rows.T), seen
        )
    )
    for ties in (False, True):
        logits_BV = np.repeat(rows(6000, ties), 2, axis=0)
        logits_BV[7, 5] = np.nan
        B = len(logits_BV)
        keys_B = jax.random.split(jax.random.key(1), B)
        seen_BV = np.random.default_rng(2).random(logits_BV.shape) < 0.3
        drawn = [draw(logits_BV, keys_B, case, seen_BV) for case in cases]
        for shift in range(len(cases)):  # each row is drawn with each, beside others
            numbers = [(row + shift) % len(cases) for row in range(B)]
            own_B5 = sampling_lib.pack_samplings([cases[number] for number in numbers])
            tokens_B, logp_B = by_row(logits_BV, keys_B, own_B5, seen_BV)
            for row, number in enumerate(numbers):
                token_B, expected_B = drawn[number]
                assert tokens_B[row] == token_B[row]
                np.testing.assert_allclose(logp_B[row], expected_B[row], rtol=1e-5, atol=1e-6)
