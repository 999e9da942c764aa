"""Evaluates a model behind a server on a benchmark."""

import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from distill.data.template import describe_template
from distill.evaluation import evaluator, problems, records, tasks
from distill.evaluation.example_rows import describe_graded
from distill.evaluation.problems import Problems
from distill.evaluation.protocols import EvalSpec
from distill.rollout import served_completions
from distill.rollout.served_model import Prompt, RequestSettings, ServedModel
from distill.runtime import environment, run_files
from models.errors import SourceFailure, UserError

Record = dict[str, Any]


def evaluate_served(
    model: ServedModel, rows: Problems, spec: EvalSpec, out_dir: epath.Path
) -> Record:
    """Evaluates a model behind a server as `evaluator.evaluate_benchmark` does one that is loaded.

    Raises:
      SourceFailure: if the server cannot be reached any more; what is finished is kept.
      UserError: if `out_dir` holds another evaluation, or a problem cannot be asked.
    """
    settings = served_completions.make_request_settings(spec.sample, spec.thinking)
    model.check_settings(settings)
    for row in rows:
        first = _make_prompt(model, row, spec)
        if row is rows[0]:
            probe = first
    model.check_answers(probe, settings)
    protocol = {**model.describe(), **evaluator.describe_task(rows, spec)}
    keys = records.make_row_keys(protocol, rows, spec.sample.samples)
    first_problem = records.resume_evaluation(out_dir, protocol, rows, keys)
    start = time.perf_counter()
    mode = describe_template(model.tokenizer).find_mode(spec.thinking)
    try:
        groups = _sample(model, rows, spec, settings, first_problem)
        tokens = evaluator.write_examples(groups, rows, spec, out_dir, keys, first_problem, mode)
    except SourceFailure as error:
        raise SourceFailure(f"{error}; {describe_graded(out_dir)}") from error
    seconds = time.perf_counter() - start
    cost = records.measure_speed(seconds, len(rows) - first_problem, tokens) | {"memory": None}
    if first_problem == len(rows):  # the cost is that of the call that sampled
        cost |= records.read_cost(out_dir, cost)
    summary = {
        **records.summarise_evaluation(out_dir, tasks.BENCHMARKS[spec.benchmark], spec.ks),
        **cost,
        "protocol": protocol,
        "versions": environment.describe_packages(),
    }
    run_files.write_json(out_dir / "summary.json", summary)
    return summary


def _make_prompt(model: ServedModel, located_row: tuple[str, Record], spec: EvalSpec) -> Prompt:
    where, row = located_row
    rendered_row = problems.render_question(spec.benchmark, row, spec.template)
    return model.make_prompt(rendered_row, where, spec.thinking, spec.sample.max_new_tokens)


def _sample(
    model: ServedModel,
    rows: Problems,
    spec: EvalSpec,
    settings: RequestSettings,
    first_problem: int,
) -> Iterator[list[Record]]:
    """Yields the responses to each problem from number `first_problem` on.

    Raises UserError naming a problem that the server refuses.
    """
    requests = (
        (number, _make_prompt(model, rows[number], spec), spec.sample.max_new_tokens)
        for number in range(first_problem, len(rows))
    )
    groups = served_completions.complete(model, requests, spec.sample, settings)
    for number, group in enumerate(groups, start=first_problem):
        where, row = rows[number]
        if isinstance(group, str):
            raise UserError(f"{where}: {group}")
        yield [
            {
                "id": row["id"],
                "sample": sample,
                "answer": row["answer"],
                "response": c.text,
                "length": c.length,
                "finish_reason": c.finish_reason,
                "prompt_tokens": c.prompt_tokens,
                "tokens": c.tokens,
            }
            for sample, c in enumerate(group)
        ]
