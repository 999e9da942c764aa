"""Decoding: sequences come and go, are parked and go on, each drawn as if it were alone."""

import copy
import dataclasses
import functools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import monitoring

from distill import rollout
from distill.objectives import losses
from distill.policy import forward
from distill.rollout import RolloutOptions, SamplingModel, Sequence, decode
from distill.rollout import options as options_lib
from distill.rollout.sampling import Sampling
from distill.runtime import mesh as mesh_lib
from distill.training import microbatches
from models import families, transformer
from models.errors import UserError
from models.layers import slabs
from models.qwen3.config import Config
from tests.support.heads import token_stats

CONFIG = Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=2048,
)
QWEN3 = families.make_model(CONFIG)
STOPS = (3, 7)
P, R = 24, 40
SMALL = RolloutOptions(slots=8, max_length=P + R, segment=8, prefill_chunk=32)
PAGES = dataclasses.replace(SMALL, cache_backend="plain", page_size=8)


@pytest.fixture(autouse=True, scope="module")
def narrow():
    """So that short rows, too, lie in several blocks of a slab."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "MIN_BLOCK_TOKENS", 16)
        yield


@jax.jit
def _weights(key: jax.Array) -> transformer.Params:
    return families.init_params(CONFIG, key)


@functools.cache
def weights(seed: int, shape: tuple[int, ...]):
    mesh = mesh_lib.make_mesh(*shape)
    shardings = jax.tree.map(lambda p: p.sharding, mesh_lib.make_abstract_params(CONFIG, mesh))
    return mesh, jax.device_put(_weights(jax.random.key(seed)), shardings)


def ask(prompts: int, samples: int = 1, seed: int = 0, longest: int = R, first: int = 0):
    """Rows of random prompts and limits; those of row i are always the same."""
    found = []
    for p in range(first, first + prompts):
        rng = np.random.default_rng((seed, p))
        prompt = rng.integers(8, 64, rng.integers(1, P + 1)).tolist()
        keys = rollout.make_row_keys(jax.random.key(5), [p] * samples, range(samples))
        found += [Sequence(prompt, key, int(rng.integers(1, longest + 1))) for key in keys]
    return found


def run(
    rows: list[Sequence], options: RolloutOptions = SMALL, shape=(1, 1, 1), seed=0, **kwargs: Any
):
    mesh, params = weights(seed, shape)
    with mesh_lib.use_mesh(mesh):
        return list(
            rollout.sample(
                SamplingModel(QWEN3, params, STOPS),
                rows,
                sampling=Sampling(),
                options=options,
                **kwargs,
            )
        )


def drawn(rows: list[Sequence]):
    return [(row.tokens, row.finish_reason) for row in rows]


@jax.jit
def _scores(params: transformer.Params, batch: Any):
    stats = token_stats(
        forward.compute_hidden(QWEN3, params, batch),
        transformer.get_output_head(params),
        losses.shift(batch.tokens_BT),
        loss_chunk_mib=1,
    )
    return losses.unshift(stats["logp"])


def scored(rows: list[Sequence], seed: int = 0) -> list[list[float]]:
    """Log-probabilities of all tokens of each row by one plain forward on one device."""
    mesh, params = weights(seed, (1, 1, 1))
    with mesh_lib.use_mesh(mesh):
        batch = microbatches.make_unpacked_batch(rows, len(rows), P + R)
        logp = np.asarray(_scores(params, batch))
    return [x[m].tolist() for x, m in zip(logp, np.asarray(batch.mask_BT), strict=True)]


def close(found: list[list[float]], expected: list[list[float]], tolerance: float = 1e-4) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.fixture(scope="module")
def plain() -> list[Sequence]:
    """What 32 rows of 8 prompts draw, all at once."""
    return run(ask(8, 4), RolloutOptions(slots=32))


ONE, EIGHT, CONTEXT = (1, 1, 1), (1, 2, 4), (1, 1, 2, 1, 2)


@pytest.mark.parametrize(
    ("kind", "shape", "stacked"),
    [
        ("slabs", ONE, False),
        ("slabs", EIGHT, False),
        ("plain", ONE, True),
        ("plain", EIGHT, True),
        ("plain", CONTEXT, False),
    ],
)
def test_sampler_equals_scorer(plain, kind, shape, stacked) -> None:
    """Under refills, shared prompts, a prompt in pieces, sequences parked for want of room, and
    some that a budget stopped and that went on."""
    page = 4 if kind == "plain" else 0
    tight = 200 if kind == "plain" else 0
    options = RolloutOptions(
        8, P + R, 8, 16, cache_tokens=tight, page_size=page, cache_backend=kind, stacked=stacked
    )
    counts: Counter[str] = Counter()
    rows = run(ask(8, 4), options, shape, token_budget=200, counts=counts)
    unfinished = [row for row in rows if not row.finish_reason]
    assert any(row.tokens for row in unfinished) and any(row.finish_reason for row in rows)
    rows = run(rows, options, shape, counts=counts)
    assert counts["parked" if kind == "plain" else "resizes"]
    assert all(row.finish_reason for row in rows)
    assert drawn(rows) == drawn(plain)
    assert counts["tokens"] == sum(len(row.tokens) for row in rows)
    close([row.logprobs for row in rows], scored(rows))


@pytest.fixture(scope="module")
def thousand() -> tuple[list[Sequence], list[Sequence], Counter[str]]:
    """1,000 rows of mixed lengths and limits, as asked for and as they came, and what was done."""
    rows, counts = ask(1000), Counter[str]()
    return rows, run(rows, counts=counts), counts


def test_every_row_comes_once_and_in_order(thousand) -> None:
    rows, found, counts = thousand
    assert [id(row) for row in found] == [id(row) for row in rows]
    for row in found:
        assert row.finish_reason == ("stop" if row.tokens[-1] in STOPS else "length")
        assert not set(row.tokens[:-1]) & set(STOPS)
        assert len(row.tokens) <= row.limit
        assert row.finish_reason == "stop" or len(row.tokens) == row.limit
        assert len(row.tokens) == len(row.logprobs) == len(row.versions)
    assert counts["tokens"] == sum(len(row.tokens) for row in found)
    assert counts["queued_tokens"] >= 0.9 * counts["queued_slot_steps"]


def test_least_rows(plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single row has an empty one beside it where no fewer than two decode, as on GPUs."""
    mesh, _ = weights(0, (1, 2, 4))
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), shape=mesh.shape)
    assert (decode.get_min_rows(mesh), decode.get_min_rows(gpu)) == (2, 4)  # pyright: ignore
    assert not decode.prefers_stacked(mesh) and not decode.prefers_stacked(gpu)  # pyright: ignore
    monkeypatch.setattr(
        options_lib, "get_min_rows", lambda mesh: 2 * mesh_lib.count_row_shards(mesh)
    )
    counts: Counter[str] = Counter()
    options = RolloutOptions(
        slots=1, max_length=P + R, segment=16, prefill_chunk=32, cache_backend="plain", page_size=8
    )
    rows = run(ask(8, 4)[:3], options, counts=counts)
    assert drawn(rows) == drawn(plain)[:3]
    assert counts["slot_steps"] == 2 * counts["steps"]


COMPANIES = {
    "alone": (60, RolloutOptions(slots=1, max_length=P + R, segment=16, prefill_chunk=32)),
    "two rows, short segments": (
        200,
        RolloutOptions(slots=2, max_length=P + R, segment=5, prefill_chunk=16),
    ),
    "pages": (1000, PAGES),
    "few pages": (300, dataclasses.replace(PAGES, cache_tokens=120)),
    "small pages, stacked": (300, dataclasses.replace(PAGES, page_size=3, stacked=True)),
}


def test_ten_thousand_tokens_do_not_depend_on_company(thousand) -> None:
    """Alone, in any batch and order, parked and not: no row differs, not by a near tie either."""
    _, expected, _ = thousand
    assert sum(len(row.tokens) for row in expected) > 10_000
    for name, (count, options) in COMPANIES.items():
        rows = ask(count)
        order = np.random.default_rng(0).permutation(count)
        found = run([rows[i] for i in order], options)
        differing = sum(
            (found[at].tokens, found[at].finish_reason)
            != (expected[i].tokens, expected[i].finish_reason)
            for at, i in enumerate(order)
        )
        assert differing == 0, name


def test_rows_come_as_soon_as_they_and_those_before_have_ended() -> None:
    mesh, params = weights(0, (1, 1, 1))
    rows = ask(24)
    with mesh_lib.use_mesh(mesh):
        coming = rollout.sample(
            SamplingModel(QWEN3, params, STOPS),
            rows,
            sampling=Sampling(),
            options=RolloutOptions(slots=4),
        )
        assert next(coming) is rows[0]
        assert not rows[-1].tokens
        assert [id(row) for row in coming] == [id(row) for row in rows[1:]]


def test_the_last_samples_of_a_prompt_come_when_few_rows_are_left(plain) -> None:
    """Eight sequences end at once, and two samples of one prompt take their rows, of which fewer
    then go on."""
    rows = ask(8, 4)[:2]
    short = [Sequence([9 + i], (1, i), 1) for i in range(8)]
    counts: Counter[str] = Counter()
    found = run([*short, *rows], counts=counts)
    assert counts["resizes"] == 1 and drawn(found[8:]) == drawn(plain)[:2]
    close([row.logprobs for row in found[8:]], scored(rows))


def test_a_budget_parks_rows_that_go_on_under_newer_weights() -> None:
    """Nothing is lost or drawn twice; each token keeps its log-probability and its version."""
    rows, before = ask(6, 4), 0
    for version in range(20):
        kept = [copy.deepcopy(row) for row in rows]
        rows = run(rows, seed=version % 2, version=version, token_budget=60)
        for old, new in zip(kept, rows, strict=True):
            n = len(old.tokens)
            assert new.tokens[:n] == old.tokens and new.logprobs[:n] == old.logprobs
            assert new.versions == old.versions + [version] * (len(new.tokens) - n)
        total = sum(len(row.tokens) for row in rows)
        ended = all(row.finish_reason for row in rows)
        assert 60 <= total - before < 60 + SMALL.slots or ended
        before = total
        if ended:
            break
    assert all(row.finish_reason for row in rows) and version > 2
    under = [scored(rows, seed) for seed in (0, 1)]
    for i, row in enumerate(rows):
        expected = [under[v % 2][i][at] for at, v in enumerate(row.versions)]
        np.testing.assert_allclose(row.logprobs, expected, atol=1e-4)
    again = [copy.deepcopy(row) for row in rows]
    assert run(again) == rows  # ended rows are returned as they are


def test_a_cache_of_few_tokens_holds_fewer_sequences() -> None:
    """Slabs: as many as fit, each as long as it may be. Pages: more than these, for few become as
    long; and when the pool is full, the youngest are parked, and lose nothing."""
    mesh, _ = weights(0, ONE)
    tight = dataclasses.replace(SMALL, cache_tokens=160)
    shape = rollout.make_cache_shape(tight, CONFIG, mesh, "float32", 30, P + R)
    assert (shape.rows, shape.pages, shape.page_size) == (2, 2, P + R)
    pages = dataclasses.replace(PAGES, cache_tokens=160, slots=0)
    shape = rollout.make_cache_shape(pages, CONFIG, mesh, "float32", 30, P + R)
    assert (shape.rows, shape.pages, shape.max_pages_per_row) == (7, 20, 8)
    expected = drawn(run(ask(30)))
    for options in (tight, pages):
        counts: Counter[str] = Counter()
        assert drawn(run(ask(30), options, counts=counts)) == expected
        assert bool(counts["parked"]) == (options.cache_backend == "plain")


@pytest.mark.parametrize(
    "options",
    [  # segments of a length that no other test has: nothing is compiled already
        dataclasses.replace(SMALL, segment=7),
        dataclasses.replace(PAGES, segment=7, cache_tokens=120),
    ],
)
def test_nothing_is_compiled_after_the_first_step(options) -> None:
    """Eight programs at most, whatever prompts and lengths come later; a second step may meet the
    second of two sizes that the first did not need."""
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(about.get("fun_name")))

    def steps(first: int, count: int) -> None:
        for step in range(first, first + count):
            run(ask(12, 2, seed=7, first=100 * step), options)

    monitoring.register_event_duration_secs_listener(note)
    try:
        steps(0, 2)
        before = len(compiled)
        steps(2, 30)
    finally:
        monitoring.unregister_event_duration_listener(note)
    assert compiled[before:] == []
    named = {"for_decoding", "init_state", "prefill", "decode", "resize"}
    assert 3 <= sum(name.removeprefix("jit(").removesuffix(")") in named for name in compiled) <= 8


def test_a_segment_moves_nothing_between_host_and_device() -> None:
    """Nor does anything else, but where the host says so: its tokens and its decisions."""
    rows = ask(12, 2)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match=r"[Dd]isallowed"):
            jax.jit(lambda x: x + 1)(np.ones(3))  # the guard guards
        run(rows)
    assert all(row.finish_reason for row in rows)


@pytest.mark.parametrize(
    "options",
    [RolloutOptions(slots=16), RolloutOptions(slots=16, cache_backend="plain", page_size=32)],
)
def test_a_group_reads_its_prompt_once(options) -> None:
    """8 prompts of 512 tokens for 8 samples each, and 64 prompts."""
    rng = np.random.default_rng(0)
    different = [Sequence(rng.integers(8, 64, 512).tolist(), (0, i), 2) for i in range(64)]
    shared = [Sequence(different[i // 8].prompt, (0, i), 2) for i in range(64)]
    counts: Counter[str] = Counter()
    run(different, options, counts=counts)
    assert counts["prompt_tokens"] == 64 * 511
    counts.clear()
    run(shared, options, counts=counts)
    assert counts["prompt_tokens"] == 8 * 511


@pytest.mark.parametrize("kind", ["slabs", "plain"])
def test_the_state_is_updated_in_place(kind) -> None:
    mesh, params = weights(0, EIGHT)
    with mesh_lib.use_mesh(mesh):
        qwen3, params = decode.prepare_weights(
            QWEN3, params, mesh, stacked=False, gather_weights=True, param_dtype=""
        )
        options = RolloutOptions(8, 64, page_size=8, cache_backend=kind)
        shape = rollout.make_cache_shape(options, CONFIG, mesh, "float32", 8, 64)
        decoder = decode.Decoder(qwen3, Sampling(), STOPS, shape, 8)
        state = decode.init_state(decoder)
        given = (
            jnp.zeros(n, jnp.int32) for n in (2, (7, 8), (8, shape.max_pages_per_row), (2, 2, 4))
        )
        compiled = decode.decode.lower(decoder, params, state, *given).compile()
        per_device = 2 * 2 * 8 * 64 * 4 * 8 * 4 // 8  # keys and values, L, B, S, K, H, bytes
        analysis: Any = compiled.memory_analysis()
        assert per_device < analysis.alias_size_in_bytes
        for x in jax.tree.leaves(state.cache):
            axes = {axis for part in x.sharding.spec if part for axis in np.atleast_1d(part)}
            assert {"fsdp", "tensor"} <= axes
        for leaf in jax.tree.leaves(params):
            assert "fsdp" not in str(leaf.sharding.spec)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.05)])
@pytest.mark.parametrize("kind", ["slabs", "plain"])
def test_a_smaller_cache_moves_log_probabilities_a_little(dtype, tolerance, kind) -> None:
    options = RolloutOptions(
        8, segment=8, cache_dtype=dtype, cache_backend=kind, page_size=8, prefill_chunk=16
    )
    rows = run(ask(16, 2), options)
    error = np.abs(np.concatenate([row.logprobs for row in rows]) - np.concatenate(scored(rows)))
    assert 0 < error.mean() < tolerance / 4 and error.max() < tolerance


def test_a_row_of_nan_ends_alone() -> None:
    mesh, params = weights(0, (1, 1, 1))
    poisoned = {**params, "embed": params["embed"].at[9].set(jnp.nan)}
    # The head is tied, so that token 9 would poison every row: here it is a matrix of its own.
    poisoned["head"] = params["embed"]
    untied = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    good, bad = Sequence([10, 11], (0, 1), 6), Sequence([10, 9, 11], (0, 2), 6)
    with mesh_lib.use_mesh(mesh):
        rows = list(
            rollout.sample(
                SamplingModel(families.make_model(untied), poisoned, ()),
                [good, bad],
                sampling=Sampling(),
                options=RolloutOptions(slots=2),
            )
        )
    assert rows[1].finish_reason == "error" and not rows[1].tokens
    assert rows[0].finish_reason == "length" and np.isfinite(rows[0].logprobs).all()


def test_what_cannot_be_sampled_is_named_before_anything_runs() -> None:
    key, ok = (0, 0), Sequence([9], (0, 0), 4)
    with pytest.raises(UserError, match=r"^in.jsonl:3: the prompt is empty$"):
        run([ok, Sequence([], key, 4, where="in.jsonl:3")])
    with pytest.raises(UserError, match=r"^row 1: a prompt of 60 tokens and 5 new ones exceed"):
        run([ok, Sequence([9] * 60, key, 5)], RolloutOptions(slots=8, max_length=64))
    with pytest.raises(UserError, match=r"^row 0: .* exceed the 8 tokens"):
        run([Sequence([9] * 60, key, 5)], RolloutOptions(slots=8, cache_tokens=16), (1, 2, 4))
    assert not ok.tokens


@pytest.mark.parametrize("kind", ["slabs", "plain"])
def test_a_simulation_does_what_the_engine_does(kind: str) -> None:
    """Segment by segment, with groups, lines of prompts, and a pool that is too small."""
    options = dataclasses.replace(SMALL, cache_backend=kind)
    if kind == "plain":
        options = dataclasses.replace(options, cache_tokens=160, page_size=8)
    rows, counts = ask(12, 2, seed=3), Counter()
    told = [dataclasses.replace(row, tokens=[]) for row in rows]
    mesh, params = weights(0, ONE)
    with mesh_lib.use_mesh(mesh):
        subject = SamplingModel(QWEN3, params, ())
        list(rollout.sample(subject, rows, sampling=Sampling(), options=options, counts=counts))
    longest = max(row.max_length for row in rows)
    shape = rollout.make_cache_shape(options, CONFIG, mesh, "float32", len(rows), longest)
    sizes = rollout.get_line_sizes(options, shape)
    ends = [row.limit for row in told]
    found = rollout.simulate(told, ends, shape, options.segment, sizes, sum)
    assert found.steps + found.shrunk_steps == counts["steps"]
    assert (
        found.steps * shape.rows + found.shrunk_steps * rollout.get_shrunk_rows(shape)
        == (counts["slot_steps"])
    )
    assert found.live_row_steps == counts["tokens"] == sum(ends)
    assert found.segments == counts["segments"]
    assert found.num_parked == counts["parked"] and (kind == "slabs") == (found.num_parked == 0)
    assert sum(T * n for T, n in found.line_counts.items()) == counts["read_tokens"]


def test_lengths_have_their_mean() -> None:
    drawn = rollout.draw_lengths(20_000, 500, 16_000)
    assert np.mean(drawn) == pytest.approx(500, rel=0.03)
    assert max(rollout.draw_lengths(1000, 500, 700)) == 700
    assert (
        drawn
        == rollout.draw_lengths(20_000, 500, 16_000)
        != rollout.draw_lengths(20_000, 500, 16_000, seed=1)
    )
