"""Sequences that outlive the step that asked for them: parked ones, and those sampled ahead."""

import base64
import dataclasses
from collections import abc
from typing import Any

import numpy as np

from distill.rollout.sequence import Sequence
from distill.runtime import mesh as mesh_lib


@dataclasses.dataclass
class PartialRollouts:
    """Rows that a step's budget of tokens left unfinished: they go on in the next step."""

    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    num_started: int = 0  # rows that were begun, over all steps

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: JSON."""
        rows = [dataclasses.asdict(row) for row in self.sequences]
        for row in rows:
            row["experts"] = [
                [x.shape, base64.b64encode(x.tobytes()).decode()] for x in row["experts"]
            ]
        return {"rows": rows, "begun": self.num_started}

    def restore(self, state: dict[str, Any]) -> None:
        self.num_started, self.sequences = state["begun"], []
        for row in state["rows"]:
            experts = [
                np.frombuffer(base64.b64decode(x), np.int16).reshape(shape)
                for shape, x in row["experts"]
            ]
            self.sequences.append(Sequence(**{**row, "key": tuple(row["key"]), "experts": experts}))


@dataclasses.dataclass
class AsyncRollouts:
    """The rows of the coming step, sampled while the one before it is trained."""

    step: int = -1  # whose rows they are; -1: none
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    # Samples them: the weights are taken already.
    pending: abc.Callable[[], tuple[list[Sequence], dict[str, float]]] | None = None

    def sample(self, wait_for: Any) -> None:
        """Samples what was begun, while the device computes `trained`."""
        pending, self.pending = self.pending, None
        if pending is None:
            self.step, self.sequences, self.metrics = -1, [], {}
            return
        mesh_lib.wait_on_cpu(wait_for)
        self.step += 1
        self.sequences, self.metrics = pending()

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: JSON."""
        rows = PartialRollouts(self.sequences).get_state()
        return {"step": self.step, "measured": self.metrics, "sampled": rows}

    def restore(self, state: dict[str, Any]) -> None:
        partial = PartialRollouts()
        partial.restore(state["sampled"])
        self.step, self.sequences, self.metrics = (
            state["step"],
            partial.sequences,
            state["measured"],
        )
