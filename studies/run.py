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
from pathlib import Path

from absl import flags

from distill.reporting import writing
from distill.runtime import cli, run_files
from models.errors import UserError, suggest
from studies import definitions, jobs, results
from studies.jobs import Queue
from studies.study import Study, plan_study

OPTIONS = flags.FlagValues()
STUDY = flags.DEFINE_list("study", [], "Names of studies; all: all of them.", flag_values=OPTIONS)
SEEDS = flags.DEFINE_list("seeds", [], "Other seeds than the study's.", flag_values=OPTIONS)
CORES = flags.DEFINE_integer(
    "cores", 0, "Processes at a time; 0: one for each core.", lower_bound=0, flag_values=OPTIONS
)
RUNS = flags.DEFINE_string("runs", "runs/studies", "Directory of the runs.", OPTIONS)
OUT = flags.DEFINE_string("out", "results", "Directory of the results.", OPTIONS)
LIST = flags.DEFINE_bool("list", False, "Print the commands, and run nothing.", flag_values=OPTIONS)


def run_study(subject: Study, queue: Queue, out: Path, cores: int) -> bool:
    """Runs what is left of a study and writes its results; returns True if nothing failed.

    Raises:
      UserError: see `Queue.read_done`.
    """

    def write() -> None:
        results.write_results(subject, queue, plan_study(subject, queue), out / subject.name)

    trials = plan_study(subject, queue).trials
    failed = queue.run(list(itertools.chain(*trials.values())), cores, write)
    failed += queue.run(list(plan_study(subject, queue).finals.values()), cores, write)
    write()
    return not failed


def main() -> None:
    known = definitions.STUDIES
    if not STUDY.value:
        print("\n".join(f"{name:4}{subject.title}" for name, subject in known.items()))
        return
    names = list(known) if STUDY.value == ["all"] else STUDY.value
    for name in names:
        if name not in known:
            hint = suggest(name, known)
            raise UserError(f"--study={name}: known are {', '.join(known)}, all{hint}")
    if Path.cwd() != jobs.CODE:
        raise UserError(f"the commands of a study are relative to {jobs.CODE}: run it there")
    if not all(seed.isdecimal() for seed in SEEDS.value):
        raise UserError(f"--seeds={','.join(SEEDS.value)}: must be whole numbers")
    out, has_failed = Path(OUT.value), False
    for name in names:
        subject, queue = known[name], Queue(Path(RUNS.value))
        if SEEDS.value:
            subject = dataclasses.replace(subject, seeds=tuple(map(int, SEEDS.value)))
        if LIST.value:
            plan = plan_study(subject, queue)
            for job in [*itertools.chain(*plan.trials.values()), *plan.finals.values()]:
                print("\n".join(shlex.join(["python", *x]) for x in queue.list_commands(job)))
            continue
        is_whole = run_study(subject, queue, out, CORES.value or len(os.sched_getaffinity(0)))
        has_failed |= not is_whole
        page = out / name / "report.html"
        writing.write_study(str(out / name), page)
        run_files.log_line(
            f"{name}: {page}" + ("" if is_whole else "; some runs failed, see above")
        )
    if has_failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
