"""python -m distill.verify --data=FILE.jsonl --benchmark=NAME --out=FILE.jsonl: rejection sampling.

FILE is what `generate` wrote over prompts with an `answer`. Every sample is graded by the
benchmark's grader and gets `outcome` and `correct`, which is true only of one that also ended by a
stop token. OUT has the rows with the samples that --keep asks for; rows without any are left out.
A stage reads OUT as its data, by the tokens themselves.
"""

import collections
from collections.abc import Iterator

from absl import flags

from distill.data import sources
from distill.rewards import graders
from distill.runtime import cli, run_files
from models.errors import UserError

OPTIONS = flags.FlagValues()
DATA = flags.DEFINE_string("data", None, "What generate wrote.", OPTIONS, required=True)
BENCHMARK = flags.DEFINE_string(
    "benchmark", None, "Whose grader: gsm8k, arithmetic, ...", OPTIONS, required=True
)
OUT = flags.DEFINE_string("out", None, "jsonl to write.", OPTIONS, required=True)
KEEP = flags.DEFINE_enum(
    "keep", "correct", ["correct", "finished", "all"], "Which samples.", flag_values=OPTIONS
)
SAMPLES = flags.DEFINE_integer(
    "samples", 0, "At most so many of each prompt, the first ones; 0: all.", 0, flag_values=OPTIONS
)
ON_BAD_ROW = flags.DEFINE_enum(
    "on_bad_row",
    "fail",
    ["fail", "skip"],
    "Rows without samples or answer, or with one that the grader cannot read.",
    flag_values=OPTIONS,
)


def grade_samples(row: dict, where: str, benchmark: str, grader: graders.Grader) -> list[dict]:
    """The samples of a row, each with `outcome` and `correct`.

    Raises:
      UserError: naming the row, if it lacks something, or the grader cannot read its answer.
    """
    if not isinstance(row.get("samples"), list) or not isinstance(
        row.get("answer"), str | int | float
    ):
        raise UserError(f"{where}: needs samples and answer, has {sorted(row)}")
    samples, answer = row["samples"], str(row["answer"])
    if any(not isinstance(sample.get("text"), str) for sample in samples):
        raise UserError(f"{where}: a sample has no text to grade")
    texts = [sample["text"] for sample in samples]
    # The answer must be one that a response can equal: itself, in the form that a response has.
    itself = answer if benchmark == "arithmetic" else f"\\boxed{{{answer}}}"
    *outcomes, readable = grader.grade(benchmark, [*texts, itself], [answer] * (len(texts) + 1))
    if readable != "correct":
        raise UserError(f"{where}: answer {answer!r} cannot be parsed")
    return [
        {
            **sample,
            "outcome": outcome,
            "correct": outcome == "correct" and sample.get("finish_reason") == "stop",
        }
        for sample, outcome in zip(samples, outcomes, strict=True)
    ]


def verify_rows(
    rows: sources.Rows,
    benchmark: str,
    *,
    keep: str,
    max_samples: int,
    skip_bad_rows: bool,
    counts: collections.Counter[str],
) -> Iterator[dict]:
    """Yields the rows with the samples that are kept; `counts` come to hold rows, samples,
    correct, kept, rows kept and bad rows."""
    with graders.Grader() as grader, run_files.show_progress(rows.size, 0, "verify") as bar:
        for index in range(rows.size):
            bar.update(index + 1, {"kept": counts["kept"]})
            counts["rows"] += 1
            try:
                row = rows.read_row(index)
                graded_samples = grade_samples(row, rows.locate_row(index), benchmark, grader)
            except UserError as error:
                if not skip_bad_rows:
                    raise
                counts["bad rows"] += 1
                run_files.log_line(f"skipped: {error}")
                continue
            good = [
                sample
                for sample in graded_samples
                if keep == "all"
                or sample["correct" if keep == "correct" else "finish_reason"] in (True, "stop")
            ][: max_samples or None]
            counts["samples"] += len(graded_samples)
            counts["correct"] += sum(sample["correct"] for sample in graded_samples)
            counts["kept"] += len(good)
            if good:
                counts["rows kept"] += 1
                yield {**row, "samples": good}


def main() -> None:
    if BENCHMARK.value not in graders.GRADERS:
        raise UserError(f"--benchmark={BENCHMARK.value}: known are {', '.join(graders.GRADERS)}")
    out, counts = cli.check_output(OUT.value), collections.Counter()
    rows = sources.open_rows(DATA.value)
    kept = verify_rows(
        rows,
        BENCHMARK.value,
        keep=KEEP.value,
        max_samples=SAMPLES.value,
        skip_bad_rows=ON_BAD_ROW.value == "skip",
        counts=counts,
    )
    run_files.write_jsonl(out, kept)
    run_files.log_line(
        f"{rows.name}: {counts['correct']} of {counts['samples']} samples correct; "
        f"{counts['kept']} kept, of {counts['rows kept']} of {rows.size} rows "
        f"({counts['bad rows']} bad rows)"
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
