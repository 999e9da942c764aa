"""python -m distill.export --run=runs/x --out=DIR: exports a run to a Hugging Face directory.

Writes the student's config.json, safetensors, tokenizer and generation_config.json, which
transformers and vLLM load, and export.json, which records the source. DIR appears only when it is
complete; it may replace an earlier export, but no other files.

For a run that trained a LoRA, DIR is a PEFT adapter directory (adapter_config.json,
adapter_model.safetensors and the tokenizer) that names its base model. With --merge_lora, DIR is
the whole model as above, with the LoRA merged in float32 and then cast, and the adapter is in
DIR/adapter.
"""

import json
import shlex
from pathlib import Path

from absl import flags

from distill.runtime import cli, console

OPTIONS = flags.FlagValues()
RUN = flags.DEFINE_string("run", None, "Run directory.", OPTIONS, required=True)
OUT = flags.DEFINE_string("out", None, "Directory to write.", OPTIONS, required=True)
STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint; default: the newest.", flag_values=OPTIONS
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float32",
    ["float32", "bfloat16"],
    "Dtype of the weights. float32 is exact; bfloat16 rounds them and takes half the space.",
    flag_values=OPTIONS,
)
MERGE_LORA = flags.DEFINE_bool(
    "merge_lora",
    False,
    "For a run that trained a LoRA: write the merged model, and the adapter to OUT/adapter; "
    "without this flag only the adapter.",
    flag_values=OPTIONS,
)
AVERAGE = flags.DEFINE_bool(
    "average",
    False,
    "Export the moving average of the parameters, if the run keeps one (config.student.ema_decay).",
    flag_values=OPTIONS,
)


def main() -> None:
    from distill.policy import exporting, policy
    from distill.runtime import run_files

    exporting.export_run(
        RUN.value, OUT.value, STEP.value, DTYPE.value, MERGE_LORA.value, AVERAGE.value
    )
    if MERGE_LORA.value and policy.read_run_lora(RUN.value) is None:
        run_files.log_line(
            "--merge_lora: all parameters were trained, so there was no LoRA to merge"
        )
    exported = json.loads((Path(OUT.value) / exporting.EXPORT_FILE).read_text())
    is_adapter = policy.read_run_lora(RUN.value) is not None and not MERGE_LORA.value
    kind = "a PEFT adapter" if is_adapter else "a model in Hugging Face format"
    after = " with its adapter in adapter/" if (Path(OUT.value) / "adapter").is_dir() else ""
    console.print_end(
        [f"wrote {OUT.value}: {kind}{after}, {DTYPE.value}, step {exported['step']:,}"],
        [
            console.format_command(
                "generate",
                model=OUT.value,
                prompts="PROMPTS.jsonl",
                out=f"{OUT.value.rstrip('/')}.samples.jsonl",
            ),
            *([] if is_adapter else [f"vllm serve {shlex.quote(OUT.value)}"]),
        ],
    )


if __name__ == "__main__":
    cli.run(main, OPTIONS)
