"""Evaluates a model on a benchmark: samples responses, grades them and summarises."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from etils import epath

from distill.data import dataset
from distill.data.template import describe_template
from distill.evaluation import (
    divergence,
    likelihood,
    problems,
    records,
    responses,
    statistics,
    tasks,
)
from distill.evaluation.problems import Problems
from distill.evaluation.protocols import EvalSpec
from distill.policy import compatibility, identity, policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.rollout import completions
from distill.rollout.completions import SampleSpec
from distill.rollout.sampling import Sampling
from distill.runtime import distributed, environment, run_files
from distill.runtime import mesh as mesh_lib
from distill.runtime.progress import show_progress
from models import families
from models.errors import UserError

Record = dict[str, Any]


def encode_prompts(subject: Policy, rows: Problems, spec: EvalSpec) -> dataset.TokenLists:
    """Encodes the problems' prompts. Reads no parameters.

    Raises UserError naming a problem that cannot be encoded or is too long.
    """
    if subject.tokenizer is None:
        raise UserError(f"{subject.path}: no tokenizer, so responses cannot be read")

    def render(row: Record, where: str) -> Record:
        row, own_spec = likelihood.render_row(row, where, spec)
        return problems.render_question(spec.benchmark, row, own_spec.template)

    rendered_rows = ((where, render(row, where)) for where, row in rows)
    return completions.encode_row_prompts(
        subject, rendered_rows, spec.thinking, spec.sample.max_new_tokens
    )


def fit_limit(
    subject: Policy, rows: Problems, spec: EvalSpec, name: str = "max_new_tokens"
) -> EvalSpec:
    """Lowers the limit of new tokens to what the model's positions leave beside the longest prompt,
    and says so under the limit's `name`. Call it if nobody has chosen one. Reads no parameters.

    The limit is a multiple of an eighth of the positions where it can be, so that a few more
    problems rarely change it.

    Raises UserError naming a problem that cannot be encoded, or leaves no position.
    """
    shortest = dataclasses.replace(spec, sample=dataclasses.replace(spec.sample, max_new_tokens=1))
    longest = max((len(ids) for ids in encode_prompts(subject, rows, shortest)), default=0)
    positions, limit = subject.config.context_length, spec.sample.max_new_tokens
    room = positions - longest
    if limit <= room:
        return spec
    eighth = max(1, positions // 8)
    fitting = room // eighth * eighth or room
    run_files.log_line(
        f"{name}={fitting} and not {limit:,}: the model has {positions:,} positions, and "
        f"the longest prompt takes {longest:,}"
    )
    return dataclasses.replace(
        spec, sample=dataclasses.replace(spec.sample, max_new_tokens=fitting)
    )


def describe_task(rows: Problems, spec: EvalSpec) -> dict[str, Any]:
    """Returns what the responses to a benchmark depend on beside the model."""
    return {
        "benchmark": spec.benchmark,
        "problems": len(rows),
        "problems_sha256": records.hash_content([row for _, row in rows]),
        "protocol": spec.protocol,
        "template": spec.template or tasks.BENCHMARKS[spec.benchmark].prompt,
        "samples": spec.sample.samples,
        "thinking": spec.thinking,
        "max_new_tokens": spec.sample.max_new_tokens,
        **dataclasses.asdict(spec.sample.sampling),
        "seed": spec.sample.seed,
        **likelihood.describe_choice(spec),
    }


def _describe_protocol(subject: Policy, rows: Problems, spec: EvalSpec) -> dict[str, Any]:
    """Returns everything that the responses depend on, as protocol.json records it."""
    return {
        "model": subject.path,
        "step": subject.step,
        "weights": records.fingerprint_params(subject.params),
        "tokenizer": identity.hash_parts(identity.describe_tokenizer(subject.tokenizer_dir)),
        **describe_task(rows, spec),
        "dtype": jnp.dtype(subject.model.dtype).name,
    }


def write_examples(
    row_groups: Iterator[list[Record]],
    rows: Problems,
    spec: EvalSpec,
    out_dir: epath.Path,
    keys: list[list[str]],
    first_problem: int,
    thinking: bool,
) -> int:
    """Grades responses as they come, and appends them to examples.jsonl; returns their tokens.

    Args:
      row_groups: the responses to each problem from number `first_problem` on.
      keys: of each sample of each of the problems `rows`.
      thinking: the mode in which well-formed responses are written.
    """
    tokens, num_correct, samples = 0, 0, spec.sample.samples
    with (
        graders.Grader() as grader,
        run_files.JsonlAppender(out_dir / records.EXAMPLES_FILE) as lines,
        show_progress(
            len(rows), first_problem, spec.benchmark, spec.sample.batch_size, is_minor=True
        ) as bar,
    ):
        if run_files.is_primary():  # the other processes only sample
            row_groups = responses.grade_while_sampling(
                row_groups,
                grader,
                tasks.BENCHMARKS[spec.benchmark].grading,
                rows[first_problem:],
                keys[first_problem:],
                thinking,
            )
        for number, group in enumerate(row_groups, start=first_problem + 1):
            lines.append_rows(group)
            tokens += sum(int(row["length"]) for row in group)
            num_correct += sum(bool(row.get("correct")) for row in group)
            num_graded = (number - first_problem) * samples
            bar.update(number, f"{num_correct / num_graded:.1%} correct so far")
    return tokens


def evaluate_benchmark(
    subject: Policy,
    rows: Problems,
    spec: EvalSpec,
    out_dir: epath.Path,
    teacher: Policy | None = None,
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> Record:
    """Samples responses to the problems `rows`, grades them and returns the summary.

    Call within `policy.use(subject)`. Writes examples.jsonl as responses finish, resuming where an
    earlier call stopped, and then summary.json. With a teacher, the summary includes the reverse KL
    to it, which is 0 if the subject is the teacher itself. For `check_stop` see `rollout.sample`;
    what it raises leaves the finished rows.

    Raises UserError if `out_dir` holds another evaluation.
    """
    task, prompts = tasks.BENCHMARKS[spec.benchmark], encode_prompts(subject, rows, spec)
    protocol = _describe_protocol(subject, rows, spec)
    keys = records.make_row_keys(protocol, rows, spec.sample.samples)
    first_problem = distributed.broadcast_from_primary(
        lambda: records.resume_evaluation(out_dir, protocol, rows, keys)
    )
    start, row_groups = time.perf_counter(), iter(())
    if spec.choice_by != "response":
        row_groups = likelihood.choose_options(subject, rows, prompts, spec, first_problem)
    elif first_problem < len(rows):
        row_groups = responses.sample(
            subject, rows, prompts, spec.sample, first_problem, check_stop
        )
    mode = describe_template(subject.tokenizer).find_mode(spec.thinking)
    tokens = write_examples(row_groups, rows, spec, out_dir, keys, first_problem, mode)
    cost = records.measure_cost(
        subject, time.perf_counter() - start, len(rows) - first_problem, tokens
    )
    if first_problem == len(rows):  # the cost is that of the call that sampled
        cost |= distributed.broadcast_from_primary(lambda: records.read_cost(out_dir, cost))
    cost |= {"protocol": protocol, "versions": environment.describe_environment()["packages"]}
    if teacher is subject:
        cost["reverse_kl"] = 0.0
    elif teacher:
        stored = records.StoredRows(out_dir)
        cost["reverse_kl"] = divergence.compute_reverse_kl(
            subject, teacher, stored, spec.sample.batch_size
        )
    summary = distributed.broadcast_from_primary(
        lambda: {**records.summarise_evaluation(out_dir, task, spec.ks), **cost}
    )
    if run_files.is_primary():
        run_files.write_json(out_dir / "summary.json", summary)
    return summary


def evaluate_model(
    model: str,
    rows: Problems,
    spec: EvalSpec,
    out_dir: epath.Path,
    dtype: str = "",
    teacher: str = "",
    fits: bool = False,
) -> Record:
    """Loads a model, and a teacher if one is named, and evaluates the model; for `fits` see
    `fit_limit`.

    Raises UserError for an invalid model or prompt, before any weights are read.
    """
    paths = [path for path in (model, teacher) if path]
    mesh = mesh_lib.make_reader_mesh(
        *(families.read_config(policy.resolve_model_dir(path)) for path in paths)
    )
    abstract_policies = [policy.make_abstract_for_inference(path, dtype, mesh) for path in paths]
    compatibility.require_same_vocabulary(abstract_policies[0], abstract_policies[-1])
    if fits:
        spec = fit_limit(abstract_policies[0], rows, spec)
    encode_prompts(abstract_policies[0], rows, spec)
    with policy.use(abstract_policies[0]):
        subject, *teachers = [policy.load(p, p.model.dtype.name) for p in abstract_policies]
        return evaluate_benchmark(subject, rows, spec, out_dir, *teachers)


def evaluate_stored(
    benchmark: str,
    rows: list[Record],
    out_dir: epath.Path,
    ks: Sequence[int],
    known: Sequence[tuple[str, Record]] = (),
) -> Record:
    """Grades stored responses (id, answer, response) and writes the summary. Needs no model.

    Args:
      known: the benchmark's problems, to say how many of them have a response; (): unknown.

    Raises UserError if `out_dir` holds the evaluation of a model.
    """
    if (out_dir / records.PROTOCOL_FILE).exists():
        raise UserError(f"--out={out_dir}: holds the evaluation of a model")
    task = tasks.BENCHMARKS[benchmark]
    with graders.Grader() as grader:
        graded = responses.grade_rows(grader, task.grading, rows)
    run_files.write_jsonl(out_dir / records.EXAMPLES_FILE, graded)
    summary = statistics.summarise_rows(graded, ks) | task.summarise(graded)
    summary["protocol"] = {"benchmark": benchmark, "protocol": "stored responses"}
    if known:
        names = {row["id"] for row in rows}
        own_names = ({str(row.get("id")), str(row.get("question"))} for _, row in known)
        answered = sum(not names.isdisjoint(own) for own in own_names)
        summary |= {"problems_in_data": len(known), "coverage": answered / len(known)}
        if answered < len(known):
            run_files.log_line(
                f"warning: only {answered:,} of the {len(known):,} problems of --data have a "
                f"response ({answered / len(known):.1%}), and the others count for nothing"
            )
    run_files.write_json(out_dir / "summary.json", summary)
    if reason := task.explain_ungradable([str(row["answer"]) for row in rows]):
        run_files.log_line(f"warning: {reason}")
    return summary


def evaluate_greedy_and_sampled(
    subject: Policy, teacher: Policy, rows: Problems, out_dir: epath.Path, max_new_tokens: int
) -> tuple[Record, Record]:
    """Evaluates arithmetic problems greedily and at temperature 1; returns both summaries.

    The second includes the reverse KL to the teacher. They are written to the folders `greedy` and
    `sampled` of `out_dir`.
    """
    summaries = []
    for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        sample = SampleSpec(
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature),
            batch_size=min(250, len(rows)),
        )
        spec = EvalSpec("arithmetic", sample)
        summaries.append(
            evaluate_benchmark(
                subject, rows, spec, out_dir / mode, teacher if temperature else None
            )
        )
    return summaries[0], summaries[1]
