"""Evaluations while a run trains, on its own mesh, and the best checkpoint by what they found.

WORKDIR/eval/STEP is what `evaluate` writes; WORKDIR/best is a run directory with one checkpoint, so
that every verb takes it as a model. Neither touches what is trained.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from distill import rollout
from distill.data import dataset
from distill.evaluation import evaluator, protocols, tasks
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import distributed, run_files
from distill.runtime.checkpoint import Checkpoints
from models.errors import UserError

# Figures of a summary that become metrics, and by which the best may be chosen.
EVAL_METRICS = (
    *("accuracy", "format_rate", "repetition_rate", "think_rate", "language_mixing_rate"),
    *("mean_length", "mean_length_finished", "truncation_rate"),
)


@dataclasses.dataclass(frozen=True)
class ValidationSetup:
    """What is evaluated, and how; checked."""

    c: ConfigDict
    rows: list[tuple[str, tasks.Record]]
    prompts: dataset.TokenLists  # of the rows
    settings: protocols.Settings
    spec: protocols.EvalSpec


@dataclasses.dataclass(frozen=True)
class ValidationHook:
    """Evaluates every so many steps (0: never), and after a stage's last.

    run: (train state, what makes its meta, steps done) -> metrics.
    warm_up: compiles what `run` samples with, of parameters like these; so that nothing is
    compiled in the middle of a run.
    """

    every_steps: int
    run: Callable[[Any, Callable[[], dict[str, Any]], int], dict[str, Any]]
    warm_up: Callable[[Any], None]

    def is_due(self, step: int, is_last: bool) -> bool:
        return bool(self.every_steps) and (is_last or step % self.every_steps == 0)


def setup_validation(c: ConfigDict, student: Policy, seed: int) -> ValidationSetup | None:
    """Checks a config's `eval` before anything is trained; None where there is none.

    Raises UserError naming the field at fault.
    """
    if c.every < 0:
        raise UserError(f"config.eval.every={c.every}: not a number of steps")
    if c.every == 0:
        return None
    if c.best.removeprefix("-") not in ("", *EVAL_METRICS):
        raise UserError(f"config.eval.best={c.best!r}: none of {', '.join(EVAL_METRICS)}")
    if min(c.limit, c.samples, c.max_new_tokens) < 0 or c.batch_size < 1:
        raise UserError(
            "config.eval: limit, samples, max_new_tokens, batch_size: a negative number"
        )
    try:
        changes = {"samples": c.samples or None, "max_new_tokens": c.max_new_tokens or None}
        tasks.require_benchmark(c.benchmark)
        settings = protocols.resolve_settings(c.protocol, c.benchmark, changes)
        rows = tasks.load_problems(c.benchmark, c.data, c.limit)
        tasks.check_gradable(c.benchmark, rows)
        sampled = settings | {"seed": seed, "batch_size": c.batch_size}
        spec = protocols.make_eval_spec(c.protocol, c.benchmark, sampled)
        prompts = evaluator.encode_prompts(student, rows, spec)
        return ValidationSetup(c, rows, prompts, settings, spec)
    except UserError as error:
        raise UserError(f"config.eval: {error}") from None


@contextlib.contextmanager
def open_validation_hook(
    validation: ValidationSetup | None, student: Policy, workdir: epath.Path
) -> Iterator[ValidationHook]:
    """Within it, what is yielded evaluates where the config says so, and keeps the best."""
    if validation is None:
        yield ValidationHook(0, lambda *_: {}, lambda _: None)
        return
    v, best = validation, workdir / "best"
    eval_config = {**v.settings, **json.loads(v.c.to_json_best_effort())}
    with contextlib.ExitStack() as stack:
        best_checkpoints, best_value = (
            stack.enter_context(_open_best(best, eval_config)) if v.c.best else (None, None)
        )

        to_sampling_params = policy.make_sampler_params_fn(student)

        def make_subject(params: Any) -> Policy:
            return dataclasses.replace(
                student, path=str(workdir), params=to_sampling_params(params)
            )

        def warm_up(params: Any) -> None:
            rollout.complete(make_subject(params), v.prompts, v.spec.sample, warm_up=True)

        def run_validation(
            state: Any, meta: Callable[[], dict[str, Any]], step: int
        ) -> dict[str, Any]:
            nonlocal best_value
            start_time = time.perf_counter()
            subject = make_subject(state.params)
            summary: Any = _evaluate_step(v, subject, workdir / "eval" / f"{step:06d}", step)
            value = summary.get(v.c.best.removeprefix("-"))
            if best_checkpoints and value is not None:
                value = -value if v.c.best.startswith("-") else value
                if best_value is None or value > best_value:
                    best_checkpoints.save(
                        step, state, {**meta(), "eval": eval_config, "value": value}
                    )
                    best_value = value
            metrics = {f"eval/{name}": summary.get(name) for name in EVAL_METRICS}
            return metrics | {"time/eval": time.perf_counter() - start_time}

        yield ValidationHook(v.c.every, run_validation, warm_up)


def _evaluate_step(v: ValidationSetup, subject: Policy, out: epath.Path, step: int) -> tasks.Record:
    """One evaluation. A folder of this step is gone on in if it is of the same parameters, as those
    of a resumed run are; one of an earlier config is replaced."""

    spec = dataclasses.replace(v.spec, step=step)

    def evaluate_once() -> tasks.Record:
        return evaluator.evaluate_benchmark(subject, v.rows, spec, out)

    try:
        return evaluate_once()
    except UserError as error:
        run_files.log_line(f"{out} is written anew: {error}")
        if run_files.is_primary():
            out.rmtree()
        return evaluate_once()


@contextlib.contextmanager
def _open_best(
    folder: epath.Path, eval_config: dict[str, Any]
) -> Iterator[tuple[Checkpoints, float | None]]:
    """The checkpoints of `folder`, which is a run directory like the one it lies in, and how good
    the one is that it holds; emptied if that was the best by another measure."""

    def read_best_value() -> float | None:
        with Checkpoints(folder / "checkpoints") as before:
            latest = before.read_latest()
        if latest and latest[1].get("eval") != eval_config:
            run_files.log_line(f"{folder} was the best of another config.eval: it begins anew")
            folder.rmtree()
            latest = None
        config = (folder.parent / "config.json").read_text()
        run_files.write_text(folder / "config.json", config)
        return latest[1]["value"] if latest else None

    value = distributed.broadcast_from_primary(read_best_value)
    with Checkpoints(folder / "checkpoints", save_interval_steps=1, max_to_keep=1) as saved:
        yield saved, value
