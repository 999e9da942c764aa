"""The streamed head, called with keyword arguments."""

import dataclasses
from typing import Any

import jax

from distill.batch import TeacherOutput
from distill.objectives import fused_head

OPTIONS = {field.name for field in dataclasses.fields(fused_head.StatsOptions)}


def token_stats(
    hidden_BTD: Any,
    head_VD: Any,
    targets_BT: Any,
    teacher_hidden_BTE: Any = None,
    teacher_head_VE: Any = None,
    *,
    teacher_weight_BTN: Any = None,
    loss: fused_head.LossFn | None = None,
    **fields: Any,
) -> dict[str, jax.Array]:
    """Calls fused_head.compute_token_stats; the teacher's arrays may be tuples, for several
    teachers. Other fields are those of HeadInputs and StatsOptions."""
    teacher = None
    if teacher_hidden_BTE is not None:
        teacher = TeacherOutput(
            hidden_BTE=tuple(jax.tree.leaves(teacher_hidden_BTE)),
            weight_BTN=teacher_weight_BTN,
            heads_VE=tuple(jax.tree.leaves(teacher_head_VE)),
        )
    options = {name: fields.pop(name) for name in OPTIONS & fields.keys()}
    inputs = fused_head.HeadInputs(hidden_BTD, head_VD, targets_BT, teacher=teacher, **fields)
    return fused_head.compute_token_stats(inputs, fused_head.StatsOptions(**options), loss)
