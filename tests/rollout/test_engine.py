"""Decoding: sequences are inserted, parked and resumed, and each is drawn as if it were alone."""

import copy
import dataclasses
import re
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
from distill.rollout import (
    RolloutOptions,
    SamplingModel,
    Sequence,
    decode,
    decode_weights,
    draft_lengths,
    sampler,
)
from distill.rollout import options as options_lib
from distill.rollout.draft_lengths import StepCost
from distill.rollout.engine import Engine
from distill.rollout.sampling import Sampling
from distill.runtime import mesh as mesh_lib
from distill.training import microbatches
from models import families, transformer
from models.errors import UserError
from models.layers import slabs
from tests.support.heads import token_stats
from tests.support.tiny_decoding import (
    CONFIG,
    QWEN3,
    SMALL,
    STOPS,
    P,
    R,
    get_draws,
    make_rows,
    sample_rows,
    weights,
)

PAGES = dataclasses.replace(SMALL, cache_backend="plain", page_size=8)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Short rows, too, then lie in several blocks of a slab."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "MIN_BLOCK_TOKENS", 16)
        yield


@jax.jit
def _scores(params: transformer.Params, batch: Any):
    stats = token_stats(
        forward.compute_hidden(QWEN3, params, batch),
        transformer.get_output_head(params),
        losses.shift(batch.tokens_BT),
        loss_chunk_mib=1,
    )
    return losses.unshift(stats["logp"])


def score(rows: list[Sequence], seed: int = 0) -> list[list[float]]:
    """Returns log-probabilities of each row's tokens by one plain forward on one device."""
    mesh, params = weights(seed, (1, 1, 1))
    with mesh_lib.use_mesh(mesh):
        batch = microbatches.make_unpacked_batch(rows, len(rows), P + R)
        logp = np.asarray(_scores(params, batch))
    return [x[m].tolist() for x, m in zip(logp, np.asarray(batch.mask_BT), strict=True)]


def assert_close(
    actual: list[list[float]], expected: list[list[float]], tolerance: float = 1e-4
) -> None:
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.fixture(scope="module")
def plain() -> list[Sequence]:
    """32 rows of 8 prompts, drawn all at once."""
    return sample_rows(make_rows(8, 4), RolloutOptions(slots=32))


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
def test_rows_draw_the_same_and_match_a_forward(plain, kind, shape, stacked) -> None:
    """With refills, shared prompts, prompts in pieces, sequences parked for lack of room, and
    sequences that a budget stopped and a second call continued."""
    page = 4 if kind == "plain" else 0
    tight = 200 if kind == "plain" else 0
    options = RolloutOptions(
        8, P + R, 8, 16, cache_tokens=tight, page_size=page, cache_backend=kind, stacked=stacked
    )
    counts: Counter[str] = Counter()
    rows = sample_rows(make_rows(8, 4), options, shape, token_budget=200, counts=counts)
    unfinished = [row for row in rows if not row.finish_reason]
    assert any(row.tokens for row in unfinished) and any(row.finish_reason for row in rows)
    rows = sample_rows(rows, options, shape, counts=counts)
    assert counts["parked" if kind == "plain" else "resizes"]
    assert all(row.finish_reason for row in rows)
    assert get_draws(rows) == get_draws(plain)
    assert counts["tokens"] == sum(len(row.tokens) for row in rows)
    assert_close([row.logprobs for row in rows], score(rows))


@pytest.fixture(scope="module")
def thousand() -> tuple[list[Sequence], list[Sequence], Counter[str]]:
    """1,000 rows of mixed lengths and limits as requested, as yielded, and the counts."""
    rows, counts = make_rows(1000), Counter[str]()
    return rows, sample_rows(rows, counts=counts), counts


def test_every_row_comes_once_and_in_order(thousand) -> None:
    rows, done, counts = thousand
    assert [id(row) for row in done] == [id(row) for row in rows]
    for row in done:
        assert row.finish_reason == ("stop" if row.tokens[-1] in STOPS else "length")
        assert not set(row.tokens[:-1]) & set(STOPS)
        assert len(row.tokens) <= row.limit
        assert row.finish_reason == "stop" or len(row.tokens) == row.limit
        assert len(row.tokens) == len(row.logprobs) == len(row.versions)
    assert counts["tokens"] == sum(len(row.tokens) for row in done)
    assert counts["queued_tokens"] >= 0.9 * counts["queued_slot_steps"]


def test_at_least_two_rows_decode_on_gpus(plain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single sequence decodes beside an empty row."""
    mesh, _ = weights(0, (1, 2, 4))
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), shape=mesh.shape)
    assert (options_lib.get_min_rows(mesh), options_lib.get_min_rows(gpu)) == (2, 4)  # pyright: ignore
    assert not decode_weights.prefers_stacked(mesh) and not decode_weights.prefers_stacked(gpu)  # pyright: ignore
    monkeypatch.setattr(
        options_lib, "get_min_rows", lambda mesh: 2 * mesh_lib.count_row_shards(mesh)
    )
    counts: Counter[str] = Counter()
    options = RolloutOptions(
        slots=1, max_length=P + R, segment=16, prefill_chunk=32, cache_backend="plain", page_size=8
    )
    rows = sample_rows(make_rows(8, 4)[:3], options, counts=counts)
    assert get_draws(rows) == get_draws(plain)[:3]
    assert counts["slot_steps"] == 2 * counts["steps"]


BATCHES = {
    "alone": (60, RolloutOptions(slots=1, max_length=P + R, segment=16, prefill_chunk=32)),
    "two rows, short segments": (
        200,
        RolloutOptions(slots=2, max_length=P + R, segment=5, prefill_chunk=16),
    ),
    "pages": (1000, PAGES),
    "few pages": (300, dataclasses.replace(PAGES, cache_tokens=120)),
    "small pages, stacked": (300, dataclasses.replace(PAGES, page_size=3, stacked=True)),
}


def test_ten_thousand_tokens_are_the_same_in_any_batch(thousand) -> None:
    """Alone, in any batch and order, parked or not: no row differs, not even by a near tie."""
    _, expected, _ = thousand
    assert sum(len(row.tokens) for row in expected) > 10_000
    for name, (count, options) in BATCHES.items():
        rows = make_rows(count)
        order = np.random.default_rng(0).permutation(count)
        done = sample_rows([rows[i] for i in order], options)
        assert get_draws(done) == get_draws([expected[i] for i in order]), name


def test_row_is_yielded_once_it_and_all_before_have_ended() -> None:
    mesh, params = weights(0, (1, 1, 1))
    rows = make_rows(24)
    with mesh_lib.use_mesh(mesh):
        stream = rollout.sample(
            SamplingModel(QWEN3, params, STOPS),
            rows,
            sampling=Sampling(),
            options=RolloutOptions(slots=4),
        )
        assert next(stream) is rows[0]
        assert not rows[-1].tokens
        assert [id(row) for row in stream] == [id(row) for row in rows[1:]]


def test_batch_shrinks_after_the_last_samples_of_a_prompt(plain) -> None:
    """Eight sequences end at once, two samples of one prompt take their rows, and the batch then
    shrinks to fewer."""
    rows = make_rows(8, 4)[:2]
    short = [Sequence([9 + i], (1, i), 1) for i in range(8)]
    counts: Counter[str] = Counter()
    done = sample_rows([*short, *rows], counts=counts)
    assert counts["resizes"] == 1 and get_draws(done[8:]) == get_draws(plain)[:2]
    assert_close([row.logprobs for row in done[8:]], score(rows))


def test_rows_stopped_by_a_budget_go_on_under_newer_weights() -> None:
    """No token is lost or drawn twice; each keeps its log-probability and its version."""
    rows, before = make_rows(6, 4), 0
    for version in range(20):
        kept = [copy.deepcopy(row) for row in rows]
        rows = sample_rows(rows, seed=version % 2, version=version, token_budget=60)
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
    scores = [score(rows, seed) for seed in (0, 1)]
    for i, row in enumerate(rows):
        expected = [scores[v % 2][i][t] for t, v in enumerate(row.versions)]
        np.testing.assert_allclose(row.logprobs, expected, atol=1e-4)
    again = [copy.deepcopy(row) for row in rows]
    assert sample_rows(again) == rows  # ended rows are returned as they are


def test_small_cache_holds_fewer_sequences() -> None:
    """Slabs hold as many as fit at full length. Pages hold more, because few become that long; when
    the pool is full, the youngest are parked and lose nothing."""
    mesh, _ = weights(0, ONE)
    tight = dataclasses.replace(SMALL, cache_tokens=160)
    shape = rollout.make_cache_shape(tight, CONFIG, mesh, "float32", 30, P + R)
    assert (shape.rows, shape.pages, shape.page_size) == (2, 2, P + R)
    pages = dataclasses.replace(PAGES, cache_tokens=160, slots=0)
    shape = rollout.make_cache_shape(pages, CONFIG, mesh, "float32", 30, P + R)
    assert (shape.rows, shape.pages, shape.max_pages_per_row) == (7, 20, 8)
    expected = get_draws(sample_rows(make_rows(30)))
    for options in (tight, pages):
        counts: Counter[str] = Counter()
        assert get_draws(sample_rows(make_rows(30), options, counts=counts)) == expected
        assert bool(counts["parked"]) == (options.cache_backend == "plain")


@pytest.mark.parametrize(
    "options",
    [  # a segment length that no other test uses, so that nothing is compiled yet
        dataclasses.replace(SMALL, segment=7),
        dataclasses.replace(PAGES, segment=7, cache_tokens=120),
    ],
)
def test_nothing_is_compiled_after_the_first_step(options) -> None:
    """At most eight programs, whatever prompts and lengths follow; the second step may need the
    other of two sizes."""
    compiled: list[str] = []

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(str(about.get("fun_name")))

    def steps(first: int, count: int) -> None:
        for step in range(first, first + count):
            sample_rows(make_rows(12, 2, seed=7, first=100 * step), options)

    monitoring.register_event_duration_secs_listener(note)
    try:
        steps(0, 2)
        before = len(compiled)
        steps(2, 30)
    finally:
        monitoring.unregister_event_duration_listener(note)
    assert compiled[before:] == []
    programs = {"convert_weights", "init_state", "prefill", "decode", "resize"}
    names = [name.removeprefix("jit(").removesuffix(")") for name in compiled]
    assert "decode" in names and sum(name in programs for name in names) <= 8


def test_sampling_makes_no_implicit_transfers() -> None:
    """All transfers are explicit: the tokens and the host's decisions."""
    rows = make_rows(12, 2)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match=r"[Dd]isallowed"):
            jax.jit(lambda x: x + 1)(np.ones(3))  # the guard guards
        sample_rows(rows)
    assert all(row.finish_reason for row in rows)


@pytest.mark.parametrize(
    "options",
    [RolloutOptions(slots=16), RolloutOptions(slots=16, cache_backend="plain", page_size=32)],
)
def test_samples_of_a_prompt_read_it_once(options) -> None:
    """64 prompts of 512 tokens, then 8 of them with 8 samples each."""
    rng = np.random.default_rng(0)
    different = [Sequence(rng.integers(8, 64, 512).tolist(), (0, i), 2) for i in range(64)]
    shared = [Sequence(different[i // 8].prompt, (0, i), 2) for i in range(64)]
    counts: Counter[str] = Counter()
    sample_rows(different, options, counts=counts)
    assert counts["prompt_tokens"] == 64 * 511
    counts.clear()
    sample_rows(shared, options, counts=counts)
    assert counts["prompt_tokens"] == 8 * 511


def test_prompts_are_read_without_copying_the_slabs() -> None:
    """A copy of all rows for each line of prompts takes longer than the model."""
    mesh, params = weights(0, (1, 1, 1))
    with mesh_lib.use_mesh(mesh):
        qwen3, params = decode_weights.prepare_weights(
            QWEN3, params, mesh, stacked=False, gather_weights=True, param_dtype=""
        )
        shape = rollout.make_cache_shape(SMALL, CONFIG, mesh, "float32", 8, 64)
        decoder = decode.Decoder(qwen3, Sampling(), STOPS, shape, 8)
        state = decode.init_state(decoder)
        given = (jnp.zeros(n, jnp.int32) for n in ((3, 1, 32), (8, 1), 8, (1, 9)))
        text = str(decode.prefill.lower(decoder, params, state, *given).compile().as_text())
    for size in {",".join(map(str, x.shape)) for x in jax.tree.leaves(state.cache)}:
        assert f"= f32[{size}]" in text
        assert not re.search(rf"= f32\[{size}\]\S* copy\(", text)


@pytest.mark.parametrize("kind", ["slabs", "plain"])
def test_state_is_updated_in_place(kind) -> None:
    mesh, params = weights(0, EIGHT)
    with mesh_lib.use_mesh(mesh):
        qwen3, params = decode_weights.prepare_weights(
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
def test_cache_of_lower_precision_changes_log_probabilities_slightly(
    dtype, tolerance, kind
) -> None:
    options = RolloutOptions(
        8, segment=8, cache_dtype=dtype, cache_backend=kind, page_size=8, prefill_chunk=16
    )
    rows = sample_rows(make_rows(16, 2), options)
    error = np.abs(np.concatenate([row.logprobs for row in rows]) - np.concatenate(score(rows)))
    assert 0 < error.mean() < tolerance / 4 and error.max() < tolerance


def test_row_with_nan_logits_ends_alone() -> None:
    mesh, params = weights(0, (1, 1, 1))
    poisoned = {**params, "embed": params["embed"].at[9].set(jnp.nan)}
    # A tied head would poison every row through token 9: here the head is a separate matrix.
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


def test_row_that_cannot_be_sampled_is_refused_before_anything_runs() -> None:
    key, ok = (0, 0), Sequence([9], (0, 0), 4)
    with pytest.raises(UserError, match=r"^in.jsonl:3: the prompt is empty$"):
        sample_rows([ok, Sequence([], key, 4, where="in.jsonl:3")])
    with pytest.raises(UserError, match=r"^row 1: a prompt of 60 tokens and 5 new ones exceed"):
        sample_rows([ok, Sequence([9] * 60, key, 5)], RolloutOptions(slots=8, max_length=64))
    with pytest.raises(UserError, match=r"^row 0: .* exceed the 8 tokens"):
        sample_rows(
            [Sequence([9] * 60, key, 5)], RolloutOptions(slots=8, cache_tokens=16), (1, 2, 4)
        )
    assert not ok.tokens


@pytest.mark.parametrize("kind", ["slabs", "plain"])
def test_simulation_counts_what_the_engine_does(kind: str) -> None:
    """With groups, lines of prompts, and a pool that is too small."""
    options = dataclasses.replace(SMALL, cache_backend=kind)
    if kind == "plain":
        options = dataclasses.replace(options, cache_tokens=160, page_size=8)
    rows, counts = make_rows(12, 2, seed=3), Counter()
    simulated = [dataclasses.replace(row, tokens=[]) for row in rows]
    mesh, params = weights(0, ONE)
    with mesh_lib.use_mesh(mesh):
        subject = SamplingModel(QWEN3, params, ())
        list(rollout.sample(subject, rows, sampling=Sampling(), options=options, counts=counts))
    longest = max(row.max_length for row in rows)
    shape = rollout.make_cache_shape(options, CONFIG, mesh, "float32", len(rows), longest)
    sizes = rollout.get_line_sizes(options, shape)
    ends = [row.limit for row in simulated]
    found = rollout.simulate(simulated, ends, shape, options.segment, sizes, sum)
    assert found.steps + found.shrunk_steps == counts["steps"]
    assert (
        found.steps * shape.rows + found.shrunk_steps * rollout.get_shrunk_rows(shape)
        == (counts["slot_steps"])
    )
    assert found.live_row_steps == counts["tokens"] == sum(ends)
    assert found.segments == counts["segments"]
    assert found.num_parked == counts["parked"] and (kind == "slabs") == (found.num_parked == 0)
    assert sum(T * n for T, n in found.line_counts.items()) == counts["read_tokens"]


def test_drawn_lengths_have_the_mean() -> None:
    lengths = rollout.draw_lengths(20_000, 500, 16_000)
    assert np.mean(lengths) == pytest.approx(500, rel=0.03)
    assert max(rollout.draw_lengths(1000, 500, 700)) == 700
    assert lengths == rollout.draw_lengths(20_000, 500, 16_000)
    assert lengths != rollout.draw_lengths(20_000, 500, 16_000, seed=1)


@pytest.mark.parametrize(
    "options",
    [
        PAGES,
        pytest.param(SMALL, marks=pytest.mark.long),
        pytest.param(dataclasses.replace(PAGES, drafts="ngram"), marks=pytest.mark.long),
    ],
    ids=["plain", "slabs", "drafts"],
)
def test_sequences_join_a_running_engine_with_their_own_sampling(
    options: RolloutOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draws as it would alone, records only what it wants, and may be left off at any time."""
    free = StepCost(1e9)  # drafts always pay
    monkeypatch.setattr(draft_lengths, "estimate_step_cost", lambda platform: free)
    mesh, params = weights(0, (1, 1, 1))
    options = dataclasses.replace(options, top_logprobs=2)
    samplings = [Sampling(0.7, top_k=5), Sampling(presence_penalty=2.0)]
    asked = make_rows(10, samples=2, longest=20)
    for number, row in enumerate(asked):
        row.sampling = samplings[number % len(samplings)]
        row.wants_logprobs = number % 3 == 0
    model = SamplingModel(QWEN3, params, STOPS)
    expected: list[Sequence] = [*asked]
    for first, sampling in enumerate(samplings):
        rows = [row.copy() for row in asked[first :: len(samplings)]]
        plain = dataclasses.replace(options, drafts="")
        drawn = rollout.sample(model, rows, sampling=sampling, options=plain)
        expected[first :: len(samplings)] = list(drawn)
    unwanted, harvested = asked[5], []
    with mesh_lib.use_mesh(mesh):
        shape = options_lib.make_cache_shape(options, CONFIG, mesh, "float32", 8, P + R)
        decoder, variables = sampler.prepare_decoder(model, Sampling(), options, shape, by_row=True)
        engine = Engine(
            *(decoder, variables, [], options, 0, Counter()),
            ended=lambda row: row is unwanted,
            harvested=harvested.extend,
        )
        assert not engine.advance(None)
        for row in asked:  # joins while the others decode
            engine.scheduler.add_sequence(row)
            engine.advance(None)
        while engine.advance(None):
            pass
        assert not engine.advance(None) and engine.scheduler.is_done
    for row, alone in zip(asked, expected, strict=True):
        if row is unwanted:
            assert row.tokens == alone.tokens[: len(row.tokens)]
            continue
        assert (row.tokens, row.finish_reason) == (alone.tokens, alone.finish_reason)
        if row.wants_logprobs:
            assert row.top_logprobs is not None and alone.top_logprobs is not None
            ids = [[i for i, _ in top] for top in row.top_logprobs]
            assert ids == [[i for i, _ in top] for top in alone.top_logprobs]
            np.testing.assert_allclose(row.model_logprobs, alone.model_logprobs, atol=1e-4)  # pyright: ignore
        else:
            assert row.top_logprobs is None and row.model_logprobs is None
    assert {id(row) for row in harvested} == {id(row) for row in asked}
