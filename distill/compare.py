"""python -m distill.compare --runs=A,B[,C…]: compares evaluations.

Prints a table with one row per folder that `evaluate` wrote; one folder is shown alone. Then, for
each folder of the same benchmark as the first, prints the difference to the first, paired by
problem: on the same problems a difference is known more precisely than either accuracy.
"""

import contextlib

from absl import flags

from distill.runtime import cli, console, paths
from models.errors import UserError

OPTIONS = flags.FlagValues()
RUNS = flags.DEFINE_list(
    "runs",
    None,
    "Folders that evaluate wrote, comma-separated; or name them without a flag.",
    flag_values=OPTIONS,
)
OUT = flags.DEFINE_string("out", "", "JSON file to write the comparison to.", flag_values=OPTIONS)
ARGUMENTS: list[str] = []  # further folders


def main() -> None:
    from distill.evaluation import comparison, protocols
    from distill.runtime import outputs, run_files

    names = [*(RUNS.value or ()), *(paths.expand_home(name) for name in ARGUMENTS)]
    if len(set(names)) < len(names) or not names:
        raise UserError("--runs: name different folders, each once")
    out = paths.check_output(OUT.value) if OUT.value else None
    owned = contextlib.nullcontext()
    if out:
        owned = outputs.own_output(out, "compare", OPTIONS, arguments=ARGUMENTS)
    with owned:
        result = comparison.compare_runs(names)
        if out:
            run_files.write_json(out, result)
    first, *others = result["runs"].values()
    for name, summary in zip(names[1:], others, strict=True):
        if texts := protocols.list_differences(first, summary):
            run_files.log_line(
                f"warning: {names[0]} and {name} were not sampled alike: {'; '.join(texts)}"
            )
    print(comparison.render_table(names, list(result["runs"].values())))
    for pair in result["paired"]:
        print("\n" + pair["sentence"])
    short = comparison.shorten_names(names)
    for name in result["unpaired"]:
        pair = f"{short[name]} is of another benchmark than {short[names[0]]}"
        print(f"\n{pair}: no difference is computed")
    console.print_end(
        [f"wrote {OUT.value}"] if out else [],
        [] if len(names) > 1 else [console.format_command("compare", runs=f"{names[0]},OTHER")],
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS, ARGUMENTS)
