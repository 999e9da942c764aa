"""Drafts: sequences are drawn token by token as without them, in fewer steps."""

import dataclasses
from collections import Counter
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from distill import rollout
from distill.rollout import RolloutOptions, Sequence, draft_lengths, drafts
from distill.rollout.draft_lengths import DraftLengths, StepCost
from distill.rollout.sampling import Sampling
from models.errors import UserError
from tests.support.tiny_decoding import CONFIG, get_draws, make_rows, sample_rows, weights

V = 64


def test_table_knows_what_followed_last() -> None:
    """Guesses are those of dictionaries of the last one, two and three tokens, longest first."""
    rng, groups = np.random.default_rng(0), np.array([5, 5, -7, 9], np.int32)
    texts = rng.integers(0, 6, (4, 60)).astype(np.int32)
    table, known = drafts.init_table(1, 4, 100_000), {}
    read = 20
    line, rows = np.full((1, 96), 3, np.int32), np.full((1, 96), -1, np.int32)
    for row in range(4):
        line[0, row * 20 : row * 20 + read - 1] = texts[row, : read - 1]
        rows[0, row * 20 : row * 20 + read - 1] = row
        for i in range(1, read - 1):
            remember(known, groups[row], texts[row], i)
    table = drafts.add_prompt_tokens(table, jnp.array(groups), jnp.array(line), jnp.array(rows), V)
    table = dataclasses.replace(table, recent_BC=jnp.array(texts[:, read - 3 : read - 1]))
    at, num_found = np.full(4, read - 1), 0
    for _ in range(8):
        newest_B = jnp.array(texts[np.arange(4), at])
        found = np.asarray(drafts.find_drafts(table, jnp.array(groups), newest_B, 4, V))
        expected = [guess(known, groups[b], texts[b, : at[b] + 1], 4) for b in range(4)]
        assert found.tolist() == expected
        num_found += (found >= 0).sum()
        counts = rng.integers(0, 4, 4)
        new = np.stack([texts[b, at[b] + 1 : at[b] + 4] for b in range(4)])
        added = (jnp.array(groups), newest_B, jnp.array(new), jnp.array(counts, jnp.int32), V)
        table = drafts.add_drawn_tokens(table, *added)
        for b in range(4):
            for i in range(at[b] + 1, at[b] + 1 + counts[b]):
                remember(known, groups[b], texts[b], i)
        at += counts
    assert num_found > 60


def remember(known: dict, group: int, text: Any, i: int) -> None:
    for order in (1, 2, 3):
        if i >= order:
            known[group, tuple(text[i - order : i])] = int(text[i])


def guess(known: dict, group: int, text: Any, k: int) -> list[int]:
    text, out = text.tolist(), []
    while len(out) < k:
        met = [known.get((group, tuple(text[-order:]))) for order in (3, 2, 1)]
        token = next((token for token in met if token is not None), None)
        if token is None:
            break
        out.append(token)
        text.append(token)
    return out + [-1] * (k - len(out))


def test_length_is_chosen_by_what_was_accepted() -> None:
    """On an accelerator long drafts pay early, on a CPU with many rows never; those that do not pay
    are tried again now and then."""
    assert draft_lengths.list_lengths(1) == (0, 1)
    assert draft_lengths.list_lengths(7) == (0, 3, 7)
    assert DraftLengths((), StepCost(1.0)).choose(8) is None
    chosen = []
    for rate in (0.9, 0.02):
        lengths = DraftLengths((0, 3, 7), StepCost(160.0))
        for _ in range(20):
            lengths.choose(8)
            lengths.add_counts(100, int(100 * rate))
        chosen.append([lengths.choose(8) for _ in range(40)])
    assert chosen[0] == [7] * 40
    assert set(chosen[1]) == {0, 3} and chosen[1].count(3) == 2
    assert DraftLengths((0, 3, 7), StepCost(6.0)).choose(256) == 0
    tpu, gpu = map(draft_lengths.estimate_step_cost, ("tpu", "gpu"))
    assert tpu.get_ratio(32, 3) == 1 and tpu.get_ratio(160, 3) == 4
    assert tpu.get_ratio(64, 3, cached=5.0) == 1 and gpu.get_ratio(8, 3, cached=1.0) == 2.5


def test_lengths_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"^draft_tokens=0: must be a whole number, at least 1; "):
        RolloutOptions(drafts="ngram", draft_tokens=0)
    with pytest.raises(UserError, match=r"^drafts='ngrams': must be one of '', 'ngram'"):
        RolloutOptions(drafts="ngrams")
    mesh, _ = weights(0, (1, 1, 1))
    long = RolloutOptions(drafts="ngram", draft_tokens=17, page_size=16, cache_backend="plain")
    with pytest.raises(UserError, match=r"^draft_tokens=17: at most the 16 tokens of a page"):
        rollout.make_cache_shape(long, CONFIG, mesh, "float32", 8, 64)


def test_simulation_takes_fewer_steps_with_drafts() -> None:
    """Two tokens a step: half of the steps, of which each reads as much as before."""
    mesh, _ = weights(0, (1, 1, 1))
    options = RolloutOptions(8, 300, cache_backend="plain", page_size=16, drafts="ngram")
    shape = rollout.make_cache_shape(options, CONFIG, mesh, "float32", 20, 300)
    tokens, lengths = rollout.get_segment_tokens(options, shape), rollout.draw_lengths(20, 100, 280)
    assert tokens == 2 * rollout.get_segment_tokens(RolloutOptions(), shape)

    def simulate(tokens_per_step: float) -> rollout.Simulation:
        rows = [Sequence([9] * 20, (0, i), 280) for i in range(20)]
        return rollout.simulate(rows, lengths, shape, tokens, (32,), sum, tokens_per_step)

    plain, fewer = simulate(1.0), simulate(2.0)
    assert plain.segments == fewer.segments and plain.live_row_steps == sum(lengths)
    assert 0.5 * plain.steps <= fewer.steps <= 0.5 * plain.steps + plain.segments
    assert fewer.bytes_read == pytest.approx(plain.bytes_read / 2, rel=0.02)


@pytest.fixture
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts as long as may be always pay."""
    monkeypatch.setattr(draft_lengths, "estimate_step_cost", lambda platform: StepCost(1e9))


SMALL = RolloutOptions(8, 64, 8, 32, drafts="ngram", draft_tokens=3)
TIGHT = dataclasses.replace(SMALL, cache_backend="plain", page_size=8, cache_tokens=200)
ONE, EIGHT = (1, 1, 1), (1, 2, 4)
SHARP = Sampling(0.2)  # of random weights: much repeats itself


def check_same_draws(
    prompts: int, samples: int, options: RolloutOptions, shape: Any, sampling: Sampling
) -> Counter[str]:
    """Checks draws, and log-probabilities; returns the counts."""
    counts = Counter()
    plain = dataclasses.replace(options, drafts="", cache_tokens=0)
    expected = sample_rows(make_rows(prompts, samples), plain, sampling=sampling)
    rows = make_rows(prompts, samples)
    found = sample_rows(rows, options, shape, sampling=sampling, counts=counts, token_budget=100)
    assert any(row.tokens for row in found if not row.finish_reason)
    found = sample_rows(found, options, shape, sampling=sampling, counts=counts)
    assert get_draws(found) == get_draws(expected)
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(row.logprobs, other.logprobs, atol=1e-4)
    assert counts["tokens"] == sum(len(row.tokens) for row in rows)
    assert counts["tokens"] == counts["row_steps"] + counts["accepted"]
    assert counts["accepted"] <= counts["compared"] and counts["accepted"] <= counts["drafted"]
    return counts


@pytest.mark.parametrize(
    ("options", "shape", "sampling"),
    [
        pytest.param(TIGHT, ONE, SHARP, id="pages"),
        pytest.param(SMALL, EIGHT, SHARP, id="slabs, mesh"),
        pytest.param(TIGHT, EIGHT, SHARP, id="pages, mesh", marks=pytest.mark.long),
        pytest.param(SMALL, ONE, Sampling(0.0), id="slabs, greedy", marks=pytest.mark.long),
        pytest.param(SMALL, ONE, Sampling(), id="slabs, 1", marks=pytest.mark.long),
    ],
)
def test_draws_are_those_without_drafts(free_drafts, options, shape, sampling) -> None:
    """With groups, refills, sequences parked for lack of room, batches that shrink, and sequences
    that a budget stopped and a second call continued."""
    counts = check_same_draws(4, 8, options, shape, sampling)
    if sampling is SHARP:
        assert counts["tokens"] > 1.4 * counts["row_steps"]
    assert counts["parked" if options.cache_backend else "resizes"]
