"""python -m distill.export --run=runs/x --out=DIR: a run's model as a Hugging Face directory.

DIR gets config.json, safetensors, the tokenizer and generation_config.json of the student, which
transformers and vLLM load, and export.json, which says what it was made from. It is there whole or
not at all; an earlier export in its place is replaced, anything else is not touched.

Of a run that trained a LoRA, DIR is a PEFT adapter directory (adapter_config.json,
adapter_model.safetensors and the tokenizer), which names the base it belongs to. With --merge_lora
DIR is the whole model as above, the LoRA merged in float32 and then cast, and the adapter
directory is DIR/adapter.
"""

from absl import flags

from distill.policy import exporting, policy
from distill.runtime import cli, run_files

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
    "The moving average of what was trained, of a run that keeps one (config.student.ema_decay).",
    flag_values=OPTIONS,
)


def main() -> None:
    exporting.export_run(
        RUN.value, OUT.value, STEP.value, DTYPE.value, MERGE_LORA.value, AVERAGE.value
    )
    if MERGE_LORA.value and policy.read_run_lora(RUN.value) is None:
        run_files.log_line(
            "--merge_lora: all parameters were trained, so there was no LoRA to merge"
        )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
