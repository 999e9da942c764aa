"""Files of results: points of curves, computed by hand from the files of runs made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from distill.runtime import run_files
from studies.jobs import Job, Queue
from studies.results import list_points, write_results
from studies.study import TUNING_SEED, Arm, Plan, Study, Training

# Operations of a token in a forward pass.
STUDENT, TEACHER, TRACE = 100, 300, 1000
PROMPT = 10  # tokens of the mean prompt
SFT = {"time/step": 0.75, "time/compile": 0.25, "train/loss": 2.0}


def write_run(
    directory: Path,
    rows: list[dict[str, Any]],
    objective: str = "sft",
    teachers: tuple[str, ...] = (),
    rank: int = 0,
    reference: float | None = None,
) -> Path:
    """Writes the files of a run with steps of four sequences, each of which takes half a second
    without compiling; `rows` are those of metrics.jsonl."""
    stage = {
        "objective": objective,
        "batch_size": 4,
        "teachers": ["teacher"],
        "loss": {"reference": reference},
    }
    config = {"stages": [objective], objective: stage, "student": {"lora": {"rank": rank}}}
    models = {"student": {"flops_per_token": STUDENT}}
    models |= {name: {"flops_per_token": TEACHER} for name in teachers}
    run_files.write_json(directory / "config.json", config)
    run_files.write_json(directory / "environment.json", {"models": models})
    run_files.write_jsonl(directory / "metrics.jsonl", rows)
    return directory


def make_rollout(length: float, trained: int, **more: Any) -> dict[str, Any]:
    """Returns a step on four responses, one of them without thinking."""
    modes = {"rollout/rows/think": 3, "rollout/rows/no_think": 1, "rollout/mean_length": length}
    return {**SFT, **modes, "train/trained_tokens": trained, **more}


def check_point(point: dict[str, Any], **wanted: Any) -> None:
    assert {key: point[key] for key in wanted} == pytest.approx(wanted)
    parts = ("flops_student", "flops_teacher", "flops_sampling")
    assert point["flops"] == sum(point[key] for key in parts)


def write_sft(directory: Path, **fields: Any) -> Path:
    """Writes three steps, of which the second is evaluated."""
    rows = [{**SFT, "train/trained_tokens": tokens} for tokens in (20, 24, 28)]
    rows[1] |= {"eval/accuracy": 0.25, "train/loss": 1.5}
    return write_run(directory, rows, **fields)


def test_each_trace_of_sft_counts_once(tmp_path):
    arm = Arm("sft", "", traces=6, teacher="models/teacher")
    second, third = list_points(arm, [write_sft(tmp_path / "run")], PROMPT, TRACE)
    # Tokens read: 4 prompts of 10, and 20 of responses; then 24, then 28.
    student = 3 * STUDENT * (60 + 64)
    # Four traces of 10 and 20/4 tokens, then the other two of 10 and 24/4.
    traces = TRACE * (4 * 15 + 2 * 16)
    check_point(second, step=2, seconds=1.0, trained_tokens=44, sampled_tokens=0)
    check_point(second, flops_student=student, flops_sampling=traces, flops_teacher=0)
    check_point(second, sampled=0.25, loss=1.5)
    check_point(third, step=3, seconds=1.5, trained_tokens=72, loss=2.0)
    check_point(third, flops_student=student + 3 * STUDENT * 68, flops_sampling=traces)
    assert third["sampled"] is None, "the last step is a point even if nothing was evaluated"


def test_other_rows_than_traces_cost_nothing_to_sample(tmp_path):
    *_, last = list_points(Arm("sft", ""), [write_sft(tmp_path / "run")], PROMPT, 0.0)
    check_point(last, flops_sampling=0, flops_student=3 * STUDENT * (60 + 64 + 68))


def test_a_lora_updates_in_two_passes(tmp_path):
    *_, last = list_points(Arm("sft", ""), [write_sft(tmp_path / "run", rank=4)], PROMPT, 0.0)
    check_point(last, flops_student=2 * STUDENT * (60 + 64 + 68), flops_sampling=0)


@pytest.mark.parametrize("metric", ["train/reverse_kl", "train/divergence"])
def test_distillation_counts_student_teacher_and_sampling(tmp_path, metric):
    rows = [make_rollout(6.0, 24, **{metric: 0.1, "eval/accuracy": 0.5})]
    run = write_run(tmp_path / "run", rows, "opd", ("teacher",))
    (point,) = list_points(Arm("opd", ""), [run], PROMPT, 0.0)
    read = 4 * PROMPT + 24  # by the student three times, by the teacher once
    check_point(point, step=1, sampled_tokens=24, trained_tokens=24, sampled=0.5)
    check_point(point, flops_student=300 * read, flops_teacher=TEACHER * read)
    check_point(point, flops_sampling=STUDENT * (4 * PROMPT + 24))


@pytest.mark.parametrize(("reference", "passes"), [(None, 0), (0.0, 0), (0.02, 1)])
def test_rl_has_no_teacher_but_may_have_a_reference(tmp_path, reference, passes):
    """Of the sampled tokens some are not trained on: those of responses that were cut."""
    rows = [make_rollout(7.5, 18), make_rollout(6.0, 24)]
    run = write_run(tmp_path / "run", rows, "grpo", reference=reference)
    (point,) = list_points(Arm("grpo", ""), [run], PROMPT, 0.0)
    check_point(point, step=2, sampled_tokens=30 + 24, trained_tokens=18 + 24)
    check_point(point, flops_student=3 * STUDENT * (58 + 64))
    check_point(point, flops_teacher=passes * STUDENT * (58 + 64))
    check_point(point, flops_sampling=STUDENT * (2 * 4 * PROMPT + 54))


def test_costs_go_on_over_trainings_in_a_row(tmp_path):
    first = write_sft(tmp_path / "first")
    rows = [make_rollout(6.0, 24), make_rollout(6.0, 24, **{"eval/accuracy": 0.75})]
    second = write_run(tmp_path / "second", rows, "grpo")
    arm = Arm("both", "", traces=6, teacher="models/teacher")
    points = list_points(arm, [first, second], PROMPT, TRACE)
    sft = TRACE * (4 * 15 + 2 * 16)  # once, though RL reads rows too
    assert [point["step"] for point in points] == [2, 5]
    check_point(points[0], sampled=0.25, flops_sampling=sft)
    check_point(points[1], sampled=0.75, seconds=2.5, trained_tokens=72 + 48, sampled_tokens=48)
    check_point(points[1], flops_student=3 * STUDENT * (60 + 64 + 68 + 64 + 64))
    check_point(points[1], flops_sampling=sft + STUDENT * 2 * (4 * PROMPT + 24))


def test_of_two_sft_the_last_reads_the_traces(tmp_path):
    runs = [write_sft(tmp_path / name) for name in ("documents", "traces")]
    arm = Arm("both", "", traces=4, teacher="models/teacher")
    first, *_, last = list_points(arm, runs, PROMPT, TRACE)
    check_point(first, step=2, flops_sampling=0)
    check_point(last, step=6, flops_sampling=TRACE * 4 * 15)


STUDY = Study(
    name="z",
    title="",
    question="",
    jobs=(),
    arms=(
        Arm("start", "", model="models/student"),
        Arm(
            "on policy",
            "",
            (Training("opd", {}, "models/student"),),
            trials=({"opd.optim.learning_rate": 0.1}, {"opd.optim.learning_rate": 0.2}),
        ),
    ),
    measures=(),
    figures=({"key": "greedy", "title": "greedy", "format": "percent"},),
    claims=(),
    start="start",
    seeds=(0, 1),
)
PLAN = Plan(
    trials={"on policy": ["runs/t0", "runs/t1"]},
    chosen={"on policy": 1},
    finals={("start", 0): "runs/s", ("on policy", 0): "runs/o0", ("on policy", 1): "runs/o1"},
)


def make_queue(root: Path, done: tuple[str, ...]) -> Queue:
    """Returns a queue with the jobs of PLAN; those that are done have an opd's files."""
    queue = Queue(root)
    for name in (*PLAN.trials["on policy"], *PLAN.finals.values()):
        queue.add(Job(name, (("-m", "studies.worker", "--workdir={out}"),)))
    for name in done:
        rows = [make_rollout(6.0, 24, **{"train/reverse_kl": 0.1, "eval/accuracy": 0.5})]
        run = write_run(root / name, rows, "opd", ("teacher",))
        record: dict[str, Any] = {"fingerprint": queue.compute_fingerprint(name)}
        record |= {"commands": ["python -m studies.worker"], "revision": "a" * 40, "dirty": True}
        record |= {"time": "2026-11-30T14:00:00+00:00", "seconds": 7.5, "cpu_seconds": 7.0}
        record["machine"] = {"processor": "p", "cores": 2, "memory_gib": 8.0, "load_before": 1.0}
        run_files.write_json(run / "done.json", record)
        figures = {"greedy": 0.4, "curve": 0.375}
        measured = {"prompt_tokens": PROMPT, "figures": figures}
        run_files.write_json(run / "measured.json", measured)
    return queue


def read_results(out: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in (out / "runs").iterdir()}


def test_a_curve_begins_with_the_start_measured_as_the_curve_is(tmp_path):
    queue = make_queue(tmp_path / "q", ("runs/s", "runs/o0"))
    write_results(STUDY, queue, PLAN, tmp_path / "out")
    results = read_results(tmp_path / "out")
    assert results.keys() == {"start.seed0.json", "on_policy.seed0.json"}
    start, trained = results["start.seed0.json"], results["on_policy.seed0.json"]
    assert start["points"] == [] and start["config"] == {}
    first, last = trained["points"]
    assert first["sampled"] == 0.375 and first["loss"] is None
    assert {first[key] for key in first.keys() - {"sampled", "loss"}} == {0.0}
    assert first.keys() == last.keys() and last["step"] == 1
    assert trained["changes"] == {"opd.optim.learning_rate": 0.2}, "those of the chosen trial"
    about = {"phase": "final", "seed": 0, "trial": None, "dirty": True, "cpu_seconds": 7.0}
    assert {key: trained[key] for key in about} == about
    assert trained["machine"] == {"processor": "p", "cores": 2, "memory_gib": 8.0}
    assert trained["config"]["stages"] == ["opd"] and trained["final"]["greedy"] == 0.4


def test_without_the_start_a_curve_has_no_first_point(tmp_path):
    queue = make_queue(tmp_path / "q", ("runs/o1", "runs/t1"))
    write_results(STUDY, queue, PLAN, tmp_path / "out")
    results = read_results(tmp_path / "out")
    assert results.keys() == {"on_policy.seed1.json", "on_policy.trial1.json"}
    assert [x["step"] for x in results["on_policy.seed1.json"]["points"]] == [1]
    trial = results["on_policy.trial1.json"]
    assert (trial["phase"], trial["seed"], trial["trial"]) == ("tuning", TUNING_SEED, 1)
    assert trial["changes"] == {"opd.optim.learning_rate": 0.2}


def test_the_definition_says_which_arms_are_tuned_and_which_have_one_seed(tmp_path):
    write_results(STUDY, make_queue(tmp_path / "q", ()), PLAN, tmp_path / "out")
    study = json.loads((tmp_path / "out" / "study.json").read_text())
    start, trained = study["arms"]
    assert start == {"name": "start", "about": "", "tuned": False, "seeds": [0]}
    assert trained == {"name": "on policy", "about": "", "tuned": True}
    assert study["seeds"] == [0, 1] and study["tuning"] is None
    assert study["command"] == "python -m studies.run --study=z"
