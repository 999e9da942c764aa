"""python -m studies.run --study=a: trains and measures what a study compares, and writes its page.

Runs queue on all cores, one process each. Stop the command whenever you like; the same command goes
on. --out/NAME gets study.json, a file for each run as soon as it has ended, and report.html; --runs
holds models, rows and checkpoints, which studies share. `python -m studies.run` lists the studies.
"""

import dataclasses
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from distill.reporting import writing
from distill.runtime import cli, run_files, stop_signals
from models.errors import UserError, suggest
from studies import definitions, jobs, results
from studies.jobs import Queue
from studies.study import Study, plan_study

OPTIONS = flags.FlagValues()
STUDY = flags.DEFINE_list("study", [], "Names of studies; all: all of them.", flag_values=OPTIONS)
SEEDS = flags.DEFINE_list(
    "seeds", [], "Run these only, or further ones; default: the study's.", flag_values=OPTIONS
)
CORES = flags.DEFINE_integer(
    "cores", 0, "Processes at a time; 0: one for each core.", lower_bound=0, flag_values=OPTIONS
)
RUNS = flags.DEFINE_string("runs", "runs/studies", "Directory of the runs.", OPTIONS)
OUT = flags.DEFINE_string("out", "results", "Directory of the results.", OPTIONS)
LIST = flags.DEFINE_bool("list", False, "Print the commands, and run nothing.", flag_values=OPTIONS)


def run_study(subject: Study, queue: Queue, out: Path, cores: int, seeds: Sequence[int]) -> bool:
    """Runs what is left of some seeds of a study, and writes its results and its page, also if it
    is interrupted; returns True if nothing failed.

    Raises:
      UserError: see `Queue.read_done`.
    """
    folder = out / subject.name

    def write() -> None:
        results.write_results(subject, queue, plan_study(subject, queue), folder)

    trials = plan_study(subject, queue).trials
    try:
        failed = queue.run(list(itertools.chain(*trials.values())), cores, write)
        finals = plan_study(subject, queue).finals
        as_is = {arm.name for arm in subject.arms if not arm.is_trained}
        wanted = [job for (arm, seed), job in finals.items() if seed in seeds or arm in as_is]
        failed += queue.run(wanted, cores, write)
    finally:
        write()
        report = writing.write_study(str(folder), folder / "report.html")
        writing.write_study_figures(report, folder)
    return not failed


def list_commands(subject: Study, queue: Queue) -> list[str]:
    """Returns the commands of all jobs that are known, in an order in which they can run."""
    plan = plan_study(subject, queue)
    known = queue.sort([*itertools.chain(*plan.trials.values()), *plan.finals.values()])
    lines = [shlex.join(["python", *words]) for job in known for words in queue.list_commands(job)]
    missing = {arm.name for arm in subject.arms} - {arm for arm, _ in plan.finals}
    if missing:
        lines.append(f"# when the trials are done: {', '.join(sorted(missing))}, at each seed")
    return lines


def main() -> None:
    known = definitions.STUDIES
    if not STUDY.value:
        print("\n".join(f"{name:3} {subject.title}" for name, subject in known.items()))
        return
    names = list(known) if STUDY.value == ["all"] else STUDY.value
    for name in names:
        if name not in known:
            hint = suggest(name, known)
            raise UserError(f"--study={name}: known are {', '.join(known)}, all{hint}")
    if not all(seed.isdecimal() for seed in SEEDS.value):
        raise UserError(f"--seeds={','.join(SEEDS.value)}: must be whole numbers")
    if Path.cwd() != jobs.CODE and not LIST.value:
        raise UserError(f"the commands of a study are relative to {jobs.CODE}: run it there")
    has_failed = False
    for name in names:
        subject, queue = known[name], Queue(Path(RUNS.value))
        seeds = tuple(map(int, SEEDS.value)) or subject.seeds
        all_seeds = tuple(dict.fromkeys((*subject.seeds, *seeds)))
        subject = dataclasses.replace(subject, seeds=all_seeds)
        if LIST.value:
            print("\n".join(list_commands(subject, queue)))
            continue
        cores = CORES.value or len(os.sched_getaffinity(0))
        with stop_signals.advise_interrupted("the same command goes on"):
            is_whole = run_study(subject, queue, Path(OUT.value), cores, seeds)
        has_failed |= not is_whole
        state = "" if is_whole else "; some runs failed, see above"
        run_files.log_line(f"{name}: {OUT.value}/{name}/report.html{state}")
    if has_failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
