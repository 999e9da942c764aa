"""Exports a run's model as a directory in Hugging Face format."""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp

from distill.data import chat
from distill.policy import hub, policy
from distill.policy.policy import Policy
from distill.runtime import paths, run_files
from models import adapter, weights
from models.errors import UserError
from models.layers.lora import MLP_TARGETS
from models.transformer import Params

EXPORT_FILE = "export.json"  # marks an export, which a later export may replace


def save_model(model: Policy, directory: Path, dtype: str) -> None:
    """Writes a Hugging Face directory: weights in `dtype`, config, stop ids and tokenizer."""
    weights.save(model.params, model.config, directory, jnp.dtype(dtype))
    chat.copy_tokenizer(
        hub.resolve_model_dir(model.path), model.tokenizer_dir, model.stop_ids, directory
    )


def save_adapter(run: Policy, lora_params: Params, directory: Path, dtype: str) -> None:
    """Writes a run's LoRA as a PEFT adapter of the run's base, and the tokenizer."""
    lora_config, base = hub.read_run_lora(run.path), hub.find_base_model(run.path)
    assert lora_config is not None
    if len(set(run.config.sparse_layers)) == 2 and not set(MLP_TARGETS).isdisjoint(
        lora_config.targets
    ):
        run_files.log_line(
            "warning: with experts in some layers, peft 0.21 loads only the LoRA of those layers"
        )
    name = str(Path(base).resolve()) if Path(base).is_dir() else base  # otherwise a hub id
    adapter.save(lora_params, lora_config, run.config, name, directory, jnp.dtype(dtype))
    chat.copy_tokenizer(hub.resolve_model_dir(run.path), run.tokenizer_dir, run.stop_ids, directory)


def export_run(
    run_dir: str | Path,
    out_dir: str | Path,
    step: int | None = None,
    dtype: str = "float32",
    merge_lora: bool = False,
    average: bool = False,
) -> None:
    """Writes a run's parameters, or their moving average, to `out_dir`.

    Args:
      step: step of the checkpoint; None: the newest that verifies.
      merge_lora: for a run that trains a LoRA, also write the merged model, not only the adapter.
      average: write the moving average.

    Raises:
      UserError: if `run_dir` is not a run or has no such checkpoint, or `out_dir` has other files.
    """
    if not policy.is_run(run_dir):
        hint = paths.suggest_path(run_dir)
        raise UserError(f"--run={run_dir}: no run directory (it has no config.json of a run){hint}")
    if paths.is_remote(out_dir):
        raise UserError(f"--out={out_dir}: an export is written to a local directory")
    target = Path(os.path.realpath(out_dir))
    if target.exists() and not target.is_dir():
        raise UserError(f"--out={out_dir}: exists and is not a directory")
    if target.exists() and any(target.iterdir()) and not (target / EXPORT_FILE).is_file():
        raise UserError(f"--out={out_dir}: holds files that are not an earlier export")
    paths.check_output(f"{target}.new")  # its folder can be written
    model = policy.make_abstract_for_inference(str(run_dir), "float32")
    has_lora = policy.read_run_lora(run_dir) is not None
    trained_params, step = policy.restore_trained_params(model, step, average)
    full_policy = None
    if merge_lora or not has_lora:
        full_policy = policy.restore(model, step, "float32", average)[0]
    fresh, old = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    for path in (fresh, old):  # left by a killed export
        shutil.rmtree(path, ignore_errors=True)
    try:
        if has_lora:
            save_adapter(model, trained_params, fresh / "adapter" if full_policy else fresh, dtype)
        if full_policy:
            save_model(full_policy, fresh, dtype)
        provenance = {"run": os.fspath(run_dir), "step": step, "dtype": dtype, "average": average}
        run_files.write_json(fresh / EXPORT_FILE, provenance)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out={out_dir}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
