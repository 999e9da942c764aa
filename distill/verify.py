"""python -m distill.verify --data=FILE.jsonl --benchmark=NAME --out=FILE.jsonl: rejection sampling.

FILE is the output of `generate` for prompts with an `answer`. The benchmark's grader grades every
sample, which gets `outcome` and `correct`; `correct` is true only if the sample also ended with a
stop token. OUT has the rows with the samples that --keep selects; rows without any are dropped. A
stage that reads OUT as its data trains on the sampled tokens themselves.
"""

import collections

from absl import flags

from distill.evaluation import tasks
from distill.runtime import cli, console, paths

OPTIONS = flags.FlagValues()
DATA = flags.DEFINE_string("data", None, "Output of generate.", OPTIONS, required=True)
BENCHMARK = flags.DEFINE_string(
    "benchmark",
    None,
    f"Benchmark whose grader to use: {', '.join(tasks.BENCHMARKS)}.",
    OPTIONS,
    required=True,
)
OUT = flags.DEFINE_string("out", None, "jsonl to write.", OPTIONS, required=True)
KEEP = flags.DEFINE_enum(
    "keep", "correct", ["correct", "finished", "all"], "Samples to keep.", flag_values=OPTIONS
)
SAMPLES = flags.DEFINE_integer(
    "samples", 0, "Keep at most the first N samples of each prompt; 0: all.", 0, None, OPTIONS
)
ON_BAD_ROW = flags.DEFINE_enum(
    "on_bad_row",
    "fail",
    ["fail", "skip"],
    "On rows without samples or answer, or with an answer that the grader cannot read.",
    flag_values=OPTIONS,
)
UNSAFE_CODE = flags.DEFINE_boolean(
    "unsafe_code",
    False,
    "Where there is no sandbox, run programs that a model wrote with your rights.",
    OPTIONS,
)


def main() -> None:
    from distill.data import sources
    from distill.evaluation import problems, rejection
    from distill.rewards import sandbox
    from distill.runtime import outputs, run_files

    if UNSAFE_CODE.value:
        sandbox.allow_unsafe_code()
    task = problems.require_task(BENCHMARK.value)
    out, counts = paths.check_output(OUT.value, DATA.value), collections.Counter()
    rows = sources.open_rows(DATA.value)
    kept = rejection.verify_rows(
        rows,
        task.grading,
        keep=KEEP.value,
        max_samples=SAMPLES.value,
        skip_bad_rows=ON_BAD_ROW.value == "skip",
        counts=counts,
    )
    with outputs.own_output(out, "verify", OPTIONS):
        run_files.write_jsonl(out, kept)
    run_files.log_line(
        f"{rows.name}: {counts['correct']} of {counts['samples']} samples correct; "
        f"{counts['kept']} kept, of {counts['rows kept']} of {rows.size} rows "
        f"({counts['bad rows']} bad rows)"
    )
    console.print_end(
        [f"wrote {OUT.value}: rows {counts['rows kept']:,}, samples {counts['kept']:,}"],
        [console.format_sft_command(OUT.value)] if counts["kept"] else [],
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
