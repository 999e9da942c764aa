"""Ending responses that have drifted from the teachers: what is refused, which end, and where."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from distill import rollout
from distill.batch import Batch
from distill.policy import forward, policy
from distill.rewards import graders
from distill.runtime import mesh as mesh_lib
from distill.training import collect, drift, loop, setup, stages
from models import transformer
from models.errors import UserError
from tests.support.paths import ROOT

EVERY = 8


def config(**changes):
    c = quickstart.get_config("tiny")
    c.student.path, c.teacher.path = str(ROOT / "assets/student"), str(ROOT / "assets/teacher")
    c.mesh.fsdp, c.opd.drift.every = 1, EVERY
    c.opd.update_from_flattened_dict({k.replace("__", "."): x for k, x in changes.items()})
    return c


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drift__kl": -1.0}, "kl=-1.0: must be at least 0 (no checks)"),
        ({"drift__every": 0}, "every=0: must be a whole number, at least 1"),
        ({"drift__every": 52}, "every=52: no response goes on after max_response_tokens=52"),
        ({"objective": "distill"}, "kl=0.5: distill samples nothing"),
        ({"objective": "grpo", "samples": 4}, "kl=0.5: grpo has no teacher to drift from"),
        ({"objective": "hybrid", "samples": 4}, "no answer to reward"),
        ({"rollout__asynchronous": True}, "samples while the teachers score"),
        ({"rollout__token_budget": 64}, "keeps responses"),
        (
            {"objective": "opd_sampled", "loss__teacher_output": "token"},
            "needs a teacher's hidden states",
        ),
    ],
)
def test_checks_that_do_not_apply_are_refused(changes, words):
    """One line, before any model is read."""
    with pytest.raises(UserError) as error:
        stages.resolve_objective("opd", config(**{"drift__kl": 0.5, **changes}).opd)
    message = str(error.value)
    assert message.startswith("config.opd.drift.") and words in message and "\n" not in message


def test_a_teacher_that_is_not_run_here_is_refused():
    c = config(drift__kl=0.5)
    c.teacher.path, c.teacher.kind = "http://localhost:1", "ours"
    loss, rows = stages.resolve_objective("opd", c.opd)
    with pytest.raises(UserError, match=r"opd\.drift\.kl=0\.5: needs a teacher that is run here"):
        stages.check_teachers(c, "opd", loss, rows)


def compute_whole_kl(student, teacher, sequence: rollout.Sequence) -> np.ndarray:
    """Returns KL(student‖teacher) at each response token, from the logits of one unpacked row."""
    tokens = [*sequence.prompt, *sequence.tokens]
    row = np.array([[*tokens, *[0] * (112 - len(tokens))]], np.int32)  # one shape compiles once
    segments = (np.arange(112)[None] < len(tokens)).astype(np.int32)
    fields: Any = map(jnp.asarray, (row, np.arange(112)[None], segments, segments > 0))
    batch = Batch(*fields)
    logp, logq = (np.asarray(compute_logp(x.model, x.params, batch)) for x in (student, teacher))
    kl = np.sum(np.exp(logp) * (logp - logq), axis=-1)
    return kl[len(sequence.prompt) - 1 : len(tokens) - 1]


@functools.partial(jax.jit, static_argnums=0)
def compute_logp(model, params, batch: Batch) -> jax.Array:
    hidden = forward.compute_hidden(model, params, batch)
    return jax.nn.log_softmax(hidden[0] @ transformer.get_output_head(params).T)


@pytest.fixture(scope="module")
def samples():
    """Samples a step with several thresholds: returns the models, and sequences and metrics of each
    threshold; None: without checks."""
    mesh = mesh_lib.make_mesh(1, 1, 1)
    plan = setup.setup_run(config(drift__kl=1.0), mesh)
    (stage,) = plan.stages
    found = {}
    with policy.use(plan.student), graders.Grader() as grader:
        student = policy.load(plan.student, "float32")
        plan = setup.load_stage_models(config(drift__kl=1.0), plan, stage)
        for kl, schedule in ((0.0, ()), (1e9, ()), (0.3, ()), (0.3, ((0, EVERY + 1),))):
            c = config(drift__kl=kl, response_schedule=schedule)
            changed = dataclasses.replace(stage, c=c.opd)
            collector = collect.make_collector(c, plan, changed, mesh, grader)
            found[kl, bool(schedule)] = collect.sample_sequences(collector, student.params, 0)
        yield student, plan.teachers["teacher"].policy, found


def test_checks_see_the_kl_of_the_new_tokens_and_change_no_sample(samples):
    """With a threshold that none exceeds, the tokens are those without checks, and what is compared
    with it is the mean over the last tokens before each check, as plain rows of logits have it."""
    student, teacher, found = samples
    plain, _ = found[0.0, False]
    sequences, metrics = found[1e9, False]
    assert [x.tokens for x in sequences] == [x.tokens for x in plain]
    assert [x.finish_reason for x in sequences] == [x.finish_reason for x in plain]
    assert {x.limit for x in sequences} == {52} and metrics["rollout/drifted"] == 0
    kl = [
        compute_whole_kl(student, teacher, x)[end - EVERY : end].mean()
        for x in plain
        for end in range(EVERY, len(x.tokens), EVERY)
    ]
    assert len(kl) > 20
    np.testing.assert_allclose(metrics["rollout/checked_kl"], np.mean(kl), rtol=1e-4)
    np.testing.assert_allclose(metrics["rollout/checked_kl_p90"], np.quantile(kl, 0.9), rtol=1e-4)


def test_a_response_ends_at_the_first_check_above_the_threshold(samples):
    """The decision depends on the tokens before it alone: each response is the beginning of what is
    sampled without checks, up to the first one whose tokens are above the threshold. With a lower
    limit, so that other tokens follow, the same responses end at the first check."""
    student, teacher, found = samples
    sequences, metrics = found[0.3, False]
    drifted = 0
    for x, plain in zip(sequences, found[0.0, False][0], strict=True):
        kl = compute_whole_kl(student, teacher, plain)
        ends = range(EVERY, len(plain.tokens), EVERY)
        end = next((n for n in ends if kl[n - EVERY : n].mean() > 0.3), None)
        assert x.tokens == plain.tokens[:end]
        assert x.finish_reason == (plain.finish_reason if end is None else drift.DRIFTED)
        drifted += end is not None
    assert 0 < drifted < len(sequences)
    assert metrics["rollout/drifted"] == drifted / len(sequences)
    short, _ = found[0.3, True]
    assert [x.finish_reason == drift.DRIFTED for x in short] == [
        x.finish_reason == drift.DRIFTED and len(x.tokens) == EVERY for x in sequences
    ]


@pytest.mark.long
def test_a_run_trains_all_tokens_of_ended_responses_and_resumes_with_the_same_bits(tmp_path):
    """On a mesh of eight devices, with a LoRA."""
    rows = {}
    for name, parts in {"whole": (4,), "stopped": (2, 4)}.items():
        for steps in parts:
            c = config(drift__kl=0.3, steps=steps, optim__schedule="constant")
            c.mesh.fsdp, c.checkpoint.every, c.student.lora.rank = 8, 2, 4
            loop.run(c, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    for row, other in zip(*rows.values(), strict=True):
        assert row["train/trained_tokens"] == pytest.approx(8 * row["rollout/mean_length"])
        assert row["rollout/truncated"] == 0 and row["time/drift"] > 0
        for key in ("train/loss", "train/grad_norm", "rollout/drifted", "rollout/checked_kl"):
            assert row[key] == other[key]
    assert any(row["rollout/drifted"] > 0 for row in rows["whole"])
