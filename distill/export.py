"""python -m distill.export --run=runs/x --out=DIR: a run's model as a Hugging Face directory.

DIR gets config.json, safetensors, the tokenizer and generation_config.json of the student, which
transformers and vLLM load, and export.json, which says what it was made from. It is there whole or
not at all; an earlier export in its place is replaced, anything else is not touched.
"""

import os
import shutil
from pathlib import Path

from absl import flags

from distill import cli, metrics, policy
from models.errors import UserError

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
    "Fold a trained LoRA into the weights; a run that trained all of them has none.",
    flag_values=OPTIONS,
)

MARK = "export.json"  # what an export can be known by, and replaced


def export(
    run: str | Path, out: str | Path, step: int | None = None, dtype: str = "float32"
) -> None:
    """Writes the parameters after `step` (None: of the newest whole checkpoint) to directory `out`.

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
    model, step = policy.restore(policy.reader(str(run), "float32"), step)
    fresh, old = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    for path in (fresh, old):  # left by an export that was killed
        shutil.rmtree(path, ignore_errors=True)
    try:
        policy.save(model, fresh, dtype)
        metrics.write_json(fresh / MARK, {"run": os.fspath(run), "step": step, "dtype": dtype})
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def main() -> None:
    if MERGE_LORA.value:
        metrics.say("--merge_lora: all parameters were trained, so there is no LoRA to merge")
    export(RUN.value, OUT.value, STEP.value, DTYPE.value)


if __name__ == "__main__":
    cli.run(main, OPTIONS)
