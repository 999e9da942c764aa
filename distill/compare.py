"""python -m distill.compare --runs=A,B[,C…]: compares evaluations.

Prints a table with one row per folder that `evaluate` wrote; one folder is shown alone. Then, for
each folder of the same benchmark as the first, prints the difference to the first, paired by
problem: on the same problems a difference is known more precisely than either accuracy.
"""

from absl import flags

from distill.runtime import cli, console, paths
from models.errors import UserError

OPTIONS = flags.FlagValues()
RUNS = flags.DEFINE_list(
    "runs",
    None,
    "Folders that evaluate wrote, comma-separated.",
    flag_values=OPTIONS,
    required=True,
)
OUT = flags.DEFINE_string("out", "", "JSON file to write the comparison to.", flag_values=OPTIONS)


def main() -> None:
    from distill.evaluation import comparison, protocols
    from distill.runtime import run_files

    if len(set(RUNS.value)) < len(RUNS.value) or not RUNS.value:
        raise UserError("--runs: name different folders, each once")
    out = paths.check_output(OUT.value) if OUT.value else None
    result = comparison.compare_runs(RUNS.value)
    if out:
        run_files.write_json(out, result)
    first, *others = result["runs"].values()
    for name, summary in zip(RUNS.value[1:], others, strict=True):
        if texts := protocols.list_differences(first, summary):
            run_files.log_line(
                f"warning: {RUNS.value[0]} and {name} were not sampled alike: {'; '.join(texts)}"
            )
    print(comparison.render_table(RUNS.value, list(result["runs"].values())))
    for pair in result["paired"]:
        print("\n" + pair["sentence"])
    short = comparison.shorten_names(RUNS.value)
    for name in result["unpaired"]:
        names = f"{short[name]} is of another benchmark than {short[RUNS.value[0]]}"
        print(f"\n{names}: no difference is computed")
    console.print_end(
        [f"wrote {OUT.value}"] if out else [],
        []
        if len(RUNS.value) > 1
        else [console.format_command("compare", runs=f"{RUNS.value[0]},OTHER")],
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
