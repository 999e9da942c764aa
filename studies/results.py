"""Writes what a study found: results/NAME/study.json, and a file for each run.

A run's file holds its config, seed, revision, machine and cost, the points of its curve, and the
figures of the finished model. `python -m distill.report results/NAME` makes a page of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.runtime import run_files
from studies.definitions.readings import READINGS, Reading
from studies.jobs import Queue
from studies.study import (
    TUNING_SEED,
    Arm,
    Plan,
    Study,
    get_changes,
    list_tuned_arms,
    read_figures,
    to_file_name,
)

Record = dict[str, Any]

PARTS = ("student", "teacher", "sampling")  # of the operations


def describe_study(study: Study) -> Record:
    """Returns the content of study.json."""
    return {
        "study": study.name,
        "title": study.title,
        "question": study.question,
        "command": f"python -m studies.run --study={study.name}",
        "seeds": list(study.seeds),
        "arms": [
            {
                "name": arm.name,
                "about": arm.about,
                "tuned": bool(arm.trials),
                **({} if arm.is_trained else {"seeds": [study.seeds[0]]}),
            }
            for arm in study.arms
        ],
        "figures": [dict(figure) for figure in study.figures],
        "curves": [dict(curve) for curve in study.curves],
        "tuning": {
            "problems": "validation problems",
            "figure": study.tune_by,
            "budget": study.tuning,
        }
        if study.tune_by
        else None,
        "claims": [{**claim, **_read_claim(study.name, claim["name"])} for claim in study.claims],
    }


def _read_claim(study: str, claim: str) -> Record:
    """Returns the fields of study.json that explain a claim's result."""
    reading = READINGS.get((study, claim), Reading("", "", ""))
    return {
        "verdict_explained": reading.verdict,
        "why": reading.why,
        "settle": reading.settle,
    }


def write_results(study: Study, queue: Queue, plan: Plan, out: Path) -> None:
    """Writes study.json and the files of all runs that are done."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    run_files.write_json(out / "study.json", describe_study(study))
    arms, start = {arm.name: arm for arm in study.arms}, None
    for (name, seed), job in plan.finals.items():
        if queue.read_done(job):
            if name == study.start:
                start = read_figures(queue.root / job)
            changes = dict(get_changes(arms[name], plan.chosen) or {})
            about = {"phase": "final", "seed": seed, "trial": None, "changes": changes}
            write_run(study, arms[name], queue, job, about, out, start)
    arms = {arm.name: arm for arm in list_tuned_arms(study)}
    for name, jobs in plan.trials.items():
        for number, job in enumerate(jobs):
            if queue.read_done(job):
                changes = dict(arms[name].trials[number])
                about = {"phase": "tuning", "seed": TUNING_SEED, "trial": number}
                about |= {"changes": changes}
                write_run(study, arms[name], queue, job, about, out, None)


def write_run(
    study: Study, arm: Arm, queue: Queue, job: str, about: Record, out: Path, start: Record | None
) -> None:
    """Writes the file of a finished run.

    Args:
      about: its phase, seed, trial and changes.
      start: figures of the model that all arms start from, for the first point of the curve.
    """
    directory, done = queue.root / job, queue.read_done(job)
    assert done is not None
    measured = json.loads((directory / "measured.json").read_text())
    record: Record = {
        "study": study.name,
        "arm": arm.name,
        **about,
        **{key: done[key] for key in ("revision", "dirty", "time", "seconds", "cpu_seconds")},
        "machine": {key: done["machine"][key] for key in ("processor", "cores", "memory_gib")},
        "command": done["commands"][0],
        "config": {},
        "points": [],
        "final": measured["figures"],
    }
    if arm.is_trained and not study.of:
        record["config"] = json.loads((directory / "config.json").read_text())
        parts = [queue.root / x for x in _list_earlier(queue, job)] + [directory]
        trace_cost = _read_flops_per_token(queue.root / arm.teacher) if arm.traces else 0.0
        record["points"] = list_points(arm, parts, measured["prompt_tokens"], trace_cost)
        if start and "curve" in start:
            first = {"sampled": start["curve"], "loss": None}
            record["points"].insert(0, dict.fromkeys(record["points"][0], 0.0) | first)
    suffix = f"seed{about['seed']}" if about["trial"] is None else f"trial{about['trial']}"
    run_files.write_json(out / "runs" / f"{to_file_name(arm.name)}.{suffix}.json", record)


def _list_earlier(queue: Queue, job: str) -> list[str]:
    """Returns the earlier trainings of the same arm and seed, first to last."""
    earlier = [need for need in queue.jobs[job].needs if need.startswith("runs/")]
    return [x for need in earlier for x in (*_list_earlier(queue, need), need)]


def _read_flops_per_token(directory: Path) -> float:
    environment = json.loads((directory / "environment.json").read_text())
    return environment["models"]["student"]["flops_per_token"]


def list_points(
    arm: Arm, directories: list[Path], prompt_tokens: float, trace_cost: float
) -> list[Record]:
    """Returns the points of a run's curve, one at each evaluation and one at the end; costs are
    those from the start on, over all its trainings.

    Seconds are those of steps, without compiling and evaluating. Operations are those of the
    weights in forward passes over prompts and responses, without attention: sampling one, each
    teacher one, a reference one, and an update three (with a LoRA two). A trace of the teacher, of
    which the last SFT reads `arm.traces`, costs `trace_cost` for each of its tokens, once.
    """
    costs = ("seconds", "sampled_tokens", "trained_tokens")
    total: dict[str, float] = {}
    total.update(dict.fromkeys(("step", *costs, *(f"flops_{x}" for x in PARTS)), 0.0))
    points: list[Record] = []
    configs = [json.loads((path / "config.json").read_text()) for path in directories]
    stages = [config[config["stages"][0]] for config in configs]
    sft = [i for i, stage in enumerate(stages) if stage["objective"] == "sft"]
    for i, (directory, stage) in enumerate(zip(directories, stages, strict=True)):
        models = json.loads((directory / "environment.json").read_text())["models"]
        rows = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
        is_last = directory == directories[-1]
        num_traces = arm.traces if sft and i == sft[-1] else 0  # that are left to read
        for row in rows:
            added = count_cost(row, stage, configs[i], models, prompt_tokens)
            read = min(stage["batch_size"], num_traces)
            tokens = read * (prompt_tokens + row["train/trained_tokens"] / stage["batch_size"])
            added["flops_sampling"] += trace_cost * tokens
            num_traces -= read
            for key, value in added.items():
                total[key] += value
            total["step"] += 1
            if "eval/accuracy" in row or (is_last and row is rows[-1]):
                flops = sum(total[f"flops_{x}"] for x in PARTS)
                figures = {"sampled": row.get("eval/accuracy"), "loss": row.get("train/loss")}
                points.append({**total, "flops": flops, **figures})
    return points


def count_cost(
    row: Record, stage: Record, config: Record, models: Mapping[str, Record], prompt_tokens: float
) -> Record:
    """Returns what a step cost: seconds, tokens, and operations by what they were for."""
    student = models["student"]["flops_per_token"]
    num_rows = row.get("rollout/rows/think", 0) + row.get("rollout/rows/no_think", 0)
    sampled = num_rows * row.get("rollout/mean_length", 0)
    trained = row["train/trained_tokens"]
    read = stage["batch_size"] * prompt_tokens + trained
    passes = 2 if config["student"]["lora"]["rank"] else 3
    names = stage["teachers"] if "train/reverse_kl" in row or "train/divergence" in row else []
    teachers = sum(models[name]["flops_per_token"] for name in names if name in models)
    if stage["loss"].get("reference"):  # the student before reads the responses, too
        teachers += student
    return {
        "seconds": row["time/step"] - row.get("time/compile", 0.0),
        "sampled_tokens": sampled,
        "trained_tokens": trained,
        "flops_student": passes * student * read,
        "flops_teacher": teachers * read,
        "flops_sampling": student * (num_rows * prompt_tokens + sampled) if num_rows else 0.0,
    }
