"""Tests that a run with a teacher outside trains as with the same teacher here."""

import jax
import numpy as np
import pytest

from distill.teachers import external
from distill.training import loop
from tests.support.runs import config, final, numbers, tiny_model
from tests.support.scorers import LocalScorer

URL = "http://teacher:8000"
TOP = {"estimator": "topk", "k": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return tiny_model(root / "student", 0), tiny_model(root / "teacher", 1, hidden_size=48)


@pytest.fixture
def scorer(models, monkeypatch):
    """Opens one scorer for every stage whose teacher has the URL."""
    scorer = LocalScorer(models[1])
    monkeypatch.setattr(external, "open_scorer", lambda *arguments: scorer)
    return scorer


def make_config(models, objective="opd", steps=2, **loss):
    c = config(models)
    c.stages, c.opd.objective, c.opd.steps = ("opd",), objective, steps
    c.opd.loss.update(loss)
    c.teacher.path = models[1]
    c.checkpoint.every = 100
    return c


def train(c, workdir, url=""):
    """Returns the parameters after a run and its metrics."""
    if url:
        c.teacher.path = url
    loop.run(c, workdir)
    return final(workdir, None), numbers(workdir)


def require_equal(one, other, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)


@pytest.mark.parametrize("output", ["hidden", "top", "token"])
def test_a_run_equals_that_with_the_teacher_here(output, models, scorer, tmp_path):
    objective = "opd_sampled" if output == "token" else "opd"
    loss = TOP if output == "top" else {}
    here, _ = train(make_config(models, objective, **loss), tmp_path / "here")
    loss |= {"teacher_topk": 8} if output == "top" else {}
    c = make_config(models, objective, **loss, teacher_output=output)
    there, _ = train(c, tmp_path / "there", URL)
    require_equal(here, there)
    assert len(scorer.asked) == 2 * 4 and scorer.closed
