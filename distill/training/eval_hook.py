"""Evaluates during training, on the run's own mesh, and keeps the best checkpoint.

WORKDIR/eval/STEP holds the output of `evaluate`, and its folder NAME that of a further benchmark.
WORKDIR/best is a run directory with one
checkpoint, so that every verb accepts it as a model. Neither affects training. The best value is
stored in the best checkpoint, so a resumed run compares with WORKDIR/best.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from distill import rollout
from distill.data import dataset
from distill.evaluation import comparison, evaluator, problems, protocols
from distill.policy import policy
from distill.policy.policy import Policy
from distill.runtime import distributed, run_files
from distill.runtime.checkpoint import Checkpoints
from distill.training import update
from models import checks
from models.checks import Range
from models.errors import UserError

# Fields of a summary that become metrics, and that `eval.best` may name.
EVAL_METRICS = (
    *("accuracy", "format_rate", "repetition_rate", "think_rate", "language_mixing_rate"),
    *("mean_length", "mean_length_finished", "truncation_rate"),
)


@dataclasses.dataclass(frozen=True)
class ValidationSetup:
    """The checked `config.eval`, with its problems and their prompts."""

    c: ConfigDict
    rows: list[tuple[str, evaluator.Record]]
    prompts: dataset.TokenLists  # of the rows
    settings: protocols.Settings
    spec: protocols.EvalSpec
    more: tuple["ValidationSetup", ...] = ()  # further benchmarks


def setup_validation(c: ConfigDict, student: Policy, seed: int) -> ValidationSetup | None:
    """Checks `config.eval` before training starts. Returns None if evaluation is off.

    Raises:
      UserError: naming the invalid field.
    """
    checks.check_fields(c, {"every": Range(off="never")}, "config.eval.")
    if c.every == 0:
        return None
    if c.best.removeprefix("-") not in ("", *EVAL_METRICS):
        raise UserError(f"config.eval.best={c.best!r}: must be one of {', '.join(EVAL_METRICS)}")
    own = _setup_benchmark(c, c.benchmark, c.data, student, seed)
    pairs = c.more if isinstance(c.more, tuple | list) else (c.more,)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or [type(x) for x in pair] != [str, str]:
            raise UserError(
                f"config.eval.more: {pair!r} is no pair of a benchmark and its data, as in "
                "more=(('ifeval', 'hf:'),)"
            )
    names = [c.benchmark, *(name for name, _ in pairs)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"config.eval.more: names {twice} twice, or beside config.eval.benchmark")
    more = tuple(_setup_benchmark(c, name, data, student, seed) for name, data in pairs)
    return dataclasses.replace(own, more=more)


def _setup_benchmark(
    c: ConfigDict, benchmark: str, data: str, student: Policy, seed: int
) -> ValidationSetup:
    """Checks the evaluation on one benchmark, and reads its problems."""
    counts = dict.fromkeys(("limit", "samples", "max_new_tokens"), Range())
    checks.check_fields(c, {**counts, "batch_size": Range(1)}, "config.eval.")
    try:
        changes = {"samples": c.samples or None, "max_new_tokens": c.max_new_tokens or None}
        problems.require_task(benchmark)
        settings = protocols.resolve_settings(c.protocol, benchmark, changes)
        rows = problems.load_problems(benchmark, data, c.limit)
        problems.check_gradable(benchmark, rows)
        sampled = settings | {"seed": seed, "batch_size": c.batch_size}
        spec = protocols.make_eval_spec(c.protocol, benchmark, sampled)
        if not c.max_new_tokens:
            spec = evaluator.fit_limit(student, rows, spec, "config.eval.max_new_tokens")
        prompts = evaluator.encode_prompts(student, rows, spec)
        return ValidationSetup(c, rows, prompts, settings, spec)
    except UserError as error:
        raise UserError(_name_keys(c, str(error), data)) from None


def _name_keys(c: ConfigDict, message: str, data: str) -> str:
    """Returns a message about `config.eval` with the keys that are meant."""
    message = message.replace("(max_new_tokens)", "(config.eval.max_new_tokens)")
    if message.startswith("--"):  # as `evaluate` names them
        return f"config.eval.{message.removeprefix('--')}"
    if data and message.startswith(data):
        return f"config.eval.{'data' if data == c.data else 'more'}={message}"
    return message if message.startswith("config.eval.") else f"config.eval: {message}"


@dataclasses.dataclass(eq=False)
class ValidationHook:
    """Evaluates the run's student every `config.eval.every` steps and after the last step of each
    stage; never if `validation` is None."""

    validation: ValidationSetup | None
    student: Policy
    workdir: epath.Path
    best_checkpoints: Checkpoints | None = None
    best_value: float | None = None

    @functools.cached_property
    def _to_sampling_params(self) -> Callable[[Any], Any]:
        return policy.make_sampler_params_fn(self.student)

    def is_due(self, step: int, is_last: bool) -> bool:
        return self.validation is not None and (is_last or step % self.validation.c.every == 0)

    def check_last_save(self) -> None:
        """Raises UserError if the best checkpoint could not be written; see `Checkpoints`."""
        if self.best_checkpoints:
            self.best_checkpoints.check_last_save()

    def warm_up(self, params: Any) -> None:
        """Compiles the sampler's programs, so that nothing is compiled in the middle of a run."""
        v = self.validation
        if v is None:
            return
        for each in (v, *v.more):
            run_files.log_line(f"evaluation: compiling for {len(each.rows):,} problems")
            subject = self._make_subject(params)
            rollout.complete(subject, each.prompts, each.spec.sample, warm_up=True)

    def run(
        self,
        state: Any,
        make_meta: Callable[[], dict[str, Any]],
        step: int,
        check_stop: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Evaluates a train state after `step` steps, and saves it if it is the best so far.

        Args:
          make_meta: makes the metadata of the state's checkpoint.
          check_stop: called now and then while sampling. After what it raises, another call, of the
            same command too, goes on with the rows that are left.

        Returns:
          The metrics.
        """
        v = self.validation
        assert v is not None
        start_time = time.perf_counter()
        subject, out = self._make_subject(state.params), self.workdir / "eval" / f"{step:06d}"
        summary: Any = self._evaluate_step(v, subject, step, out, check_stop)
        value, is_best = summary.get(v.c.best.removeprefix("-")), False
        if self.best_checkpoints and value is not None:
            value = -value if v.c.best.startswith("-") else value
            if self.best_value is None or value > self.best_value:
                meta = {**make_meta(), "eval": make_eval_config(v), "value": value}
                update.require_finite(state)
                # In place of the former best, which a run before the last resume may have found
                # at a later step.
                self.best_checkpoints.save(step, state, meta, replace=True)
                self.best_value, is_best = value, True
        results = ", ".join(f"{name} {text}" for name, text in comparison.list_results(summary))
        best = f"; the best {v.c.best} so far, kept in {self.workdir / 'best'}" if is_best else ""
        run_files.log_line(f"evaluation after step {step:,} on {v.c.benchmark}: {results}{best}")
        metrics = {f"eval/{name}": summary.get(name) for name in EVAL_METRICS}
        for other in v.more:
            benchmark = other.spec.benchmark
            summary = self._evaluate_step(other, subject, step, out / benchmark, check_stop)
            results = ", ".join(f"{name} {text}" for name, text in comparison.list_results(summary))
            run_files.log_line(f"evaluation after step {step:,} on {benchmark}: {results}")
            metrics |= {f"eval/{benchmark}/{name}": summary.get(name) for name in EVAL_METRICS}
        return metrics | {"time/eval": time.perf_counter() - start_time}

    def _make_subject(self, params: Any) -> Policy:
        return dataclasses.replace(
            self.student, path=str(self.workdir), params=self._to_sampling_params(params)
        )

    def _evaluate_step(
        self,
        v: ValidationSetup,
        subject: Policy,
        step: int,
        out: epath.Path,
        check_stop: Callable[[], None],
    ) -> evaluator.Record:
        """Runs one evaluation.

        Resumes a directory of this step if the same parameters wrote it, as in a resumed run;
        replaces one of an earlier config.
        """
        subject = dataclasses.replace(subject, step=step)
        evaluate_once = functools.partial(
            evaluator.evaluate_benchmark, subject, v.rows, v.spec, out, check_stop=check_stop
        )
        try:
            return evaluate_once()
        except UserError as error:
            run_files.log_line(f"{out} is replaced: {error}")
            if run_files.is_primary():
                out.rmtree()
            return evaluate_once()


@contextlib.contextmanager
def open_validation_hook(
    validation: ValidationSetup | None, student: Policy, workdir: epath.Path
) -> Iterator[ValidationHook]:
    """Yields the hook of a run, with its best checkpoint open if one is kept."""
    hook = ValidationHook(validation, student, workdir)
    if validation is None or not validation.c.best:
        yield hook
        return
    best, eval_config = workdir / "best", make_eval_config(validation)
    hook.best_value = distributed.broadcast_from_primary(lambda: _init_best(best, eval_config))
    with Checkpoints(best / "checkpoints", save_interval_steps=1, max_to_keep=1) as checkpoints:
        hook.best_checkpoints = checkpoints
        yield hook


def make_eval_config(v: ValidationSetup) -> dict[str, Any]:
    """Returns the settings of evaluations as JSON. Values with equal settings are comparable, for
    which further benchmarks do not count."""
    config = json.loads(v.c.to_json_best_effort())
    return {**v.settings, **{name: x for name, x in config.items() if name != "more"}}


def _init_best(directory: epath.Path, eval_config: dict[str, Any]) -> float | None:
    """Makes `directory` a run directory like its parent; returns its checkpoint's value, if any.

    Clears it first if that checkpoint was the best under another `config.eval`.
    """
    with Checkpoints(directory / "checkpoints") as checkpoints:
        saved = dict(checkpoints.read_all())
    if any(meta.get("eval") != eval_config for meta in saved.values()):
        run_files.log_line(f"{directory} was the best of another config.eval: starting again")
        directory.rmtree()
        saved = {}
    best_step = max(saved, key=lambda step: (saved[step]["value"], -step), default=None)
    for step in saved.keys() - {best_step}:  # left by a run that was stopped while it replaced one
        (directory / "checkpoints" / str(step)).rmtree()
    config = (directory.parent / "config.json").read_text()
    run_files.write_text(directory / "config.json", config)
    return None if best_step is None else saved[best_step]["value"]
