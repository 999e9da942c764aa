"""Makes assets/student: SFT from its own random weights on a small fixed set of traces.

    python -m distill.train --config=configs/tiny_student.py --workdir=runs/tiny_student
    python -m distill.export --run=runs/tiny_student --out=runs/tiny_student/model
    cp runs/tiny_student/model/model.safetensors assets/student/

LOG.md has the time and the accuracy.
"""

from ml_collections import ConfigDict

from configs import tiny_teacher


def get_config(arg: str = "") -> ConfigDict:
    """Returns tiny_teacher with another size and seed, and few traces in many epochs."""
    c = tiny_teacher.get_config(arg)
    c.seed = 11
    c.student.path = "assets/student"
    c.sft.batch_size = min(32, c.sft.batch_size)
    c.sft.data.max_rows = 3000
    if arg != "tiny":
        c.sft.steps = 680
    return c
