"""python -m distill.evaluate --model=DIR --benchmark=NAME --out=DIR: evaluates a model.

Writes examples.jsonl to OUT, one row per response, as they finish; the same command resumes where
it stopped, if weights, tokenizer, problems and settings are the same. Then writes summary.json,
with accuracy, its 95% interval, other statistics and all settings, and prints the main ones.
--protocol names a set of sampling settings, which the sampling flags override. With --responses,
grades responses from a file and needs no model. `compare` compares several OUTs.

DIR may also be the address of an OpenAI-compatible server, such as vLLM, SGLang or `python -m
distill.serve`: http://HOST:PORT, or several of equal servers, separated by commas. It renders the
chat template itself, unless --tokenizer names the model's tokenizer. --batch_size requests are in
flight, and summary.json records server and model.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath

from distill.evaluation import protocols, tasks
from distill.rewards import sandbox
from distill.runtime import cli, console, paths
from models.errors import UserError

if TYPE_CHECKING:
    from distill.evaluation.judging import JudgeSpec
    from distill.evaluation.problems import Problems

OPTIONS = flags.FlagValues()
MODEL, DTYPE = cli.define_model_flags(
    OPTIONS,
    required=False,
    about="Model directory, hub id, run directory, or http://HOST:PORT of a server.",
)
BENCHMARK = flags.DEFINE_string(
    "benchmark", None, f"One of {', '.join(tasks.BENCHMARKS)}.", OPTIONS, required=True
)
DATA = flags.DEFINE_string(
    "data",
    "",
    "jsonl of question and answer, hf:NAME[:CONFIG][:SPLIT] or tfds:NAME[:CONFIG][:SPLIT]; a bare "
    "hf: stands for the benchmark's own set; arithmetic generates its problems.",
    OPTIONS,
)
OUT = flags.DEFINE_string(
    "out", None, "Directory for examples.jsonl and summary.json.", OPTIONS, required=True
)
PROTOCOL = flags.DEFINE_string(
    "protocol",
    "greedy",
    f"Sampling settings: {', '.join(protocols.PROTOCOLS)}. Sampling flags override them.",
    OPTIONS,
)
cli.define_sampling_flags(OPTIONS, seed=0, batch_size=64)
KS = flags.DEFINE_list("k", ["1"], "k of pass@k and maj@k, at most --samples.", OPTIONS)
LIMIT = flags.DEFINE_integer(
    "limit",
    0,
    "Only this many problems; up to ten are also printed, with the responses. 0: all.",
    0,
    flag_values=OPTIONS,
)
TEMPLATE = flags.DEFINE_string(
    "template", "", "Prompt template with {question}; default: the benchmark's own.", OPTIONS
)
CHOICE_BY = flags.DEFINE_enum(
    "choice_by",
    "response",
    ["response", "letter", "text"],
    "How a multiple-choice problem is answered: by the letter that a sampled response gives, or, "
    "without sampling, by the likeliest letter, or option's text.",
    flag_values=OPTIONS,
)
RESPONSES = flags.DEFINE_string(
    "responses", "", "jsonl of stored responses to grade instead of a model's.", OPTIONS
)
JUDGE = flags.DEFINE_string(
    "judge",
    "",
    "Model directory or http://HOST:PORT of a server that also says which responses are right.",
    OPTIONS,
)
JUDGE_TEMPLATE = flags.DEFINE_string(
    "judge_template",
    "",
    "What the judge is asked, with {question}, {answer} and {response}; ends with a verdict.",
    OPTIONS,
)
for _name, _about in (
    ("judge_model", "Name of the judge on its server."),
    ("judge_api_key_env", "Name of the environment variable with its bearer token."),
):
    flags.DEFINE_string(_name, "", f"With --judge=http://...: {_about}", flag_values=OPTIONS)
WINDOW = flags.DEFINE_string(
    "window",
    "",
    "FROM:UNTIL: only problems of these months or days, such as 2024-10:2025-02 (livecodebench).",
    OPTIONS,
)
UNSAFE_CODE = flags.DEFINE_boolean(
    "unsafe_code",
    False,
    "Where there is no sandbox, run programs that a model wrote with your rights.",
    OPTIONS,
)
TEACHER = flags.DEFINE_string("teacher", "", "Model to measure the reverse KL to.", OPTIONS)
cli.define_server_flags(OPTIONS)
cli.define_process_flags(OPTIONS)


def main() -> None:
    from distill.runtime import addresses, distributed, xla

    is_server = addresses.is_url(MODEL.value)
    if is_server and CHOICE_BY.value != "response":
        raise UserError(f"--choice_by={CHOICE_BY.value}: needs a model that is run here")
    cli.check_server_flags(OPTIONS, is_server, "dtype", "teacher", "responses")
    if is_server:
        run_evaluation()
        return
    with distributed.join_processes(OPTIONS):
        xla.init_compilation_cache()
        run_evaluation()


def run_evaluation() -> None:
    ks, out = _read_ks(), epath.Path(OUT.value)
    if UNSAFE_CODE.value:
        sandbox.allow_unsafe_code()
    spec = None if RESPONSES.value else _read_spec(ks)  # first: the next imports take seconds
    from distill.evaluation import evaluator, problems, records
    from distill.runtime import run_files

    examples_path = f"{OUT.value}/{records.EXAMPLES_FILE}"
    paths.check_output(examples_path, RESPONSES.value, DATA.value, creates_folder=False)
    ours = (records.PROTOCOL_FILE, records.EXAMPLES_FILE)
    if (out / "summary.json").exists() and not any((out / name).exists() for name in ours):
        raise UserError(
            f"--out={OUT.value}: has a summary.json that no evaluation made; name another folder"
        )
    judge = _make_judge()
    if spec is None:
        known = []
        if DATA.value:
            known = problems.load_problems(BENCHMARK.value, DATA.value, 0, WINDOW.value)
        rows = problems.load_responses(BENCHMARK.value, RESPONSES.value, known)
        with own_output(out):
            summary = evaluator.evaluate_stored(
                BENCHMARK.value, rows[: LIMIT.value or None], out, ks, known
            )
            summary = _add_judge(summary, known, out, judge)
        print_results(summary)
        return
    rows = problems.load_problems(BENCHMARK.value, DATA.value, LIMIT.value, WINDOW.value)
    problems.check_gradable(BENCHMARK.value, rows)
    if not MODEL.value:
        raise UserError("--model: name a model directory, or give --responses")
    with own_output(out):
        summary = _add_judge(_evaluate_model(rows, spec, out), rows, out, judge)
    if 0 < LIMIT.value <= records.MAX_TRANSCRIPTS and run_files.is_primary():
        print(records.render_transcripts(rows, out / records.EXAMPLES_FILE))
    print_results(summary)


def _evaluate_model(rows: "Problems", spec: protocols.EvalSpec, out: epath.Path) -> dict[str, Any]:
    from distill.evaluation import evaluator, served_evaluation
    from distill.rollout import served_model
    from distill.runtime import addresses

    if addresses.is_url(MODEL.value):
        with served_model.open_served_model(
            MODEL.value, spec.sample.batch_size, **cli.read_server_flags(OPTIONS)
        ) as model:
            return served_evaluation.evaluate_served(model, rows, spec, out)
    return evaluator.evaluate_model(
        MODEL.value,
        rows,
        spec,
        out,
        dtype=DTYPE.value,
        teacher=TEACHER.value,
        fits=OPTIONS["max_new_tokens"].value is None,
    )


def _make_judge() -> "JudgeSpec | None":
    """Makes the judge, if one is named, before anything is evaluated."""
    if not JUDGE.value:
        for name in ("judge_template", "judge_model", "judge_api_key_env"):
            if OPTIONS[name].value:
                raise UserError(f"--{name}: is read with --judge only")
        return None
    from distill.evaluation import judges

    return judges.make_judge(
        JUDGE.value,
        JUDGE_TEMPLATE.value,
        served_model=OPTIONS["judge_model"].value or "",
        api_key_env=OPTIONS["judge_api_key_env"].value or "",
    )


def _add_judge(
    summary: dict[str, Any], rows: "Problems", out: epath.Path, judge: "JudgeSpec | None"
) -> dict[str, Any]:
    """Returns the summary with what the judge says, if one is named, and writes it."""
    if judge is None:
        return summary
    from distill.evaluation import judging
    from distill.runtime import run_files

    summary = {**summary, "judge": judging.judge_evaluation(out, rows, judge)}
    if run_files.is_primary():
        run_files.write_json(out / "summary.json", summary)
    return summary


def print_results(summary: dict[str, Any]) -> None:
    """Prints the results, on stdout, and what may follow: to compare with an evaluation that is
    beside this one, or else to evaluate the model that a run began from."""
    from distill.evaluation import comparison
    from distill.policy import hub
    from distill.runtime import addresses, run_files

    if not run_files.is_primary():
        return
    protocol = summary["protocol"]
    print(f"{BENCHMARK.value}, {protocol['protocol']}: {MODEL.value or RESPONSES.value}")
    print(console.render_table(comparison.list_results(summary)), flush=True)
    others = comparison.find_others(OUT.value, summary)
    if others:
        command = console.format_command("compare", runs=f"{others[0]},{OUT.value}")
    elif base := "" if addresses.is_url(MODEL.value) else hub.find_initial_model(MODEL.value):
        given = {name: OPTIONS[name].value for name in OPTIONS if OPTIONS[name].present}
        given = {name: ",".join(x) if isinstance(x, list) else x for name, x in given.items()}
        changed = {"model": base, "out": f"{OUT.value.rstrip('/')}_before"}
        command = console.format_command("evaluate", **given | changed)
    else:
        command = console.format_command("compare", runs=OUT.value)
    console.print_end([f"wrote {OUT.value}: summary.json, examples.jsonl"], [command])


@contextlib.contextmanager
def own_output(out: epath.Path) -> Iterator[None]:
    """Context in which no other process writes `out`, and a full disk is a UserError."""
    from distill.evaluation.example_rows import describe_graded
    from distill.runtime import locks, run_files, stop_signals

    flag = f"--out={OUT.value}"

    def advise() -> str:
        if not MODEL.value:
            return "nothing was written"
        return describe_graded(out)

    with (
        run_files.explain_write_errors(out, flag),
        stop_signals.advise_interrupted(advise),
        locks.hold_lock(out / "lock", flag),
    ):
        yield


def _read_ks() -> tuple[int, ...]:
    ks = tuple(int(k) for k in KS.value if k.isdecimal() and int(k) > 0)
    if len(ks) < len(KS.value):
        raise UserError(f"--k={','.join(KS.value)}: each must be 1 or more")
    return ks


def _read_spec(ks: tuple[int, ...]) -> protocols.EvalSpec:
    """Reads the protocol and the flags that override it, and checks them."""
    from distill.evaluation import problems

    problems.require_task(BENCHMARK.value)
    settings = protocols.resolve_settings(PROTOCOL.value, BENCHMARK.value, _read_sampling_flags())
    if max(ks, default=0) > settings["samples"]:
        raise UserError(
            f"--k={','.join(KS.value)}: each must be 1 to --samples={settings['samples']}"
        )
    if TEMPLATE.value and "{question}" not in TEMPLATE.value:
        raise UserError("--template: no {question} in it")
    try:
        return protocols.make_eval_spec(
            PROTOCOL.value,
            BENCHMARK.value,
            settings,
            template=TEMPLATE.value,
            ks=ks,
            choice_by=CHOICE_BY.value,
        )
    except UserError as error:
        raise UserError(f"--{error}") from None


def _read_sampling_flags() -> dict[str, Any]:
    """Reads the flags of sampling; with --choice_by=letter or text, the settings that stand for
    them, as nothing is sampled.

    Raises UserError for flags that would do nothing.
    """
    given = cli.read_sampling_flags(OPTIONS)
    if CHOICE_BY.value == "response":
        return given
    flag = f"--choice_by={CHOICE_BY.value}"
    unread = [name for name in given if OPTIONS[name].present and name != "batch_size"]
    unread += [name for name in ("teacher", "responses") if OPTIONS[name].value]
    if unread:
        raise UserError(f"{flag}: samples nothing, so --{unread[0]} would do nothing; leave it out")
    return {**given, "thinking": False, "samples": 1, "max_new_tokens": 1, "temperature": 0.0}


if __name__ == "__main__":
    cli.run(main, OPTIONS)
