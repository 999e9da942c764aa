"""On-policy distillation on the one TPU chip that Colab lends: 0.6B from 1.7B in 8 bits.

    python -m distill.train --config=configs/colab.py --workdir=runs/colab

The student trains a LoRA on GSM8K's questions, and is tried on 200 problems of its test set every
50 steps. Stopped by Colab, the same command goes on from the newest checkpoint. Argument: tiny.

Hardware: v5e-1 (one chip, 16 GB). Counted, not measured: student 1.2 GB, and 1.2 merged for the
sampler; teacher 1.4 in 8 bits and 0.6 for its embedding; 16 slots of 1,024 tokens 1.9.
Time and cost: not yet measured. Expected accuracy: not yet measured.
"""

from ml_collections import ConfigDict

from configs import arguments, base, tiny


def get_config(arg: str = "") -> ConfigDict:
    """What differs from base."""
    a = arguments.read("colab", arg)
    c = base.get_config()
    c.student.path = "Qwen/Qwen3-0.6B"
    c.student.lora.rank = 32
    c.teacher.path = "Qwen/Qwen3-1.7B"
    c.teacher.param_dtype = "int8"
    c.checkpoint.every = 25
    c.eval.every = 50
    c.eval.benchmark = "gsm8k"
    c.eval.data = "hf:"
    c.eval.batch_size = 16

    c.opd.steps = 200
    c.opd.batch_size = 32
    c.opd.samples = 4
    c.opd.accumulate = 16
    c.opd.max_prompt_tokens = 256
    c.opd.max_response_tokens = 768
    c.opd.rollout.slots = 16
    c.opd.data.source = "hf:openai/gsm8k:main"
    c.opd.data.template = base.BOXED
    c.opd.optim.learning_rate = 1e-4
    return tiny.shrink(c) if a.tiny else c
