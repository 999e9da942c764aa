"""python -m distill.quickstart [--workdir=runs/quickstart]: a demonstration in minutes on a CPU.

Evaluates the embedded student, distils it on-policy, evaluates it again, and exports it to a
Hugging Face directory; prints one table at the end. Uses the same functions as the other verbs. If
it is interrupted, the same command resumes it.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from distill.runtime import cli, console, paths

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config",
    paths.find_project_file("configs/quickstart.py"),
    lock_config=True,
    flag_values=OPTIONS,
)
WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Directory of the run.", OPTIONS)
PROBLEMS = flags.DEFINE_integer(
    "problems",
    1000,
    "Held-out problems of each of the six evaluations; fewer take less time.",
    lower_bound=1,
    flag_values=OPTIONS,
)


def main() -> None:
    from distill.reporting import writing
    from distill.training import demonstration

    out = Path(WORKDIR.value)
    summary, was_done = demonstration.run(CONFIG.value, out, PROBLEMS.value)
    report = out / "report.html"
    if not was_done or not report.exists():
        writing.write_report([str(out)], report)
    print(f"\n{demonstration.render_table(summary)}\n")
    for manner in ("greedy", "sampled"):
        print(demonstration.describe_gap(summary, out, manner))
    print(f"{summary['distillation_seconds']:.0f} s to distil, {summary['seconds']:.0f} s in all")
    print(f"model     {summary['export']}  (a Hugging Face directory)")
    print(f"run       {out}: summary.json, metrics.jsonl, rollouts/, eval/, tensorboard/")
    print(f"report    {report}  (open it in a browser)")
    console.print_end(
        [],
        [
            console.format_command(
                "generate", model=out, prompts="PROMPTS.jsonl", out=f"{out}/samples.jsonl"
            ),
            console.format_command(
                "compare", runs=f"{out}/eval/student_before/greedy,{out}/eval/student_after/greedy"
            ),
            f"tensorboard --logdir={out}/tensorboard",
        ],
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
