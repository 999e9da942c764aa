"""Mathematics as in "On-Policy Distillation" (Thinking Machines Lab, October 2025).

    python -m distill.train --config=configs/opd_math.py --workdir=runs/opd_math
    python -m distill.train --config=configs/opd_math.py:lora=128 --workdir=runs/opd_math_128
    python -m distill.evaluate --model=runs/opd_math --benchmark=aime24 --data=hf: \
        --protocol=qwen3-thinking --out=runs/opd_math/eval_aime24

Qwen3-8B-Base learns 400,000 traces of OpenThoughts3, then for 150 steps from Qwen3-32B on its own
answers to DeepMath's problems: 512 problems a step, 4 answers to each. `opd` takes the exact KL;
for the post's own estimate, by the sampled token, pass --config.opd.objective=opd_sampled.
Arguments: lora=full, 32 or 128 (rank); tiny.

Hardware: v5p-64 (32 chips). Compiled: 78.8 of 95.7 GiB a chip, most of it the cache. By the
roofline, a step of `opd` takes 127 s at responses of 2,000 tokens in the mean, 206 s at 4,000.
Time and cost: not yet measured. The post counts 3.8e20 FLOPs for SFT-400K, and for the 150 steps
8.4e19 of the teacher and 8.2e19 of the student: at 40% of a v5p's 459 TFLOP/s, 575 and 251
chip-hours, without sampling.
Expected, AIME'24 (the post, as quoted by other texts; we have not seen the page): 60 after SFT, 70
after OPD. With LoRA of rank 32: 13 points below full training after SFT, 6 below after OPD. The
cookbook of the same authors (tinker-cookbook, README) has about 55 and 65 with rank 128 and
Qwen3-8B as the teacher, after 100 steps. Here: not yet measured.
"""

from ml_collections import ConfigDict

from configs import arguments, base, tiny


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe as a config."""
    a = arguments.parse_argument("opd_math", arg, lora=("full", "32", "128"))
    lora = a.lora != "full"
    c = base.get_config()
    c.stages = ("sft", "opd")
    c.mesh.tensor = 4  # decoding, which is most of a step, then reads a quarter of the weights
    c.student.path = "Qwen/Qwen3-8B-Base"
    c.teacher.path = c.student.tokenizer = "Qwen/Qwen3-32B"
    if lora:
        c.student.lora.rank = int(a.lora)

    c.sft.steps = 3000
    c.sft.batch_size = 128
    c.sft.accumulate = 2
    c.sft.max_prompt_tokens = 2048
    c.sft.max_response_tokens = 14_336
    c.sft.data.source = "hf:open-thoughts/OpenThoughts3-1.2M"
    c.sft.data.max_rows = 400_000
    c.sft.data.check_rows = 1000
    c.sft.data.on_bad_row = "skip"
    c.sft.optim.learning_rate = 1e-3 if lora else 1e-4

    c.opd.steps = 150
    c.opd.batch_size = 2048
    c.opd.samples = 4
    c.opd.accumulate = 32
    c.opd.max_prompt_tokens = 1024
    c.opd.max_response_tokens = 16_384
    c.opd.data.source = "hf:zwhe99/DeepMath-103K"
    c.opd.data.on_bad_row = "skip"
    c.opd.data.template = base.BOXED_TEMPLATE
    c.opd.optim.learning_rate = 1e-4 if lora else 5e-5
    c.opd.optim.schedule = "constant"
    return tiny.shrink_config(c) if a.tiny else c
