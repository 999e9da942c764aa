"""python -m benchmarks.quickstart [--seeds=0,1,2]: the quick start, once a seed, with its curve.

Each run is `python -m distill.quickstart` with another seed of prompts and samples, evaluated every
--every steps on the same held-out problems. Evaluating changes nothing that is trained. Writes all
numbers (quickstart.json) and a table (quickstart.md) to --out. A stopped command resumes where it
stopped.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import contest
from distill.runtime import cli, paths
from models.errors import UserError

OPTIONS = flags.FlagValues()
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, one run each.", flag_values=OPTIONS)
EVERY = flags.DEFINE_integer(
    "every", 100, "Steps between evaluations.", lower_bound=1, flag_values=OPTIONS
)
CONFIG = flags.DEFINE_string("config", "configs/quickstart.py", "The recipe.", OPTIONS)
PROBLEMS = flags.DEFINE_integer(
    "problems", 1000, "Held-out problems of an evaluation.", lower_bound=1, flag_values=OPTIONS
)
RUNS = flags.DEFINE_string("runs", "runs/quickstart_seeds", "Directory of the runs.", OPTIONS)
OUT = flags.DEFINE_string("out", "benchmarks/results", "Directory for the results.", OPTIONS)

MODELS = ("student_before", "student_after", "teacher")
FIGURES = (
    *("parameters", "accuracy", "interval", "accuracy_sampled", "interval_sampled"),
    *("reverse_kl", "mean_length"),
)
KL_STEPS = 10  # steps whose mean reverse KL is one point of the curve


def run_seed(seed: int, workdir: Path) -> None:
    """Runs the quick start; returns at once if it is finished."""
    command = [
        *(sys.executable, "-m", "distill.quickstart", f"--config={CONFIG.value}"),
        *(f"--workdir={workdir}", f"--config.seed={seed}", f"--problems={PROBLEMS.value}"),
        *(f"--config.eval.every={EVERY.value}", f"--config.eval.limit={PROBLEMS.value}"),
        "--config.eval.max_new_tokens=52",
    ]
    if code := subprocess.run(command, cwd=contest.ROOT).returncode:
        raise UserError(f"the quick start of seed {seed} ended with exit code {code}, see above")


def read_run(seed: int, workdir: Path) -> dict[str, Any]:
    """Reads a finished quick start: the figures of the three models, and the curve of training.

    `accuracy` of the curve is greedy, after so many steps; the points before training and after the
    last step are those of the models. `reverse_kl` is the mean of the last KL_STEPS steps.
    """
    summary = json.loads((workdir / "summary.json").read_text())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    models = {name: {k: summary[name][k] for k in FIGURES} for name in MODELS}
    measured = {row["step"] + 1: row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    steps = len(rows)
    points = {
        0: models["student_before"]["accuracy"],
        **measured,
        steps: models["student_after"]["accuracy"],
    }
    kl = [row["train/reverse_kl"] for row in rows]
    ends = range(KL_STEPS, steps + 1, KL_STEPS)
    return {
        "seed": seed,
        "models": models,
        "accuracy": {"step": list(points), "value": list(points.values())},
        "reverse_kl": {
            "step": list(ends),
            "value": [round(sum(kl[i - KL_STEPS : i]) / KL_STEPS, 5) for i in ends],
        },
        "distillation_seconds": round(summary["distillation_seconds"], 1),
    }


def render_table(runs: list[dict[str, Any]]) -> list[str]:
    """Renders one line for each seed, between those of the student before and of the teacher."""

    def format_row(name: str, model: dict[str, Any]) -> str:
        cells = [name, f"{model['parameters']:,}"]
        for kind in ("", "_sampled"):
            low, high = (100 * end for end in model["interval" + kind])
            cells.append(f"{100 * model['accuracy' + kind]:.1f}% [{low:.1f}, {high:.1f}]")
        cells.append(f"{abs(model['reverse_kl']):.3f}")  # of the teacher itself: -0.0
        return f"| {' | '.join(cells)} |"

    first = runs[0]["models"]
    return [
        "| | parameters | greedy accuracy | sampled, T = 1 | reverse KL, nats a token |",
        "|---|---|---|---|---|",
        format_row("student before", first["student_before"]),
        *(
            format_row(f"student after, seed {run['seed']}", run["models"]["student_after"])
            for run in runs
        ),
        format_row("teacher", first["teacher"]),
    ]


def main() -> None:
    out = paths.check_output(f"{OUT.value}/quickstart.json")
    seeds = [int(seed) for seed in SEEDS.value]
    host = contest.describe_machine({})
    runs = []
    for seed in seeds:
        workdir = Path(RUNS.value) / f"seed{seed}"
        run_seed(seed, workdir)
        runs.append(read_run(seed, workdir))
    lines = [
        "# The quick start, one run a seed",
        "",
        f"{host['time']}, {host['processor']}, {host['cores']} cores, {host['memory_gib']} GiB, no"
        f" accelerator. {PROBLEMS.value} held-out problems, 95% intervals.",
        "",
        *render_table(runs),
    ]
    problems = {"problems": PROBLEMS.value}
    contest.write_results(out, {"machine": host, **problems, "runs": runs}, lines, "", {})


if __name__ == "__main__":
    cli.run(main, OPTIONS)
