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

Row = dict[str, Any]


def _prompts(
    subject: Policy,
    benchmark: str,
    rows: list[tuple[str, Row]],
    template: str,
    thinking: bool,
    limit: int,
) -> dataset.TokenLists:
    """What the model is asked; reads no parameters. Raises UserError for what it cannot be."""
    if subject.tokenizer is None:
        raise UserError(f"{subject.path}: no tokenizer, so responses cannot be read")
    asked = ((where, tasks.put(benchmark, row, template)) for where, row in rows)
    return completions.prompts(subject, asked, thinking, limit)


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
    template = template or tasks.BENCHMARKS[benchmark]["prompt"]
    prompts = _prompts(subject, benchmark, rows, template, thinking, max_new_tokens)
    protocol: Row = {
        "model": subject.path,
        "step": policy.newest_step(subject.path) if step is None else step,
        "weights": records.fingerprint(subject.params),
        "benchmark": benchmark,
        "problems": len(rows),
        "problems_sha256": records.digest([row for _, row in rows]),
        "protocol": name,
        "template": template,
        "samples": samples,
        "thinking": thinking,
        "max_new_tokens": max_new_tokens,
        **dataclasses.asdict(sampling),
        "seed": seed,
        "dtype": jnp.dtype(subject.model.dtype).name,
    }
    keys = records.row_keys(protocol, rows, samples)
    first = distributed.from_primary(lambda: records.resume(out, protocol, rows, keys))
    tokens, start = 0, time.perf_counter()
    with (
        graders.Grader() as grader,
        run_files.Lines(out / records.EXAMPLES) as lines,
        run_files.progress(len(rows), first, benchmark) as bar,
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
        if run_files.is_primary():  # the others only sample
            done = responses.graded_as_they_come(done, grader, benchmark, *left[1:], thinking)
        for number, group in enumerate(done, start=first + 1):
            lines.add(group)
            tokens += sum(int(row["length"]) for row in group)  # type: ignore[call-overload]
            bar.update(number, {})
    cost = records.cost(subject, time.perf_counter() - start, len(rows) - first, tokens)
    cost |= {"protocol": protocol, "versions": run_files.environment()["packages"]}
    if teacher:
        stored = records.Stored(out)
        cost["reverse_kl"] = divergence.reverse_kl(subject, teacher, stored, batch_size)
    summary = distributed.from_primary(lambda: {**records.summarise(out, ks), **cost})
    if run_files.is_primary():
        run_files.write_json(out / "summary.json", summary)
    return summary
