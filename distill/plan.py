"""Compiles a run for TPUs or GPUs without having one, and reports its memory and speed.

    python -m distill.plan --config=configs/X.py --topology=v5e:8x8 [--config.a.b=v ...]
    python -m distill.plan --config=configs/X.py --topology=h100:8

Runs the device's own compiler on every program that `train` may run (sampling, the teacher's
scoring, updates, evaluation), and adds the other arrays in memory at that time. For TPUs `pip
install libtpu` brings the compiler; for GPUs the error without it names the package. Reads no
weights, allocates and executes nothing, and needs no accelerator. A model is a directory, of which
only config.json is read, or the hub name of a released size, of which nothing is read.

GPUs are h100, h200, a100 (80 GB), l4 and rtx4090, 1 to 8 of them in one host. Their memory is JAX's
pool: three quarters, or XLA_PYTHON_CLIENT_MEM_FRACTION. XLA tunes kernels by running them, which it
cannot do here, so traffic and seconds are those of an untuned program; memory is meaningful.

Seconds assume that every response has the maximum length, whatever a response_schedule says.
--mean_response_tokens=N adds a forecast for typical lengths: log-normal (sigma 1) with mean N, cut
at the limit, after prompts of 300 tokens, scheduled and packed by the code that a run uses.

--topology=v5e:auto (or h100:auto) finds the smallest slice of a generation that fits. The exit code
is 0 if the run fits; otherwise it is 1, and the output names a change that would help.
"""

import sys
import time
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict, config_flags

from distill.runtime import cli
from models.errors import UserError

if TYPE_CHECKING:
    from distill.planning.fit import TooLarge
    from distill.planning.roofline import ProgramCost

OPTIONS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=OPTIONS)
flags.mark_flag_as_required("config", OPTIONS)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Slice, such as v5e:8x8, v5p:2x2x4 or v5e:auto; or GPUs of a host, such as h100:8.",
    OPTIONS,
    required=True,
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of tables.", OPTIONS)
MEAN_RESPONSE_TOKENS = flags.DEFINE_integer(
    "mean_response_tokens",
    0,
    "Also forecast a step whose responses have this mean length in tokens: log-normal, sigma 1, "
    "cut at the limit, after prompts of 300 tokens. 0: no forecast.",
    lower_bound=0,
    flag_values=OPTIONS,
)
TOKENS_PER_STEP = flags.DEFINE_float(
    "tokens_per_step",
    1.0,
    "Tokens that a decoding step of that forecast draws for a row, where drafts are on: "
    "a run's metric rollout/tokens_per_step.",
    lower_bound=1.0,
    flag_values=OPTIONS,
)
EXPLAIN = flags.DEFINE_bool(
    "explain", True, "If the run does not fit, search for a change that helps.", OPTIONS
)


def find_smallest(c: ConfigDict, generation: str) -> "tuple[str, dict[str, list[ProgramCost]]]":
    """Finds the smallest slice of a generation that fits; returns its name and program costs.

    Raises:
      UserError: if none fits, with the reason for the largest.
    """
    from distill.planning import fit
    from distill.runtime import run_files

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
    import jax

    from distill.planning import aot, fit, forecast, roofline
    from distill.runtime import run_files

    c, topology = CONFIG.value, TOPOLOGY.value
    jax.config.update("jax_enable_compilation_cache", False)  # for devices that are not here
    start = time.perf_counter()
    try:
        if topology.endswith(":auto"):
            topology, stage_costs = find_smallest(c, topology.removesuffix(":auto"))
        else:
            aot.get_chip(topology)
            stage_costs = fit.compile_run(c, topology)
        forecasts = {}
        if MEAN_RESPONSE_TOKENS.value:
            forecasts = fit.forecast_stages(
                c, topology, stage_costs, MEAN_RESPONSE_TOKENS.value, TOKENS_PER_STEP.value
            )
    except fit.TooLarge as error:
        print_failure(c, topology, error)
        sys.exit(1)
    if JSON.value:
        summary = roofline.summarise_run(c, topology, stage_costs)
        for name, stage_forecast in forecasts.items():
            forecast.add_to_summary(summary["stages"][name], stage_forecast)
        print(run_files.to_json(summary, 2))
    else:
        print(roofline.render_tables(c, topology, stage_costs))
        for name, stage_forecast in forecasts.items():
            print(forecast.render_forecast(name, stage_forecast))
        print(f"compiled in {time.perf_counter() - start:.0f} s")


def print_failure(c: ConfigDict, topology: str, error: "TooLarge") -> None:
    """Prints the program that does not fit, its largest arrays, and a change that would help."""
    from distill.planning import aot, fit
    from distill.runtime import run_files

    hbm_gib = aot.get_chip(topology).hbm_gib
    helps = fit.find_remedy(c, topology, error.program) if EXPLAIN.value else None
    if JSON.value:
        summary = {
            "topology": topology,
            "fits": False,
            "program": error.program,
            "needs_gib": error.needs_gib,
            "hbm_gib": hbm_gib,
            "largest": error.largest,
            "helps": helps,
        }
        print(run_files.to_json(summary, 2))
        return
    print(
        f"does not fit {topology}: {error.program} needs {error.needs_gib:.2f} GiB a "
        f"device, {error.needs_gib - hbm_gib:.2f} more than the {hbm_gib} available"
    )
    print("largest:", "; ".join(f"{size} {name}" for size, name in error.largest))
    if helps:
        print("would help: {change} ({peak_gib:.2f} GiB)".format(**helps))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
