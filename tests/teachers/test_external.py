"""Tests that a run with a teacher outside trains as with the same teacher here."""

import itertools
import json
from types import SimpleNamespace

import pytest

from configs import base
from distill.planning import fit, programs
from distill.runtime import http_client
from distill.runtime import mesh as mesh_lib
from distill.teachers import external
from distill.training import loop, memory, setup
from models.errors import UserError
from tests.support import http_servers
from tests.support.runs import final, numbers, stop_after, tiny_model
from tests.support.scorers import LocalScorer
from tests.support.teacher_runs import make_config, require_equal
from tests.support.teacher_servers import FAULTS, answer_as_ours

URL = "http://teacher:8000"


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


def train(c, workdir):
    """Returns the parameters after a run and its metrics."""
    loop.run(c, workdir)
    return final(workdir, None), numbers(workdir)


@pytest.mark.parametrize("output", ["hidden", "token", pytest.param("top", marks=pytest.mark.long)])
def test_a_run_equals_that_with_the_teacher_here(output, models, scorer, tmp_path):
    here, rows_here = train(make_config(models, output), tmp_path / "here")
    there, rows_there = train(make_config(models, output, url=URL), tmp_path / "there")
    require_equal(here, there)
    assert len(scorer.asked) == 2 * 4 and scorer.closed
    last_here, last_there = rows_here[-1], rows_there[-1]
    gone = {name for name in last_here if name not in last_there}
    if output == "hidden":
        assert not gone
    else:  # what takes the teacher's whole distribution is not measured
        assert {"train/reverse_kl", "train/teacher_entropy"} <= gone
    if output == "token":
        sampled = last_here["train/logp"] - last_here["train/teacher_logp"]
        assert last_there["train/sampled_reverse_kl"] == pytest.approx(sampled, abs=1e-4)
        (file,) = (tmp_path / "there" / "rollouts").iterdir()
        row = json.loads(file.read_text().splitlines()[0])
        assert len(row["sampled_reverse_kl"]) == len(row["teacher_logp"]) == len(row["tokens"])
    for name in last_here.keys() - gone:
        if isinstance(last_here[name], float):
            assert last_there[name] == pytest.approx(last_here[name], abs=1e-4), name


TEXT = "Say what you think."
VARIANTS = {
    "context": {"opd.context.text": TEXT, "opd.context.max_tokens": 40},
    "traces": {"opd.objective": "distill", "opd.samples": 1},
    "packed traces": {"opd.objective": "distill", "opd.samples": 1, "opd.pack_tokens": 100},
    "a mixture": {"opd.objective": "gkd"},
    "cut responses": {"opd.objective": "distill", "opd.samples": 1, "opd.max_response_tokens": 3},
    "asynchronous": {"opd.rollout.asynchronous": True},
    "partial rollouts": {"opd.rollout.token_budget": 24},
    "several updates": {"opd.minibatches": 2, "opd.epochs": 2},
    "accumulation": {"opd.accumulate": 2},
    "rewards": {"opd.objective": "hybrid", "opd.reward.grader": "arithmetic"},
    "LoRA": {"student.lora.rank": 4},
    "several devices": {"mesh.fsdp": 2, "mesh.tensor": 2},
    "context axis": {"mesh.fsdp": 2, "mesh.context": 2, "opd.max_response_tokens": 20},
    "weights": {"opd.teachers": ("teacher", "other"), "opd.teacher_weights": (0.25, 0.75)},
}


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_path_through_a_step_equals_that_with_the_teacher_here(
    variant, models, scorer, tmp_path
):
    changes = dict(VARIANTS[variant])
    if "opd.context.text" in changes:
        (tmp_path / "text.txt").write_text(TEXT)
        changes["opd.context.text"] = str(tmp_path / "text.txt")
    found = []
    for url in ("", URL):
        c = make_config(models, url=url)
        c.other = base.make_teacher()
        c.other.path, c.other.dtype, c.other.param_dtype = models[0], "float32", "float32"
        c.update_from_flattened_dict(changes)
        found.append(train(c, tmp_path / ("there" if url else "here"))[0])
    require_equal(*found)
    assert scorer.asked


@pytest.mark.long
@pytest.mark.parametrize("output", ["hidden", "top", "token"])
def test_each_source_has_its_own_teacher(output, models, monkeypatch, tmp_path):
    """Rows of another source are not asked for."""
    scorers = {URL: LocalScorer(models[1]), f"{URL}1": LocalScorer(models[0])}
    monkeypatch.setattr(external, "open_scorer", lambda t, *arguments: scorers[t.path])
    rows = [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(8)]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for there in (False, True):
        c = make_config(models, output, url=URL if there else "")
        c.other = base.make_teacher()
        c.other.path = f"{URL}1" if there else models[0]
        c.other.dtype = c.other.param_dtype = "float32"
        c.opd.teachers = ("teacher", "other")
        c.opd.data.mixture = tuple((str(file), 1.0) for file in files)
        c.opd.batch_size, c.opd.samples = 8, 1
        found.append(train(c, tmp_path / str(there))[0])
    require_equal(*found)
    asked = [len(x.asked) for x in scorers.values()]
    assert sum(asked) == 16 and min(asked) > 0


@pytest.mark.long
def test_a_resumed_run_has_the_same_bits(models, scorer, tmp_path, monkeypatch):
    whole, rows = train(make_config(models, steps=4, url=URL), tmp_path / "whole")
    c = make_config(models, steps=4, url=URL)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(SystemExit):
            loop.run(c, tmp_path / "run")
    c.teacher.max_in_flight = 3  # nothing that is trained depends on it
    params, resumed = train(c, tmp_path / "run")
    require_equal(whole, params, atol=0)
    assert resumed == rows


@pytest.mark.long
@pytest.mark.parametrize("objective", ["opd", "distill"])
def test_a_teacher_that_fails_stops_the_run_at_a_checkpoint(objective, models, scorer, tmp_path):
    """From which it goes on to the parameters of the run that was never stopped."""
    changes = {"opd.objective": objective, "opd.samples": 1}
    whole, rows = train(make_config(models, steps=4, url=URL, **changes), tmp_path / "whole")
    scorer.asked.clear()
    scorer.fails_at = 9  # a row of the third step
    c = make_config(models, steps=4, url=URL, **changes)
    words = "does not answer; stopped at the checkpoint of step 2, from which the same command"
    with pytest.raises(UserError, match=words):
        loop.run(c, tmp_path / "run")
    scorer.fails_at = 10**9
    params, resumed = train(c, tmp_path / "run")
    require_equal(whole, params, atol=0)
    assert resumed == rows


@pytest.mark.long
def test_a_changed_teacher_is_noticed(models, scorer, tmp_path, monkeypatch):
    train(make_config(models, url=URL), tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "inputs.json").read_text())["inputs"]
    parts = recorded["config.teacher.path"]["parts"]
    assert parts == {"": {"model": f"hash of {models[1]} in float32"}}
    monkeypatch.setattr(external, "open_scorer", lambda *arguments: LocalScorer(models[0]))
    c = make_config(models, steps=3, url=f"{URL}1")
    with pytest.raises(UserError, match=r"inputs have changed .*config\.teacher\.path"):
        loop.run(c, tmp_path / "run")


REFUSED = {
    "a token of a teacher here": (
        {"opd.objective": "opd_sampled", "opd.loss.teacher_output": "token"},
        "teacher_output=token: config.teacher is run here, and gives hidden states",
    ),
    "samples with a stored top": (
        {"opd.loss.estimator": "topk", "opd.loss.k": 2, "opd.loss.teacher_topk": 2}
        | {"opd.loss.teacher_output": "top"},
        "teacher_output=top: only traces have stored log-probabilities, but 4 of 4 rows",
    ),
    "a judge": (
        {"teacher.path": URL, "opd.objective": "grpo", "opd.reward.teacher_logprob": 1.0},
        "opd.reward.teacher_logprob: needs a teacher that is run here, and config.teacher.path",
    ),
    "weights": (
        {"teacher.path": URL, "opd.objective": "opd_sampled", "opd.loss.teacher_output": "token"}
        | {"opd.teachers": ("teacher", "other"), "opd.teacher_weights": (1.0, 1.0)}
        | {"other.path": URL},
        "opd.teacher_weights: mixes whole distributions, which teacher_output=token does not have",
    ),
    "a temperature": (
        {"teacher.path": URL, "opd.objective": "opd_sampled", "opd.loss.teacher_output": "token"}
        | {"opd.sampling.temperature": 0.7},
        "opd.sampling.temperature=0.7: with teacher_output=token the teacher's log-probab",
    ),
    "a kind of a teacher here": (
        {"teacher.kind": "vllm"},
        r"config.teacher.kind='vllm': is read for a path of http\(s\)://… only",
    ),
    "too long rows": (
        {"teacher.path": URL, "opd.max_response_tokens": 100},
        r"= 160 exceeds the model's 128 positions \(http://teacher:8000\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_teacher_cannot_give_is_refused(case, models, scorer):
    changes, words = REFUSED[case]
    c = make_config(models)
    c.other = base.make_teacher()
    c.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words):
        setup.setup_run(c, mesh_lib.make_mesh(1, 1, 1))


def test_memory_counts_the_head_and_hidden_states_but_no_model(models, scorer):
    mesh, sizes = mesh_lib.make_mesh(1, 1, 1), []
    for url in ("", URL):
        c = make_config(models, url=url)
        run_setup = setup.setup_run(c, mesh)
        student = run_setup.student
        trained = mesh_lib.make_abstract_params(student.config, mesh)
        stage = memory.describe_stage(c, run_setup, run_setup.stages[0], trained)
        sizes.append(memory.count_resident_bytes(stage) | memory.estimate_update_bytes(stage))
    here, there = sizes
    assert there.pop("head of teacher") == 4 * 512 * 48 < here.pop("teacher")
    assert here == there


def test_plan_lists_the_same_update_and_no_scoring(models, scorer):
    """The update's program is, letter for letter, the one with the teacher here."""
    mesh, texts, names = mesh_lib.make_mesh(1, 1, 1), [], []
    for url in ("", URL):
        c = make_config(models, url=url)
        c.opd.minibatches = 2
        stage = fit.describe_stage(c, "opd", mesh, mesh)
        with mesh_lib.use_mesh(mesh):
            calls = {call.name: call for call in programs.list_stage_calls(stage)}
            texts.append(calls["accumulate"].lower().as_text())
        names.append(list(calls))
    assert texts[0] == texts[1]
    names[0].remove("score")
    assert names[0] == names[1]


@pytest.mark.long
def test_faults_of_a_server_leave_the_parameters_of_the_undisturbed_run(
    models, tmp_path, monkeypatch
):
    """One of three requests fails in one of all ways. A server that returns with another model
    stops the run at a checkpoint, from which it goes on once the right one is back."""
    monkeypatch.setattr(http_client, "WAIT_SECONDS", (0.01,) * 6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher, other = LocalScorer(models[1]), LocalScorer(models[0])
    answers = {x: answer_as_ours(x) for x in (teacher, other)}
    state = SimpleNamespace(count=0, faulty=False, changes_at=10**9)
    faults = itertools.cycle(FAULTS[name] for name in FAULTS if name != "slow")

    def answer(asked):
        if asked.path != "/v1/score":
            return answers[teacher](asked)
        state.count += 1
        if state.count > state.changes_at:
            return answers[other](asked)
        good = answers[teacher](asked)
        return next(faults)(good) if state.faulty and state.count % 3 == 0 else good

    with http_servers.serve(answer) as server:
        whole, rows = train(make_config(models, steps=4, url=server.url), tmp_path / "whole")
        state.faulty = True
        faulty, faulty_rows = train(make_config(models, steps=4, url=server.url), tmp_path / "run")
        require_equal(whole, faulty, atol=0)
        assert faulty_rows == rows
        state.count, state.faulty, state.changes_at = 0, False, 2 + 9  # after two probes
        words = (
            r"another model than at the start.*; stopped at the checkpoint of step 2, from which"
        )
        c = make_config(models, steps=4, url=server.url)
        with pytest.raises(UserError, match=words):
            loop.run(c, tmp_path / "stopped")
        state.changes_at = 10**9
        resumed, resumed_rows = train(c, tmp_path / "stopped")
        require_equal(whole, resumed, atol=0)
        assert resumed_rows == rows
