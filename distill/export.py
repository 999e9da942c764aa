"""python -m distill.export --run=runs/x --out=DIR: a run's model as a Hugging Face directory.

DIR gets config.json, safetensors, the tokenizer and generation_config.json of the student, which
transformers and vLLM load, and export.json, which says what it was made from. It is there whole or
not at all; an earlier export in its place is replaced, anything else is not touched.

Of a run that trained a LoRA, DIR is a PEFT adapter directory (adapter_config.json,
adapter_model.safetensors and the tokenizer), which names the base it belongs to. With --merge_lora
DIR is the whole model as above, the LoRA merged in float32 and then cast, and the adapter
directory is DIR/adapter.
"""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp
from absl import flags

from distill import chat, cli, locate, metrics, policy
from distill.policy import Policy
from models.errors import UserError
from models.qwen3 import adapter, weights
from models.qwen3.lora import MLP
from models.qwen3.model import Params

OPTIONS = flags.FlagValues()
RUN = flags.DEFINE_string("run", None, "Run directory.", OPTIONS, required=True)
OUT = flags.DEFINE_string("out", None, "Directory to write.", OPTIONS, required=True)
STEP = flags.DEFINE_integer(
    "step", None, "Of the checkpoint; without it the newest.", flag_values=OPTIONS
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Of the weights. float32 is exactly what was trained; bfloat16, rounded, takes half the room.",
    flag_values=OPTIONS,
)
MERGE_LORA = flags.DEFINE_bool(
    "merge_lora",
    False,
    "Of a run that trained a LoRA: the whole model with it merged, and the adapter in OUT/adapter; "
    "without, the adapter alone.",
    flag_values=OPTIONS,
)
AVERAGE = flags.DEFINE_bool(
    "average",
    False,
    "The moving average of what was trained, of a run that keeps one (config.student.ema).",
    flag_values=OPTIONS,
)

MARK = "export.json"  # what an export can be known by, and replaced


def save(model: Policy, directory: Path, dtype: str) -> None:
    """Writes a Hugging Face directory: weights in `dtype`, config, stop ids, tokenizer."""
    weights.save(model.params, model.config, directory, jnp.dtype(dtype))
    chat.copy(locate.resolve(model.path), model.tokenizer_dir, model.stop_ids, directory)


def save_adapter(run: Policy, trained: Params, directory: Path, dtype: str) -> None:
    """Writes what a LoRA run has trained as a PEFT adapter to the run's base, and its tokenizer."""
    kind, base = locate.lora_of(run.path), locate.origin(run.path)
    assert kind is not None
    if len(set(run.config.sparse_layers)) == 2 and not set(MLP).isdisjoint(kind.targets):
        metrics.say("warning: of layers with and without experts peft 0.21 loads only the former's")
    name = str(Path(base).resolve()) if Path(base).is_dir() else base  # else a hub id
    adapter.save(trained, kind, run.config, name, directory, jnp.dtype(dtype))
    chat.copy(locate.resolve(run.path), run.tokenizer_dir, run.stop_ids, directory)


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
        metrics.write_json(fresh / MARK, made_of)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def main() -> None:
    export(RUN.value, OUT.value, STEP.value, DTYPE.value, MERGE_LORA.value, AVERAGE.value)
    if MERGE_LORA.value and policy.lora_of(RUN.value) is None:
        metrics.say("--merge_lora: all parameters were trained, so there was no LoRA to merge")


if __name__ == "__main__":
    cli.run(main, OPTIONS)
