"""Short runs whose teacher is here, or outside and gives one of the three outputs."""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tests.support.runs import config

LOSSES = {
    "hidden": ("opd", {}),
    "top": ("opd", {"estimator": "topk", "k": 8}),
    "token": ("opd_sampled", {}),
}


def make_config(
    models: Any, output: str = "hidden", steps: int = 2, url: str = "", **changes: Any
) -> ConfigDict:
    """Configures on-policy steps with a teacher here, or at `url` with an output."""
    c = config(models)
    objective, loss = LOSSES[output]
    c.stages, c.opd.objective, c.opd.steps = ("opd",), objective, steps
    c.opd.loss.update(loss)
    c.teacher.path, c.checkpoint.every = url or models[1], 100
    if url:
        c.opd.loss.teacher_output = output
        c.opd.loss.teacher_topk = 8 if output == "top" else None
    c.update_from_flattened_dict(changes)
    return c


def require_equal(one: Any, other: Any, atol: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), one, other)
