"""Checks that a run is resumed with the config and the inputs that it began with.

What may change of a config says config_changes.py. A run without a step belongs to whoever starts
it: nothing is compared.

WORKDIR/inputs.json records the identity of what a run reads when it starts: its data, models and
adapters. A run that is resumed compares what its remaining stages read, and goes on with other
inputs only if a flag allows it: the order of an epoch depends on the number of rows, so with one
more row all later steps would read other examples. Paths do not count, nor do inputs of finished
stages, which may be gone.

    {"inputs": {"config.sft.data.source": {"name": "rows.jsonl", "parts": {"": {"bytes": ...,
                "sha256": ..., "rows": ...}}}, ...},
     "changes": [{"step": 200, "what": ["..."]}]}   inputs that were changed after so many steps
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

from distill.data import sources
from distill.policy import identity, policy
from distill.policy.identity import Part
from distill.runtime import environment, run_files
from distill.teachers import external, local
from distill.training import config_changes
from distill.training.config_changes import ROUNDING, SAME_CONTENT, Change
from models import adapter, tensor_files
from models.errors import UserError

INPUTS_FILE = "inputs.json"
SAMPLED_ROWS = 1000  # hashed of a set that is not files of one's own; more cost time
_SHOWN_CHANGES = 3  # in a message

Inputs = dict[str, dict[str, Any]]
"""Config key → {name: as the config says it, parts: {label: Part}}."""


def init_workdir(
    workdir: epath.Path,
    c: ConfigDict,
    inputs: Inputs | None = None,
    steps_done: int = 0,
    allow_changed_inputs: bool = False,
    writes: bool = True,
    models: dict[str, Any] | None = None,
) -> list[str]:
    """Compares a config and its inputs with those of the run in `workdir`, if it holds one, and
    writes them and the environment there.

    Says each change of the config that is allowed, in a line.

    Args:
      inputs: of the stages that are not finished; None: not compared.
      steps_done: steps in the newest checkpoint. With 0 nothing of a run is left, so it may start
        again with another config and other inputs.
      writes: False only compares.
      models: what environment.json says of the run's models.

    Returns:
      The config keys of the inputs that the run has recorded.

    Raises:
      UserError: if the directory cannot be written, or holds a run of another config or of other
        inputs, naming all that differs.
    """
    path, inputs_path = workdir / "config.json", workdir / INPUTS_FILE
    checkpoints = workdir / "checkpoints"
    _refuse_models(workdir)
    if checkpoints.exists() and not path.is_file():
        raise UserError(f"{workdir} holds checkpoints but no config.json: not a run to resume")
    # Checkpoints that cannot be read are damaged, and no reason to start again.
    is_new = not steps_done and not (
        checkpoints.exists() and ocp.utils.checkpoint_steps(checkpoints)
    )
    record, inputs = _read_record(inputs_path), inputs or {}
    recorded = record["inputs"]
    changes = []
    if path.is_file():
        input_keys = recorded.keys() & inputs.keys()
        changes = compare_config(str(path), path.read_text(), c, max(1, steps_done), input_keys)
        if not is_new:
            require_allowed(f"{workdir} holds a run of another config", changes)
    changed = list(find_changes(recorded, inputs))
    is_another = is_new and bool(changes or changed)
    if is_new:
        if is_another:
            texts = [x.text for x in changes if x.reason != SAME_CONTENT]
            texts += [text for _, text in changed]
            run_files.log_line(f"{workdir} holds no step, so it starts again: {_shorten(texts)}")
        record, recorded, changes = {"inputs": {}, "changes": []}, {}, []
    elif changed:
        record["changes"] += _allow_changes(workdir, changed, steps_done, allow_changed_inputs)
    elif inputs and not recorded:
        run_files.log_line(
            f"{inputs_path}: no such file, so nothing shows whether data and models are those that "
            "the run began with; they are recorded from now on"
        )
    for change in changes:
        if change.input_key not in {key for key, _ in changed}:
            run_files.log_line(f"{workdir} goes on: {change.text} ({change.reason})")
    record["inputs"] = recorded | inputs
    if not writes:
        return sorted(record["inputs"])
    about_path = workdir / "environment.json"
    about = _describe_environment(about_path, is_new, models or {})
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        run_files.write_json(path, json.loads(c.to_json_best_effort()))
        run_files.write_json(about_path, about)
        if inputs:
            run_files.write_json(inputs_path, record)
        if is_another:  # in its trackers, too
            (workdir / run_files.TRACKERS_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error}") from error
    return sorted(record["inputs"])


def _describe_environment(path: epath.Path, is_new: bool, models: dict[str, Any]) -> dict[str, Any]:
    """Returns what environment.json is to hold, and says what has changed since it was written."""
    before = {} if is_new else environment.read_environment(path)
    about = environment.describe_environment()
    if known := before.get("models", {}) | models:  # those of finished stages, too
        about["models"] = known
    if texts := environment.list_changes(before, about):
        run_files.log_line(f"{path.parent} goes on: {'; '.join(texts)} ({ROUNDING})")
    return about


def _refuse_models(workdir: epath.Path) -> None:
    """Raises UserError if a directory holds models, itself or in a folder of it, and no run: its
    name was meant for something else."""
    if not workdir.is_dir() or policy.is_run(workdir):
        return
    for folder in (workdir, *sorted(path for path in workdir.iterdir() if path.is_dir())):
        names = (tensor_files.WHOLE_FILE, tensor_files.INDEX_FILE, adapter.TENSORS_FILE)
        if any((folder / name).exists() for name in names):
            raise UserError(
                f"--workdir={workdir}: holds a model ({folder}) and no run; name a new directory"
            )


def compare_config(
    name: str, text: str, c: ConfigDict, steps_done: int, input_keys: Collection[str]
) -> list[Change]:
    """Calls config_changes.compare_configs with a config as text, and `name` for what holds it."""
    try:
        return config_changes.compare_configs(json.loads(text), c, steps_done, input_keys)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{name}: not the config of a run ({reason})") from error


def require_allowed(problem: str, changes: Sequence[Change]) -> None:
    """Raises UserError, which begins with `problem`, for the changes that are not allowed."""
    if refused := [change.text for change in changes if not change.reason]:
        raise UserError(
            f"{problem}: {'; '.join(refused)}. Give the old values again, or start in another "
            "directory (--workdir)"
        )


def _shorten(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _SHOWN_CHANGES} more" if texts[_SHOWN_CHANGES:] else ""
    return "; ".join(texts[:_SHOWN_CHANGES]) + more


def _read_record(path: epath.Path) -> dict[str, Any]:
    """Reads inputs.json; an empty record if there is none."""
    if not path.is_file():
        return {"inputs": {}, "changes": []}
    try:
        record = json.loads(path.read_bytes())
        parts = [part for x in record["inputs"].values() for part in x["parts"].values()]
        counts = [
            part[name] for part in parts for name in ("rows", "step", "bytes") if name in part
        ]
        if all(isinstance(x, dict) for x in parts) and all(type(x) is int for x in counts):
            return {"inputs": record["inputs"], "changes": [*record["changes"]]}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: not a record of a run's inputs; delete it to go on unchecked")


def _allow_changes(
    workdir: epath.Path, changed: list[tuple[str, str]], steps_done: int, allow: bool
) -> list[dict[str, Any]]:
    """Returns the record of changes, or raises UserError if they are not allowed."""
    texts = [text for _, text in changed]
    if not allow:
        raise UserError(
            f"{workdir}: inputs have changed since the run began: {_shorten(texts)}. Restore them, "
            "start in another directory, or go on with them (--allow_changed_inputs)"
        )
    run_files.log_line(f"warning: {workdir} goes on with other inputs: {_shorten(texts)}")
    return [{"step": steps_done, "what": texts}]


def find_changes(before: Inputs, now: Inputs) -> Iterator[tuple[str, str]]:
    """Yields (config key, a line) for each part of `now` that differs from the one recorded.

    Keys that were not recorded are passed over.
    """
    for key in sorted(before.keys() & now.keys()):
        then_parts, now_parts = before[key]["parts"], now[key]["parts"]
        for label in sorted(then_parts.keys() | now_parts.keys()):
            then, part = then_parts.get(label), now_parts.get(label)
            # Not every name of a file tells its number of rows.
            same_content = then and part and then.get("sha256") == part.get("sha256", "")
            if then != part and not same_content:
                name = "/".join(filter(None, (now[key]["name"], label)))
                yield key, f"{name} ({key}): {_describe_change(then, part)}"


def _describe_change(then: Part | None, now: Part | None) -> str:
    if then is None or now is None:
        return "is new" if then is None else "is gone"
    for field, unit in (("rows", "rows"), ("step", "steps"), ("bytes", "bytes")):
        if field in then and field in now and then[field] != now[field]:
            return f"{then[field]:,} {unit} then, {now[field]:,} now"
    if "model" in then and "model" in now:
        return f"model {then['model']} then, {now['model']} now"
    return "other content of the same size"


def describe_inputs(
    c: ConfigDict, stages: Sequence[Any], eval_rows: Sequence[Any] | None = None
) -> Inputs:
    """Describes all that some stages (setup.StageSetup) of a config read, and the evaluation.

    Args:
      eval_rows: the problems of config.eval; None: no evaluation.

    Raises:
      UserError: naming what cannot be read.
    """
    if not stages:
        return {}
    parts: dict[str, tuple[str, dict[str, Part]]] = {}

    def add(key: str, name: str, described: dict[str, Part]) -> None:
        if described:
            parts[key] = name, described

    m = c.student
    add("config.student.path", m.path, identity.describe_model(m.path, None, not m.random_init))
    if m.tokenizer:
        described = identity.describe_model(m.tokenizer, None, weights=False)
        add("config.student.tokenizer", m.tokenizer, described)
    for stage in stages:
        key, s = f"config.{stage.name}", stage.c
        for i, (name, _) in enumerate(s.data.mixture):
            add(f"{key}.data.mixture[{i}]", name, describe_data(name, s.data))
        if not s.data.mixture:
            add(f"{key}.data.source", s.data.source, describe_data(s.data.source, s.data))
        if s.data.difficulty.endswith(".jsonl"):
            described = describe_data(s.data.difficulty, s.data)
            add(f"{key}.data.difficulty", s.data.difficulty, described)
        if s.context.text:
            described = {"": identity.describe_file(s.context.text)}
            add(f"{key}.context.text", s.context.text, described)
        for teacher in stage.external:
            described = {"": external.identify(teacher.info)}
            add(f"config.{teacher.name}.path", teacher.info.model, described)
        for name in stage.local_teachers:
            t = c[name]
            if t.path not in (local.INITIAL, local.EMA) and f"config.{name}.path" not in parts:
                described = identity.describe_model(t.path, t.step or None)
                add(f"config.{name}.path", t.path, described)
    if eval_rows is not None:
        text = run_files.to_json([row for _, row in eval_rows]).encode()
        part = {"rows": len(eval_rows), "sha256": hashlib.sha256(text).hexdigest()}
        # The config of evaluations may change, and then other problems are no surprise.
        key = f"config.eval: {c.eval.benchmark} {c.eval.data} {c.eval.limit}".strip()
        add(key, c.eval.data or c.eval.benchmark, {"": part})
    return {key: {"name": name, "parts": described} for key, (name, described) in parts.items()}


def describe_data(name: str, c: ConfigDict) -> dict[str, Part]:
    """Describes a data source: a file, or the files of a folder, by all their bytes; a set from a
    hub by its number of rows and the content of SAMPLED_ROWS of them; a stream by its length.

    Nothing of a generated source.
    """
    scheme, _, rest = name.partition(":")
    folder = Path(rest.split(":")[0]) if scheme in ("hf", "tfds") else None
    if name == "arithmetic":
        return {}
    if folder is None and Path(name).is_file():
        return {"": identity.describe_file(name)}
    if folder is not None and folder.is_dir():
        files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
        return {
            file.as_posix(): identity.describe_file(folder / file)
            for file in files
            if not any(part.startswith(".") for part in file.parts)
        }
    rows = sources.open_rows(name, size=c.max_rows, window=c.shuffle_window if c.streaming else 0)
    if rows.window:
        return {"": {"rows": rows.size}}
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, rows.size - 1, SAMPLED_ROWS).astype(int)):
        row = rows.read_row(int(index))
        text = json.dumps(row, sort_keys=True, default=lambda x: type(x).__name__)  # of images
        digest.update(text.encode())
    return {"": {"rows": rows.size, "sha256": digest.hexdigest()}}
