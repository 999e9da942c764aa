"""python -m distill.diagnose --config=configs/X.py [--prompts=N] [--out=FILE.json]

Checks on N prompts of a run's own data, before training, that the run is worthwhile: that the
student's responses are likely under the teacher, the teacher is better, both encode and end text
alike, responses fit the length limit, and rewards differ within groups. Prints one line per
finding, with its numbers and consequence, and then the verdict. Trains nothing. --out writes all
numbers as JSON.
"""

import contextlib
import sys

from absl import flags
from ml_collections import config_flags

from distill.runtime import cli, console, paths

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
flags.mark_flag_as_required("config", OPTIONS)
PROMPTS = flags.DEFINE_integer(
    "prompts", 64, "Number of prompts.", lower_bound=2, flag_values=OPTIONS
)
SAMPLES = flags.DEFINE_integer(
    "samples", 4, "Responses to each prompt.", lower_bound=2, flag_values=OPTIONS
)
STAGE = flags.DEFINE_string(
    "stage", "", "Name of the stage; default: the last.", flag_values=OPTIONS
)
OUT = flags.DEFINE_string("out", "", "JSON file to write.", flag_values=OPTIONS)


def main() -> None:
    from distill.planning import diagnosis
    from distill.runtime import outputs, run_files

    out = paths.check_output(OUT.value) if OUT.value else None
    with outputs.own_output(out, "diagnose", OPTIONS) if out else contextlib.nullcontext():
        statistics = diagnosis.diagnose_run(CONFIG.value, STAGE.value, PROMPTS.value, SAMPLES.value)
        findings = diagnosis.make_findings(statistics)
        verdict = diagnosis.render_verdict(findings)
        for is_against, line in findings:
            print(f"{'against' if is_against else '-' if is_against is None else 'for':8}{line}")
        print(verdict)
        if out:
            lines = [line for _, line in findings]
            run_files.write_json(out, {**statistics, "findings": lines, "verdict": verdict})
    own_flags = [arg for arg in sys.argv[1:] if arg.lstrip("-").startswith("config")]
    console.print_end(
        [f"wrote {OUT.value}: all numbers"] if out else [],
        []
        if any(is_against for is_against, _ in findings)
        else [console.format_command("train", *own_flags, workdir="runs/x")],
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
