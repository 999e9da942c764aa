"""Trains a student: python -m distill.train --config=configs/X.py --workdir=runs/x.

One loop trains all objectives (losses.OBJECTIVES). The data and random numbers of a step are
functions of (seed, step), so a resumed run is bit-identical to one that was never stopped. For that
its data, models and adapters must be those that it began with: WORKDIR/inputs.json has their sizes
and hashes, and a run whose remaining stages would read others is refused (--allow_changed_inputs).
What may change of its config says distill/training/config_changes.py.
"""

from absl import flags
from ml_collections import config_flags

from distill.runtime import cli, gpu

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
flags.mark_flag_as_required("config", OPTIONS)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run, which is resumed if it exists.", OPTIONS, required=True
)
ALLOW_CHANGED_INPUTS = flags.DEFINE_bool(
    "allow_changed_inputs",
    False,
    "Resume with other data, models or adapters than those that the run began with.",
    flag_values=OPTIONS,
)
cli.define_process_flags(OPTIONS)


def main() -> None:
    from distill.runtime import distributed
    from distill.training import loop

    gpu.set_xla_flags(CONFIG.value.deterministic)
    with distributed.join_processes(OPTIONS):
        loop.run(CONFIG.value, WORKDIR.value, ALLOW_CHANGED_INPUTS.value)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
