"""Samples answers to a benchmark, grades them and sums up."""

import dataclasses
import time
from typing import Any

import jax.numpy as jnp
from etils import epath

from distill.data import dataset
from distill.evaluation import divergence, records, responses, tasks
from distill.evaluation.protocols import EvalSpec
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.rollout import completions
from distill.runtime import distributed, environment, run_files
from models.errors import UserError

Record = dict[str, Any]


def encode_prompts(
    subject: Policy, rows: list[tuple[str, Record]], spec: EvalSpec
) -> dataset.TokenLists:
    """Encodes the problems' prompts; reads no parameters.

    Raises UserError naming the problem that cannot be encoded or is too long.
    """
    if subject.tokenizer is None:
        raise UserError(f"{subject.path}: no tokenizer, so responses cannot be read")
    rendered_rows = (
        (where, tasks.render_question(spec.benchmark, row, spec.template)) for where, row in rows
    )
    return completions.encode_row_prompts(
        subject, rendered_rows, spec.thinking, spec.sample.max_new_tokens
    )


def _describe_protocol(
    subject: Policy, rows: list[tuple[str, Record]], spec: EvalSpec
) -> dict[str, Any]:
    """Returns everything that the responses depend on, as protocol.json records it."""
    return {
        "model": subject.path,
        "step": policy.find_newest_step(subject.path) if spec.step is None else spec.step,
        "weights": records.fingerprint_params(subject.params),
        "benchmark": spec.benchmark,
        "problems": len(rows),
        "problems_sha256": records.hash_content([row for _, row in rows]),
        "protocol": spec.protocol,
        "template": spec.template or tasks.BENCHMARKS[spec.benchmark]["prompt"],
        "samples": spec.sample.samples,
        "thinking": spec.thinking,
        "max_new_tokens": spec.sample.max_new_tokens,
        **dataclasses.asdict(spec.sample.sampling),
        "seed": spec.sample.seed,
        "dtype": jnp.dtype(subject.model.dtype).name,
    }


def evaluate_benchmark(
    subject: Policy,
    rows: list[tuple[str, Record]],
    spec: EvalSpec,
    out_dir: epath.Path,
    teacher: Policy | None = None,
) -> Record:
    """Samples responses to the problems `rows`, grades them and sums up.

    Call it within `policy.use(subject)`. Writes examples.jsonl as responses come, resuming where an
    earlier call was stopped, and summary.json, which is also returned. With a teacher the summary
    has the reverse KL to it.

    Raises UserError if `out_dir` holds another evaluation.
    """
    prompts = encode_prompts(subject, rows, spec)
    protocol = _describe_protocol(subject, rows, spec)
    keys = records.make_row_keys(protocol, rows, spec.sample.samples)
    first_problem = distributed.broadcast_from_primary(
        lambda: records.resume_evaluation(out_dir, protocol, rows, keys)
    )
    tokens, start = 0, time.perf_counter()
    with (
        graders.Grader() as grader,
        run_files.JsonlAppender(out_dir / records.EXAMPLES_FILE) as lines,
        run_files.show_progress(len(rows), first_problem, spec.benchmark) as bar,
    ):
        row_groups = iter(())
        if first_problem < len(rows):
            row_groups = responses.sample(subject, rows, prompts, spec.sample, first_problem)
        if run_files.is_primary():  # the other processes only sample
            row_groups = responses.grade_while_sampling(
                row_groups,
                grader,
                spec.benchmark,
                rows[first_problem:],
                keys[first_problem:],
                spec.thinking,
            )
        for number, group in enumerate(row_groups, start=first_problem + 1):
            lines.append_rows(group)
            tokens += sum(int(row["length"]) for row in group)
            bar.update(number, {})
    cost = records.measure_cost(
        subject, time.perf_counter() - start, len(rows) - first_problem, tokens
    )
    cost |= {"protocol": protocol, "versions": environment.describe_environment()["packages"]}
    if teacher:
        stored = records.StoredRows(out_dir)
        cost["reverse_kl"] = divergence.compute_reverse_kl(
            subject, teacher, stored, spec.sample.batch_size
        )
    summary = distributed.broadcast_from_primary(
        lambda: {**records.summarise_evaluation(out_dir, spec.ks), **cost}
    )
    if run_files.is_primary():
        run_files.write_json(out_dir / "summary.json", summary)
    return summary
