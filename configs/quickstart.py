"""On-policy distillation of the embedded student from the embedded teacher, on a laptop.

    make quickstart
    python -m distill.train --config=configs/quickstart.py --workdir=runs/x

The student, less than half the teacher's size, samples solutions of word problems and learns the
teacher's distribution at every token of them. LOG.md has the time and the accuracy. The argument
`tiny` makes it a run of a few small steps.
"""

from ml_collections import ConfigDict

from configs import arguments, base


def get_config(arg: str = "") -> ConfigDict:
    """Returns the recipe: the models under assets/, float32, sizes for two CPU cores."""
    a = arguments.parse_argument("quickstart", arg)
    c = base.get_config()
    c.student.path = "assets/student"
    c.student.param_dtype = c.student.dtype = "float32"
    c.teacher.path = "assets/teacher"
    c.teacher.param_dtype = c.teacher.dtype = "float32"
    c.checkpoint.every = 200
    c.log.transcripts_every = 100
    c.log.overlap_top_k = 5  # cheap with so small a vocabulary

    c.opd.steps = 1000
    c.opd.batch_size = 32
    c.opd.max_prompt_tokens = 60
    c.opd.max_response_tokens = 52
    c.opd.pack_tokens = 168  # two responses a row, with their prompts; 112 would hold one
    c.opd.optim.learning_rate = 1e-3
    c.opd.optim.final_fraction = 0.02
    if a.tiny:
        c.opd.steps = 3
        c.opd.batch_size = 8
        c.opd.pack_tokens = 0
        c.checkpoint.every = 2
        c.log.transcripts_every = 2
    return c
