"""The sampler: it draws from what it says, and a row's tokens are its own."""

import dataclasses

import jax
import numpy as np
import pytest

from distill import data, losses, policy, rollout
from distill import mesh as mesh_lib
from distill.sampling import Sampling
from models.qwen3 import model
from models.qwen3.config import Config

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
QWEN3 = model.Qwen3(CONFIG)
STOPS = (3, 7, 11, 13)
P, R = 12, 24


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: model.init(CONFIG, key))(jax.random.key(0))


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(14, 96, rng.integers(1, P + 1)).tolist() for _ in range(count)]


def sample(params, rows, numbers, samples=None, qwen3=QWEN3, **kwargs):
    tokens, segments = data.left_pad(rows, P)
    keys = rollout.row_keys(
        jax.random.key(3), np.array(numbers), np.array(samples or [0] * len(rows))
    )
    kwargs = {"sampling": Sampling(), "stacked": False, "max_new_tokens": R, **kwargs}
    return rollout.sample(qwen3, params, tokens, segments, keys, stop_ids=STOPS, **kwargs)


def responses(batch):
    tokens, mask = np.asarray(batch.tokens_BT), np.asarray(batch.mask_BT)
    return [t[m].tolist() for t, m in zip(tokens, mask, strict=True)]


@pytest.fixture(scope="module")
def eight(params):
    return sample(params, prompts(8), range(8))


@pytest.mark.parametrize("stacked", [False, True])
def test_sampler_equals_scorer(params, stacked):
    """Recorded log-probs are those of one plain forward, under random prompt lengths."""
    batch = sample(params, prompts(8), range(8), stacked=stacked)
    stats = jax.jit(
        lambda b: losses.token_stats(
            policy.hidden(QWEN3, params, b),
            model.head(params),
            losses.shift(b.tokens_BT),
            logits_mib=1,
        )
    )(batch)
    mask = np.asarray(batch.mask_BT)
    scored = np.asarray(losses.unshift(stats["logp"]))
    assert mask.sum() > 50
    np.testing.assert_allclose(np.asarray(batch.sampler_logp_BT)[mask], scored[mask], atol=1e-4)


def test_layouts_draw_the_same_tokens(params, eight):
    assert responses(sample(params, prompts(8), range(8), stacked=True)) == responses(eight)


def test_a_row_is_independent_of_its_company(params, eight):
    rows, all_of_them = prompts(8), responses(eight)
    order = [5, 2, 7, 0, 1, 6, 3, 4]
    shuffled = responses(sample(params, [rows[i] for i in order], order))
    assert shuffled == [all_of_them[i] for i in order]
    assert responses(sample(params, [rows[5]] * 8, [5] * 8))[3] == all_of_them[5]


def test_samples_of_a_prompt_differ(params):
    rows = responses(sample(params, [prompts(1)[0]] * 8, [0] * 8, list(range(8))))
    assert len({tuple(r) for r in rows}) == 8


def test_stops(eight):
    """A row ends with its first stop token, or at the limit and then without one."""
    finished = np.asarray(eight.finished_B)
    assert 0 < finished.sum() < 8
    for row, done in zip(responses(eight), finished, strict=True):
        assert (row[-1] in STOPS) == done
        assert done or len(row) == R
        assert not set(row[:-1]) & set(STOPS)


def test_nothing_after_the_stop(eight):
    mask, segments = np.asarray(eight.mask_BT), np.asarray(eight.segments_BT)
    np.testing.assert_array_equal(mask[:, P:], segments[:, P:] > 0)
    assert not mask[:, :P].any()
    assert not np.asarray(eight.sampler_logp_BT)[~mask].any()


def test_positions_count_real_tokens(eight):
    for segments, positions in zip(
        np.asarray(eight.segments_BT), np.asarray(eight.positions_BT), strict=True
    ):
        real = positions[segments > 0]
        np.testing.assert_array_equal(real, np.arange(len(real)))


@pytest.mark.parametrize("stacked", [False, True])
def test_meshes_draw_the_same_tokens(params, eight, stacked):
    mesh = mesh_lib.make(1, 2, 4)
    with mesh_lib.use(mesh):
        shardings = jax.tree.map(lambda p: p.sharding, mesh_lib.parameters(CONFIG, mesh))
        batch = sample(jax.device_put(params, shardings), prompts(8), range(8), stacked=stacked)
    assert responses(batch) == responses(eight)
    np.testing.assert_allclose(batch.sampler_logp_BT, eight.sampler_logp_BT, atol=1e-4)


def test_greedy_records_the_models_own_probability(params):
    batch = sample(params, prompts(4), range(4), sampling=Sampling(temperature=0))
    again = sample(params, prompts(4), range(10, 14), sampling=Sampling(temperature=0))
    assert responses(batch) == responses(again)
    mask = np.asarray(batch.mask_BT)
    assert (np.asarray(batch.sampler_logp_BT)[mask] < 0).all()


def test_presence_penalty_reaches_every_token_written(params):
    """So large a one, and no token comes twice in a response; prompts do not count."""
    batch = sample(params, prompts(8), range(8), sampling=Sampling(presence_penalty=1e6))
    assert all(len(set(row)) == len(row) for row in responses(batch))
    assert any(
        set(row) & set(prompt) for row, prompt in zip(responses(batch), prompts(8), strict=True)
    )


def test_the_models_own_log_probabilities_on_demand(params, eight):
    batch = sample(params, prompts(8), range(8), top_logprobs=96)
    mask, tokens = np.asarray(batch.mask_BT), np.asarray(batch.tokens_BT)
    assert responses(batch) == responses(eight)
    own = np.asarray(batch.model_logp_BT)
    np.testing.assert_allclose(own, eight.sampler_logp_BT, atol=1e-5)
    ids, logp = np.asarray(batch.top_ids_BTk)[mask], np.asarray(batch.top_logp_BTk)[mask]
    np.testing.assert_allclose(np.exp(logp).sum(-1), 1, atol=1e-4)
    assert (np.diff(logp) <= 0).all()
    np.testing.assert_allclose(logp[ids == tokens[mask][:, None]], own[mask], atol=1e-5)


def test_a_row_of_nan_ends_and_the_others_go_on(params, eight):
    """One token, which only the third prompt has, has an embedding of nan."""
    rows = prompts(8)
    token = next(t for t in rows[2] if not any(t in row for i, row in enumerate(rows) if i != 2))
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    poisoned = {**params, "embed": params["embed"].at[token].set(np.nan), "head": params["embed"]}
    batch = sample(poisoned, rows, range(8), qwen3=model.Qwen3(config))
    found = responses(batch)
    assert found[2] == [] and not batch.finished_B[2]
    assert batch.tokens_BT[2, P] == -1
    same = [i for i in range(8) if i != 2 and token not in responses(eight)[i]]
    assert len(same) >= 4
    assert [found[i] for i in same] == [responses(eight)[i] for i in same]
    assert np.isfinite(np.asarray(batch.sampler_logp_BT)).all()


def test_complete_is_independent_of_batches_and_of_where_it_starts(params):
    mesh = mesh_lib.make(1, 1, 1)
    with mesh_lib.use(mesh):
        shardings = jax.tree.map(lambda p: p.sharding, mesh_lib.parameters(CONFIG, mesh))
        subject = policy.Policy(
            "tiny", CONFIG, QWEN3, jax.device_put(params, shardings), None, STOPS
        )
        rows = prompts(7)

        def complete(prompts, batch_size, first=0):
            return list(
                rollout.complete(
                    subject,
                    prompts,
                    samples=3,
                    key=jax.random.key(1),
                    max_new_tokens=8,
                    sampling=Sampling(),
                    batch_size=batch_size,
                    first=first,
                )
            )

        whole = complete(rows, 64)
        tokens = [[c.tokens for c in group] for group in whole]
        assert [len(group) for group in whole] == [3] * 7
        assert [[c.tokens for c in g] for g in complete(rows, 4)] == tokens
        assert [[c.tokens for c in g] for g in complete(rows[4:], 4, first=4)] == tokens[4:]


def test_buckets_are_few_and_near():
    sizes = {rollout.bucket(n) for n in range(1, 4097)}
    assert len(sizes) < 40
    assert all(n <= rollout.bucket(n) <= max(n + 15, 1.25 * n) for n in range(1, 4097))


def test_batch_is_frozen(eight):
    with pytest.raises(dataclasses.FrozenInstanceError):
        eight.tokens_BT = None
