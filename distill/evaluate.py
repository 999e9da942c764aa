"""python -m distill.evaluate --model=DIR --benchmark=NAME --out=DIR: accuracy, with its interval.

OUT gets examples.jsonl, one row a response, written as they come: the same command goes on where
it was stopped. When all are there, summary.json says what they amount to, and how they came about:
--protocol names a way to sample, and any flag changes its part of it. With --responses the
responses are read from a file and no model is needed. `compare` puts several OUTs side by side.
"""

import math

from absl import flags
from etils import epath

from distill.evaluation import evaluator, protocols, records, responses, statistics, tasks
from distill.policy import compatibility, policy
from distill.rewards import graders, ifeval
from distill.runtime import cli, distributed, run_files
from distill.runtime import mesh as mesh_lib
from models import families
from models.errors import UserError

OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", "", "Model directory, hub id or run directory.", flag_values=OPTIONS
)
BENCHMARK = flags.DEFINE_string(
    "benchmark",
    None,
    f"One of {', '.join(tasks.BENCHMARKS)}.",
    required=True,
    flag_values=OPTIONS,
)
DATA = flags.DEFINE_string(
    "data",
    "",
    "jsonl of question and answer, hf:NAME[:CONFIG][:SPLIT] or tfds:NAME[:CONFIG][:SPLIT]; hf: "
    "alone is the benchmark's own set; arithmetic makes its own.",
    flag_values=OPTIONS,
)
OUT = flags.DEFINE_string(
    "out", None, "Directory of examples.jsonl, summary.json.", required=True, flag_values=OPTIONS
)
PROTOCOL = flags.DEFINE_string(
    "protocol",
    "greedy",
    f"How to sample: {', '.join(protocols.PROTOCOLS)}. Each flag below changes its own part.",
    flag_values=OPTIONS,
)
SAMPLES = flags.DEFINE_integer(
    "samples", None, "Responses to each problem.", lower_bound=1, flag_values=OPTIONS
)
KS = flags.DEFINE_list(
    "k", ["1"], "pass@k and maj@k for these, at most --samples.", flag_values=OPTIONS
)
LIMIT = flags.DEFINE_integer(
    "limit",
    0,
    "Only the first problems, with transcripts printed; 0: all.",
    lower_bound=0,
    flag_values=OPTIONS,
)
THINKING = flags.DEFINE_enum(
    "thinking", None, ["on", "off"], "The chat template's switch.", flag_values=OPTIONS
)
TEMPLATE = flags.DEFINE_string(
    "template", "", "How a question is put, with {question}; else as usual.", flag_values=OPTIONS
)
RESPONSES = flags.DEFINE_string(
    "responses", "", "jsonl of stored responses to grade, without a model.", flag_values=OPTIONS
)
TEACHER = flags.DEFINE_string(
    "teacher", "", "Measure the reverse KL to this model too.", flag_values=OPTIONS
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Longest response, in tokens.", lower_bound=1, flag_values=OPTIONS
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "0: greedy.", lower_bound=0.0, flag_values=OPTIONS
)
TOP_K = flags.DEFINE_integer("top_k", None, "0: off.", lower_bound=0, flag_values=OPTIONS)
TOP_P = flags.DEFINE_float(
    "top_p", None, "1: off.", lower_bound=1e-6, upper_bound=1.0, flag_values=OPTIONS
)
MIN_P = flags.DEFINE_float(
    "min_p",
    None,
    "Least share of the likeliest token's probability; 0: off.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=OPTIONS,
)
PRESENCE_PENALTY = flags.DEFINE_float(
    "presence_penalty", None, "Taken from the logits of what was said; 0: off.", flag_values=OPTIONS
)
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0, flag_values=OPTIONS)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 64, "Responses sampled together.", lower_bound=1, flag_values=OPTIONS
)
DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "float32", "bfloat16"], "Of the computation.", flag_values=OPTIONS
)
distributed.define_flags(OPTIONS)


def _read_settings(ks: list[int]) -> evaluator.Record:
    """The protocol's settings, with the flags that change them; checked."""
    tasks.require_benchmark(BENCHMARK.value)
    changes = {
        "samples": SAMPLES.value,
        "thinking": None if THINKING.value is None else THINKING.value == "on",
        "max_new_tokens": MAX_NEW_TOKENS.value,
        "temperature": TEMPERATURE.value,
        "top_k": TOP_K.value,
        "top_p": TOP_P.value,
        "min_p": MIN_P.value,
        "presence_penalty": PRESENCE_PENALTY.value,
    }
    for name in ("temperature", "top_p", "min_p", "presence_penalty"):  # nan passes a flag's bounds
        if changes[name] is not None and not math.isfinite(changes[name]):
            raise UserError(f"--{name}={changes[name]}: not a finite number")
    settings = protocols.resolve_settings(PROTOCOL.value, BENCHMARK.value, changes)
    if max(ks, default=0) > settings["samples"]:
        raise UserError(
            f"--k={','.join(KS.value)}: each must be 1 to --samples={settings['samples']}"
        )
    if TEMPLATE.value and "{question}" not in TEMPLATE.value:
        raise UserError("--template: no {question} in it")
    return settings


def _grade_stored_responses(out_dir: epath.Path, ks: list[int]) -> None:
    """--responses: grades them and sums up."""
    benchmark = BENCHMARK.value
    known_problems = tasks.load_problems(benchmark, DATA.value, 0) if DATA.value else []
    rows = tasks.load_responses(benchmark, RESPONSES.value, known_problems)[: LIMIT.value or None]
    cli.check_output(f"{OUT.value}/summary.json")
    if (out_dir / "protocol.json").exists():
        raise UserError(f"--out={out_dir}: holds the evaluation of a model")
    with graders.Grader() as grader:
        rows = responses.grade_rows(grader, benchmark, rows)
    run_files.write_jsonl(out_dir / records.EXAMPLES_FILE, rows)
    summary = statistics.summarise_rows(rows, ks)
    run_files.write_json(out_dir / "summary.json", summary)
    if unchecked := summary.get("ifeval", {}).get("unchecked"):  # type: ignore[attr-defined]
        run_files.log_line(f"warning: {unchecked} instructions not checked: {ifeval.PUNKT_COMMAND}")


def main() -> None:
    with distributed.join_processes(OPTIONS):
        run_evaluation()


def run_evaluation() -> None:
    ks = [int(k) for k in KS.value if k.isdecimal() and int(k) > 0]
    if len(ks) < len(KS.value):
        raise UserError(f"--k={','.join(KS.value)}: each must be 1 or more")
    out = epath.Path(OUT.value)
    if RESPONSES.value:
        return _grade_stored_responses(out, ks)
    settings = _read_settings(ks)
    settings |= {"seed": SEED.value, "batch_size": BATCH_SIZE.value}
    spec = protocols.make_eval_spec(
        PROTOCOL.value, BENCHMARK.value, settings, template=TEMPLATE.value, ks=tuple(ks)
    )
    rows = tasks.load_problems(BENCHMARK.value, DATA.value, LIMIT.value)
    tasks.check_gradable(BENCHMARK.value, rows)
    if not MODEL.value:
        raise UserError("--model: name a model directory, or give --responses")
    paths = [path for path in (MODEL.value, TEACHER.value) if path]
    mesh = mesh_lib.make_reader_mesh(
        *(families.read_config(policy.resolve_model_dir(path)) for path in paths)
    )
    abstract_policies = [
        policy.make_abstract_for_inference(path, DTYPE.value or "", mesh) for path in paths
    ]
    compatibility.require_same_vocabulary(abstract_policies[0], abstract_policies[-1])
    cli.check_output(f"{OUT.value}/summary.json")
    evaluator.encode_prompts(abstract_policies[0], rows, spec)
    with policy.use(abstract_policies[0]):
        subject, *teachers = [policy.load(p, p.model.dtype.name) for p in abstract_policies]
        evaluator.evaluate_benchmark(subject, rows, spec, out, teachers[0] if teachers else None)
    if LIMIT.value and run_files.is_primary():
        print(records.render_transcripts(rows, out / records.EXAMPLES_FILE))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
