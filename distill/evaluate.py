"""python -m distill.evaluate --model=DIR --benchmark=NAME --out=DIR: accuracy, with its interval.

OUT gets examples.jsonl, one row a response, written as they come: the same command goes on where
it was stopped. When all are there, summary.json says what they amount to, and how they came about:
--protocol names a way to sample, and any flag changes its part of it. With --responses the
responses are read from a file and no model is needed. `compare` puts several OUTs side by side.
"""

import dataclasses
import math
import time
from typing import Any

import jax.numpy as jnp
from absl import flags
from etils import epath

from distill import (
    benchmarks,
    cli,
    data,
    divergence,
    figures,
    generate,
    ifeval,
    metrics,
    pod,
    policy,
    responses,
    results,
    rewards,
    rollout,
)
from distill import mesh as mesh_lib
from distill.policy import Policy
from models.errors import UserError
from models.qwen3.config import Config

Row = dict[str, Any]


def _prompts(
    subject: Policy,
    benchmark: str,
    rows: list[tuple[str, Row]],
    template: str,
    thinking: bool,
    limit: int,
) -> data.TokenLists:
    """What the model is asked; reads no parameters. Raises UserError for what it cannot be."""
    if subject.tokenizer is None:
        raise UserError(f"{subject.path}: no tokenizer, so responses cannot be read")
    asked = ((where, benchmarks.put(benchmark, row, template)) for where, row in rows)
    return generate.prompts(subject, asked, thinking, limit)


def evaluate(
    subject: Policy,
    benchmark: str,
    rows: list[tuple[str, Row]],
    out: epath.Path,
    *,
    samples: int,
    ks: list[int],
    thinking: bool,
    max_new_tokens: int,
    sampling: rollout.Sampling,
    seed: int,
    batch_size: int,
    name: str = "",
    template: str = "",
    step: int | None = None,
    teacher: Policy | None = None,
) -> Row:
    """Samples, grades and sums up; writes examples.jsonl and summary.json, returns the summary.

    `name` is that of the protocol, for the record; `template` how a question is put ("": the
    benchmark's own way); `step` that of the parameters where `subject` is no directory.
    """
    template = template or benchmarks.BENCHMARKS[benchmark]["prompt"]
    prompts = _prompts(subject, benchmark, rows, template, thinking, max_new_tokens)
    protocol: Row = {
        "model": subject.path,
        "step": policy.newest_step(subject.path) if step is None else step,
        "weights": results.fingerprint(subject.params),
        "benchmark": benchmark,
        "problems": len(rows),
        "problems_sha256": results.digest([row for _, row in rows]),
        "protocol": name,
        "template": template,
        "samples": samples,
        "thinking": thinking,
        "max_new_tokens": max_new_tokens,
        **dataclasses.asdict(sampling),
        "seed": seed,
        "dtype": jnp.dtype(subject.model.dtype).name,
    }
    keys = results.row_keys(protocol, rows, samples)
    first = pod.from_primary(lambda: results.resume(out, protocol, rows, keys))
    tokens, start = 0, time.perf_counter()
    with (
        rewards.Grader() as grader,
        metrics.Lines(out / results.EXAMPLES) as lines,
        metrics.progress(len(rows), first, benchmark) as bar,
    ):
        sampled = responses.sample(
            subject,
            rows,
            prompts,
            first=first,
            samples=samples,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            batch_size=batch_size,
        )
        left = (sampled if first < len(rows) else iter(()), rows[first:], keys[first:])
        done = left[0]
        if metrics.is_primary():  # the others only sample
            done = responses.graded_as_they_come(done, grader, benchmark, *left[1:], thinking)
        for number, group in enumerate(done, start=first + 1):
            lines.add(group)
            tokens += sum(int(row["length"]) for row in group)  # type: ignore[call-overload]
            bar.update(number, {})
    cost = results.cost(subject, time.perf_counter() - start, len(rows) - first, tokens)
    cost |= {"protocol": protocol, "versions": metrics.environment()["packages"]}
    if teacher:
        stored = results.Stored(out)
        cost["reverse_kl"] = divergence.reverse_kl(subject, teacher, stored, batch_size)
    summary = pod.from_primary(lambda: {**results.summarise(out, ks), **cost})
    if metrics.is_primary():
        metrics.write_json(out / "summary.json", summary)
    return summary


OPTIONS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", "", "Model directory, hub id or run directory.", flag_values=OPTIONS
)
BENCHMARK = flags.DEFINE_string(
    "benchmark",
    None,
    f"One of {', '.join(benchmarks.BENCHMARKS)}.",
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
    f"How to sample: {', '.join(benchmarks.PROTOCOLS)}. Each flag below changes its own part.",
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
pod.define(OPTIONS)


def _settings(ks: list[int]) -> Row:
    """The protocol's settings, with the flags that change them; checked."""
    benchmarks.require(BENCHMARK.value)
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
    settings = benchmarks.settings(PROTOCOL.value, BENCHMARK.value, changes)
    if max(ks, default=0) > settings["samples"]:
        raise UserError(
            f"--k={','.join(KS.value)}: each must be 1 to --samples={settings['samples']}"
        )
    if TEMPLATE.value and "{question}" not in TEMPLATE.value:
        raise UserError("--template: no {question} in it")
    return settings


def _grade_stored(out: epath.Path, ks: list[int]) -> None:
    """--responses: grades them and sums up."""
    benchmark = BENCHMARK.value
    known = benchmarks.problems(benchmark, DATA.value, 0) if DATA.value else []
    rows = benchmarks.stored(benchmark, RESPONSES.value, known)[: LIMIT.value or None]
    cli.output(f"{OUT.value}/summary.json")
    if (out / "protocol.json").exists():
        raise UserError(f"--out={out}: holds the evaluation of a model")
    with rewards.Grader() as grader:
        rows = responses.graded(grader, benchmark, rows)
    metrics.write_jsonl(out / results.EXAMPLES, rows)
    summary = figures.summarise(rows, ks)
    metrics.write_json(out / "summary.json", summary)
    if unchecked := summary.get("ifeval", {}).get("unchecked"):  # type: ignore[attr-defined]
        metrics.say(f"warning: {unchecked} instructions not checked: {ifeval.PUNKT}")


def main() -> None:
    with pod.joined(OPTIONS):
        run()


def run() -> None:
    ks = [int(k) for k in KS.value if k.isdecimal() and int(k) > 0]
    if len(ks) < len(KS.value):
        raise UserError(f"--k={','.join(KS.value)}: each must be 1 or more")
    out = epath.Path(OUT.value)
    if RESPONSES.value:
        return _grade_stored(out, ks)
    settings = _settings(ks)
    sampling = benchmarks.sampling(settings)
    rows = benchmarks.problems(BENCHMARK.value, DATA.value, LIMIT.value)
    benchmarks.check(BENCHMARK.value, rows)
    if not MODEL.value:
        raise UserError("--model: name a model directory, or give --responses")
    paths = [path for path in (MODEL.value, TEACHER.value) if path]
    mesh = mesh_lib.spread(*(Config.from_directory(policy.resolve(path)) for path in paths))
    described = [policy.reader(path, DTYPE.value or "", mesh) for path in paths]
    policy.require_same_vocabulary(described[0], described[-1])
    cli.output(f"{OUT.value}/summary.json")
    template = TEMPLATE.value or benchmarks.BENCHMARKS[BENCHMARK.value]["prompt"]
    thinking, limit = settings["thinking"], settings["max_new_tokens"]
    _prompts(described[0], BENCHMARK.value, rows, template, thinking, limit)
    with policy.use(described[0]):
        subject, *teachers = [policy.load(p, p.model.dtype.name) for p in described]
        evaluate(
            subject,
            BENCHMARK.value,
            rows,
            out,
            samples=settings["samples"],
            ks=ks,
            thinking=thinking,
            max_new_tokens=limit,
            sampling=sampling,
            seed=SEED.value,
            batch_size=BATCH_SIZE.value,
            name=PROTOCOL.value,
            template=template,
            teacher=teachers[0] if teachers else None,
        )
    if LIMIT.value and metrics.is_primary():
        print(results.transcripts(rows, out / results.EXAMPLES))


if __name__ == "__main__":
    cli.run(main, OPTIONS)
