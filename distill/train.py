"""Trains a student: python -m distill.train --config=configs/X.py --workdir=runs/x.

One loop trains all objectives (losses.OBJECTIVES). The data and random numbers of a step are
functions of (seed, step), so a resumed run is bit-identical to one that was never stopped. For that
its data, models and adapters must be those that it began with: WORKDIR/inputs.json has their sizes
and hashes, and a run whose remaining stages would read others is refused (--allow_changed_inputs).
What may change of its config says distill/training/config_changes.py. With --check, nothing is
trained or written, and the exit code is 2 if anything is wrong.
"""

from absl import flags
from ml_collections import config_flags

from distill.runtime import cli, gpu
from models.errors import UserError

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
flags.mark_flag_as_required("config", OPTIONS)
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the run, which is resumed if it exists. Required, but with --check.",
    OPTIONS,
)
CHECK = flags.DEFINE_bool(
    "check",
    False,
    "Check the run and write nothing: flags, config, models, all rows of the data, memory, and the "
    "programs that would be compiled. Lists what is wrong, as many mistakes as it can reach at "
    "once, a line each.",
    flag_values=OPTIONS,
)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "With --check: devices that need not be here, such as v5e:8x8 or h100:8. Their memory is "
    "checked if their compiler is installed (TPUs: pip install libtpu). Default: those that are.",
    OPTIONS,
)
ALLOW_CHANGED_INPUTS = flags.DEFINE_bool(
    "allow_changed_inputs",
    False,
    "Resume with other data, models or adapters than those that the run began with.",
    flag_values=OPTIONS,
)
cli.define_process_flags(OPTIONS)


def main() -> None:
    if not WORKDIR.value and not CHECK.value:
        raise UserError("--workdir is required")
    if TOPOLOGY.value and not CHECK.value:
        raise UserError(f"--topology={TOPOLOGY.value}: only with --check; `plan` compiles for it")
    if CHECK.value:
        from distill.planning import checking

        checking.check_run(CONFIG.value, WORKDIR.value or "", TOPOLOGY.value)
        return
    from distill.runtime import distributed
    from distill.training import loop

    gpu.set_xla_flags(CONFIG.value.deterministic)
    with distributed.join_processes(OPTIONS):
        loop.run(CONFIG.value, WORKDIR.value, ALLOW_CHANGED_INPUTS.value)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
