"""On-policy distillation on the one TPU chip that Colab offers: 0.6B from 1.7B in 8 bits.

    python -m distill.train --config=configs/colab.py --workdir=runs/colab

The student trains a LoRA on GSM8K's questions, in /no_think mode: its answers are a few hundred
tokens long, while thoughts would be cut at what one chip has time for. Every 50 steps it is tested
on 200 problems of the test set. When Colab stops the run, the same command resumes it from the
newest checkpoint; notebooks/colab_tpu.ipynb has all steps. Argument: tiny.

Hardware: v5e-1 (one chip, 16 GB). By `plan`, compiled and not run: 9.17 of 15.75 GiB.
Time and cost: not yet measured; by `plan` at least 7.8 s a step if all answers have full length.
Expected accuracy: not yet measured.
"""

from ml_collections import ConfigDict

from configs import arguments, base, tiny


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe as a config."""
    a = arguments.parse_argument("colab", arg)
    c = base.get_config()
    c.student.path = "Qwen/Qwen3-0.6B"
    c.student.lora.rank = 32
    c.teacher.path = "Qwen/Qwen3-1.7B"
    c.teacher.param_dtype = "int8"
    c.checkpoint.every = 25
    c.eval.every = 50
    c.eval.benchmark = "gsm8k"
    c.eval.data = "hf:"
    c.eval.protocol = "qwen3-nonthinking"
    c.eval.max_new_tokens = 768
    c.eval.batch_size = 32

    c.opd.steps = 200
    c.opd.batch_size = 32
    c.opd.samples = 4
    c.opd.accumulate = 16
    c.opd.max_prompt_tokens = 256
    c.opd.max_response_tokens = 768
    c.opd.rollout.slots = 16
    c.opd.data.source = "hf:openai/gsm8k:main"
    c.opd.data.template = base.BOXED_TEMPLATE
    c.opd.data.thinking = 0.0
    c.opd.optim.learning_rate = 1e-4
    if a.tiny:
        tiny.shrink_config(c)
        c.opd.data.thinking = 1.0  # the embedded models know no other mode
        c.eval.every = 1
        c.eval.benchmark, c.eval.data, c.eval.protocol = "arithmetic", "", "greedy"
        c.eval.limit = c.eval.batch_size = 16
        c.eval.max_new_tokens = 52  # as long as their solutions are
    return c
