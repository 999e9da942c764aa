"""Tests evaluations during training: they change nothing, resume, and keep the best checkpoint."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from distill import rollout
from distill.evaluation import evaluator, problems, protocols, records, responses
from distill.policy import exporting, policy
from distill.runtime.checkpoint import Checkpoints
from distill.training import eval_hook, loop
from models.errors import UserError
from tests.support.paths import ROOT
from tests.support.runs import config, final, numbers

QUESTIONS = "assets/rows/questions.jsonl"


def settings(models, **changes):
    c = config(models)
    c.eval.every = 2
    c.eval.limit = 3
    c.eval.max_new_tokens = 8
    c.eval.batch_size = 4
    c.eval.best = "-mean_length"  # mean length differs from step to step; accuracy does not here
    for name, value in changes.items():
        c.eval[name] = value
    return c


@pytest.fixture(scope="module")
def student(models) -> policy.Policy:
    return policy.make_abstract(models[0], "float32", False, loop.mesh_lib.make_mesh(1, 1, 1))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("validated") / "run"
    loop.run(settings(models), workdir)
    return workdir


def assert_same_params(a: Path, b: Path, models) -> None:
    """Asserts that two runs have bitwise equal trained parameters."""
    ours, theirs = (jax.tree.leaves(final(workdir, models)) for workdir in (a, b))
    for x, y in zip(ours, theirs, strict=True):
        assert np.array_equal(x, y)


def evals(workdir: Path) -> dict[str, bytes]:
    return {p.parent.name: p.read_bytes() for p in sorted(workdir.glob("eval/*/examples.jsonl"))}


def lengths(workdir: Path) -> dict[int, float]:
    return {
        int(p.parent.name): json.loads(p.read_text())["mean_length"]
        for p in workdir.glob("eval/*/summary.json")
    }


def best_step(workdir: Path) -> int:
    with Checkpoints(workdir / "best" / "checkpoints") as saved:
        latest = saved.read_latest()
    assert latest is not None
    return latest[0]


def test_evaluations_leave_training_unchanged(whole, models, tmp_path) -> None:
    loop.run(config(models), tmp_path / "run")
    assert_same_params(whole, tmp_path / "run", models)


def test_evaluations_run_at_steps_and_after_each_stage(whole) -> None:
    assert sorted(lengths(whole)) == [2, 4, 5]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"] + 1: row["eval/mean_length"] for row in rows if "time/eval" in row}
    assert measured == lengths(whole)
    assert all(0 <= row["eval/accuracy"] <= 1 for row in rows if "time/eval" in row)


def test_an_evaluation_equals_the_evaluate_verb(whole) -> None:
    """The last evaluation has the same responses as the verb on the finished run."""
    subject = policy.make_abstract_for_inference(str(whole), "float32")
    rows = problems.load_problems("arithmetic", "", 3)
    with policy.use(subject):
        subject = policy.load(subject, "float32")
        out = whole.parent / "again"
        sample = rollout.SampleSpec(1, 8, rollout.Sampling(0.0), batch_size=4)
        spec = protocols.EvalSpec("arithmetic", sample, protocol="greedy")
        evaluator.evaluate_benchmark(subject, rows, spec, out)
    stored = [json.loads((p / "protocol.json").read_text()) for p in (out, whole / "eval/000005")]
    assert stored[0]["weights"] == stored[1]["weights"]
    responses = [[json.loads(r)["tokens"] for r in e.splitlines()] for e in evals(whole).values()]
    again = [json.loads(r)["tokens"] for r in (out / "examples.jsonl").read_text().splitlines()]
    assert responses[-1] == again


def test_the_best_checkpoint_is_a_run_directory(whole, tmp_path) -> None:
    mean_lengths = lengths(whole)
    step = best_step(whole)
    assert mean_lengths[step] == min(mean_lengths.values())
    assert step == min(
        s for s, length in mean_lengths.items() if length == mean_lengths[step]
    )  # the first of equals
    subject = policy.load(
        policy.make_abstract_for_inference(str(whole / "best"), "float32"), "float32"
    )
    weights = json.loads((whole / f"eval/{step:06d}/protocol.json").read_text())["weights"]
    assert records.fingerprint_params(subject.params) == weights
    exporting.export_run(whole / "best", tmp_path / "model", None, "float32")
    exported = policy.load(
        policy.make_abstract_for_inference(str(tmp_path / "model"), "float32"), "float32"
    )
    for a, b in zip(jax.tree.leaves(subject.params), jax.tree.leaves(exported.params), strict=True):
        assert np.array_equal(a, b)


def test_a_better_checkpoint_of_an_earlier_step_replaces_the_best(tmp_path) -> None:
    """A resumed run may evaluate steps before the best of the run that it continues."""
    (tmp_path / "config.json").write_text("{}")
    best, about = epath.Path(tmp_path) / "best", {"eval": {"limit": 3}}
    with Checkpoints(best / "checkpoints", save_interval_steps=1) as saved:
        saved.save(60, {"x": jnp.ones(3)}, {**about, "value": 0.5})
        # As a run leaves it that is killed before the former best is deleted.
        saved.save(50, {"x": jnp.ones(3)}, {**about, "value": 0.6}, replace=True)
        saved._delete_old = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    assert eval_hook._init_best(best, about["eval"]) == 0.6
    assert best_step(tmp_path) == 50
    assert eval_hook._init_best(best, {"limit": 4}) is None
    assert not (best / "checkpoints").exists()


def test_run_killed_during_an_evaluation_resumes_with_the_same_files(
    whole, models, tmp_path, monkeypatch
) -> None:
    """Kills the run after one row of the second evaluation."""
    real, calls, workdir = responses.add_grade, [0], tmp_path / "run"

    class Killed(BaseException):
        pass

    def judged(row, rule, grade):
        calls[0] += 1
        if calls[0] > 3 + 1:
            raise Killed
        return real(row, rule, grade)

    monkeypatch.setattr(responses, "add_grade", judged)
    with pytest.raises(Killed):
        loop.run(settings(models), workdir)
    monkeypatch.undo()
    loop.run(settings(models), workdir)
    assert_same_params(whole, workdir, models)
    assert best_step(workdir) == best_step(whole)
    assert evals(workdir) == evals(whole)
    assert numbers(workdir) == numbers(whole)


def test_eval_settings_may_change_on_resume(whole, models, tmp_path, capsys) -> None:
    """Evaluations do not affect training; another measure keeps another best checkpoint."""
    c = settings(models, every=5, limit=2, best="accuracy")
    c.checkpoint.every = 4
    workdir = tmp_path / "run"
    first = settings(models)
    first.stages = c.stages
    first.checkpoint.every = 4
    loop.run(first, workdir)
    with Checkpoints(workdir / "checkpoints", save_interval_steps=1) as saved:
        saved._delete(5)
    loop.run(c, workdir)
    assert "was the best of another config.eval" in capsys.readouterr().err
    assert best_step(workdir) == 5
    assert sorted(lengths(workdir)) == [2, 4, 5]
    rows = json.loads((workdir / "eval/000005/summary.json").read_text())["responses"]
    assert rows == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"every": -1}, "config.eval.every=-1"),
        ({"benchmark": "trivia"}, "config.eval.benchmark=trivia: known are"),
        ({"benchmark": "gsm8k"}, "config.eval.data: gsm8k needs"),
        ({"protocol": "guess"}, "config.eval.protocol=guess: known are greedy"),
        ({"best": "luck"}, "config.eval.best='luck': must be one of accuracy"),
        ({"max_new_tokens": 10_000}, "10000 new ones (config.eval.max_new_tokens) exceed"),
        ({"limit": -1}, "config.eval.limit=-1: must be at least 0"),
    ],
)
def test_bad_eval_settings_are_refused(student, models, changes, words) -> None:
    with pytest.raises(UserError) as error:
        eval_hook.setup_validation(settings(models, **changes).eval, student, 0)
    assert words in str(error.value)


def test_bad_eval_settings_are_refused_before_training(models, tmp_path) -> None:
    with pytest.raises(UserError, match=r"config\.eval\.every"):
        loop.run(settings(models, every=-1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_evaluation_is_the_default(student, models) -> None:
    c = config(models)
    assert eval_hook.setup_validation(c.eval, student, 0) is None
    with eval_hook.open_validation_hook(None, student, Path("nowhere")) as judge:
        assert not judge.is_due(1, True) and not judge.is_due(4, False)


@pytest.mark.long
def test_further_benchmarks_are_evaluated_beside_the_first(models, tmp_path) -> None:
    """Their figures and files are their own; the run is trained as without them."""
    more = (("choice", str(ROOT / "assets/rows/choice.jsonl")), ("qa", str(ROOT / QUESTIONS)))
    c = settings(models, more=more, every=1000, best="")
    loop.run(c, tmp_path / "run")
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "time/eval" in row]
    steps = {int(path.parent.name) for path in (tmp_path / "run").glob("eval/*/summary.json")}
    assert len(measured) == len(steps) == len(c.stages)  # after each stage
    for row in measured:
        folder = tmp_path / "run" / "eval" / f"{row['step'] + 1:06d}"
        for name in ("choice", "qa"):
            summary = json.loads((folder / name / "summary.json").read_text())
            assert summary["protocol"]["benchmark"] == name
            assert row[f"eval/{name}/mean_length"] == summary["mean_length"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((("choice",),), r"config\.eval\.more: \('choice',\) is no pair of a benchmark"),
        (("choice", "x.jsonl"), r"config\.eval\.more: 'choice' is no pair"),
        ((("arithmetic", ""),), r"config\.eval\.more: names arithmetic twice, or beside"),
        ((("choices", "x"),), r"config\.eval\.benchmark=choices: known are"),
        ((("qa", "lost.jsonl"),), r"config\.eval\.more=lost\.jsonl: "),
    ],
)
def test_wrong_further_benchmarks_are_refused(models, student, more, message) -> None:
    with pytest.raises(UserError, match=message):
        eval_hook.setup_validation(settings(models, more=more).eval, student, 0)
