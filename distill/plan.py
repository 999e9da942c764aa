"""Whether a run fits a TPU slice, and how fast it can be: compiled here, without one.

    python -m distill.plan --config=configs/X.py --topology=v5e:8x8 [--config.a.b=v ...]

All programs that `train` may run (sampling, the teacher's scoring, updates, evaluation) are
compiled for the slice by libtpu's own compiler, each with what lies in memory beside it; nothing is
read, allocated or executed, and no accelerator is needed. Models are directories, of which only
config.json is read, or the hub's names of the released sizes, of which nothing is.

Seconds are those of responses that are all as long as they may be. --mean_response_tokens=N adds
those of lengths that occur: log-normal (sigma 1) with mean N, cut at the limit, behind prompts of
300 tokens, scheduled and packed by the code that a run does it with.

--topology=v5e:auto finds the smallest slice of a generation that fits. Exit code 0: it fits; 1: it
does not, and what would help is said.
"""

import sys
import time

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from distill.planning import aot, fit, forecast, roofline
from distill.planning.roofline import ProgramCost
from distill.runtime import cli, run_files
from models.errors import UserError

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
flags.mark_flag_as_required("config", OPTIONS)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Slice, such as v5e:8x8 or v5p:2x2x4, or v5e:auto.", OPTIONS, required=True
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.", OPTIONS)
MEAN_RESPONSE_TOKENS = flags.DEFINE_integer(
    "mean_response_tokens",
    0,
    "Tell also how long a step takes if responses have so many tokens in the mean: log-normal, "
    "sigma 1, cut at the limit, behind prompts of 300 tokens. 0: not.",
    lower_bound=0,
    flag_values=OPTIONS,
)
EXPLAIN = flags.DEFINE_bool("explain", True, "Look for what helps where it does not fit.", OPTIONS)


def find_smallest(c: ConfigDict, generation: str) -> tuple[str, dict[str, list[ProgramCost]]]:
    """The smallest slice of a generation that fits, and its programs.

    Raises:
      UserError: if none does, with the last reason.
    """
    if generation not in fit.SLICES:
        raise UserError(f"--topology={generation}:auto: name one of {', '.join(fit.SLICES)}")
    reason = ""
    for shape in fit.SLICES[generation]:
        topology = f"{generation}:{shape}"
        try:
            return topology, fit.compile_run(c, topology)
        except fit.TooLarge as error:
            reason = f"{topology}: {error.program} needs {error.needs_gib:.2f} GiB a device"
        except UserError as error:
            reason = f"{topology}: {error}"
        if not JSON.value:
            run_files.log_line(f"does not fit {reason}")
    raise UserError(f"--topology={generation}:auto: nothing fits; {reason}")


def main() -> None:
    c, topology = CONFIG.value, TOPOLOGY.value
    jax.config.update("jax_enable_compilation_cache", False)  # of programs for devices elsewhere
    start = time.perf_counter()
    try:
        if topology.endswith(":auto"):
            topology, stage_costs = find_smallest(c, topology.removesuffix(":auto"))
        else:
            aot.get_chip(topology)
            stage_costs = fit.compile_run(c, topology)
        forecasts = (
            fit.forecast_stages(c, topology, stage_costs, MEAN_RESPONSE_TOKENS.value)
            if MEAN_RESPONSE_TOKENS.value
            else {}
        )
    except fit.TooLarge as error:
        hbm = aot.get_chip(topology).hbm_gib
        over = error.needs_gib - hbm
        failed = {
            "topology": topology,
            "fits": False,
            "program": error.program,
            "needs_gib": error.needs_gib,
            "hbm_gib": hbm,
            "largest": error.largest,
            "helps": fit.find_remedy(c, topology, error.program) if EXPLAIN.value else None,
        }
        if JSON.value:
            print(run_files.to_json(failed, 2))
        else:
            print(
                f"does not fit {topology}: {error.program} needs {error.needs_gib:.2f} GiB a "
                f"device, {over:.2f} more than the {hbm} there are"
            )
            print("largest:", "; ".join(f"{size} {what}" for size, what in error.largest))
            if failed["helps"]:
                print("what would help: {change} ({peak_gib:.2f} GiB)".format(**failed["helps"]))
        sys.exit(1)
    if JSON.value:
        summary = roofline.summarise_run(c, topology, stage_costs)
        for name, of in forecasts.items():
            forecast.add_to_summary(summary["stages"][name], of)
        print(run_files.to_json(summary, 2))
    else:
        print(roofline.render_tables(c, topology, stage_costs))
        for name, of in forecasts.items():
            print(forecast.render_forecast(name, of))
        print(f"compiled in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
