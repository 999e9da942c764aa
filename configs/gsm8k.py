"""A student of your own learns GSM8K from a larger teacher: the recipe to copy for your own runs.

    python -m distill.train --config=configs/gsm8k.py --workdir=runs/gsm8k \
        --config.student.path=Qwen/Qwen3-0.6B --config.teacher.path=Qwen/Qwen3-8B
    python -m distill.evaluate --model=runs/gsm8k --benchmark=gsm8k --data=hf: \
        --protocol=qwen3-nonthinking --max_new_tokens=1024 --out=runs/gsm8k/eval

The student answers GSM8K's training questions, put as the benchmark puts them, and learns the
teacher's distribution at every token. Every 50 steps, and at the end, it is tested on 200 problems
of the test set, with the sampling of Qwen3's report. With the argument `thinking` it answers in
thinking mode, which needs eight times as many tokens; evaluate with --protocol=qwen3-thinking
--max_new_tokens=8192 then. The other argument: tiny.

Hardware: v5e-8 (8 chips, 16 GB each). By `plan`, compiled and not run: 5.33 of 15.75 GiB a chip,
and 2.7 s a step at responses of 250 tokens in the mean. By the sizes, one GPU of 80 GB will do.
Time and cost: not yet measured. Expected accuracy: not yet measured.
"""

from ml_collections import ConfigDict

from configs import arguments, base, tiny


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe as a config."""
    a = arguments.parse_argument("gsm8k", arg, mode=("nonthinking", "thinking"))
    c = base.get_config()
    c.student.path = "Qwen/Qwen3-0.6B"
    c.teacher.path = "Qwen/Qwen3-8B"

    c.opd.steps = 200
    c.opd.samples = 4
    c.opd.max_prompt_tokens = 512
    c.opd.max_response_tokens = 1024 if a.mode == "nonthinking" else 8192
    c.opd.data.source = "hf:openai/gsm8k:main"
    c.opd.data.template = base.BOXED_TEMPLATE
    c.opd.data.thinking = 0.0 if a.mode == "nonthinking" else 1.0
    c.opd.reward.grader = "gsm8k"  # read if you change the objective to one with rewards

    c.eval.every = 50
    c.eval.benchmark = "gsm8k"
    c.eval.data = "hf:"
    c.eval.protocol = f"qwen3-{a.mode}"
    c.eval.max_new_tokens = c.opd.max_response_tokens
    return tiny.shrink_config(c) if a.tiny else c
