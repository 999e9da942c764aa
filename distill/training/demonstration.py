"""The quick start: evaluates a student, distils it, evaluates it again and exports it.

Uses the same functions as the verbs.
"""

import json
import time
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from distill.evaluation import comparison, evaluator, problems
from distill.policy import exporting, policy
from distill.policy.policy import Policy
from distill.runtime import mesh as mesh_lib
from distill.runtime import run_files, stop_signals, xla
from distill.training import loop, resume, setup
from models.errors import UserError

Evaluation = dict[str, object]


def evaluate_policy(
    name: str, subject: Policy, teacher: Policy, out_dir: Path, count: int, max_new_tokens: int
) -> Evaluation:
    """Measures greedy and sampled accuracy on `count` held-out problems, reverse KL and length."""
    rows = problems.load_problems("arithmetic", "", count)
    run_files.log_line(f"{name}: {len(rows):,} held-out problems, greedy and sampled")
    greedy, sampled = evaluator.evaluate_greedy_and_sampled(
        subject, teacher, rows, epath.Path(out_dir) / "eval" / name, max_new_tokens
    )
    return {
        "accuracy": greedy["accuracy"],
        "interval": greedy["interval"],
        "accuracy_sampled": sampled["accuracy"],
        "interval_sampled": sampled["interval"],
        "reverse_kl": sampled["reverse_kl"],
        "mean_length": greedy["mean_length"],
        "seconds": greedy["seconds"] + sampled["seconds"],
        "model": subject.path,
        "parameters": subject.config.num_parameters,
    }


def render_table(summary: dict[str, Evaluation]) -> str:
    """Renders the results of the three models."""
    lines = [
        f"{'':15} {'parameters':>10}  {'greedy accuracy':>22}  {'sampled, T = 1':>22}  "
        f"{'reverse KL':>10}  {'length':>6}  {'seconds':>7}",
        f"{'':15} {'':>10}  {'% [95% interval]':>22}  {'% [95% interval]':>22}  "
        f"{'nats/token':>10}  {'tokens':>6}  {'to judge':>7}",
    ]
    for name in ("student_before", "student_after", "teacher"):
        row = summary[name]

        def format_accuracy(suffix: str, row: Evaluation = row) -> str:
            low, high = row["interval" + suffix]  # type: ignore[misc]
            return f"{100 * row['accuracy' + suffix]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"  # type: ignore[operator]

        lines.append(
            f"{name:15} {row['parameters']:>10,}  {format_accuracy(''):>22}  "
            f"{format_accuracy('_sampled'):>22}  "
            f"{row['reverse_kl']:>10.4f}  {row['mean_length']:>6.1f}  {row['seconds']:>7.1f}"
        )
    return "\n".join(lines)


def describe_gap(summary: dict[str, Any], out_dir: Path, manner: str) -> str:
    """Says how much of the gap in accuracy between student and teacher was closed, where the
    problems, compared one by one, tell both the teacher and the student after from the student
    before.

    Args:
      manner: greedy or sampled.
    """
    rows, accuracy = {}, {}
    for name in ("student_before", "student_after", "teacher"):
        _, rows[name] = comparison.read_evaluation(f"{out_dir}/eval/{name}/{manner}")
        accuracy[name] = summary[name]["accuracy" if manner == "greedy" else "accuracy_sampled"]
    for name, words in (("teacher", "the teacher"), ("student_after", "the student after")):
        names = ("student_before", name)
        pair = comparison.compare_pair(names, rows["student_before"], rows[name])
        low, high = (100 * end for end in pair["interval"])
        if low <= 0 <= high:
            return (
                f"{manner}: {pair['problems']:,} problems do not tell {words} from the student "
                f"before (paired difference {100 * pair['difference']:+.1f} points, 95% interval "
                f"{low:+.1f} to {high:+.1f})"
            )
    gap = accuracy["teacher"] - accuracy["student_before"]
    closed = (accuracy["student_after"] - accuracy["student_before"]) / gap
    return f"{100 * closed:.0f}% of the {manner} gap to the teacher closed"


def distil_and_evaluate(c: ConfigDict, out_dir: Path, count: int) -> dict[str, Any]:
    """Evaluates on `count` problems, distils, exports and evaluates again; writes summary.json and
    returns it."""
    start, limit = time.perf_counter(), c.opd.max_response_tokens
    xla.init_compilation_cache(c.compilation_cache)
    mesh = mesh_lib.make_mesh(**c.mesh)

    def load_policy(path: str) -> Policy:
        return policy.load(policy.make_abstract(path, "float32", False, mesh), "float32")

    def evaluate(name: str, subject: Policy) -> Evaluation:
        return evaluate_policy(name, subject, teacher, out_dir, count, limit)

    with mesh_lib.use_mesh(mesh):
        teacher = load_policy(c.teacher.path)
        summary: dict[str, Any] = {
            "teacher": evaluate("teacher", teacher),
            "student_before": evaluate("student_before", load_policy(c.student.path)),
        }
    began = time.perf_counter()
    loop.run(c, out_dir, is_whole=False)
    summary["distillation_seconds"] = time.perf_counter() - began
    exporting.export_run(
        out_dir, out_dir / "student", None, "float32", merge_lora=True
    )  # on a mesh of its own
    with mesh_lib.use_mesh(mesh):
        summary["student_after"] = evaluate("student_after", load_policy(str(out_dir / "student")))
    summary["problems"] = count
    summary["seconds"] = time.perf_counter() - start
    summary["export"] = str(out_dir / "student")
    run_files.write_json(out_dir / "summary.json", summary)
    return summary


def run(c: ConfigDict, out: Path, count: int) -> tuple[dict[str, Any], bool]:
    """Runs the quick start in `out`, going on where it was interrupted.

    Returns its summary, and True if it was finished before, with as many problems.

    Raises UserError if the config is invalid, or `out` holds another run.
    """
    if c.stages[-1] != "opd":
        raise UserError(f"config.stages: the quick start ends in opd, not in {c.stages[-1]!r}")
    mesh = mesh_lib.make_mesh(**c.mesh)
    with mesh_lib.use_mesh(mesh):
        setup.setup_run(c, mesh)
    summary: dict[str, Any] = {}
    if (out / "summary.json").is_file() and (out / "student").is_dir():
        summary = json.loads((out / "summary.json").read_text())
    steps_done, steps = policy.find_newest_step(str(out)) or 0, sum(c[x].steps for x in c.stages)
    if summary and steps_done < steps:
        raise UserError(
            f"--workdir={out}: its {steps_done} steps are evaluated and exported; for {steps} "
            "start in another directory"
        )
    resume.init_workdir(out, c, steps_done=steps_done)
    is_done = summary.get("problems") == count  # with its times
    if not is_done:
        with stop_signals.advise_interrupted("the same command goes on"):
            summary = distil_and_evaluate(c, out, count)
    return summary, is_done
