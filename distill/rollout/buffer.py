"""Sequences that outlive the step that requested them."""

import base64
import dataclasses
from collections import abc
from typing import Any

import numpy as np

from distill.rollout.sequence import Sequence


@dataclasses.dataclass
class RolloutBuffer:
    """Sequences carried from one step to the next. Checkpoints hold them, so that a resumed run
    continues with the same ones.

    `partial` are those that a step's token budget left unfinished; the next step continues them.
    `ready` are the finished sequences of step `ready_step`, sampled while the step before it
    trained, and `ready_metrics` what was measured meanwhile.
    """

    partial: list[Sequence] = dataclasses.field(default_factory=list)
    num_started: int = 0  # sequences started over all steps, where a budget may leave some partial
    ready_step: int = -1  # -1: none are ready
    ready: list[Sequence] = dataclasses.field(default_factory=list)
    ready_metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def get_state(self) -> dict[str, Any]:
        """Returns the contents as JSON."""
        return {
            "partial": [_sequence_to_json(x) for x in self.partial],
            "num_started": self.num_started,
            "ready_step": self.ready_step,
            "ready": [_sequence_to_json(x) for x in self.ready],
            "ready_metrics": self.ready_metrics,
        }

    def restore(self, state: abc.Mapping[str, Any]) -> None:
        """Takes over what `get_state` returned."""
        self.partial = [_sequence_from_json(x) for x in state["partial"]]
        self.num_started = state["num_started"]
        self.ready_step = state["ready_step"]
        self.ready = [_sequence_from_json(x) for x in state["ready"]]
        self.ready_metrics = dict(state["ready_metrics"])


def _sequence_to_json(sequence: Sequence) -> dict[str, Any]:
    fields = dataclasses.asdict(sequence)
    fields["experts"] = [
        [x.shape, base64.b64encode(x.tobytes()).decode()] for x in sequence.experts
    ]
    return fields


def _sequence_from_json(fields: abc.Mapping[str, Any]) -> Sequence:
    experts = [
        np.frombuffer(base64.b64decode(data), np.int16).reshape(shape)
        for shape, data in fields["experts"]
    ]
    return Sequence(**{**fields, "key": tuple(fields["key"]), "experts": experts})
