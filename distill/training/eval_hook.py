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

import jax
from etils import epath
from ml_collections import ConfigDict

from distill import rollout
from distill.data import dataset
from distill.evaluation import evaluator, tasks
from distill.policy import policy
from distill.policy.policy import Policy
from distill.rollout import completions
from distill.runtime import distributed, run_files
from distill.runtime.checkpoint import Checkpoints
from models.errors import UserError

# Figures of a summary that become metrics, and by which the best may be chosen.
FIGURES = (
    *("accuracy", "format_rate", "repetition_rate", "think_rate", "language_mixing_rate"),
    *("mean_length", "mean_length_finished", "truncation_rate"),
)


@dataclasses.dataclass(frozen=True)
class Validation:
    """What is evaluated, and how; checked."""

    c: ConfigDict
    rows: list[tuple[str, tasks.Row]]
    prompts: dataset.TokenLists  # of the rows
    settings: dict[str, Any]
    sampling: rollout.Sampling


@dataclasses.dataclass(frozen=True)
class Judge:
    """Evaluates every so many steps (0: never), and after a stage's last.

    run: (train state, what makes its meta, steps done) -> metrics.
    warm_up: compiles what `run` samples with, of parameters like these; so that nothing is
    compiled in the middle of a run.
    """

    every: int
    run: Callable[[Any, Callable[[], dict[str, Any]], int], dict[str, Any]]
    warm_up: Callable[[Any], None]

    def due(self, step: int, last: bool) -> bool:
        return bool(self.every) and (last or step % self.every == 0)


def prepare(c: ConfigDict, student: Policy) -> Validation | None:
    """Checks a config's `eval` before anything is trained; None where there is none.

    Raises UserError naming the field at fault.
    """
    if c.every < 0:
        raise UserError(f"config.eval.every={c.every}: not a number of steps")
    if c.every == 0:
        return None
    if c.best.removeprefix("-") not in ("", *FIGURES):
        raise UserError(f"config.eval.best={c.best!r}: none of {', '.join(FIGURES)}")
    if min(c.limit, c.samples, c.max_new_tokens) < 0 or c.batch_size < 1:
        raise UserError(
            "config.eval: limit, samples, max_new_tokens, batch_size: a negative number"
        )
    if student.tokenizer is None:
        raise UserError(f"config.eval: {student.path}: no tokenizer, so responses cannot be read")
    try:
        changes = {"samples": c.samples or None, "max_new_tokens": c.max_new_tokens or None}
        tasks.require(c.benchmark)
        settings = tasks.settings(c.protocol, c.benchmark, changes)
        rows = tasks.problems(c.benchmark, c.data, c.limit)
        tasks.check(c.benchmark, rows)
        put = [(where, tasks.put(c.benchmark, row)) for where, row in rows]
        asked = completions.prompts(student, put, settings["thinking"], settings["max_new_tokens"])
        return Validation(c, rows, asked, settings, tasks.sampling(settings))
    except UserError as error:
        raise UserError(f"config.eval: {error}") from None


@contextlib.contextmanager
def judging(
    validation: Validation | None, student: Policy, workdir: epath.Path, seed: int
) -> Iterator[Judge]:
    """Within it, what is yielded evaluates where the config says so, and keeps the best."""
    if validation is None:
        yield Judge(0, lambda *_: {}, lambda _: None)
        return
    v, best = validation, workdir / "best"
    told = {**v.settings, **json.loads(v.c.to_json_best_effort())}
    with contextlib.ExitStack() as stack:
        saved, record = stack.enter_context(_best(best, told)) if v.c.best else (None, None)

        sampled = policy.sampled(student)

        def subject_of(params: Any) -> Policy:
            return dataclasses.replace(student, path=str(workdir), params=sampled(params))

        def warm_up(params: Any) -> None:
            rollout.complete(
                subject_of(params),
                v.prompts,
                samples=v.settings["samples"],
                key=jax.random.key(seed),
                limits=[v.settings["max_new_tokens"]] * len(v.prompts),
                sampling=v.sampling,
                batch_size=v.c.batch_size,
                warm_up=True,
            )

        def judge(state: Any, meta: Callable[[], dict[str, Any]], step: int) -> dict[str, Any]:
            nonlocal record
            begin = time.perf_counter()
            subject = subject_of(state.params)
            summary: Any = _evaluate(v, subject, workdir / "eval" / f"{step:06d}", step, seed)
            value = summary.get(v.c.best.removeprefix("-"))
            if saved and value is not None:
                value = -value if v.c.best.startswith("-") else value
                if record is None or value > record:
                    saved.save(step, state, {**meta(), "eval": told, "value": value})
                    record = value
            found = {f"eval/{name}": summary.get(name) for name in FIGURES}
            return found | {"time/eval": time.perf_counter() - begin}

        yield Judge(v.c.every, judge, warm_up)


def _evaluate(v: Validation, subject: Policy, out: epath.Path, step: int, seed: int) -> tasks.Row:
    """One evaluation. A folder of this step is gone on in if it is of the same parameters, as those
    of a resumed run are; one of an earlier config is replaced."""

    def run() -> tasks.Row:
        return evaluator.evaluate(
            subject,
            v.c.benchmark,
            v.rows,
            out,
            samples=v.settings["samples"],
            ks=[1],
            thinking=v.settings["thinking"],
            max_new_tokens=v.settings["max_new_tokens"],
            sampling=v.sampling,
            seed=seed,
            batch_size=v.c.batch_size,
            name=v.c.protocol,
            step=step,
        )

    try:
        return run()
    except UserError as error:
        run_files.say(f"{out} is written anew: {error}")
        if run_files.is_primary():
            out.rmtree()
        return run()


@contextlib.contextmanager
def _best(folder: epath.Path, told: dict[str, Any]) -> Iterator[tuple[Checkpoints, float | None]]:
    """The checkpoints of `folder`, which is a run directory like the one it lies in, and how good
    the one is that it holds; emptied if that was the best by another measure."""

    def begun() -> float | None:
        with Checkpoints(folder / "checkpoints") as before:
            found = before.latest()
        if found and found[1].get("eval") != told:
            run_files.say(f"{folder} was the best of another config.eval: it begins anew")
            folder.rmtree()
            found = None
        config = (folder.parent / "config.json").read_text()
        run_files.write_text(folder / "config.json", config)
        return found[1]["value"] if found else None

    value = distributed.from_primary(begun)
    with Checkpoints(folder / "checkpoints", every=1, keep=1) as saved:
        yield saved, value
