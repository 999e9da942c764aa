"""Makes assets/teacher: SFT from random weights on fresh problems, none seen twice.

    python -m distill.train --config=configs/tiny_teacher.py --workdir=runs/tiny_teacher
    python -m distill.export --run=runs/tiny_teacher --out=runs/tiny_teacher/model
    cp runs/tiny_teacher/model/model.safetensors assets/teacher/

LOG.md has the time and the accuracy.
"""

from ml_collections import ConfigDict

from configs import arguments, base


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe: one sft stage on the generated task, random initial weights."""
    a = arguments.parse_argument("tiny_teacher", arg)
    c = base.get_config()
    c.stages = ("sft",)
    c.student.path = "assets/teacher"  # its config.json and tokenizer
    c.student.random_init = True
    c.student.dtype = "float32"
    c.student.remat = False
    c.sft.steps = 1200
    c.sft.batch_size = 64
    c.sft.max_prompt_tokens = 60
    c.sft.max_response_tokens = 52
    c.sft.optim.learning_rate = 3e-3
    c.sft.optim.weight_decay = 0.01
    c.sft.optim.warmup_steps = 50
    c.sft.optim.final_fraction = 0.02
    if a.tiny:
        c.sft.steps = 2
        c.sft.batch_size = 8
    return c
