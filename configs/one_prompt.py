"""On-policy distillation on a single prompt: 256 answers to it a step, for 20 steps.

    python -m distill.train --config=configs/one_prompt.py --workdir=runs/one_prompt
    python -m distill.evaluate --model=runs/one_prompt --benchmark=aime24 --data=hf: \
        --protocol=qwen3-thinking --out=runs/one_prompt/eval_aime24

Reinforcement learning on one prompt soon memorises its answer; the teacher's distributions along
5,120 answers hold more than that. For another prompt: --config.opd.data.source=FILE. The student
should know the format already: train opd_math.py, export its first stage and pass that as
--config.student.path. Argument: tiny.

Hardware: v5p-16 (8 chips). Time and cost: not yet measured.
Expected ("On-Policy Distillation", Thinking Machines Lab, October 2025, as quoted by other texts;
we have not seen the page): nearly the teacher's accuracy on AIME'24. Its teacher was a model that
its authors had trained by reinforcement learning; with Qwen3-8B as the teacher, as here, the
result is not yet measured.
"""

from ml_collections import ConfigDict

from configs import arguments, base, tiny


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe as a config."""
    a = arguments.parse_argument("one_prompt", arg)
    c = base.get_config()
    c.student.path = "Qwen/Qwen3-8B-Base"
    c.teacher.path = c.student.tokenizer = "Qwen/Qwen3-8B"
    c.opd.steps = 20
    c.opd.batch_size = c.opd.samples = 256
    c.opd.accumulate = 8
    c.opd.max_response_tokens = 8192
    c.opd.data.source = "hf:zwhe99/DeepMath-103K"
    c.opd.data.max_rows = 1
    c.opd.data.template = base.BOXED_TEMPLATE
    c.opd.optim.learning_rate = 5e-5
    c.opd.optim.schedule = "constant"
    c.opd.optim.warmup_steps = 0
    return tiny.shrink_config(c) if a.tiny else c
