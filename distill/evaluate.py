"""python -m distill.evaluate --model=DIR --benchmark=NAME --out=DIR: accuracy, with its interval.

OUT gets examples.jsonl, one row a response, written as they come; the same command resumes where
it was stopped. When all are there, summary.json has the figures and how they came about.
--protocol names a way to sample, and each sampling flag overrides its setting. With --responses the
responses are read from a file and no model is needed. `compare` puts several OUTs side by side.
"""

from absl import flags
from etils import epath

from distill.evaluation import evaluator, problems, protocols, records, tasks
from distill.runtime import cli, distributed, run_files
from models.errors import UserError

OPTIONS = flags.FlagValues()
MODEL, DTYPE = cli.define_model_flags(OPTIONS, required=False)
BENCHMARK = flags.DEFINE_string(
    "benchmark", None, f"One of {', '.join(tasks.BENCHMARKS)}.", OPTIONS, required=True
)
DATA = flags.DEFINE_string(
    "data",
    "",
    "jsonl of question and answer, hf:NAME[:CONFIG][:SPLIT] or tfds:NAME[:CONFIG][:SPLIT]; hf: "
    "alone is the benchmark's own set; arithmetic makes its own.",
    OPTIONS,
)
OUT = flags.DEFINE_string(
    "out", None, "Directory of examples.jsonl, summary.json.", OPTIONS, required=True
)
PROTOCOL = flags.DEFINE_string(
    "protocol",
    "greedy",
    f"How to sample: {', '.join(protocols.PROTOCOLS)}. A sampling flag overrides its setting.",
    OPTIONS,
)
cli.define_sampling_flags(OPTIONS, seed=0, batch_size=64)
KS = flags.DEFINE_list("k", ["1"], "pass@k and maj@k for these, at most --samples.", OPTIONS)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Only the first problems, with transcripts printed; 0: all.", 0, flag_values=OPTIONS
)
TEMPLATE = flags.DEFINE_string(
    "template", "", "How a question is put, with {question}; default: the benchmark's way.", OPTIONS
)
RESPONSES = flags.DEFINE_string(
    "responses", "", "jsonl of stored responses to grade, without a model.", OPTIONS
)
TEACHER = flags.DEFINE_string("teacher", "", "Also measure the reverse KL to this model.", OPTIONS)
distributed.define_flags(OPTIONS)


def main() -> None:
    with distributed.join_processes(OPTIONS):
        run_evaluation()


def run_evaluation() -> None:
    ks, out = _read_ks(), epath.Path(OUT.value)
    if RESPONSES.value:
        known = problems.load_problems(BENCHMARK.value, DATA.value, 0) if DATA.value else []
        rows = problems.load_responses(BENCHMARK.value, RESPONSES.value, known)
        cli.check_output(f"{OUT.value}/summary.json")
        return evaluator.evaluate_stored(BENCHMARK.value, rows[: LIMIT.value or None], out, ks)
    spec = _read_spec(ks)
    rows = problems.load_problems(BENCHMARK.value, DATA.value, LIMIT.value)
    problems.check_gradable(BENCHMARK.value, rows)
    if not MODEL.value:
        raise UserError("--model: name a model directory, or give --responses")
    evaluator.evaluate_model(MODEL.value, rows, spec, out, dtype=DTYPE.value, teacher=TEACHER.value)
    if LIMIT.value and run_files.is_primary():
        print(records.render_transcripts(rows, out / records.EXAMPLES_FILE))
    return None


def _read_ks() -> tuple[int, ...]:
    ks = tuple(int(k) for k in KS.value if k.isdecimal() and int(k) > 0)
    if len(ks) < len(KS.value):
        raise UserError(f"--k={','.join(KS.value)}: each must be 1 or more")
    return ks


def _read_spec(ks: tuple[int, ...]) -> protocols.EvalSpec:
    """Returns the protocol's settings with the flags that override them, checked."""
    problems.require_task(BENCHMARK.value)
    settings = protocols.resolve_settings(
        PROTOCOL.value, BENCHMARK.value, cli.read_sampling_flags(OPTIONS)
    )
    if max(ks, default=0) > settings["samples"]:
        raise UserError(
            f"--k={','.join(KS.value)}: each must be 1 to --samples={settings['samples']}"
        )
    if TEMPLATE.value and "{question}" not in TEMPLATE.value:
        raise UserError("--template: no {question} in it")
    try:
        return protocols.make_eval_spec(
            PROTOCOL.value, BENCHMARK.value, settings, template=TEMPLATE.value, ks=ks
        )
    except UserError as error:
        raise UserError(f"--{error}") from None


if __name__ == "__main__":
    cli.run(main, OPTIONS)
