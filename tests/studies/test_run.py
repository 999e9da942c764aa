"""The command: studies by name, from tuning to files of results, by workers that train nothing."""

import dataclasses
import json
from pathlib import Path

import pytest

from distill.reporting import study_read, writing
from studies import definitions, results, run
from studies.jobs import Job, Queue
from studies.run import run_study
from studies.study import Arm, Study, Training
from tests.support.paths import ROOT
from tests.support.verbs import call

RATE = "opd.optim.learning_rate"
FINALS = [f"{name}.seed{seed}.json" for seed in (0, 1) for name in ("opd", "plain")]
TRIALS = [f"opd.trial{i}.json" for i in range(3)]


def make_arm(name: str, rates: tuple[float, ...] = ()) -> Arm:
    training = Training("opd", {"opd.steps": 2}, "models/student")
    return Arm(name, f"about {name}", (training,), trials=tuple({RATE: rate} for rate in rates))


STUDY = Study(
    name="z",
    title="A small study",
    question="Does it work?",
    jobs=(Job("models/student", (("-c", "pass"),)),),
    arms=(
        Arm("start", "the student before", model="models/student"),
        make_arm("opd", (0.1, 0.3, 0.4)),
        make_arm("plain"),
    ),
    measures=("greedy:arithmetic:test.jsonl:0:8", "curve:arithmetic:curve.jsonl:0:8"),
    figures=({"key": "greedy", "title": "greedy accuracy", "format": "percent"},),
    claims=(
        {
            **{"name": "better", "claimed": "opd is better", "source": "a paper"},
            **{"kind": "contrast", "figure": "greedy", "weights": {"opd": 1, "plain": -1}},
            **{"expected": "above", "margin": 0.01, "unit": "points"},
        },
    ),
    start="start",
    tune_by="sampled",
    tune_measures=("sampled:arithmetic:valid.jsonl:4:8",),
    tuning="three trials of two steps",
    seeds=(0, 1),
)
FAILING = dataclasses.replace(
    STUDY, name="failing", arms=(*STUDY.arms, make_arm("wild", (0.3, 9, 0.1)))
)


@pytest.fixture(autouse=True)
def fake_workers(monkeypatch):
    """Runs tests.support.fake_worker in place of studies.worker."""
    list_commands = Queue.list_commands

    def replace(self: Queue, name: str) -> list[list[str]]:
        fake = {"studies.worker": "tests.support.fake_worker"}
        return [[fake.get(x, x) for x in command] for command in list_commands(self, name)]

    monkeypatch.setattr(Queue, "list_commands", replace)
    monkeypatch.setattr(writing, "write_study_figures", lambda *_: None)  # takes seconds
    monkeypatch.setattr(definitions, "STUDIES", {"z": STUDY, "failing": FAILING})
    monkeypatch.chdir(ROOT)


def list_results(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs").iterdir())


def count_runs(root: Path) -> int:
    return len((root / "runs.txt").read_text().splitlines())


def test_a_study_tunes_trains_and_writes_each_run_as_it_ends(tmp_path, monkeypatch):
    root, out, seen = tmp_path / "q", tmp_path / "out", list[list[str]]()
    write = results.write_results

    def spy(subject, queue, plan, folder):
        write(subject, queue, plan, folder)
        seen.append(list_results(folder))

    monkeypatch.setattr(results, "write_results", spy)
    assert run_study(STUDY, Queue(root), out, 1, STUDY.seeds)
    # Files appear after the model, each trial, then the start, each arm at seed 0, then at seed 1.
    order = [*TRIALS, "start.seed0.json", *FINALS]
    assert seen[:-1] == [sorted(order[:i]) for i in range(len(order) + 1)]
    found = {x: json.loads((out / "z" / "runs" / x).read_text()) for x in order}
    rates = [found[x]["final"]["sampled"] for x in TRIALS]
    assert max(rates) == rates[1], "the second trial is the best"
    for seed in (0, 1):
        tuned, plain = (found[f"{name}.seed{seed}.json"] for name in ("opd", "plain"))
        assert tuned["changes"] == {RATE: 0.3} and plain["changes"] == {}
        assert tuned["config"]["opd"]["optim"]["learning_rate"] == 0.3
        assert f"--config.{RATE}=0.3 --seed={seed} " in tuned["command"]
        assert [x["sampled"] for x in tuned["points"]] == pytest.approx([0.25, 0.8 + seed / 100])
        assert tuned["seed"] == seed and tuned["phase"] == "final"
    assert "sampled" not in found["opd.seed0.json"]["final"], "finals are measured on the test"

    # A file that is lost comes back without another run.
    before, count = found["opd.seed1.json"], count_runs(root)
    (out / "z" / "runs" / "opd.seed1.json").unlink()
    assert run_study(STUDY, Queue(root), out, 1, STUDY.seeds)
    assert json.loads((out / "z" / "runs" / "opd.seed1.json").read_text()) == before
    assert count_runs(root) == count == 8


def test_an_arm_whose_trial_fails_is_left_out_and_the_page_says_so(tmp_path):
    root, out = tmp_path / "q", tmp_path / "out" / "failing"
    assert not run_study(FAILING, Queue(root), out.parent, 1, FAILING.seeds)
    wanted = ["start.seed0.json", *FINALS, *TRIALS, "wild.trial0.json", "wild.trial2.json"]
    assert list_results(out) == sorted(wanted)
    assert count_runs(root) == 11, "the failed trial ran again, or another run did not"
    notes = "\n".join(study_read.read_study(str(out)).notes)
    assert "5 of 7 runs are there" in notes and "wild: no result yet" in notes
    assert "wild: trials of tuning are missing: 1" in notes
    assert "wild: no result yet" in (out / "report.html").read_text()


def test_an_interrupted_study_has_a_page_too(tmp_path, monkeypatch):
    root, out, run_jobs = tmp_path / "q", tmp_path / "out", Queue.run

    def run_trials_only(self: Queue, names: list[str], *arguments) -> list[str]:
        if "trial" in names[0]:
            return run_jobs(self, names, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Queue, "run", run_trials_only)
    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, Queue(root), out, 1, STUDY.seeds)
    assert list_results(out / "z") == TRIALS
    assert "0 of 5 runs are there" in (out / "z" / "report.html").read_text()


def test_the_command_runs_a_study_and_fails_if_a_run_has(tmp_path, capsys):
    flags = [f"--runs={tmp_path / 'q'}", f"--out={tmp_path / 'out'}", "--cores=1", "--seeds=4"]
    assert call(run, "--study=failing", *flags) == 1
    said = capsys.readouterr().err
    assert "ended with exit code 1, see" in said and "some runs failed, see above" in said
    finals = [x for x in list_results(tmp_path / "out" / "failing") if "seed" in x]
    assert finals == ["opd.seed4.json", "plain.seed4.json", "start.seed0.json"]
    study = json.loads((tmp_path / "out" / "failing" / "study.json").read_text())
    assert study["seeds"] == [0, 1, 4], "the study is whole with its own seeds"


def test_a_changed_definition_ends_the_command_and_loses_nothing(tmp_path, capsys, monkeypatch):
    flags = [f"--runs={tmp_path / 'q'}", f"--out={tmp_path / 'out'}", "--cores=1", "--study=z"]
    assert call(run, *flags) == 0
    page = (tmp_path / "out" / "z" / "report.html").read_text()
    assert "A small study" in page and "opd is better" in page
    before, files = count_runs(tmp_path / "q"), list_results(tmp_path / "out" / "z")
    capsys.readouterr()
    jobs = (Job("models/student", (("-c", "print()"),)),)
    monkeypatch.setitem(definitions.STUDIES, "z", dataclasses.replace(STUDY, jobs=jobs))
    assert call(run, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "was made by another definition" in error
    assert error.startswith(f"error: {tmp_path / 'q'}")
    assert count_runs(tmp_path / "q") == before
    assert list_results(tmp_path / "out" / "z") == files


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--study=failin", "--study=failin: known are z, failing, all; did you mean 'failing'?"),
        ("--study=z,failing,q", "--study=q: known are z, failing, all"),
        ("--seeds=1,x", "--seeds=1,x: must be whole numbers"),
        ("--cores=-1", "cores=-1"),
    ],
)
def test_bad_flags_are_named_in_one_line(tmp_path, capsys, flag, reason):
    assert call(run, "--study=z", f"--runs={tmp_path / 'q'}", flag) == 2
    error = capsys.readouterr().err
    assert reason in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "q").exists()


def test_elsewhere_than_in_the_project_it_says_where(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(run, "--study=z") == 2
    assert f"are relative to {ROOT}: run it there" in capsys.readouterr().err


def test_without_a_name_it_lists_the_studies(capsys):
    assert call(run) == 0
    assert capsys.readouterr().out.splitlines() == ["z   A small study", "failing A small study"]


def test_the_commands_are_listed_and_not_run(tmp_path, capsys):
    assert call(run, "--study=z", f"--runs={tmp_path / 'q'}", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    first, *others, last = lines
    assert first == "python -c pass"
    assert len(others) == 3 + 1 + 2, "trials, the start, and the arm that needs no tuning, twice"
    assert all(line.startswith("python -m tests.support.fake_worker ") for line in others)
    assert f"--config.{RATE}=0.1" in others[0] and "{" not in "".join(others)
    assert last == "# when the trials are done: opd, at each seed"
    assert not (tmp_path / "q").exists()
