"""python -m distill.generate --model=DIR --prompts=FILE --out=FILE.jsonl: samples responses.

FILE is jsonl, or anything that a config's data.source may be. A row has `prompt` (plain text),
`messages` (a chat), `question` (a chat of one turn) or `tokens` (ids), or any form that
distill/data/columns.py lists, and may have its own `max_new_tokens`. OUT has the same rows in the
same order, with two more fields: `prompt_tokens`, and `samples`, a list of {tokens, text, logprobs,
finish_reason: "stop" | "length"}. The tokens of
a sample end with its stop token, if it has one, or with the token that completes a stop string.
The text has no special tokens, is cut before the stop string, and is null for a model without a
tokenizer; if the prompt ends with an opening think tag, it begins with that tag. The
log-probabilities are those of the distribution that tokens were drawn from; with greedy decoding
(temperature 0), the model's own. With --top_logprobs=K, a sample also has the model's own
log-probabilities (temperature 1, without cut-offs and penalties): `model_logprobs` of its tokens,
and `top_logprobs`, the K most likely tokens at each position as [id, log-probability].

A row that cannot be completed (empty prompt, prompt too long, NaN logits) has an `error` and no
samples; the other rows are written, and the exit code is 2. Rows are written to OUT.partial as they
finish; the same command resumes after the last one, if rows, settings and the model's files are
the same. OUT.about says which command made OUT; only `generate` replaces it. Without
--max_new_tokens a response may have 1024 tokens, or what the model's positions leave after its
prompt.

MODEL may also be the address of an OpenAI-compatible server, such as vLLM, SGLang or `python -m
distill.serve`: http://HOST:PORT, or several of equal servers, separated by commas. It renders the
chat template itself, unless --tokenizer names the model's tokenizer. --batch_size requests are in
flight. What may pass is tried again: a broken connection, a time-out, status 429 or 5xx. The same
command resumes if server, model, rows and settings are the same. `tokens` and `prompt_tokens` are
null where the server gives no ids (vLLM and `serve` do), and `logprobs` unless the temperature is 0
or 1 and nothing is cut off or penalised: elsewhere servers mean different things by them.
"""

import dataclasses
import json
from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from distill.runtime import cli, console, paths
from models.errors import UserError

if TYPE_CHECKING:
    from distill.data.sources import Rows
    from distill.policy.policy import Policy
    from distill.rollout.completions import SampleSpec

OPTIONS = flags.FlagValues()
MODEL, DTYPE = cli.define_model_flags(
    OPTIONS, about="Model directory, hub id, run directory, or http://HOST:PORT of a server."
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "jsonl of prompts, or hf:..., tfds:...", OPTIONS, required=True
)
LIMIT = flags.DEFINE_integer(
    "limit", 0, "Only the first N rows; 0: all.", lower_bound=0, flag_values=OPTIONS
)
TEMPLATE = flags.DEFINE_string(
    "template", "{question}", "Prompt template of a question, like config.data.template.", OPTIONS
)
OUT = flags.DEFINE_string("out", None, "jsonl to write.", OPTIONS, required=True)
cli.define_sampling_flags(
    OPTIONS,
    **{"samples": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    **{"min_p": 0.0, "presence_penalty": 0.0, "seed": 0, "batch_size": 32, "thinking": "on"},
)
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a response.", flag_values=OPTIONS)
TOP_LOGPROBS = flags.DEFINE_integer(
    "top_logprobs", 0, "Most likely tokens to report at each position.", 0, flag_values=OPTIONS
)
cli.define_server_flags(OPTIONS)
cli.define_process_flags(OPTIONS)


def _read_spec() -> "SampleSpec":
    """Reads the sampling flags. Raises UserError naming the flag that is out of range."""
    from distill.rollout import completions

    settings = {k: x for k, x in cli.read_sampling_flags(OPTIONS).items() if x is not None}
    if "" in STOP.value:
        raise UserError("--stop=: an empty text is in every response")
    settings |= {"stop_strings": tuple(STOP.value), "top_logprobs": TOP_LOGPROBS.value}
    try:
        return completions.make_sample_spec(settings)
    except UserError as error:
        raise UserError(f"--{error}") from None


def _check_spec(spec: "SampleSpec", subject: "Policy") -> None:
    """Raises UserError naming a sampling flag that the model cannot serve."""
    try:
        spec.sampling.check_vocab_size(subject.config.vocab_size)
    except UserError as error:
        raise UserError(f"--{error}") from None
    if TOP_LOGPROBS.value > subject.config.vocab_size:
        size = subject.config.vocab_size
        raise UserError(f"--top_logprobs={TOP_LOGPROBS.value}: the vocabulary has {size} tokens")
    if STOP.value and subject.tokenizer is None:
        raise UserError(f"--stop={STOP.value[0]}: {subject.path} has no tokenizer to find it with")


def main() -> None:
    from distill.runtime import addresses, distributed, xla

    is_server = addresses.is_url(MODEL.value)
    cli.check_server_flags(OPTIONS, is_server, "dtype", "top_logprobs")
    if is_server:
        run_generation()
        return
    with distributed.join_processes(OPTIONS):
        xla.init_compilation_cache()
        run_generation()


def run_generation() -> None:
    from distill.data import canonical, dataset
    from distill.runtime import addresses, locks, outputs, run_files, stop_signals

    prompt_rows = dataset.open_canonical_rows(PROMPTS.value, LIMIT.value)
    rows = dataclasses.replace(
        prompt_rows,
        read_row=lambda i: canonical.apply_template(prompt_rows.read_row(i), TEMPLATE.value),
    )
    is_server = addresses.is_url(MODEL.value)
    generate = _generate_elsewhere if is_server else _generate_here
    out, spec = paths.check_output(OUT.value, PROMPTS.value), _read_spec()
    flag, lock = f"--out={OUT.value}", out.with_name(out.name + ".lock")
    with (
        run_files.explain_write_errors(out, flag),
        stop_signals.advise_interrupted(lambda: run_files.describe_finished(out)),
        locks.hold_lock(lock, flag),
        outputs.own_output(out, "generate", OPTIONS),
    ):
        errors = generate(rows, spec, OPTIONS["thinking"].value == "on", out)
    if errors:
        more = f" (and {len(errors) - 1} more rows)" if len(errors) > 1 else ""
        raise UserError(f"{errors[min(errors)]}{more}; the other rows are in {OUT.value}")
    print_made(rows, spec.samples)


def _generate_here(
    rows: "Rows", spec: "SampleSpec", thinking: bool, out: epath.Path
) -> dict[int, str]:
    """Samples from a model that is loaded here; returns the errors of rows by number."""
    from distill.policy import policy
    from distill.rollout import completions

    subject = policy.make_abstract_for_inference(MODEL.value, DTYPE.value)
    _check_spec(spec, subject)
    fits = OPTIONS["max_new_tokens"].value is None
    return completions.generate_file(subject, rows, spec, thinking, out, fits=fits)


def _generate_elsewhere(
    rows: "Rows", spec: "SampleSpec", thinking: bool, out: epath.Path
) -> dict[int, str]:
    """Samples from a model behind a server; returns the errors of rows by number."""
    from distill.rollout import served_completions, served_model

    with served_model.open_served_model(
        MODEL.value, spec.batch_size, **cli.read_server_flags(OPTIONS)
    ) as model:
        return served_completions.generate_file(model, rows, spec, thinking, out)


def find_benchmark(path: str) -> str:
    """Returns the benchmark by which the run directory `path` was evaluated, or else the grader of
    its last stage's reward; "" if it has neither, or is no run."""
    from distill.objectives import losses

    try:
        c = json.loads((epath.Path(path) / "config.json").read_text())
        if c["eval"]["every"]:
            return c["eval"]["benchmark"]
        last = c[c["stages"][-1]]
        reward = last["loss"]["reward"]
        reward = losses.OBJECTIVES[last["objective"]].reward if reward is None else reward
        return last["reward"]["grader"] if reward else ""
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def choose_benchmark(out: epath.Path, answer: object, known: str = "") -> str:
    """Returns the benchmark that can grade the first row's samples: that of the run which sampled
    them, if it is `known`; "" if they have no text.

    arithmetic is stricter: it reads a response that ends in a bare whole number; math reads the
    last number or formula of any.
    """
    from distill.rewards import graders

    with out.open() as file:
        samples = json.loads(file.readline())["samples"]
    if any(sample["text"] is None for sample in samples):
        return ""
    if known:
        return known
    finished = [sample["text"] for sample in samples if sample["finish_reason"] == "stop"]
    grades = {graders.grade_arithmetic(text, str(answer)) for text in finished}
    return "arithmetic" if grades and not grades & {"no_answer", "error"} else "math"


def print_made(rows: "Rows", samples: int) -> None:
    """Says what was written, and what may follow: to keep the correct responses where rows have an
    answer, or else to train on all of them."""
    from distill.runtime import run_files

    if not run_files.is_primary():
        return
    out, stem, row = OUT.value, OUT.value.removesuffix(".jsonl"), rows.read_row(0)
    known = find_benchmark(MODEL.value)
    if "answer" in row and (benchmark := choose_benchmark(epath.Path(out), row["answer"], known)):
        command = console.format_command(
            "verify", data=out, benchmark=benchmark, out=f"{stem}.correct.jsonl"
        )
    else:
        command = console.format_sft_command(out)
    console.print_end(
        [f"wrote {out}: rows {len(rows):,}, responses {len(rows) * samples:,}"], [command]
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
