"""Samples answers to a benchmark, grades them and sums up."""

import dataclasses
import time
from typing import Any

import jax.numpy as jnp
from etils import epath

from distill import rollout
from distill.data import dataset
from distill.evaluation import divergence, records, responses, tasks
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rewards import graders
from distill.rollout import completions
from distill.runtime import distributed, run_files
from models.errors import UserError

Record = dict[str, Any]


def encode_prompts(
    subject: Policy,
    benchmark: str,
    rows: list[tuple[str, Record]],
    template: str,
    thinking: bool,
    max_new_tokens: int,
) -> dataset.TokenLists:
    """What the model is asked; reads no parameters. Raises UserError for what it cannot be."""
    if subject.tokenizer is None:
        raise UserError(f"{subject.path}: no tokenizer, so responses cannot be read")
    rendered_rows = (
        (where, tasks.render_question(benchmark, row, template)) for where, row in rows
    )
    return completions.encode_row_prompts(subject, rendered_rows, thinking, max_new_tokens)


def evaluate_benchmark(
    subject: Policy,
    benchmark: str,
    rows: list[tuple[str, Record]],
    out_dir: epath.Path,
    *,
    samples: int,
    ks: list[int],
    thinking: bool,
    max_new_tokens: int,
    sampling: rollout.Sampling,
    seed: int,
    batch_size: int,
    protocol_name: str = "",
    template: str = "",
    step: int | None = None,
    teacher: Policy | None = None,
) -> Record:
    """Samples, grades and sums up; writes examples.jsonl and summary.json, returns the summary.

    `name` is that of the protocol, for the record; `template` how a question is put ("": the
    benchmark's own way); `step` that of the parameters where `subject` is no directory.
    """
    template = template or tasks.BENCHMARKS[benchmark]["prompt"]
    prompts = encode_prompts(subject, benchmark, rows, template, thinking, max_new_tokens)
    protocol: Record = {
        "model": subject.path,
        "step": policy.find_newest_step(subject.path) if step is None else step,
        "weights": records.fingerprint_params(subject.params),
        "benchmark": benchmark,
        "problems": len(rows),
        "problems_sha256": records.hash_content([row for _, row in rows]),
        "protocol": protocol_name,
        "template": template,
        "samples": samples,
        "thinking": thinking,
        "max_new_tokens": max_new_tokens,
        **dataclasses.asdict(sampling),
        "seed": seed,
        "dtype": jnp.dtype(subject.model.dtype).name,
    }
    keys = records.make_row_keys(protocol, rows, samples)
    first_problem = distributed.broadcast_from_primary(
        lambda: records.resume_evaluation(out_dir, protocol, rows, keys)
    )
    tokens, start = 0, time.perf_counter()
    with (
        graders.Grader() as grader,
        run_files.JsonlAppender(out_dir / records.EXAMPLES_FILE) as lines,
        run_files.show_progress(len(rows), first_problem, benchmark) as bar,
    ):
        sampled = responses.sample(
            subject,
            rows,
            prompts,
            first_problem=first_problem,
            samples=samples,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            batch_size=batch_size,
        )
        remaining = (
            sampled if first_problem < len(rows) else iter(()),
            rows[first_problem:],
            keys[first_problem:],
        )
        row_groups = remaining[0]
        if run_files.is_primary():  # the others only sample
            row_groups = responses.grade_while_sampling(
                row_groups, grader, benchmark, *remaining[1:], thinking
            )
        for number, group in enumerate(row_groups, start=first_problem + 1):
            lines.append_rows(group)
            tokens += sum(int(row["length"]) for row in group)  # type: ignore[call-overload]
            bar.update(number, {})
    cost = records.measure_cost(
        subject, time.perf_counter() - start, len(rows) - first_problem, tokens
    )
    cost |= {"protocol": protocol, "versions": run_files.describe_environment()["packages"]}
    if teacher:
        stored = records.StoredRows(out_dir)
        cost["reverse_kl"] = divergence.compute_reverse_kl(subject, teacher, stored, batch_size)
    summary = distributed.broadcast_from_primary(
        lambda: {**records.summarise_evaluation(out_dir, ks), **cost}
    )
    if run_files.is_primary():
        run_files.write_json(out_dir / "summary.json", summary)
    return summary
