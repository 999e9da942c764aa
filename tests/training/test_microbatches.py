"""Tests that packed rows train as unpacked ones do, for any objective, and how rows are packed."""

import dataclasses
import types
from typing import Any

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import quickstart
from distill.data import collate, packing
from distill.data.collate import BatchLayout, SampledExample
from distill.data.examples import Example
from distill.objectives import losses
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.teachers import local
from distill.training import grading, loop, microbatches, stages, trainer
from distill.training import update as update_lib
from models.families import make_model
from tests.support.updates import CONFIG, TEACHER, placed

P, R, ROOM, COUNT = 6, 12, 5, 16
T = P + R
SPARSE = dataclasses.replace(
    CONFIG, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
)
FURTHER = dataclasses.replace(TEACHER, hidden_size=48)


def examples_of(form: BatchLayout, written: int = COUNT) -> list[Example]:
    """Makes sequences of random lengths, the first `written` of which are the student's."""
    rng, examples = np.random.default_rng(0), []
    for i in range(COUNT):
        n, m, num_context = (
            rng.integers(1, P + 1),
            rng.integers(1, R + 1),
            rng.integers(0, ROOM + 1),
        )
        prompt, response, more = (rng.integers(0, 96, k).tolist() for k in (n, m, num_context))
        experts = []
        if form.routing:  # the last token is never read
            layers, chosen = form.routing
            drawn = np.argsort(rng.random((n + m - 1, layers, 4)))[..., :chosen].astype(np.int16)
            experts = [drawn[:2], drawn[2:]]
        common: dict[str, Any] = {
            "teacher_prompt": more + prompt,
            "source_id": i % 2,
            "thinking": i % 3 > 0,
        }
        top = [
            [[int(v), -1.0 - k] for k, v in enumerate(rng.permutation(96)[:3])] for _ in range(m)
        ]
        if i >= written:
            examples.append(Example(prompt, response, "", f"read {i}", teacher_top=top, **common))
            continue
        examples.append(
            SampledExample(
                *(prompt, response, "", f"written {i}"),
                **common,
                teacher_top=top,
                logprobs=(-4.5 + 0.3 * rng.normal(size=m)).tolist(),
                finished=bool(i % 4),
                experts=experts,
                advantage=float(rng.normal()) if form.has_advantages else None,
            )
        )
    return examples


def alone(rows: int, minibatches: int) -> list[list[microbatches.PackedRows]]:
    """Lays out one sequence per row."""
    minibatches_of_rows = []
    for j in range(minibatches):
        listed = [(i,) for i in range(j, COUNT, minibatches)]
        minibatches_of_rows.append(
            [tuple(listed[k : k + rows]) for k in range(0, len(listed), rows)]
        )
    return minibatches_of_rows


def read(config: Any, seed: int, mesh: Any) -> Policy:
    return Policy("", config, make_model(config), placed(config, seed, mesh), None, ())


def trained(case: dict, packed: bool, sizes: tuple[int, ...] = (1, 1, 1)):
    """Trains one step; returns its metrics, the change of the parameters and the number of rows."""
    mesh = mesh_lib.make_mesh(*sizes)
    settings = {"epochs": 1, "minibatches": 1, "teachers": 1, "temperature": 1.0} | case
    config = SPARSE if settings.get("sparse") else CONFIG
    loss = dataclasses.replace(losses.OBJECTIVES[settings["objective"]], **settings.get("loss", {}))
    shares = {"source": np.eye(2), "weights": np.full((2, 2), [0.25, 0.75])}
    shares = shares.get(settings.get("share", ""))
    written = settings.get("written", COUNT)
    stored = loss.teacher_output == "top"
    form = BatchLayout(
        T,
        R,
        top_k=3 if stored else 0,
        context_tokens=ROOM if settings.get("context") else 0,
        has_sampler_logprobs=written == COUNT,
        has_advantages=loss.reward > 0,
        routing=config.routing_shape if settings.get("sparse") else None,
        teacher_weights=shares,
    )
    examples = examples_of(form, written)
    rows, minibatches = mesh.size, settings["minibatches"]
    taken = microbatches.pack_examples(examples, rows, minibatches, form)
    if not packed:
        taken = alone(rows, minibatches)
    with mesh_lib.use_mesh(mesh):
        each = [] if stored or not loss.teacher else [TEACHER, FURTHER][: settings["teachers"]]
        who = [
            local.Teacher(ConfigDict({"path": "x"}), read(c, 5 + i, mesh))
            for i, c in enumerate(each)
        ]
        optimizer = optax.sgd(1.0 if settings["epochs"] * minibatches == 1 else 0.01)
        params = placed(config, 0, mesh)
        before = jax.tree.map(np.array, params)
        state = update_lib.init_train_state(optimizer, params, 0)
        mib = 4e-3 * mesh.size
        options = update_lib.UpdateOptions(
            R, mib, overlap_k=20 if loss.teacher else 0, temperature=settings["temperature"]
        )
        programs = update_lib.make_update(make_model(config), optimizer, loss, options, state)
        stage: Any = types.SimpleNamespace(
            sampled_rows=written,
            updates_per_step=settings["epochs"] * minibatches,
            c=types.SimpleNamespace(epochs=settings["epochs"], accumulate=1),
        )
        train = trainer.Trainer(
            *(stage, mesh, programs, local.place_heads(who)),
            read(config, 9, mesh) if loss.reference else None,
            *(None, mib, settings["temperature"]),
        )
        work = microbatches.make_microbatches(taken, examples, form, mesh)
        state, measured, kept_stats, _ = train.step(state, work, COUNT)
        require_aligned_tops(kept_stats)
        assert int(state.step) == 1
        moved = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before)
    return {k: float(x) for k, x in measured.items()}, moved, sum(map(len, taken[0]))


def require_aligned_tops(kept_stats: trainer.KeptStats) -> None:
    """Wherever a token is among the likeliest, its log-probability there is its own: the lists
    belong to their tokens, not to the neighbours."""
    found = []
    for micro, stats in kept_stats:
        batch = micro.make_batch()
        for side, name in (("student", "logp"), ("teacher", "teacher_logp")):
            if f"{side}_top_ids" not in stats or name not in stats:
                continue
            ids, logp = (np.asarray(stats[f"{side}_top_{x}"]) for x in ("ids", "logp"))
            is_drawn = (ids == np.asarray(batch.tokens_BT)[..., None]) & batch.mask_BT[..., None]
            expected = np.broadcast_to(np.asarray(stats[name])[..., None], logp.shape)
            np.testing.assert_allclose(logp[is_drawn], expected[is_drawn], rtol=1e-5, atol=1e-5)
            found.append(is_drawn.sum())
    assert not found or sum(found) > 0


EXACT: dict[str, Any] = {"objective": "opd"}
SAMPLED = {"objective": "opd_sampled"}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"objective": name} for name in losses.OBJECTIVES},
    "topk": {**EXACT, "loss": {"estimator": "topk", "k": 5}},
    "k2": {**EXACT, "loss": {"estimator": "k2"}},
    "k3": {**EXACT, "loss": {"estimator": "k3", "divergence": "forward"}},
    "stored": {
        "objective": "distill",
        "loss": {"teacher_output": "top", "teacher_topk": 3, "estimator": "topk", "k": 3},
    },
    "by sequence": {**EXACT, "loss": {"aggregation": "sequence"}},
    "constant": {**EXACT, "loss": {"aggregation": "constant"}},
    "baseline": {**SAMPLED, "loss": {"baseline": True, "discount": 0.9}},
    "credit": {**EXACT, "loss": {"discount": 0.9, "ratio": "sequence"}},
    "reference": {"objective": "hybrid", "loss": {"reference": 0.1, "tis_clip": 2.0}},
    "by source": {**EXACT, "teachers": 2, "share": "source"},
    "by weights": {**EXACT, "teachers": 2, "share": "weights"},
    "context": {**EXACT, "context": True, "teachers": 2, "share": "source"},
    "mixed": {"objective": "gkd", "written": 8, "context": True},
    "experts": {"objective": "hybrid", "sparse": True},
    "updates": {"objective": "gspo", "minibatches": 2, "epochs": 2, "loss": {"reference": 0.1}},
    "taught updates": {**SAMPLED, "minibatches": 2, "epochs": 2, "context": True},
    "hot": {**SAMPLED, "temperature": 0.7},
}


def same(packed, unpacked) -> None:
    (actual, moved, few), (expected, by, many) = packed, unpacked
    assert few < 0.8 * many
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(actual[name], x, rtol=1e-5, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(by), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert max(np.abs(x).max() for x in jax.tree.leaves(by)) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_train_as_unpacked_ones_do(name: str) -> None:
    """Compares the loss, all metrics and the gradient, which is the step of plain SGD."""
    same(trained(CASES[name], True), trained(CASES[name], False))


@pytest.mark.parametrize("name", ["gspo", "context", "mixed", "experts", "taught updates"])
def test_packed_rows_train_as_unpacked_ones_on_a_mesh_of_eight(name: str) -> None:
    eight, packed = trained(CASES[name], True, (1, 4, 2)), trained(CASES[name], False)
    same((*eight[:2], 1), packed)


def test_a_judge_scores_packed_rows_like_unpacked_ones() -> None:
    """The score is the mean log-probability of each response under a mixture of two teachers with a
    context."""
    mesh, form = (
        mesh_lib.make_mesh(1, 1, 1),
        BatchLayout(
            T, R, context_tokens=ROOM, has_sampler_logprobs=True, teacher_weights=np.eye(2)
        ),
    )
    examples, scores_by_layout = examples_of(form), []
    with mesh_lib.use_mesh(mesh):
        who = [
            local.Teacher(ConfigDict({"path": "x"}), read(c, 5, mesh)) for c in (TEACHER, FURTHER)
        ]
        for taken in (microbatches.pack_examples(examples, 2, 2, form), alone(2, 2)):
            scores = grading.score_with_teachers(who, taken, examples, form, mesh, 1.0, None)
            scores_by_layout.append(scores)
    np.testing.assert_allclose(*scores_by_layout, rtol=1e-5)
    assert len(np.unique(scores_by_layout[0])) == COUNT


def test_at_most_one_micro_batch_of_teacher_states_is_alive(tmp_path, monkeypatch) -> None:
    """In a run with several micro-batches and updates per step, earlier teacher states are freed
    before a teacher scores the next micro-batch, and none remain after a step."""
    c = quickstart.get_config("tiny")
    c.opd.batch_size, c.opd.samples, c.opd.minibatches, c.opd.accumulate = 16, 2, 2, 4
    c.mesh.fsdp, c.log.overlap_top_k = 1, 0  # transcripts' likeliest tokens have three axes too
    score, alive_before_and_after, T = local.score, [], stages.get_row_tokens(c.opd)

    def alive() -> int:
        return sum(x.ndim == 3 and x.shape[1] == T for x in jax.live_arrays())

    def score_and_count(*arguments):
        before = alive()
        scored = score(*arguments)
        alive_before_and_after.append((before, alive()))
        return scored

    monkeypatch.setattr(local, "score", score_and_count)
    loop.run(c, tmp_path)
    assert len(alive_before_and_after) >= 3 * 2 * 2 and set(alive_before_and_after) == {(0, 1)}
    assert not alive()


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), max_size=60),
    st.integers(1, 7),
    st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_packing_places_every_example_once_within_bounds(
    sizes: list[tuple[int, int]], rows: int, minibatches: int
) -> None:
    """Every example is in its own minibatch once; no row is too long for the student or for a
    teacher with a context; micro-batches are full and not empty; the number of rows is at most
    twice what is needed, and the same in every process."""
    form = BatchLayout(50, 49, context_tokens=20)
    examples = [Example([1], [2] * (n - 1), "", "", teacher_prompt=[1] * (1 + m)) for n, m in sizes]
    packed = microbatches.pack_examples(examples, rows, minibatches, form)
    assert packed == microbatches.pack_examples(list(examples), rows, minibatches, form)
    assert len(packed) == minibatches
    for j, part in enumerate(packed):
        assert part and all(len(micro) == rows for micro in part)
        taken = [row for micro in part for row in micro]
        assert sorted(i for row in taken for i in row) == list(range(j, len(sizes), minibatches))
        for row in taken:
            assert sum(sizes[i][0] for i in row) <= 50
            assert sum(sum(sizes[i]) for i in row) <= 70
        assert len(part) == 1 or all(any(micro) for micro in part)
        full = [row for row in taken if row]
        need = max(sum(n for n, _ in sizes[j::minibatches]) / 50, 1 / 50)
        need = max(need, sum(n + m for n, m in sizes[j::minibatches]) / 70)
        assert len(full) <= 3 * need + 1


def test_first_fit_decreasing_packs_well() -> None:
    """With log-normal lengths, the longest truncated at a row, almost no place stays empty."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(np.log(2048) - 0.5, 1, 512), 16_384).astype(int) + 150
    packed = packing.pack_first_fit_decreasing(
        {i: (int(n),) for i, n in enumerate(lengths)}, (18_432,)
    )
    assert len(packed) <= np.ceil(lengths.sum() / 18_432) + 1


def test_stored_samples_have_the_samplers_log_probabilities_in_their_columns():
    layout = BatchLayout(8, 3, has_sampler_logprobs=True)
    rows = [
        [Example([1, 2], [3, 4], "", "", logprobs=[-0.5, -1.5], finished=True)],
        [Example([5], [6, 7, 8, 9], "", "", logprobs=[-1.0, -2.0, -3.0, -4.0], finished=True)],
    ]
    batch = collate.collate_rows(rows, layout)
    expected = [[0, 0, -0.5, -1.5, 0, 0, 0, 0], [0, -1, -2, -3, 0, 0, 0, 0]]  # the second is cut
    np.testing.assert_array_equal(batch.sampler_logp_BT, np.array(expected, np.float32))
    assert batch.finished_BT is not None
    assert batch.finished_BT.any(axis=1).tolist() == [True, False]
