"""A run's model as a directory in Hugging Face format."""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp

from distill.data import chat
from distill.policy import hub, policy
from distill.policy.policy import Policy
from distill.runtime import run_files
from models.errors import UserError
from models.qwen3 import adapter, weights
from models.qwen3.lora import MLP
from models.qwen3.model import Params

MARK = "export.json"  # what an export can be known by, and replaced


def save(model: Policy, directory: Path, dtype: str) -> None:
    """Writes a Hugging Face directory: weights in `dtype`, config, stop ids, tokenizer."""
    weights.save(model.params, model.config, directory, jnp.dtype(dtype))
    chat.copy(hub.resolve(model.path), model.tokenizer_dir, model.stop_ids, directory)


def save_adapter(run: Policy, trained: Params, directory: Path, dtype: str) -> None:
    """Writes what a LoRA run has trained as a PEFT adapter to the run's base, and its tokenizer."""
    kind, base = hub.lora_of(run.path), hub.origin(run.path)
    assert kind is not None
    if len(set(run.config.sparse_layers)) == 2 and not set(MLP).isdisjoint(kind.targets):
        run_files.say(
            "warning: of layers with and without experts peft 0.21 loads only the former's"
        )
    name = str(Path(base).resolve()) if Path(base).is_dir() else base  # else a hub id
    adapter.save(trained, kind, run.config, name, directory, jnp.dtype(dtype))
    chat.copy(hub.resolve(run.path), run.tokenizer_dir, run.stop_ids, directory)


def export(
    run: str | Path,
    out: str | Path,
    step: int | None = None,
    dtype: str = "float32",
    merge_lora: bool = False,
    average: bool = False,
) -> None:
    """Writes the parameters after `step` (None: of the newest whole checkpoint), or their moving
    `average`, to directory `out`.

    Of a LoRA run, `merge_lora` chooses between the merged model and the adapter alone.

    Raises:
      UserError: if `run` is no run or has no such checkpoint, or `out` holds something else.
    """
    if not policy.is_run(run):
        raise UserError(f"--run={run}: no run directory (it has no config.json of a run)")
    target = Path(out).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"--out={out}: is there and not a directory")
    if target.exists() and any(target.iterdir()) and not (target / MARK).is_file():
        raise UserError(f"--out={out}: holds files that are no earlier export")
    model, adapted = policy.reader(str(run), "float32"), policy.lora_of(run) is not None
    trained, step = policy.restore_trained(model, step, average)
    whole = None
    if merge_lora or not adapted:
        whole = policy.restore(model, step, "float32", average)[0]
    fresh, old = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    for path in (fresh, old):  # left by an export that was killed
        shutil.rmtree(path, ignore_errors=True)
    try:
        if adapted:
            save_adapter(model, trained, fresh / "adapter" if whole else fresh, dtype)
        if whole:
            save(whole, fresh, dtype)
        made_of = {"run": os.fspath(run), "step": step, "dtype": dtype, "average": average}
        run_files.write_json(fresh / MARK, made_of)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
