"""python -m benchmarks.fewer_tokens: what fewer tokens cost and teach, at equal CPU seconds.

The embedded student learns from the embedded teacher as in the quick start, at a constant learning
rate, so that runs of different costs can be compared at any point: with whole responses, with short
responses first (`response_schedule`), and ending rows that the teacher no longer agrees with
(`drift`). Each run is evaluated at some of its checkpoints. Seconds are those of the process's CPU
time in the training loop, since the cores may be shared; compiling is in the first steps, which do
not count, and evaluation comes afterwards. Between checkpoints figures are interpolated, and runs
are compared at the CPU seconds of the cheapest.

Writes fewer-tokens.json and fewer-tokens.md to --out. A stopped command goes on with the run that
it was in, from that run's start.
"""

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import contest
from configs import quickstart
from distill.evaluation import evaluator, problems
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import cli, paths, run_files
from distill.runtime import mesh as mesh_lib
from distill.training import loop
from models.errors import UserError

OPTIONS = flags.FlagValues()
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, one run each.", flag_values=OPTIONS)
ONLY = flags.DEFINE_list("only", [], "Names of arms; default: all.", flag_values=OPTIONS)
STEPS = flags.DEFINE_integer("steps", 300, "Steps of a run.", lower_bound=24, flag_values=OPTIONS)
PROBLEMS = flags.DEFINE_integer(
    "problems", 400, "Held-out problems of an evaluation.", lower_bound=1, flag_values=OPTIONS
)
RUNS = flags.DEFINE_string("runs", "runs/fewer_tokens", "Directory of the runs.", OPTIONS)
OUT = flags.DEFINE_string("out", "benchmarks/results", "Directory for the results.", OPTIONS)

WARM_UP = 4  # first steps, which compile
POINTS = (1 / 2, 3 / 4, 1)  # of the steps, after which a checkpoint is evaluated
FIGURES = ("accuracy", "greedy", "reverse_kl", "mean_length")


def make_arms(steps: int) -> dict[str, dict[str, Any]]:
    """Returns the changes of each arm to the stage, by dotted key."""
    rising = ((0, 16), (steps // 3, 32), (2 * steps // 3, 52))
    return {
        "whole responses": {},
        "16, 32, then 52 tokens": {"response_schedule": rising},
        "ended above 0.6 nats": {"drift.kl": 0.6, "drift.every": 24},
    }


def make_config(changes: dict[str, Any], seed: int) -> ConfigDict:
    c = quickstart.get_config()
    c.seed, c.log.transcripts, c.log.overlap_top_k, c.log.to = seed, 0, 0, ()
    c.checkpoint.every = c.checkpoint.keep_every = STEPS.value // 4
    c.opd.steps, c.opd.optim.schedule, c.opd.optim.learning_rate = STEPS.value, "constant", 5e-4
    c.opd.update_from_flattened_dict(changes)
    return c


def train(c: ConfigDict, workdir: Path) -> list[float]:
    """Trains, and returns the CPU seconds of this process at the start of each step, and at the
    end."""
    seconds, collect_step = [], loop.collect_step

    def collect_timed(*args: Any, **options: Any) -> Any:
        seconds.append(time.process_time())
        return collect_step(*args, **options)

    loop.collect_step = collect_timed
    try:
        loop.run(c, workdir)
    finally:
        loop.collect_step = collect_step
    return [*seconds, time.process_time()]


def evaluate_step(workdir: Path, step: int, teacher: Policy, mesh: Mesh) -> dict[str, float]:
    """Returns FIGURES of a run after `step` steps; `greedy` is the greedy accuracy."""
    described = policy.make_abstract(str(workdir), "float32", False, mesh)
    subject, _ = policy.restore(described, step, "float32")
    rows = problems.load_problems("arithmetic", "", PROBLEMS.value)
    greedy, sampled = evaluator.evaluate_greedy_and_sampled(
        subject, teacher, rows, epath.Path(workdir) / f"judged{step}", 52
    )
    return {**{name: sampled[name] for name in FIGURES if name != "greedy"}} | {
        "greedy": greedy["accuracy"]
    }


def run_arm(name: str, seed: int, teacher: Policy, mesh: Mesh) -> dict[str, Any]:
    """Trains and evaluates a run, or reads its earlier result."""
    workdir = Path(RUNS.value) / f"{''.join(x if x.isalnum() else '_' for x in name)}_{seed}"
    result_file = workdir / "result.json"
    if result_file.is_file():
        return json.loads(result_file.read_text())
    run_files.log_line(f"{name}, seed {seed}")
    shutil.rmtree(workdir, ignore_errors=True)
    c = make_config(make_arms(STEPS.value)[name], seed)
    seconds = train(c, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [int(share * STEPS.value) for share in POINTS]
    result = {
        "name": name,
        "seed": seed,
        "step": steps,
        "cpu_seconds": [seconds[step] - seconds[WARM_UP] for step in steps],
        "step_cpu_seconds": statistics.median(np.diff(seconds[WARM_UP:]).tolist()),
        "trained_tokens": [sum(row["train/trained_tokens"] for row in rows[:n]) for n in steps],
        "metrics": {
            key: statistics.mean(values)
            for key in rows[-1]
            if key.startswith(("rollout/", "time/", "train/reverse_kl"))
            and (values := [row[key] for row in rows if row.get(key) is not None])
        },
        "figures": [evaluate_step(workdir, step, teacher, mesh) for step in steps],
    }
    run_files.write_json(result_file, result)
    return result


def interpolate(result: dict[str, Any], figure: str, seconds: float) -> float:
    """Returns a figure of a run at a number of CPU seconds, between its evaluated checkpoints."""
    values = [point[figure] for point in result["figures"]]
    return float(np.interp(seconds, result["cpu_seconds"], values))


def render_table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Renders a line for each arm: means over seeds, and the least and the largest."""
    equal = min(r["cpu_seconds"][-1] for runs in results.values() for r in runs)

    def spread(values: list[float], form: str) -> str:
        mean, low, high = statistics.mean(values), min(values), max(values)
        return f"{format(mean, form)} ({format(low, form)} to {format(high, form)})"

    lines = [
        f"At {equal:.0f} CPU seconds, those of the cheapest run:",
        "",
        "| | CPU s a step | steps | trained tokens | greedy | sampled, T = 1 | reverse KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        steps = [np.interp(equal, r["cpu_seconds"], r["step"]) for r in runs]
        tokens = [np.interp(equal, r["cpu_seconds"], r["trained_tokens"]) for r in runs]
        cells = [
            name,
            spread([r["step_cpu_seconds"] for r in runs], ".3f"),
            f"{statistics.mean(steps):.0f}",
            f"{statistics.mean(tokens):,.0f}",
            *(spread([interpolate(r, x, equal) for r in runs], ".1%") for x in ("greedy",)),
            spread([interpolate(r, "accuracy", equal) for r in runs], ".1%"),
            spread([interpolate(r, "reverse_kl", equal) for r in runs], ".3f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"After {STEPS.value} steps:",
        "",
        "| | CPU seconds | trained tokens | greedy | sampled, T = 1 | reverse KL |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        cells = [
            name,
            f"{statistics.mean(r['cpu_seconds'][-1] for r in runs):.0f}",
            f"{statistics.mean(r['trained_tokens'][-1] for r in runs):,.0f}",
            *(
                spread([r["figures"][-1][x] for r in runs], form)
                for x, form in (("greedy", ".1%"), ("accuracy", ".1%"), ("reverse_kl", ".3f"))
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    out, arms = paths.check_output(f"{OUT.value}/fewer-tokens.json"), make_arms(STEPS.value)
    for name in ONLY.value:
        if name not in arms:
            raise UserError(f"--only={name}: known are {'; '.join(arms)}")
    host, seeds = contest.describe_machine({}), [int(seed) for seed in SEEDS.value]
    mesh = mesh_lib.make_mesh(data=1, fsdp=1, tensor=1, expert=1)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ONLY.value or arms}
    with mesh_lib.use_mesh(mesh):
        path = quickstart.get_config().teacher.path
        teacher = policy.load(policy.make_abstract(path, "float32", False, mesh), "float32")
        for seed in seeds:  # arms take turns, so that what else runs here slows them alike
            for name in results:
                results[name].append(run_arm(name, seed, teacher, mesh))
    lines = [
        "# Fewer tokens: short responses first, and rows that end where the teacher disagrees",
        "",
        f"{host['time']}, {host['processor']}, {host['cores']} cores, {host['memory_gib']} GiB, no"
        f" accelerator. {len(seeds)} seeds, means with the least and the largest;"
        f" {PROBLEMS.value} held-out problems. `python -m benchmarks.fewer_tokens`",
        "",
        *render_table(results),
    ]
    run_files.write_json(epath.Path(out), {"host": host, "results": results})
    run_files.write_text(epath.Path(out).parent / "fewer-tokens.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
