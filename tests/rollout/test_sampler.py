"""The sampler draws from the distribution it records, and each row independently of the others."""

import dataclasses

import jax
import numpy as np
import pytest

from distill import rollout
from distill.objectives import losses
from distill.policy import forward, policy
from distill.rollout import RolloutOptions, Sequence
from distill.rollout.sampling import Sampling
from distill.runtime import mesh as mesh_lib
from distill.training import microbatches
from models import families, transformer
from models.qwen3.config import Config
from tests.support.heads import token_stats

CONFIG = Config(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=256,
)
QWEN3 = families.make_model(CONFIG)
STOPS = (3, 7, 11, 13)
P, R = 12, 24


@pytest.fixture(scope="module")
def unplaced():
    return jax.jit(lambda key: families.init_params(CONFIG, key))(jax.random.key(0))


def placed(params, mesh):
    shardings = jax.tree.map(lambda p: p.sharding, mesh_lib.make_abstract_params(CONFIG, mesh))
    return jax.device_put(params, shardings)


@pytest.fixture(scope="module")
def params(unplaced):
    """On one device, on which all tests of this module compute."""
    mesh = mesh_lib.make_mesh(1, 1, 1)
    with mesh_lib.use_mesh(mesh):
        yield placed(unplaced, mesh)


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(14, 96, rng.integers(1, P + 1)).tolist() for _ in range(count)]


def sample(params, rows, numbers, samples=None, sampling=None, **options):
    keys = rollout.make_row_keys(jax.random.key(3), list(numbers), samples or [0] * len(rows))
    done = rollout.sample(
        rollout.SamplingModel(QWEN3, params, STOPS),
        [Sequence(prompt, key, R) for prompt, key in zip(rows, keys, strict=True)],
        sampling=sampling or Sampling(),
        options=RolloutOptions(**{"slots": 8, **options}),
    )
    return microbatches.make_unpacked_batch(list(done), len(rows), P + R)


def responses(batch):
    tokens, mask = np.asarray(batch.tokens_BT), np.asarray(batch.mask_BT)
    return [t[m].tolist() for t, m in zip(tokens, mask, strict=True)]


@pytest.fixture(scope="module")
def eight(params):
    return sample(params, prompts(8), range(8))


@pytest.mark.parametrize("kind", ["slabs", "plain"])
def test_recorded_log_probabilities_match_a_forward(params, kind):
    """Recorded log-probabilities are those of one plain forward, for random prompt lengths."""
    batch = sample(params, prompts(8), range(8), cache_backend=kind, page_size=8)
    stats = jax.jit(
        lambda b: token_stats(
            forward.compute_hidden(QWEN3, params, b),
            transformer.get_output_head(params),
            losses.shift(b.tokens_BT),
            loss_chunk_mib=1,
        )
    )(batch)
    mask = np.asarray(batch.mask_BT)
    scored = np.asarray(losses.unshift(stats["logp"]))
    assert mask.sum() > 50
    np.testing.assert_allclose(np.asarray(batch.sampler_logp_BT)[mask], scored[mask], atol=1e-4)


def test_pages_and_slabs_draw_the_same_tokens(params, eight):
    pages = sample(params, prompts(8), range(8), cache_backend="plain", page_size=8, stacked=True)
    assert responses(pages) == responses(eight)


def test_draws_of_a_row_are_the_same_in_any_batch(params, eight):
    rows, expected = prompts(8), responses(eight)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    shuffled = responses(sample(params, [rows[i] for i in order], order))
    assert shuffled == [expected[i] for i in order]
    assert responses(sample(params, [rows[5]] * 8, [5] * 8))[3] == expected[5]


def test_samples_of_a_prompt_differ(params):
    rows = responses(sample(params, [prompts(1)[0]] * 8, [0] * 8, list(range(8))))
    assert len({tuple(r) for r in rows}) == 8


def test_row_ends_with_a_stop_token_or_at_the_limit(eight):
    finished = np.any(np.asarray(eight.finished_BT), axis=1).tolist()
    assert 0 < sum(finished) < 8
    for row, done in zip(responses(eight), finished, strict=True):
        assert (row[-1] in STOPS) == done
        assert done or len(row) == R
        assert not set(row[:-1]) & set(STOPS)


def test_mask_covers_the_response_to_its_stop_token(eight):
    mask, segments = np.asarray(eight.mask_BT), np.asarray(eight.segments_BT)
    for row, segment, prompt in zip(mask, segments, prompts(8), strict=True):
        np.testing.assert_array_equal(row[len(prompt) :], segment[len(prompt) :] > 0)
        assert not row[: len(prompt)].any()
    assert not np.asarray(eight.sampler_logp_BT)[~mask].any()


def test_positions_count_real_tokens(eight):
    for segments, positions in zip(
        np.asarray(eight.segments_BT), np.asarray(eight.positions_BT), strict=True
    ):
        real = positions[segments > 0]
        np.testing.assert_array_equal(real, np.arange(len(real)))


@pytest.mark.parametrize("kind", ["slabs", "plain"])
def test_meshes_draw_the_same_tokens(unplaced, eight, kind):
    mesh = mesh_lib.make_mesh(1, 2, 4)
    with mesh_lib.use_mesh(mesh):
        batch = sample(
            placed(unplaced, mesh), prompts(8), range(8), cache_backend=kind, page_size=8
        )
    assert responses(batch) == responses(eight)
    np.testing.assert_allclose(
        np.asarray(batch.sampler_logp_BT), np.asarray(eight.sampler_logp_BT), atol=1e-4
    )


def test_greedy_records_the_model_log_probability(params):
    batch = sample(params, prompts(4), range(4), sampling=Sampling(temperature=0))
    again = sample(params, prompts(4), range(10, 14), sampling=Sampling(temperature=0))
    assert responses(batch) == responses(again)
    mask = np.asarray(batch.mask_BT)
    assert (np.asarray(batch.sampler_logp_BT)[mask] < 0).all()


def test_complete_draws_the_same_in_any_batch_and_from_any_start(params):
    subject = policy.Policy("tiny", CONFIG, QWEN3, params, None, STOPS)
    rows = prompts(7)

    def complete(prompts, batch_size, first=0):
        return list(
            rollout.complete(
                subject,
                prompts,
                rollout.SampleSpec(3, 8, seed=1, batch_size=batch_size),
                first=first,
            )
        )

    whole = complete(rows, 64)
    tokens = [[c.tokens for c in group] for group in whole]
    assert [len(group) for group in whole] == [3] * 7
    assert [[c.tokens for c in g] for g in complete(rows, 4)] == tokens
    assert [[c.tokens for c in g] for g in complete(rows[4:], 4, first=4)] == tokens[4:]


def test_length_buckets_are_few_and_close():
    sizes = {rollout.bucket_length(n) for n in range(1, 4097)}
    assert len(sizes) < 40
    assert all(n <= rollout.bucket_length(n) <= max(n + 15, 1.25 * n) for n in range(1, 4097))


def test_batch_is_frozen(eight):
    with pytest.raises(dataclasses.FrozenInstanceError):
        eight.tokens_BT = None
